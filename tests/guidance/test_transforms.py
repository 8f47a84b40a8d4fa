"""What differences go through before they are added, against what is known of it."""

import math

import pytest
import torch

from guided_diffusion.diffusion.denoiser import ModelMeanType, Prediction
from guided_diffusion.diffusion.process import ForwardProcess, NoiseLevels, get_named_beta_schedule
from guided_diffusion.guidance.base import Guidance, GuidedDenoiser, evaluations
from guided_diffusion.guidance.methods.momentum import MomentumGuidance
from guided_diffusion.guidance.methods.transforms import FrequencyScale, ProjectedGuidance, low_frequencies, optimised

PROCESS = ForwardProcess(get_named_beta_schedule("cosine", 10))
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
DELTA = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))


class Given(Guidance):
    """A Δ that is known: DELTA times the step's number."""

    passes = 0

    def difference(self, step):
        return DELTA * (1 + step.conditional.t.reshape(-1, 1, 1, 1))


def denoiser(x_t, t, condition, process=PROCESS):
    eps = torch.cos(3 * x_t)
    return Prediction(process, x_t, t, condition, eps, process.x0_from_eps(x_t, t, eps, otherwise=x_t))


def trajectory(*transforms, scale=0.5, steps=(4,), process=PROCESS):
    """The guided predictions, and the last one's unguided belief."""
    guided = GuidedDenoiser(lambda *of: denoiser(*of, process), process, [Given(scale=scale, transforms=transforms)])
    found = [guided(X, torch.full((2,), step), {}) for step in steps]
    return found, guided.last_step.conditional


def x0_difference(prediction, plain):
    return prediction.raw_x0 - plain.raw_x0


def inner(a, b):
    return (a * b).flatten(1).sum(dim=1)


def test_without_any_the_difference_is_added_as_it_is():
    [prediction], plain = trajectory()
    torch.testing.assert_close(prediction.eps, plain.eps + 0.5 * 5 * DELTA)


def test_all_off_is_nothing_and_costs_nothing():
    [wanted], _ = trajectory()
    [got], _ = trajectory(ProjectedGuidance(eta=1), FrequencyScale(1))
    torch.testing.assert_close(got.eps, wanted.eps)
    assert evaluations([Given(scale=1, transforms=(optimised,))], PROCESS) == 10


def test_projection_takes_away_what_lies_along_the_belief():
    [prediction], plain = trajectory(ProjectedGuidance(eta=0))
    moved = x0_difference(prediction, plain)
    torch.testing.assert_close(inner(moved, plain.raw_x0), torch.zeros(2), atol=1e-3, rtol=0)
    [whole], _ = trajectory()
    torch.testing.assert_close(inner(moved, x0_difference(whole, plain)), inner(moved, moved), rtol=1e-4, atol=1e-4)
    [half], _ = trajectory(ProjectedGuidance(eta=0.5))
    torch.testing.assert_close(half.eps, (prediction.eps + whole.eps) / 2)


def test_the_cap_is_a_norm_of_the_difference_in_x0():
    [prediction], plain = trajectory(ProjectedGuidance(eta=1, cap=0.25), scale=2)
    moved = x0_difference(prediction, plain)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), torch.full((2,), 2 * 0.25), rtol=1e-4, atol=0)
    [whole], _ = trajectory(scale=2)
    torch.testing.assert_close(trajectory(ProjectedGuidance(eta=1, cap=1e6), scale=2)[0][0].eps, whole.eps)
    norms = x0_difference(whole, plain).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, x0_difference(whole, plain) * (0.5 / norms).reshape(-1, 1, 1, 1), rtol=1e-3,
                               atol=1e-5)  # fmt: skip


def test_momentum_adds_earlier_differences_in_x0():
    apg = ProjectedGuidance(eta=1, momentum=-0.5)
    found, _ = trajectory(apg, scale=1, steps=(4, 3, 2))
    plain, _ = trajectory(scale=0, steps=(4, 3, 2))
    alone, _ = trajectory(scale=1, steps=(4, 3, 2))
    running = 0
    for prediction, without, fresh in zip(found, plain, alone, strict=True):
        running = x0_difference(fresh, without) - 0.5 * running
        torch.testing.assert_close(x0_difference(prediction, without), running, rtol=1e-3, atol=1e-4)
    # It dies with the trajectory, and two guidances do not share it.
    again, _ = trajectory(apg, scale=1, steps=(3,))
    torch.testing.assert_close(again[0].eps, alone[1].eps, rtol=1e-4, atol=1e-4)
    both = GuidedDenoiser(denoiser, PROCESS, [Given(scale=0.5, transforms=(apg,)), Given(scale=0.5, transforms=(apg,))])
    for step, prediction in zip((4, 3, 2), found, strict=True):
        torch.testing.assert_close(both(X, torch.full((2,), step), {}).eps, prediction.eps, rtol=1e-3, atol=1e-4)


