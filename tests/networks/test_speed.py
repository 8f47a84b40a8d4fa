"""What makes the networks fast changes nothing they say: memory layout, kept memory, half precision, compilation."""

import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

from guided_diffusion.commands.benchmarks.rows import plain
from guided_diffusion.networks.attention import TokenLinear, attention_blocks, record_attention
from guided_diffusion.networks.building import make_ready
from guided_diffusion.networks.unet import UNetModel
from guided_diffusion.runs.timing import in_turns
from small import randomised

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3, 700])


def shallow():
    """A network of one level: few shapes, quickly compiled."""
    torch.manual_seed(0)
    return randomised(UNetModel(16, 3, 32, 6, 1, [1], channel_mult=(1,), use_scale_shift_norm=True))


def test_a_token_linear_is_a_convolution_of_width_one():
    layer, x = TokenLinear(8, 12), torch.randn(2, 8, 5)
    torch.testing.assert_close(layer(x), F.conv1d(x, layer.weight, layer.bias))
    assert layer(x).transpose(1, 2).is_contiguous()


def test_fused_attention_sees_channels_side_by_side(any_order):
    """Or it would fall back to the slow path that makes the whole map."""
    seen = []
    for block in attention_blocks(any_order).values():
        block.attention.register_forward_hook(
            lambda _attention, inputs, _output, block=block: seen.extend(
                part.stride(-1) for part in block.split(inputs[0])
            )
        )
    any_order(X, T)
    assert set(seen) == {1}


def test_the_layout_does_not_change_what_the_network_says(any_order):
    before = any_order(X, T)
    make_ready(any_order, use_fp16=False)
    assert any_order.input_blocks[1][0].in_layers[2].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(any_order(X, T), before, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_near_and_keeps_embeddings_normalisation_and_output_in_float32(any_order):
    before = any_order(X, T)
    any_order.convert_to(torch.bfloat16)
    assert any_order.dtype is torch.bfloat16
    kept = {name.split(".")[0] for name, p in any_order.named_parameters() if p.dtype is torch.float32 and p.ndim > 1}
    assert kept >= {"time_embed", "out"}
    assert {p.dtype for p in any_order.input_blocks[0].parameters()} == {torch.float32}
    after = any_order(X, T)
    assert after.dtype is torch.float32
    error = (after - before).square().mean().sqrt() / before.std()
    assert 0 < error < 0.02


def test_compiled_blocks_say_the_same_and_attention_is_still_recorded():
    plain, compiled = shallow(), shallow()
    make_ready(compiled, use_fp16=False, compiled=True)
    block = attention_blocks(compiled)["middle_block.1"]
    with torch.no_grad(), record_attention(block) as scores:
        torch.testing.assert_close(compiled(X, T), plain(X, T), rtol=1e-5, atol=1e-5)
    assert scores[block].shape == (2, 16, 16)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


PAGES = """
import resource, torch
from guided_diffusion.runs.ranks import start
start()
def faults():
    x = [torch.ones(4_000_000) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = [faults() for _ in range(10)][-1]
print(faults() - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_freed_memory_is_used_again(monkeypatch):
    """Another 48 MB of tensors are made without asking the system for pages of 4 kB, unless the user says otherwise."""
    [fresh] = map(int, subprocess.check_output([sys.executable, "-c", PAGES]).split())
    assert fresh < 100
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    [fresh] = map(int, subprocess.check_output([sys.executable, "-c", PAGES]).split())
    assert fresh > 1000


def stretched(milliseconds):
    return lambda: time.sleep(milliseconds / 1000)


def test_works_take_turns_in_processes_of_their_own():
    found = in_turns({"short": (stretched, 1), "long": (stretched, 300)}, repeats=3)
    assert found["long"][0] >= 0.3 > found["short"][0]
    assert all(peak > 1e6 for _, peak in found.values())


def test_the_plain_path_of_the_benchmark_says_the_same(any_order):
    before = any_order(X, T)
    plain(any_order)
    torch.testing.assert_close(any_order(X, T), before, rtol=1e-5, atol=1e-5)
