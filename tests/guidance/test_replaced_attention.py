"""Perturbed-attention and smoothed energy guidance against attention computed by hand."""

import copy
import math

import pytest
import torch

from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.schedule import Schedule
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.guidance.smoothed_energy import SmoothedEnergyGuidance
from guided_diffusion.networks.attention import (
    attention_blocks,
    attention_map,
    find_block,
    record_attention,
    replace_attention,
)
from guided_diffusion.script_util import create_gaussian_diffusion

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([4, 4])
DIFFUSION = create_gaussian_diffusion(steps=1000, learn_sigma=True, timestep_respacing="8")
NAMES = ("input_blocks.1.1", "output_blocks.1.1")


def hooks(network):
    return sum(len(module._forward_pre_hooks) for module in network.modules())


def blocks_of(network, names=NAMES):
    return tuple(find_block(network, name) for name in names)


def pag(network, **settings):
    return PerturbedAttentionGuidance(**{"scale": 0.8, "blocks": blocks_of(network)} | settings)


def seg(network, **settings):
    return SmoothedEnergyGuidance(**{"scale": 0.8, "blocks": blocks_of(network)} | settings)


def guide(network, guidances):
    guided = GuidedDenoiser(DIFFUSION.denoiser(network), DIFFUSION.process, guidances)
    return guided(X, T, {}), guided


def heads_by_hand(block, x):
    """q, k, v of every head, [N, heads, d, T] each, from the block's own weights, in its order of rows."""
    tokens = x.flatten(2)
    normed = block.norm(tokens)
    weight, bias = block.qkv.weight[:, :, 0], block.qkv.bias
    rows = torch.einsum("oc,nct->not", weight, normed) + bias[:, None]
    heads, width = block.num_heads, tokens.shape[1] // block.num_heads
    if block.use_new_attention_order:
        order = [
            [[part * heads * width + h * width + i for i in range(width)] for h in range(heads)] for part in range(3)
        ]
    else:
        order = [[[h * 3 * width + part * width + i for i in range(width)] for h in range(heads)] for part in range(3)]
    return [rows[:, torch.tensor(part)] for part in order]


def output_by_hand(block, x, values):
    """What the block returns if attention gives `values` [N, heads, d, T]."""
    joined = values.flatten(1, 2)
    projected = torch.einsum("oc,nct->not", block.proj_out.weight[:, :, 0], joined) + block.proj_out.bias[:, None]
    return x + projected.reshape(x.shape)


FEATURES = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(6))


