"""Self-attention guidance as mathematics: what must hold whatever the weights are."""

import math
from dataclasses import replace

import pytest
import torch

from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.blur import gaussian_blur
from guided_diffusion.guidance.classifier import ClassifierGradient
from guided_diffusion.guidance.masks import attention_mask
from guided_diffusion.guidance.schedule import Schedule
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.guidance.smoothed_energy import token_grid
from guided_diffusion.networks.attention import attention_score, find_block
from guided_diffusion.script_util import create_guidance

SIDE = 16
X = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


class Counting:
    """A network that counts its calls and keeps what it was asked."""

    def __init__(self, network):
        self.network = network
        self.inputs = []

    def __call__(self, x, t, **condition):
        self.inputs.append(x)
        return self.network(x, t, **condition)


def sag(network, **settings):
    defaults = {"scale": 0.7, "block": find_block(network, "output_blocks.2.1"), "blur_sigma": 2.0}
    return SelfAttentionGuidance(**defaults | settings)


def predict(network, diffusion, guidances, step=4, clip_denoised=True):
    """(prediction, network calls, guided denoiser) at one step."""
    counting = Counting(network)
    guided = GuidedDenoiser(diffusion.denoiser(counting, clip_denoised), diffusion.process, guidances)
    return guided(X, torch.full((2,), step), {}), counting, guided


def test_scale_zero_is_the_identity_and_calls_nothing(small):
    network, diffusion = small
    plain, _, _ = predict(network, diffusion, [])
    zero, counting, guided = predict(network, diffusion, [sag(network, scale=0.0)])
    assert torch.equal(zero.eps, plain.eps)
    assert torch.equal(zero.raw_x0, plain.raw_x0)
    assert len(counting.inputs) == guided.evaluations == 1


def test_guidance_costs_one_more_call_and_moves_eps_by_s_times_the_difference(small):
    network, diffusion = small
    plain, _, _ = predict(network, diffusion, [])
    prediction, counting, guided = predict(network, diffusion, [sag(network)])
    assert len(counting.inputs) == guided.evaluations == 2
    with torch.no_grad():
        degraded = diffusion.denoiser(network)(counting.inputs[1], torch.full((2,), 4), {})
    torch.testing.assert_close(prediction.eps, degraded.eps + 1.7 * (plain.eps - degraded.eps))
    assert not torch.equal(prediction.eps, plain.eps)
    assert torch.equal(prediction.variance, plain.variance)
    expected = diffusion.process.x0_from_eps(X, prediction.t, prediction.eps)
    torch.testing.assert_close(prediction.raw_x0, expected)


def test_an_empty_mask_gives_no_guidance(small):
    network, diffusion = small
    plain, _, _ = predict(network, diffusion, [])
    prediction, counting, _ = predict(network, diffusion, [sag(network, threshold=1e9)])
    assert torch.equal(counting.inputs[1], X)
    torch.testing.assert_close(prediction.eps, plain.eps, rtol=0, atol=0)


def test_a_mask_of_ones_is_blur_guidance(small):
    network, diffusion = small
    plain, _, _ = predict(network, diffusion, [])
    _, counting, _ = predict(network, diffusion, [sag(network, threshold=-1.0)])
    blurred = diffusion.process.q_sample(gaussian_blur(plain.x0, 2.0), plain.t, plain.eps)
    assert torch.equal(counting.inputs[1], blurred)


def test_pixels_outside_the_mask_are_those_of_x_t(small):
    network, diffusion = small
    guidance = sag(network)
    _, counting, guided = predict(network, diffusion, [guidance])
    mask = guidance.mask(guided.last_step).expand_as(X)
    assert 0 < mask.float().mean() < 1
    assert torch.equal(counting.inputs[1][~mask], X[~mask])
    assert not torch.equal(counting.inputs[1][mask], X[mask])


def test_reference_fidelity_changes_pixels_outside_the_mask_where_x0_was_clamped(small):
    network, diffusion = small
    reference = create_guidance(network, guide_scale=1.7, sag_block="middle_block.1", fidelity="reference")
    _, counting, guided = predict(network, diffusion, [reference])
    outside = ~reference.mask(guided.last_step).expand_as(X)
    clamped = guided.last_step.base.raw_x0.abs() > 1
    same = torch.isclose(counting.inputs[1], X, atol=1e-5)
    assert (outside & clamped).any()
    assert (outside & ~clamped).any()
    assert same[outside & ~clamped].all()
    assert not same[outside & clamped].any()
    assert reference.fidelity == "reference"
    assert reference.reference_heads == network.num_heads
    assert reference.blur_kernel == 31


def test_what_is_blurred_is_clamped_only_with_clip_denoised(small):
    network, diffusion = small
    for clip in (True, False):
        plain, _, _ = predict(network, diffusion, [], clip_denoised=clip)
        assert (plain.x0.abs().max() <= 1) == clip
        _, counting, _ = predict(network, diffusion, [sag(network, threshold=-1.0)], clip_denoised=clip)
        blurred = diffusion.process.q_sample(gaussian_blur(plain.x0, 2.0), plain.t, plain.eps)
        assert torch.equal(counting.inputs[1], blurred)


@pytest.mark.parametrize("side", [4, 6, 7, 8, 12, 14, 24, 32])
def test_uniform_attention_gives_an_empty_mask(side):
    alike = torch.ones(2, 3, side**2, 8)
    assert not attention_mask(attention_score(alike, alike).unflatten(1, (side, side)), (side, side), 1.0).any()


