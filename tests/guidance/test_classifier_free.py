"""Classifier-free guidance, alone and with others, on denoisers whose ε is known."""

from dataclasses import dataclass

import pytest
import torch

from guided_diffusion.diffusion.denoiser import Prediction, stacked
from guided_diffusion.diffusion.process import ForwardProcess, get_named_beta_schedule
from guided_diffusion.guidance.base import Guidance, GuidedDenoiser, evaluations
from guided_diffusion.guidance.blur import gaussian_blur
from guided_diffusion.guidance.classifier_free import ClassifierFreeGuidance, null_class
from guided_diffusion.guidance.schedule import Schedule
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.networks.attention import find_block

PROCESS = ForwardProcess(get_named_beta_schedule("cosine", 10))
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
Y = {"y": torch.tensor([1, 2])}
NULL = null_class(4)


def analytic_eps(x, y):
    """Not linear in x, and different for every class."""
    return torch.sin(2 * x) * (1 + 0.3 * y.reshape(-1, 1, 1, 1)) + 0.1 * y.reshape(-1, 1, 1, 1)


class Analytic:
    """A denoiser that is a formula; keeps the rows and labels of its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, condition):
        self.calls.append(condition["y"].tolist())
        eps = analytic_eps(x_t, condition["y"])
        variance = 0.01 * (1 + condition["y"].reshape(-1, 1, 1, 1)) * torch.ones_like(x_t)
        x0 = PROCESS.x0_from_eps(x_t, t, eps)
        return Prediction(PROCESS, x_t, t, condition, eps, x0, variance, variance.log())


@dataclass(frozen=True, eq=False, kw_only=True)
class Blurred(Guidance):
    """What self-attention guidance is with a mask of ones."""

    def difference(self, step):
        base = step.base
        blurred = base.process.q_sample(gaussian_blur(base.x0, 2.0), base.t, base.eps)
        return base.eps - step.denoise(blurred, base.t, base.condition).eps


@dataclass(frozen=True, eq=False, kw_only=True)
class OfTheConditional(Guidance):
    """A guidance that does not look at the base."""

    uses_base = False

    def difference(self, step):
        return step.conditional.eps - step.denoise(0.5 * step.conditional.x_t, step.conditional.t, Y).eps


def cfg(scale=1.5, **settings):
    return ClassifierFreeGuidance(scale=scale, null=NULL, **settings)


def guide(guidances, step=4):
    denoiser = Analytic()
    guided = GuidedDenoiser(denoiser, PROCESS, guidances)
    return guided(X, torch.full((2,), step), Y), denoiser, guided


def test_classifier_free_guidance_is_its_formula():
    prediction, denoiser, guided = guide([cfg()])
    conditional, unconditional = analytic_eps(X, Y["y"]), analytic_eps(X, torch.tensor([4, 4]))
    torch.testing.assert_close(prediction.eps, conditional + 1.5 * (conditional - unconditional))
    assert denoiser.calls == [[1, 2, 4, 4]]
    assert guided.evaluations == 2


def test_everything_but_eps_is_that_of_the_conditional_prediction():
    plain = Analytic()(X, torch.full((2,), 4), Y)
    prediction, _, _ = guide([cfg()])
    assert torch.equal(prediction.variance, plain.variance)
    assert torch.equal(prediction.log_variance, plain.log_variance)
    assert torch.equal(prediction.x_t, X)
    assert torch.equal(prediction.t, plain.t)
    assert prediction.condition is Y
    torch.testing.assert_close(prediction.raw_x0, PROCESS.x0_from_eps(X, plain.t, prediction.eps))


def test_scale_zero_is_the_conditional_model_and_calls_nothing():
    plain = Analytic()(X, torch.full((2,), 4), Y)
    prediction, denoiser, guided = guide([cfg(0.0)])
    assert torch.equal(prediction.eps, plain.eps)
    assert denoiser.calls == [[1, 2]]
    assert guided.evaluations == 1


def test_with_a_degrading_guidance_it_is_equation_25():
    s_c, s_s = 1.5, 0.7
    both = [cfg(s_c), Blurred(scale=s_s)]
    prediction, denoiser, guided = guide(both)
    null = torch.tensor([4, 4])
    t = torch.full((2,), 4)
    conditional, unconditional = analytic_eps(X, Y["y"]), analytic_eps(X, null)
    blurred = gaussian_blur(PROCESS.x0_from_eps(X, t, unconditional), 2.0)
    degraded = analytic_eps(PROCESS.q_sample(blurred, t, unconditional), null)
    expected = conditional + s_c * (conditional - unconditional) + s_s * (unconditional - degraded)
    torch.testing.assert_close(prediction.eps, expected)
    assert denoiser.calls == [[1, 2, 4, 4], [4, 4]]
    assert guided.evaluations == 3
    swapped, _, _ = guide(both[::-1])
    torch.testing.assert_close(swapped.eps, prediction.eps)


def test_a_guidance_of_the_conditional_prediction_does_not_see_the_null_label():
    prediction, denoiser, _ = guide([cfg(), OfTheConditional(scale=0.4)])
    conditional = analytic_eps(X, Y["y"])
    expected = conditional + 1.5 * (conditional - analytic_eps(X, torch.tensor([4, 4])))
    expected += 0.4 * (conditional - analytic_eps(0.5 * X, Y["y"]))
    torch.testing.assert_close(prediction.eps, expected)
    assert denoiser.calls == [[1, 2, 4, 4], [1, 2]]


@pytest.mark.parametrize(
    ("guidances", "calls"),
    [
        ([cfg(schedule=Schedule(every=2))], [2, 1, 2, 1]),
        # The base stays unconditional where only the other guidance is computed.
        ([cfg(schedule=Schedule(every=3)), Blurred(scale=1.0)], [3, 3, 3, 3]),
        ([cfg(schedule=Schedule(every=2)), Blurred(scale=1.0, schedule=Schedule(every=2))], [3, 1, 3, 1]),
        ([cfg(schedule=Schedule(every=4)), OfTheConditional(scale=1.0)], [3, 2, 2, 2]),
        ([cfg(schedule=Schedule(start=2)), Blurred(scale=1.0)], [2, 2, 3, 3]),
    ],
)
def test_passes_with_reuse_and_intervals(guidances, calls):
    guided = GuidedDenoiser(Analytic(), PROCESS, guidances)
    made = []
    for step in reversed(range(4)):
        before = guided.evaluations
        guided(X, torch.full((2,), step), Y)
        made.append(guided.evaluations - before)
    assert made == calls
    assert evaluations(guidances, PROCESS.first(4)) == sum(calls)


def test_the_base_does_not_change_with_reuse():
    guided = GuidedDenoiser(Analytic(), PROCESS, [cfg(schedule=Schedule(every=3)), Blurred(scale=1.0)])
    for step in reversed(range(4)):
        guided(X, torch.full((2,), step), Y)
        assert guided.last_step.base.condition["y"].tolist() == [4, 4]
        assert guided.last_step.conditional.condition is Y


def test_one_batch_equals_two_calls(small_conditional):
    network, diffusion = small_conditional
    denoiser, t = diffusion.denoiser(network), torch.full((2,), 4)
    conditional, unconditional = denoiser(X, t, Y), denoiser(X, t, NULL(Y))
    guided = GuidedDenoiser(denoiser, diffusion.process, [cfg()])(X, t, Y)
    expected = conditional.eps + 1.5 * (conditional.eps - unconditional.eps)
    torch.testing.assert_close(guided.eps, expected)
    torch.testing.assert_close(guided.variance, conditional.variance)
    assert not torch.allclose(conditional.eps, unconditional.eps)


def test_self_attention_is_that_of_the_unconditional_rows(small_conditional):
    network, diffusion = small_conditional
    sag = SelfAttentionGuidance(scale=1.0, block=find_block(network, "output_blocks.2.1"))
    denoiser, t = diffusion.denoiser(network), torch.full((2,), 4)
    scores = []
    for guidances, condition in [([sag], Y), ([sag], NULL(Y)), ([cfg(), sag], Y)]:
        guided = GuidedDenoiser(denoiser, diffusion.process, guidances)
        guided(X, t, condition)
        scores.append(guided.last_step.recorded[sag][sag.block])
    torch.testing.assert_close(scores[2], scores[1])
    assert not torch.allclose(scores[2], scores[0], atol=1e-4)


def test_conditions_are_joined_where_they_have_rows():
    shared, words = torch.zeros(7), object()
    first = {"y": torch.tensor([1, 2]), "more": {"rows": torch.ones(2, 3)}, "maps": [torch.ones(2, 1)], "w": words}
    second = {"y": torch.tensor([4, 4]), "more": {"rows": torch.zeros(2, 3)}, "maps": [torch.zeros(2, 1)], "w": words}
    both = stacked(first | {"shared": shared, "number": 3}, second | {"shared": shared, "number": 3}, 2)
    assert both["y"].tolist() == [1, 2, 4, 4]
    assert both["more"]["rows"].mean(dim=1).tolist() == [1, 1, 0, 0]
    assert both["maps"][0].flatten().tolist() == [1, 1, 0, 0]
    assert both["shared"] is shared
    assert both["w"] is words
    assert both["number"] == 3
    with pytest.raises(ValueError, match=r"null condition: wanted the keys \['y'\], got \['z'\]"):
        stacked({"y": shared}, {"z": shared}, 2)


def test_one_row_of_a_condition_stands_for_all():
    both = stacked({"y": torch.tensor([2])}, {"y": torch.tensor([4])}, 3)
    assert both["y"].tolist() == [2, 2, 2, 4, 4, 4]
    low_res = torch.ones(3, 2)
    assert stacked({"low_res": low_res}, {"low_res": low_res}, 3)["low_res"].shape == (6, 2)
    embedding = torch.ones(1, 2, 5)
    assert stacked(embedding, 0 * embedding, 2).shape == (4, 2, 5)
    assert stacked(embedding, embedding, 2) is embedding


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.tensor([1, 2]), torch.tensor([4, 4])), (torch.tensor(1.0), torch.tensor(1.0)), ("a cat", ""), (3, 4)],
)
def test_what_differs_and_cannot_be_joined_is_refused(first, second):
    with pytest.raises(ValueError, match=r"rows or of one|only tensors may differ"):
        stacked({"y": first}, {"y": second}, 3)


def test_one_label_for_a_batch_is_guided_like_a_label_each(small_conditional):
    network, diffusion = small_conditional
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def sampled(labels, **more):
        kwargs = {"y": torch.tensor(labels)}
        return diffusion.ddim_sample_loop(network, noise.shape, noise=noise, model_kwargs=kwargs, **more)

    guidance = ClassifierFreeGuidance(scale=3.0, null=null_class(4))
    torch.testing.assert_close(sampled([2], guidance=guidance), sampled([2, 2], guidance=guidance))
    assert not torch.allclose(sampled([2], guidance=guidance), sampled([2]), atol=1e-3)


def test_two_null_conditions_are_refused():
    other = ClassifierFreeGuidance(scale=1.0, null=null_class(0))
    with pytest.raises(ValueError, match="different null conditions"):
        GuidedDenoiser(Analytic(), PROCESS, [cfg(), other])
    with pytest.raises(ValueError, match="different null conditions"):
        evaluations([cfg(), other], PROCESS)
