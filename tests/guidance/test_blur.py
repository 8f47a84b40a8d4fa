"""Gaussian blur against closed forms and scipy."""

import math

import pytest
import torch
from scipy import ndimage

from guided_diffusion.guidance.blur import gaussian_blur

X = torch.randn(2, 3, 20, 13, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_agrees_with_scipy(sigma):
    expected = ndimage.gaussian_filter(
        X.double().numpy(), sigma, mode="mirror", radius=math.ceil(3 * sigma), axes=(2, 3)
    )
    torch.testing.assert_close(gaussian_blur(X, sigma), torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-5)


def test_sigma_zero_is_the_identity():
    assert gaussian_blur(X, 0.0) is X


def test_sigma_infinite_is_the_mean_pixel():
    assert torch.equal(gaussian_blur(X, math.inf), X.mean(dim=(2, 3), keepdim=True).expand_as(X))


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        blurred = gaussian_blur(X, 2.0)
    assert torch.equal(gaussian_blur(X, 2.0), blurred)


def test_a_constant_image_stays():
    torch.testing.assert_close(gaussian_blur(torch.full_like(X, 0.3), 9.0), torch.full_like(X, 0.3))


def test_images_smaller_than_the_window():
    for side in (1, 2, 8):
        assert gaussian_blur(torch.randn(1, 3, side, side), 9.0, kernel=31).shape == (1, 3, side, side)


def test_more_sigma_is_less_detail():
    spread = [gaussian_blur(X, sigma).std().item() for sigma in (0.0, 0.5, 1.0, 3.0, math.inf)]
    assert spread == sorted(spread, reverse=True)


def test_kernel_cuts_the_window():
    impulse = torch.zeros(1, 1, 21, 21)
    impulse[0, 0, 10, 10] = 1
    assert (gaussian_blur(impulse, 9.0, kernel=5) > 0).sum() == 25


@pytest.mark.parametrize(("sigma", "kernel"), [(-1.0, None), (math.nan, None), (1.0, 4), (1.0, -3)])
def test_impossible_blurs_are_refused(sigma, kernel):
    with pytest.raises(ValueError, match="blur_"):
        gaussian_blur(X, sigma, kernel)
