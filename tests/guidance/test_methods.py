"""Guidances by a weak network, another class, another timestep, other layers and earlier steps."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import dits
from guided_diffusion.diffusion.noise import OTHER_CLASS, TIME_STEP, TOKENS, Samples
from guided_diffusion.guidance.base import GuidedDenoiser, evaluations, weak_evaluations
from guided_diffusion.guidance.classifier import with_classifier
from guided_diffusion.guidance.methods.autoguidance import Autoguidance
from guided_diffusion.guidance.methods.building import Guided, build_method, layers_that_keep_shape
from guided_diffusion.guidance.methods.independent_condition import IndependentConditionGuidance
from guided_diffusion.guidance.methods.momentum import MomentumGuidance
from guided_diffusion.guidance.methods.skipped_layers import SkippedLayersGuidance
from guided_diffusion.guidance.methods.time_step import TimeStepGuidance
from guided_diffusion.guidance.methods.token_perturbation import TokenPerturbationGuidance
from guided_diffusion.guidance.schedule import Schedule
from guided_diffusion.networks.altering import altered
from guided_diffusion.networks.attention import find_block
from guided_diffusion.networks.dit import DiT
from guided_diffusion.script_util import create_gaussian_diffusion, create_model_and_diffusion
from guided_diffusion.settings.methods import (
    IndependentConditionConfig,
    SkippedLayersConfig,
    TimeStepConfig,
    TokenPerturbationConfig,
)
from guided_diffusion.settings.model import NetworkConfig
from small import SMALL, randomised

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Y = {"y": torch.tensor([1, 2, 0])}
DIFFUSION = create_gaussian_diffusion(steps=1000, learn_sigma=True, timestep_respacing="8")
SAMPLES = Samples(5, [3, 4, 7])
CLASSES = 40


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return randomised(create_model_and_diffusion(**SMALL, class_cond=True, num_classes=CLASSES)[0])


@pytest.fixture(scope="module")
def weak():
    torch.manual_seed(1)
    smaller = SMALL | {"channel_mult": "1,1"}
    return randomised(create_model_and_diffusion(**smaller, class_cond=True, num_classes=CLASSES)[0], seed=1)


def all_methods(network, weak, scale=0.7):
    block = find_block(network, "middle_block.1")
    return {
        "autoguidance": Autoguidance(scale=scale, weak=DIFFUSION.denoiser(weak), network=weak),
        "icg": IndependentConditionGuidance(scale=scale, num_classes=CLASSES),
        "tsg": TimeStepGuidance(scale=scale, embedder=network.time_embed),
        "tpg": TokenPerturbationGuidance(scale=scale, blocks=(block,)),
        "skip": SkippedLayersGuidance(scale=scale, layers=(block,)),
        "s2": SkippedLayersGuidance(scale=scale, layers=tuple(layers_that_keep_shape(network).values()), drawn=2),
        "momentum": MomentumGuidance(scale=scale),
    }


def at(step, rows=3):
    return torch.full((rows,), step)


def guide(network, guidances, step=4, samples=SAMPLES):
    guided = GuidedDenoiser(DIFFUSION.denoiser(network), DIFFUSION.process, guidances, samples)
    return guided(X, at(step), Y), guided


def eps(network, y=Y["y"], step=4):
    return DIFFUSION.denoiser(network)(X, at(step), {"y": y}).eps


def hooks(network):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules())


METHODS = ("autoguidance", "icg", "tsg", "tpg", "skip", "s2", "momentum")


@pytest.mark.parametrize("name", METHODS)
def test_a_scale_of_zero_calls_nothing(network, weak, name):
    prediction, guided = guide(network, [all_methods(network, weak, scale=0)[name]])
    assert torch.equal(prediction.eps, eps(network))
    assert (guided.evaluations, guided.weak_evaluations) == (1, 0)


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_counted_before_and_after_they_are_made(network, weak, name):
    method = all_methods(network, weak)[name]
    guided = GuidedDenoiser(DIFFUSION.denoiser(network), DIFFUSION.process, [method], SAMPLES)
    for step in (1, 0):
        guided(X, at(step), Y)
    two = DIFFUSION.process.first(2)
    assert guided.evaluations == evaluations([method], two) == 2 * (1 + method.passes)
    assert guided.weak_evaluations == weak_evaluations([method], two) == (2 if name == "autoguidance" else 0)
    assert hooks(network) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_sample_is_the_same_alone_in_another_place_and_beside_others(network, weak, name):
    def predicted(indices):
        rows = [SAMPLES.indices.index(index) for index in indices]
        method = all_methods(network, weak)[name]
        guided = GuidedDenoiser(DIFFUSION.denoiser(network), DIFFUSION.process, [method], Samples(5, indices))
        guided(0.5 * X[rows], at(5, len(rows)), {"y": Y["y"][rows]})
        return guided(X[rows], at(4, len(rows)), {"y": Y["y"][rows]}).eps

    together = predicted([3, 4, 7])
    torch.testing.assert_close(predicted([4]), together[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predicted([7, 3]), together[[2, 0]], rtol=1e-4, atol=1e-5)


def test_autoguidance_leads_away_from_the_weak_network(network, weak):
    prediction, _ = guide(network, [all_methods(network, weak)["autoguidance"]])
    torch.testing.assert_close(prediction.eps, eps(network) + 0.7 * (eps(network) - eps(weak)))
    same, _ = guide(network, [Autoguidance(scale=3, weak=DIFFUSION.denoiser(network))])
    torch.testing.assert_close(same.eps, eps(network))


def test_another_class_is_drawn_for_every_sample_and_step(network, weak):
    other = (SAMPLES.uniform([4] * 3, 1, OTHER_CLASS)[:, 0] * CLASSES).long()
    prediction, _ = guide(network, [all_methods(network, weak)["icg"]])
    torch.testing.assert_close(prediction.eps, eps(network) + 0.7 * (eps(network) - eps(network, other)))
    drawn = [(Samples(5, range(500)).uniform([t] * 500, 1, OTHER_CLASS)[:, 0] * CLASSES).long() for t in (4, 5)]
    assert set(drawn[0].tolist()) == set(range(CLASSES))
    assert not torch.equal(*drawn)


def test_the_timestep_embedding_is_disturbed_by_its_own_spread(network):
    def by_hand(timesteps):
        emb = network.time_embed[2](network.time_embed[1](network.time_embed[0](timesteps)))
        n = SAMPLES.normal([4] * 3, emb.shape[1], TIME_STEP).float()
        return emb + 2 * (4 / 8) ** 0.5 * emb.std(dim=1, keepdim=True) * n

    prediction, _ = guide(network, [TimeStepGuidance(scale=1, embedder=network.time_embed, noise=2, power=0.5)])
    forward, network.time_embed.forward = network.time_embed.forward, by_hand
    try:
        disturbed = eps(network)
    finally:
        network.time_embed.forward = forward
    assert not torch.allclose(disturbed, eps(network))
    torch.testing.assert_close(prediction.eps, 2 * eps(network) - disturbed)


def test_at_the_image_or_without_noise_the_timestep_is_not_disturbed(network):
    tsg = TimeStepGuidance(scale=2, embedder=network.time_embed)
    torch.testing.assert_close(guide(network, [tsg], step=0)[0].eps, eps(network, step=0))
    torch.testing.assert_close(guide(network, [replace(tsg, noise=0)])[0].eps, eps(network))


def test_each_block_gets_its_own_permutation_of_its_tokens(network):
    names = ("input_blocks.1.1", "middle_block.1")
    blocks = tuple(find_block(network, name) for name in names)
    seen, permutations = [], []

    def look(_block, inputs):
        seen.append(inputs[0].flatten(2))

    handles = [block.norm.register_forward_pre_hook(look) for block in blocks]
    prediction, _ = guide(network, [TokenPerturbationGuidance(scale=1, blocks=blocks)])
    for handle in handles:
        handle.remove()
    for number, tokens in enumerate((256, 64)):
        order = SAMPLES.uniform([4] * 3, tokens, TOKENS, number).argsort(dim=1)
        permutations.append(order)
        assert not torch.equal(order[0], order[1])
    # The first block is reached by what the first pass gave it, and sees that in another order; nothing is lost.
    plain, shuffled = seen[0], seen[2]
    for row in range(3):
        assert torch.equal(shuffled[row], plain[row][:, permutations[0][row]])
    assert torch.equal(permutations[0].sort(dim=1).values, torch.arange(256).expand(3, -1))
    assert not torch.allclose(prediction.eps, eps(network))


def test_tokens_of_transformers_are_shuffled_too():
    class Block(torch.nn.Module):
        def forward(self, x, c):
            return x + c

    block = Block()
    tokens = torch.arange(24.0).reshape(2, 4, 3)
    order = torch.tensor([[3, 2, 1, 0], [1, 0, 3, 2]])

    class Fixed:
        conditional = None

        def uniform(self, count, purpose, place):
            assert (count, purpose, place) == (4, TOKENS, 0)
            return order.argsort(dim=1).double()

        def denoise(self, *_args):
            self.seen = block(tokens, 100)
            return self

        eps = t = condition = 0
        x_t = tokens

    step = Fixed()
    step.conditional = step
    TokenPerturbationGuidance(scale=1, blocks=(block,)).difference(step)
    wanted = torch.stack([tokens[0].flip(0), tokens[1][[1, 0, 3, 2]]])
    assert torch.equal(step.seen, wanted + 100)


def test_a_skipped_layer_is_as_if_it_were_the_identity(network):
    layers = layers_that_keep_shape(network)
    assert {"middle_block.0", "middle_block.1", "middle_block.2", "input_blocks.1.0"} <= layers.keys()
    assert "output_blocks.0.0" not in layers  # it halves the channels
    names = ("middle_block.1", "input_blocks.1.0")
    guidance = SkippedLayersGuidance(scale=1, layers=tuple(layers[name] for name in names))
    prediction, _ = guide(network, [guidance])
    forwards = [layers[name].forward for name in names]
    for name in names:
        layers[name].forward = lambda x, *_args: x
    try:
        without = eps(network)
    finally:
        for name, forward in zip(names, forwards, strict=True):
            layers[name].forward = forward
    torch.testing.assert_close(prediction.eps, 2 * eps(network) - without)


def test_so_many_layers_are_drawn_for_every_sample_and_step(network):
    layers = tuple(layers_that_keep_shape(network).values())
    guidance = SkippedLayersGuidance(scale=1, layers=layers, drawn=2)
    rows = []
    for t in (4, 5):
        _, guided = guide(network, [guidance], step=t)
        left_out = guidance._left_out(guided.last_step)
        assert (left_out.sum(dim=1) == 2).all()
        rows += left_out.tolist()
    assert len({tuple(row) for row in rows}) > 3
    # A row leaves out its own layers, whatever the others leave out.
    all_out = SkippedLayersGuidance(scale=1, layers=layers, drawn=len(layers))
    torch.testing.assert_close(guide(network, [all_out])[0].eps, guide(network, [replace(all_out, drawn=None)])[0].eps)


def formula(x_t, t, condition, factor):
    """A prediction whose ε is known at every step."""
    eps = torch.sin(x_t) * factor[t].reshape(-1, 1, 1, 1)
    prediction = DIFFUSION.denoiser(lambda x, _t, **_c: torch.cat([x, x], dim=1))(x_t, t, condition)
    return prediction.with_eps(eps)


@pytest.mark.parametrize("decay", [0, 0.6])
def test_momentum_leads_away_from_the_average_of_earlier_steps(decay):
    factor = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0, 64.0])
    guided = GuidedDenoiser(
        partial(formula, factor=factor), DIFFUSION.process, [MomentumGuidance(scale=0.5, decay=decay)]
    )
    average = factor[7]
    for step in reversed(range(8)):
        now = factor[step]
        wanted = now + 0.5 * (now - average)
        torch.testing.assert_close(guided(X, at(step), {}).eps, wanted * torch.sin(X))
        average = decay * average + (1 - decay) * now
    # A new trajectory knows nothing of it.
    again = GuidedDenoiser(partial(formula, factor=factor), DIFFUSION.process, [MomentumGuidance(scale=0.5)])
    torch.testing.assert_close(again(X, at(3), {}).eps, factor[3] * torch.sin(X))


def test_momentum_knows_the_guided_steps_only():
    factor = torch.tensor([1.0, 4.0, 9.0, 16.0, 25.0, 36.0, 49.0, 64.0])
    momentum = MomentumGuidance(scale=1, decay=0, schedule=Schedule(high=0.5))
    guided = GuidedDenoiser(partial(formula, factor=factor), DIFFUSION.process, [momentum])
    found = [guided(X, at(step), {}).eps / torch.sin(X) for step in reversed(range(8))]
    for got, wanted in zip(found, [64, 49, 36, 25, 16, 9 - 7, 4 - 5, 1 - 3], strict=True):
        torch.testing.assert_close(got, torch.full_like(got, float(wanted)), rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_not_called_is_noticed(network, weak):
    for method in (
        TimeStepGuidance(scale=1, embedder=weak.time_embed),
        TokenPerturbationGuidance(scale=1, blocks=(find_block(weak, "middle_block.1"),)),
    ):
        with pytest.raises(ValueError, match="a layer that was to be altered was not heard in the pass"):
            guide(network, [method])
        assert hooks(weak) == 0
    with pytest.raises(RuntimeError, match="stop"), altered(network.time_embed, rows=3):
        raise RuntimeError("stop")
    assert hooks(network) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_network_called_in_parts_is_guided_as_the_whole(network, weak, name):
    def in_parts(x, t, y):
        return torch.cat([network(*part) for part in zip(x.split(2), t.split(2), y.split(2), strict=True)])

    methods = [all_methods(network, weak)[name]]
    whole, parts = guide(network, methods)[0].eps, guide(in_parts, methods)[0].eps
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert name == "momentum" or not torch.allclose(whole, eps(network), atol=1e-3)


@pytest.mark.parametrize("name", ["tsg", "tpg", "skip", "s2"])
@pytest.mark.parametrize("rows", [6, 2])
def test_layers_called_for_other_rows_than_those_of_the_pass_are_refused(network, weak, name, rows):
    def other(x, t, y):
        some = torch.arange(rows) % 3
        return network(x[some], t[some], y[some])[torch.arange(3) % rows]

    with pytest.raises(ValueError, match=rf"a layer's input of {rows} rows was heard in a pass of 3: .* for more or"):
        guide(other, [all_methods(network, weak)[name]])
    assert hooks(network) == 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrap", [lambda guided: guided, lambda guided: with_classifier(guided, lambda x, *_, **__: x)])
def test_a_denoiser_that_is_guided_already_is_refused(network, weak, name, wrap):
    methods = all_methods(network, weak)
    inner = GuidedDenoiser(DIFFUSION.denoiser(network), DIFFUSION.process, [methods["momentum"]])
    with pytest.raises(ValueError, match="guided already: give all guidances to one GuidedDenoiser"):
        GuidedDenoiser(wrap(inner), DIFFUSION.process, [methods[name]], SAMPLES)(X, at(4), Y)


def test_the_weak_network_may_be_guided(network, weak):
    momentum = MomentumGuidance(scale=0.5)
    by = GuidedDenoiser(DIFFUSION.denoiser(weak), DIFFUSION.process, [momentum])
    prediction, _ = guide(network, [Autoguidance(scale=0.7, weak=by)])
    torch.testing.assert_close(prediction.eps, eps(network) + 0.7 * (eps(network) - eps(weak)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: TimeStepGuidance(scale=1, embedder=torch.nn.Identity(), noise=-1),
            "tsg_noise: wanted a finite number",
        ),
        (lambda: MomentumGuidance(scale=1, decay=1), "momentum_decay: wanted 0 to less than 1, got 1"),
        (lambda: TokenPerturbationGuidance(scale=1, blocks=()), "blocks: wanted one attention block or more"),
        (lambda: SkippedLayersGuidance(scale=1, layers=()), "layers: wanted one or more, got none"),
        (lambda: SkippedLayersGuidance(scale=1, layers=(torch.nn.Identity(),), drawn=2), "skip_drawn: wanted 1 to 1"),
        (lambda: IndependentConditionGuidance(scale=1, num_classes=1), "num_classes: wanted 2 or more"),
        (lambda: MomentumGuidance(scale=float("nan")), "guidance scale: wanted a finite number"),
    ],
)
def test_impossible_parameters_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_streams_of_purposes_and_places_are_their_own():
    drawn = [SAMPLES.uniform([4] * 3, 5, purpose, place) for purpose in (3, 10, 12, 13) for place in (0, 1)]
    drawn.append(SAMPLES.uniform([5] * 3, 5, 12, 1))
    assert len({array.numpy().tobytes() for array in drawn}) == len(drawn)
    np.testing.assert_array_equal(drawn[4][1:2], Samples(5, [4]).uniform([4], 5, 12))


def test_methods_that_alter_layers_act_on_transformers_too():
    transformer = dits.filled(DiT(8, 2, 4, 32, 3, 2, num_classes=5))
    about = NetworkConfig(image_size=8, class_cond=True, num_classes=5, null_label=True)
    guided_by = Guided(transformer, about, "random")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    given = DIFFUSION.denoiser(transformer)
    plain = given(x, at(4, 2), {"y": torch.tensor([1, 2])}).eps
    for config in (
        TimeStepConfig(tsg_scale=1),
        TokenPerturbationConfig(tpg_scale=1, tpg_blocks="blocks.0,blocks.2"),
        SkippedLayersConfig(skip_scale=1, skip_layers="blocks.1,blocks.2", skip_drawn=1),
        IndependentConditionConfig(icg_scale=1),
    ):
        guided = GuidedDenoiser(
            given, DIFFUSION.process, [build_method(config, guided_by, Schedule())], Samples(5, [0, 1])
        )
        found = guided(x, at(4, 2), {"y": torch.tensor([1, 2])}).eps
        assert found.isfinite().all()
        assert not torch.allclose(found, plain)
        assert guided.evaluations == 2
    assert hooks(transformer) == 0