def test_where_nothing_but_noise_is_left_the_difference_is_kept():
    process = NoiseLevels([1.0, 0.6, 0.0], [0.0, 0.8, 1.0], torch.arange(3))
    apg = ProjectedGuidance(eta=0, cap=0.1, momentum=-0.5)
    [first, second], _ = trajectory(apg, steps=(2, 1), process=process)
    torch.testing.assert_close(first.eps, denoiser(X, torch.full((2,), 2), {}, process).eps + 0.5 * 3 * DELTA)
    assert second.eps.isfinite().all()
    [alone], _ = trajectory(apg, steps=(1,), process=process)
    torch.testing.assert_close(second.eps, alone.eps)


def test_cfg_zero_leads_away_from_the_optimally_scaled_weak_prediction():
    [prediction], plain = trajectory(optimised)
    weak = plain.eps - 5 * DELTA
    best = (inner(plain.eps, weak) / inner(weak, weak)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(prediction.eps, plain.eps + 0.5 * (plain.eps - best * weak))
    # What is added is orthogonal to the weak prediction.
    torch.testing.assert_close(inner(prediction.eps - plain.eps, weak), torch.zeros(2), atol=1e-3, rtol=0)


def test_low_frequencies_of_a_plane_and_of_a_checkerboard():
    constant = torch.full((1, 2, 16, 16), 3.0)
    torch.testing.assert_close(low_frequencies(constant), constant)
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1).expand(1, 2, 16, 16)
    torch.testing.assert_close(low_frequencies(board), torch.zeros(1, 2, 16, 16), atol=1e-6, rtol=0)
    assert low_frequencies(torch.randn(1, 1, 7, 9)).shape == (1, 1, 7, 9)


def test_low_frequencies_get_their_share_of_the_scale():
    [prediction], plain = trajectory(FrequencyScale(0.25))
    low = low_frequencies(5 * DELTA)
    wanted = plain.eps + 0.5 * (5 * DELTA - low) + 0.5 * 0.25 * low
    torch.testing.assert_close(prediction.eps, wanted)


def test_they_are_applied_in_their_order():
    [one], _ = trajectory(FrequencyScale(0), ProjectedGuidance(cap=0.1))
    [other], _ = trajectory(ProjectedGuidance(cap=0.1), FrequencyScale(0))
    assert not torch.allclose(one.eps, other.eps)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ProjectedGuidance(eta=math.inf), "apg_eta: wanted a finite number"),
        (lambda: ProjectedGuidance(cap=0), "apg_cap: wanted more than 0"),
        (lambda: ProjectedGuidance(momentum=1), "apg_momentum: wanted more than -1 and less than 1"),
        (lambda: FrequencyScale(math.nan), "low_frequencies: wanted a finite number"),
    ],
)
def test_impossible_parameters_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_networks_of_velocities_have_momentum_and_the_optimised_scale_of_velocities():
    process = NoiseLevels([1.0, 0.6], [0.0, 0.8], torch.arange(2))

    def by_velocity(x_t, t, condition):
        x0, eps = process.from_velocity(x_t, t, torch.cos(3 * x_t))
        return Prediction(process, x_t, t, condition, eps, x0, predicts=ModelMeanType.VELOCITY)

    t = torch.ones(2, dtype=torch.int64)
    guided = GuidedDenoiser(by_velocity, process, [MomentumGuidance(scale=1, decay=0)])
    guided(X + 1, t, {})
    moved = guided(X, t, {}).output
    torch.testing.assert_close(moved, 2 * torch.cos(3 * X) - torch.cos(3 * (X + 1)), atol=1e-5, rtol=1e-4)
    guided = GuidedDenoiser(by_velocity, process, [Given(scale=1, transforms=(optimised,))])
    v, weak = torch.cos(3 * X), by_velocity(X, t, {}).with_eps(by_velocity(X, t, {}).eps - 2 * DELTA).output
    best = (inner(v, weak) / inner(weak, weak)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(guided(X, t, {}).output, 2 * v - best * weak, atol=1e-5, rtol=1e-4)