def test_identity_attention_by_hand(any_order):
    block = find_block(any_order, "middle_block.1")
    assert block.num_heads == 4
    with replace_attention(block, fn=lambda q, k, v: pag(any_order).attend(q, k, v, (16, 16))):
        replaced = block(FEATURES)
    _, _, v = heads_by_hand(block, FEATURES)
    torch.testing.assert_close(replaced, output_by_hand(block, FEATURES, v), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(replaced, block(FEATURES), atol=1e-3)


@pytest.mark.parametrize("sigma", [0.0, 0.7, 2.0, math.inf])
def test_blurred_queries_by_hand(any_order, sigma):
    block = find_block(any_order, "middle_block.1")
    guidance = seg(any_order, sigma=sigma)
    with replace_attention(block, fn=lambda q, k, v: guidance.attend(q, k, v, (16, 16))):
        replaced = block(FEATURES)
    q, k, v = heads_by_hand(block, FEATURES)
    weights = torch.zeros(64, 64)  # of the blur: row a token, column what it is made of
    reach = min(math.ceil(3 * sigma), 7) if sigma < math.inf else 0
    for token in range(64):
        row, column = divmod(token, 8)
        if math.isinf(sigma):
            weights[token] = 1 / 64
            continue
        for down in range(-reach, reach + 1):
            for across in range(-reach, reach + 1):
                size = math.exp(-(down**2 + across**2) / (2 * sigma**2)) if sigma else 1.0
                mirrored = [7 - abs(7 - abs(place)) for place in (row + down, column + across)]
                weights[token, mirrored[0] * 8 + mirrored[1]] += size
        weights[token] /= weights[token].sum()
    q = q @ weights.T
    logits = torch.einsum("nhdq,nhdk->nhqk", q, k) / q.shape[2] ** 0.5
    values = torch.einsum("nhqk,nhdk->nhdq", logits.softmax(dim=-1), v)
    torch.testing.assert_close(replaced, output_by_hand(block, FEATURES, values), atol=1e-5, rtol=1e-5)


def test_the_difference_is_that_of_a_network_with_another_attention(any_order):
    network = any_order
    prediction, guided = guide(network, [pag(network)])
    plain = DIFFUSION.denoiser(network)(X, T, {})
    with replace_attention(*blocks_of(network), fn=lambda q, k, v: v):
        changed = DIFFUSION.denoiser(network)(X, T, {})
    torch.testing.assert_close(prediction.eps, plain.eps + 0.8 * (plain.eps - changed.eps))
    assert not torch.allclose(plain.eps, changed.eps, atol=1e-4)
    assert guided.evaluations == 2


def test_one_block_is_not_the_other(any_order):
    results = [guide(any_order, [pag(any_order, blocks=blocks_of(any_order, [name]))])[0].eps for name in NAMES]
    assert not torch.allclose(*results, atol=1e-4)


def test_no_blur_is_no_guidance(any_order):
    plain, _ = guide(any_order, [])
    none, guided = guide(any_order, [seg(any_order, sigma=0.0)])
    torch.testing.assert_close(none.eps, plain.eps, atol=1e-6, rtol=1e-6)
    assert guided.evaluations == 2
    small, _ = guide(any_order, [seg(any_order, sigma=1e-3)])
    torch.testing.assert_close(small.eps, plain.eps, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(guide(any_order, [seg(any_order)])[0].eps, plain.eps, atol=1e-4)


def test_replacing_with_attention_itself_changes_nothing(any_order):
    names, plain = list(any_order.state_dict()), any_order(X, T)
    with replace_attention(*attention_blocks(any_order).values(), fn=lambda q, k, v: attention_map(q, k) @ v):
        torch.testing.assert_close(any_order(X, T), plain, atol=1e-5, rtol=1e-5)
        assert list(any_order.state_dict()) == names
    assert hooks(any_order) == 0
    assert torch.equal(any_order(X, T), plain)


def test_no_hook_is_left_after_an_exception(any_order):
    def fail(*_qkv):
        assert hooks(any_order) == 2
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), replace_attention(*blocks_of(any_order), fn=fail):
        any_order(X, T)
    assert hooks(any_order) == 0
    with pytest.raises(AttributeError), replace_attention(*blocks_of(any_order), any_order, fn=fail):
        pass
    assert hooks(any_order) == 0


def test_recording_sees_the_network_and_not_the_replacement(any_order):
    block = find_block(any_order, "output_blocks.1.1")
    sag = SelfAttentionGuidance(scale=0.5, block=block)
    with record_attention(block) as scores:
        any_order(X, DIFFUSION.process.network_timesteps(T))
    _, guided = guide(any_order, [pag(any_order), sag])
    torch.testing.assert_close(guided.last_step.recorded[sag][block], scores[block])


def test_scale_zero_calls_nothing_and_order_does_not_matter(any_order):
    network = any_order
    plain, guided = guide(network, [pag(network, scale=0.0), seg(network, scale=0.0)])
    assert guided.evaluations == 1
    three = [pag(network), seg(network, scale=-0.3), SelfAttentionGuidance(scale=0.5, block=blocks_of(network)[0])]
    together, guided = guide(network, three)
    assert guided.evaluations == 4
    torch.testing.assert_close(guide(network, three[::-1])[0].eps, together.eps)
    parts = [guide(network, [guidance])[0].eps - plain.eps for guidance in three]
    torch.testing.assert_close(together.eps, plain.eps + sum(parts))


def test_with_classifier_free_guidance_it_starts_from_the_conditional_prediction(small_conditional):
    network, diffusion = small_conditional
    y = {"y": torch.tensor([0, 3])}
    denoiser = diffusion.denoiser(network)
    plain, null = denoiser(X, T, y), denoiser(X, T, null_class(4)(y))
    with replace_attention(*blocks_of(network), fn=lambda q, k, v: v):
        changed = denoiser(X, T, y)
    cfg = ClassifierFreeGuidance(scale=1.5, null=null_class(4))
    guided = GuidedDenoiser(denoiser, diffusion.process, [pag(network), cfg])
    expected = plain.eps + 1.5 * (plain.eps - null.eps) + 0.8 * (plain.eps - changed.eps)
    torch.testing.assert_close(guided(X, T, y).eps, expected)
    assert guided.evaluations == 3


@pytest.mark.parametrize(("every", "calls"), [(1, [1, 2, 2, 2]), (2, [1, 2, 1, 2]), (3, [1, 2, 1, 1])])
def test_reuse_and_interval(any_order, every, calls):
    network = any_order
    guidances = [pag(network, schedule=Schedule(start=3, every=every))]
    guided = GuidedDenoiser(DIFFUSION.denoiser(network), DIFFUSION.process, guidances)
    plain = GuidedDenoiser(DIFFUSION.denoiser(network), DIFFUSION.process, [pag(network, schedule=Schedule(start=3))])
    made = []
    for step in reversed(range(4)):
        before, t = guided.evaluations, torch.full((2,), step)
        same = torch.equal(guided(X, t, {}).eps, plain(X, t, {}).eps)
        made.append(guided.evaluations - before)
        # Where the difference is computed, it is that of no reuse.
        assert same or (step < 3 and made[-1] == 1)
    assert made == calls


def test_impossible_settings_are_refused(any_order):
    with pytest.raises(ValueError, match="blocks: wanted one attention block or more"):
        pag(any_order, blocks=())
    for sigma in (-1.0, math.nan):
        with pytest.raises(ValueError, match="seg_sigma: wanted 0 or more"):
            seg(any_order, sigma=sigma)


@pytest.mark.parametrize("guidance", [PerturbedAttentionGuidance, SmoothedEnergyGuidance])
def test_a_guidance_of_another_network_than_is_called_is_refused(small, guidance):
    """A deep copy, as an average of weights is, has blocks of its own: nothing would be perturbed, at double cost."""
    network, diffusion = small
    made = guidance(scale=1.0, blocks=(find_block(network, "middle_block.1"),))
    noise = torch.zeros(1, 3, 16, 16)
    assert diffusion.ddim_sample_loop(network, noise.shape, noise=noise, guidance=made).shape == noise.shape
    with pytest.raises(ValueError, match=r"was not heard in the pass: .* \(a deep copy\?"):
        diffusion.ddim_sample_loop(copy.deepcopy(network), noise.shape, noise=noise, guidance=made)
