"""Attention is heard and replaced in the very pass that it is for: in parts, by threads, compiled, computed again."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.guidance.smoothed_energy import SmoothedEnergyGuidance
from guided_diffusion.networks.attention import find_block, record_attention, replace_attention
from guided_diffusion.script_util import create_model_and_diffusion
from small import SMALL, randomised

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
T = torch.full((4,), 5)


def sag(network, **settings):
    return SelfAttentionGuidance(scale=0.8, block=find_block(network, "middle_block.1"), **settings)


def pag(network, block="middle_block.1"):
    return PerturbedAttentionGuidance(scale=0.8, blocks=(find_block(network, block),))


def seg(network):
    return SmoothedEnergyGuidance(scale=0.8, blocks=(find_block(network, "middle_block.1"),))


def guided_eps(network, diffusion, guidances, condition=None):
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, guidances)
    return guided(X, T, condition or {}).eps


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("cfg", [False, True])
def test_a_network_called_in_parts_is_guided_as_the_whole(small_conditional, rows, cfg):
    network, diffusion = small_conditional

    def in_parts(x, t, y):
        return torch.cat([network(*part) for part in zip(x.split(rows), t.split(rows), y.split(rows), strict=True)])

    guidances = [sag(network), pag(network)]
    if cfg:
        guidances.append(ClassifierFreeGuidance(scale=1.5, null=null_class(4)))
    y = {"y": torch.tensor([0, 1, 2, 3])}
    whole = guided_eps(network, diffusion, guidances, y)
    torch.testing.assert_close(guided_eps(in_parts, diffusion, guidances, y), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, diffusion.denoiser(network)(X, T, y).eps, atol=1e-3)


def test_attention_of_another_number_of_rows_is_refused(small):
    network, diffusion = small

    def twice(x, t):
        return network(torch.cat([x, x]), torch.cat([t, t]))[: len(x)]

    with pytest.raises(ValueError, match=r"attention of 8 rows was heard in a pass of 4: .*guided already"):
        guided_eps(twice, diffusion, [sag(network)])


@pytest.mark.parametrize("inner", [pag, seg, sag])
@pytest.mark.parametrize("outer", [pag, seg, sag])
def test_a_denoiser_that_is_guided_already_is_refused(small, inner, outer):
    """The attention heard last would be that of the perturbed pass, the one replaced that of both passes."""
    network, diffusion = small
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [inner(network)])
    with pytest.raises(ValueError, match="guided already: give all guidances to one GuidedDenoiser"):
        GuidedDenoiser(guided, diffusion.process, [outer(network)])(X, T, {})


def test_two_threads_with_one_network_are_each_guided_as_alone(small):
    """Both threads are inside their passes at the same time, one of them with attention replaced."""
    network, diffusion = small
    meet = threading.Barrier(2, timeout=300)

    def meeting(x, t):
        meet.wait()
        output = network(x, t)
        meet.wait()
        return output

    def run(kind, network_of_pass):
        torch.set_grad_enabled(False)  # is of a thread
        return [guided_eps(network_of_pass, diffusion, [kind(network)]) for _ in range(3)]

    for kinds in ((sag, pag), (sag, sag), (seg, pag)):
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, kinds, [meeting] * 2))
        for kind, found in zip(kinds, together, strict=True):
            alone = guided_eps(network, diffusion, [kind(network)])
            for eps in found:
                torch.testing.assert_close(eps, alone, atol=1e-5, rtol=1e-5)


@pytest.fixture
def compiled(small):
    """(network, the same compiled, diffusion); nothing else that is compiled is left before or after."""
    torch.compiler.reset()
    yield small[0], torch.compile(small[0], backend="eager"), small[1]
    torch.compiler.reset()


def test_a_compiled_network_is_guided_as_itself(compiled):
    network, fast, diffusion = compiled
    unguided = guided_eps(fast, diffusion, [])
    for kind in (sag, pag, seg):
        guided = guided_eps(fast, diffusion, [kind(network)])
        torch.testing.assert_close(guided, guided_eps(network, diffusion, [kind(network)]), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(guided, unguided, atol=1e-3)
    assert torch.equal(guided_eps(fast, diffusion, []), unguided)
    assert torch._dynamo.config.skip_nnmodule_hook_guards  # as it was


def test_nothing_is_imported_for_networks_that_are_not_compiled():
    """Importing Dynamo takes seconds."""
    code = f"""
import sys, torch
from guided_diffusion.networks.attention import attention_blocks
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
network, diffusion = create_model_and_diffusion(**{SMALL | {"timestep_respacing": "1"}})
guidance = SelfAttentionGuidance(scale=1.0, block=attention_blocks(network)["middle_block.1"])
diffusion.ddim_sample_loop(network, (1, 3, 16, 16), guidance=guidance)
print("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_guiding_a_compiled_network_compiles_no_more_at_every_step(compiled):
    network, _, diffusion = compiled
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(network, backend=backend)
    after = []
    for _ in range(3):
        guided_eps(fast, diffusion, [sag(network), pag(network)])
        after.append(len(graphs))
    assert after[0] == after[1] == after[2] > 0


def test_a_network_compiled_for_no_hooks_is_refused(compiled):
    network, fast, diffusion = compiled
    fast(X, T)
    for kind in (sag, pag):
        with pytest.raises(ValueError, match=r"was not heard in the pass: .* torch.compiler.reset\(\)"):
            guided_eps(fast, diffusion, [kind(network)])


@pytest.mark.parametrize("kind", [pag, seg, sag])
def test_gradients_through_a_guided_step_are_those_without_checkpoints(kind):
    """The blocks that are computed again for the gradient attend as they did before."""
    gradients = []
    for use_checkpoint in (False, True):
        torch.manual_seed(0)
        network, diffusion = create_model_and_diffusion(**SMALL, use_checkpoint=use_checkpoint)
        randomised(network)
        x = X.clone().requires_grad_()
        step = diffusion.ddim_sample(network, x, T, clip_denoised=False, guidance=kind(network))
        step["sample"].square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert gradients[0].abs().max() > 0.1


def test_listening_survives_a_replacement(small):
    """A recorder around a pass with other attention hears that pass's own queries and keys."""
    network, _ = small
    block = find_block(network, "middle_block.1")
    with record_attention(block) as plain:
        network(X, T)
    with record_attention(block) as scores, replace_attention(block, fn=lambda q, k, v: v):
        network(X, T)
    torch.testing.assert_close(scores[block], plain[block])


def test_under_autocast_only_the_network_is_in_half_precision(small):
    network, diffusion = small
    guidance = sag(network)
    guided = GuidedDenoiser(diffusion.denoiser(network), diffusion.process, [guidance])
    with torch.autocast("cpu", torch.bfloat16):
        prediction = guided(X, T, {})
        step = guided.last_step
        degraded = guidance.degrade(step.base, guidance.mask(step))
    assert {prediction.eps.dtype, prediction.x0.dtype, step.recorded[guidance][guidance.block].dtype} == {torch.float32}
    assert torch.equal(degraded, guidance.degrade(step.base, guidance.mask(step)))
