"""The attention score, its recorder, and what both promise."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.masks import attention_mask
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.networks import attention
from guided_diffusion.networks.attention import (
    attention_blocks,
    attention_map,
    attention_score,
    find_block,
    record_attention,
    split_legacy,
    split_new,
)

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 700])


def test_score_is_the_column_sum_of_the_map():
    q, k = torch.randn(2, 2, 3, 10, 4, generator=torch.Generator().manual_seed(2))
    expected = attention_map(q, k).mean(dim=1).sum(dim=1)
    torch.testing.assert_close(attention_score(q, k), expected)


def test_rounding_does_not_grow_with_the_parts_that_a_batch_is_cut_into(monkeypatch):
    """Uniform attention at 40², cut as in a batch of 256: nothing receives more than the mean."""
    monkeypatch.setattr(attention, "ENTRIES_AT_A_TIME", 2 * 1600)
    score = attention_score(*torch.zeros(2, 1, 3, 1600, 4))
    torch.testing.assert_close(score, torch.ones(1, 1600), atol=5e-7, rtol=0)
    assert not attention_mask(score.unflatten(1, (40, 40)), (40, 40), 1.0).any()
    q, k = torch.randn(2, 1, 2, 301, 4, generator=torch.Generator().manual_seed(2))
    exact = (q.double() @ k.double().mT / 2).softmax(dim=-1).mean(dim=1).sum(dim=1)
    monkeypatch.setattr(attention, "ENTRIES_AT_A_TIME", 301)
    torch.testing.assert_close(attention_score(q, k).double(), exact, atol=1e-6, rtol=1e-6)


class Launches(TorchDispatchMode):
    """Counts what a device would be told to do; views cost nothing there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **kwargs or {})


def test_where_each_part_costs_launches_there_are_few():
    """ADM 128², Out.8, batch 64: cut for a CPU's cache it would be 1,800."""
    q = torch.empty(64, 4, 1024, 64, device="meta", dtype=torch.float16)
    with Launches() as launches:
        attention_score(q, q)
    assert launches.count < 40


def test_only_the_rows_of_the_base_are_scored(small_conditional, monkeypatch):
    network, diffusion = small_conditional
    scored = []

    def counting(q, k):
        scored.append(len(q))
        return attention_score(q, k)

    monkeypatch.setattr(attention, "attention_score", counting)
    sag = SelfAttentionGuidance(scale=1.0, block=find_block(network, "middle_block.1"))
    cfg = ClassifierFreeGuidance(scale=1.0, null=null_class(4))
    t, y = torch.tensor([5, 5]), {"y": torch.tensor([0, 3])}
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [sag, cfg])
    guided(X, t, y)
    assert scored == [2]
    alone = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [sag])
    alone(X, t, {"y": torch.tensor([4, 4])})
    score = alone.last_step.recorded[sag][sag.block]
    torch.testing.assert_close(guided.last_step.recorded[sag][sag.block], score)


def test_the_score_is_in_float32_under_autocast():
    q, k = torch.randn(2, 2, 3, 16, 4, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        score = attention_score(q, k)
    assert score.dtype is torch.float32
    assert torch.equal(score, attention_score(q, k))


def test_mean_score_is_one_in_every_block(any_order):
    blocks = attention_blocks(any_order)
    assert len(blocks) == 7
    with record_attention(*blocks.values()) as scores:
        any_order(X, T)
    for block in blocks.values():
        assert scores[block].dtype is torch.float32
        assert scores[block].shape in ((2, 8, 8), (2, 16, 16))
        torch.testing.assert_close(scores[block].mean(dim=(1, 2)), torch.ones(2))
        assert scores[block].std() > 0


def test_map_times_values_is_the_output_of_every_block(any_order):
    seen = {}
    blocks = attention_blocks(any_order).values()

    def keep(block):
        return block.attention.register_forward_hook(lambda _, inputs, output: seen.update({block: (*inputs, output)}))

    handles = [keep(block) for block in blocks]
    any_order(X, T)
    for handle in handles:
        handle.remove()
    assert len(seen) == len(blocks)
    for block, (qkv, output) in seen.items():
        q, k, v = block.split(qkv)
        assert q.shape[1] == block.num_heads
        by_map = (attention_map(q, k) @ v).transpose(-1, -2).flatten(1, 2)
        torch.testing.assert_close(by_map, output, atol=1e-5, rtol=1e-5)


def test_the_two_orders_read_different_rows():
    qkv = torch.arange(12.0).reshape(1, 12, 1)
    assert split_legacy(qkv, 2)[0].flatten().tolist() == [0, 1, 6, 7]
    assert split_new(qkv, 2)[0].flatten().tolist() == [0, 1, 2, 3]


def test_recording_changes_nothing(any_order):
    plain = any_order(X, T)
    names = list(any_order.state_dict())
    with record_attention(*attention_blocks(any_order).values()):
        assert torch.equal(any_order(X, T), plain)
        assert list(any_order.state_dict()) == names


def hooks(network):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_no_hook_is_left_after_an_exception(any_order):
    def fail():
        assert hooks(any_order) == 14
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), record_attention(*attention_blocks(any_order).values()):
        fail()
    assert hooks(any_order) == 0


def test_no_hook_is_left_by_a_wrong_block(any_order):
    block = find_block(any_order, "middle_block.1")
    with pytest.raises(AttributeError), record_attention(block, any_order):
        pass
    assert hooks(any_order) == 0


def test_a_wrong_block_name_is_answered_with_the_right_ones(any_order):
    with pytest.raises(ValueError, match=r"no attention block 'middle_block.0'.*input_blocks.1.1, .*output_blocks.3.1"):
        find_block(any_order, "middle_block.0")
