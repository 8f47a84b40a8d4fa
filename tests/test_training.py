"""Losses and data."""

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.training.data import center_crop, load_data, random_crop
from guided_diffusion.training.losses import discretized_gaussian_log_likelihood, normal_kl


def test_kl_of_gaussians():
    parameters = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    one, two = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in (parameters[:2], parameters[2:])]
    torch.testing.assert_close(normal_kl(*parameters), torch.distributions.kl_divergence(one, two))


def test_likelihood_of_all_pixel_values_is_one():
    values = torch.arange(256.0) / 127.5 - 1
    for mean, scale in [(0.1, 0.02), (-0.99, 0.1), (0.7, 0.3)]:
        log_probs = discretized_gaussian_log_likelihood(
            values, torch.full_like(values, mean), torch.full_like(values, scale).log()
        )
        assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-3)
        inside = log_probs[1:-1]  # the ends hold the tails
        assert inside.argmax() == (values[1:-1] - mean).abs().argmin()


@pytest.fixture
def folder(tmp_path):
    """Ten 20×24 pictures of two classes; picture i is filled with 20·i."""
    for i in range(10):
        Image.new("RGB", (24, 20), (20 * i,) * 3).save(tmp_path / f"{'cat' if i % 2 else 'dog'}_{i}.png")
    return tmp_path


def test_data_comes_scaled_and_labelled(folder):
    batches = load_data(data_dir=str(folder), batch_size=5, image_size=16, class_cond=True, deterministic=True)
    images, condition = next(batches)
    assert images.shape == (5, 3, 16, 16)
    assert condition["y"].tolist() == [0] * 5  # cats come first
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([20.0, 60, 100, 140, 180]) / 127.5 - 1)
    assert next(batches)[1]["y"].tolist() == [1] * 5
    assert next(batches)[1]["y"].tolist() == [0] * 5


def test_an_epoch_sees_every_image_once(folder):
    batches = load_data(data_dir=str(folder), batch_size=2, image_size=16)
    for _ in range(2):
        seen = torch.cat([next(batches)[0][:, 0, 0, 0] for _ in range(5)])
        assert len(seen.unique()) == 10


def test_a_batch_larger_than_the_data(folder):
    assert len(next(load_data(data_dir=str(folder), batch_size=64, image_size=16))[0]) == 10


def test_crops():
    picture = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3))
    assert center_crop(picture, 16).size == random_crop(picture, 16).size == (16, 16)
    assert center_crop(picture, 40).getpixel((0, 0)) == picture.getpixel((10, 0))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data_dir: no image"):
        load_data(data_dir=str(tmp_path), batch_size=1, image_size=16).__next__()