def test_mask_is_upsampled_to_whole_squares():
    score = torch.zeros(1, 4, 4)
    score[0, 1, 1] = 2.0
    mask = attention_mask(score, (8, 8), 1.0)[0, 0]
    assert mask.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_mask_of_a_map_that_does_not_tile_the_image():
    score = torch.tensor([[[0.0, 2.0, 0.0], [2.0, 0.0, 0.0]]])
    mask = attention_mask(score, (3, 5), 1.0)[0, 0]
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


def test_a_grid_that_is_not_known_must_tile_the_image():
    assert token_grid(4 * 8, 16, 32) == (4, 8)
    with pytest.raises(ValueError, match="31 tokens does not tile"):
        token_grid(31, 16, 32)


def test_sigma_zero_is_no_guidance(small):
    network, diffusion = small
    plain, _, _ = predict(network, diffusion, [])
    prediction, _, _ = predict(network, diffusion, [sag(network, blur_sigma=0.0)], clip_denoised=False)
    torch.testing.assert_close(prediction.eps, plain.eps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "guided_steps"),
    [
        (Schedule(), range(8)),
        (Schedule(start=250), range(8)),
        (Schedule(start=3), range(3)),
        (Schedule(start=0), []),
        (Schedule(low=0.25, high=0.75), range(2, 6)),
        (Schedule(low=0.25, start=4), range(2, 4)),
    ],
)
def test_interval(small, schedule, guided_steps):
    network, diffusion = small
    assert [t for t, factor in enumerate(schedule.factors(diffusion.process)) if factor] == list(guided_steps)
    for step in range(8):
        _, _, guided = predict(network, diffusion, [sag(network, schedule=schedule)], step)
        assert guided.evaluations == (2 if step in guided_steps else 1)


def test_rows_outside_the_interval_stay_unguided(small):
    network, diffusion = small
    t = torch.tensor([2, 6])
    denoiser = diffusion.denoiser(network)
    plain = denoiser(X, t, {})
    guided = GuidedDenoiser(denoiser, diffusion.process, [sag(network, schedule=Schedule(start=4))])(X, t, {})
    assert not torch.equal(guided.eps[0], plain.eps[0])
    assert torch.equal(guided.eps[1], plain.eps[1])


def test_every_reuses_the_difference_between(small):
    network, diffusion = small
    guidance = sag(network, schedule=Schedule(start=7, every=3))
    counting = Counting(network)
    guided = GuidedDenoiser(diffusion.denoiser(counting), diffusion.process, [guidance])
    calls = []
    for step in reversed(range(8)):
        before = len(counting.inputs)
        guided(X, torch.full((2,), step), {})
        calls.append(len(counting.inputs) - before)
    assert calls == [1, 2, 1, 1, 2, 1, 1, 2]
    assert guided.evaluations == 11


def test_every_uses_the_old_difference(small):
    network, diffusion = small
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [sag(network, schedule=Schedule(every=2))])
    t = torch.full((2,), 4)
    first = guided(X, t, {})
    delta = first.eps - guided.last_step.base.eps
    again = guided(0.5 * X, t, {})
    torch.testing.assert_close(again.eps - guided.last_step.base.eps, delta)


def test_guidances_add_in_any_order(small):
    network, diffusion = small
    one, two = sag(network), sag(network, scale=-0.2, block=find_block(network, "input_blocks.1.1"), threshold=0.9)
    plain, _, _ = predict(network, diffusion, [])
    both, counting, _ = predict(network, diffusion, [one, two])
    assert len(counting.inputs) == 3
    swapped, _, _ = predict(network, diffusion, [two, one])
    torch.testing.assert_close(both.eps, swapped.eps)
    parts = [predict(network, diffusion, [guidance])[0].eps - plain.eps for guidance in (one, two)]
    torch.testing.assert_close(both.eps, plain.eps + sum(parts))


def test_every_block_of_encoder_middle_and_decoder_guides(small):
    network, diffusion = small
    plain, _, _ = predict(network, diffusion, [])
    for name in ("input_blocks.1.1", "input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.3.1"):
        prediction, _, _ = predict(network, diffusion, [sag(network, block=find_block(network, name))])
        assert not torch.equal(prediction.eps, plain.eps)


def test_the_authors_block_names(small):
    network, _ = small
    for block, depth, name in [("middle", 0, "middle_block.1"), ("output", 2, "output_blocks.2.1")]:
        guidance = create_guidance(network, guide_scale=1.5, sel_attn_block=block, sel_attn_depth=depth)
        assert guidance.block is find_block(network, name)
        assert guidance.scale == 0.5
    with pytest.raises(ValueError, match=r"no attention block 'output_blocks.8.1'"):
        create_guidance(network, guide_scale=1.5)


def test_classifier_gradient_is_that_of_log_p():
    weights = torch.randn(5, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(4)) * 0.05

    def classifier(x, _t):
        return x.flatten(1) @ weights.T

    y = torch.tensor([1, 4])
    gradient = ClassifierGradient(classifier, 2.5)(X, torch.zeros(2), y=y)
    probabilities = (X.flatten(1) @ weights.T).softmax(dim=1)
    expected = 2.5 * (weights[y] - probabilities @ weights).reshape(X.shape)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("bad", [{"scale": math.nan}, {"threshold": math.inf}, {"blur_sigma": -1.0}])
def test_impossible_settings_are_refused(small, bad):
    with pytest.raises(ValueError, match="wanted"):
        sag(small[0], **bad)


def test_a_guidance_can_be_changed_by_replace(small):
    guidance = sag(small[0])
    assert replace(guidance, scale=0.1).scale == 0.1
