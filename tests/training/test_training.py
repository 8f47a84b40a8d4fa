"""Losses."""

import pytest
import torch

from guided_diffusion.diffusion.losses import discretized_gaussian_log_likelihood, normal_kl


def test_kl_of_gaussians():
    parameters = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    one, two = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in (parameters[:2], parameters[2:])]
    torch.testing.assert_close(normal_kl(*parameters), torch.distributions.kl_divergence(one, two))


def test_likelihood_of_all_pixel_values_is_one():
    values = torch.arange(256.0) / 127.5 - 1
    for mean, scale in [(0.1, 0.02), (-0.99, 0.1), (0.7, 0.3)]:
        log_probs = discretized_gaussian_log_likelihood(
            values, means=torch.full_like(values, mean), log_scales=torch.full_like(values, scale).log()
        )
        assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-3)
        inside = log_probs[1:-1]  # the ends hold the tails
        assert inside.argmax() == (values[1:-1] - mean).abs().argmin()
