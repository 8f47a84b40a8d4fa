"""What a guidance is, the step it sees, and the sum: ε̃ = ε + Σ scale · Δ."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Condition, Denoiser, Prediction, stacked
from ..diffusion.noise import MASK, Samples
from ..diffusion.process import NoiseLevels
from ..diffusion.times import on_host
from ..networks.attention import Scores
from .schedule import Schedule

NullCondition = Callable[[Condition], Condition]
"""What makes of a condition the one of the unconditional pass: the same keys and shapes."""

Transform = Callable[[Tensor, "Step", "Guidance"], Tensor]
"""What makes of a guidance's Δ at a step the one that is added; what it remembers is in the step's memory."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Guidance(ABC):
    """One difference Δ in ε; the guided prediction is ε(x, c) + Σ scale · Δ.

    scale: the paper's s, 0 = off. schedule: at which steps, and by what factor of the scale. channels: how many
    channels of ε it acts on, the first ones; None: all. transforms: what Δ goes through, in this order, before it is
    scaled and added.
    """

    uses_base: ClassVar[bool] = True
    """Whether `difference` looks at `step.base` or at what was recorded, and not at `step.conditional` alone."""

    passes: ClassVar[int] = 1
    """Network passes that one difference takes beside the shared ones."""

    weak_passes: ClassVar[int] = 0
    """Passes of a weak network of its own that one difference takes."""

    scale: float
    schedule: Schedule = field(default_factory=Schedule)
    channels: int | None = None
    transforms: Sequence[Transform] = ()

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale: wanted a finite number, got {self.scale}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels: wanted 1 or more, got {self.channels}")

    def record(self) -> AbstractContextManager[Scores]:
        """The recorder to hold open during the shared pass; what it yields comes back as `step.recorded[self]`."""
        return nullcontext(Scores())

    def unconditional_by(self) -> NullCondition | None:
        """What makes the condition of the unconditional pass, if Δ needs that pass."""
        return None

    def networks(self) -> Sequence[nn.Module]:
        """The networks of its own, beside the one that is guided."""
        return ()

    @abstractmethod
    def difference(self, step: "Step") -> Tensor:
        """Δ of x_t's shape, without the scale."""

    def transformed(self, step: "Step") -> Tensor:
        """Δ as it is added, but for the scale."""
        difference = self.difference(step)
        for transform in self.transforms:
            difference = transform(difference, step, self)
        return difference

    def x0_difference(self, step: "Step") -> Tensor | float:  # noqa: ARG002
        """Δ in x̂_0, where the step has ᾱ = 0 and ε says nothing of x̂_0; 0 if the technique knows none."""
        return 0.0

    def acting(self, difference: Tensor | float) -> Tensor | float:
        """A difference [N, C, …] where this guidance acts: kept on its channels, 0 on the others."""
        if self.channels is None or not isinstance(difference, Tensor):
            return difference
        kept, others = difference[:, : self.channels], difference[:, self.channels :]
        return torch.cat([kept, torch.zeros_like(others)], dim=1)


@dataclass(eq=False)
class Observation:
    """What the shared passes of a step have shown: all that a mask is chosen by.

    base: what guidances degrade, the unconditional ε(x, ∅) where that pass is made (Hong et al., Eq. 25), else the
    conditional one. recorded: attention of the base's rows, by guidance and block. samples: which samples the rows are,
    None where that is not known. memory: what is kept until the end of the trajectory, by who keeps it.
    """

    base: Prediction
    recorded: Mapping[Guidance, Scores]
    samples: Samples | None = None
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def indices(self) -> Sequence[int]:
        """Which samples the rows are; where that is not known, their places in the batch."""
        return self.samples.indices if self.samples else range(len(self.base.x_t))

    def uniform(self, count: int, purpose: int = MASK, place: int = 0) -> Tensor:
        """Numbers in [0, 1) for masks, or another purpose, [N, count] float64 on the CPU, the same at every call.

        A function of sample, step, purpose and place alone; where the samples are not known, from torch's generator.
        """
        if self.samples:
            return self.samples.uniform(on_host(self.base.t), count, purpose, place)
        return torch.rand(len(self.base.x_t), count, dtype=torch.float64)

    def normal(self, count: int, purpose: int) -> Tensor:
        """Standard normal numbers, as `uniform`."""
        if self.samples:
            return self.samples.normal(on_host(self.base.t), count, purpose)
        return torch.randn(len(self.base.x_t), count, dtype=torch.float64)


class Step(Observation):
    """One sampling step as guidances see it: what its shared passes have shown, and more passes.

    conditional: ε(x, c), which guidance is added to, from one batch with `base`; without `null`, which makes the
    condition of the unconditional pass, the two are one. due: the guidances that attention is recorded for.
    evaluations: network passes made so far, in units of one pass of x_t; weak_evaluations: those of weak networks.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        due: Sequence[Guidance] = (),
        null: NullCondition | None = None,
        samples: Samples | None = None,
        memory: dict[Any, Any] | None = None,
    ):
        self._denoiser = denoiser
        self.evaluations = self.weak_evaluations = 0
        of = len(x_t) if null is None else 2 * len(x_t)
        with ExitStack() as stack:
            recorded = {guidance: stack.enter_context(guidance.record()) for guidance in due}
            for scores in recorded.values():
                scores.skipped = of - len(x_t)  # the base's rows are the last ones
            if null is None:
                base = self.conditional = self.denoise(x_t, t, condition)
            else:
                self.conditional, base = self._denoise_both(x_t, t, condition, null(condition))
        for scores in recorded.values():
            scores.check(of)
        super().__init__(base, recorded, samples, {} if memory is None else memory)

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """One more network pass."""
        self.evaluations += 1
        return self._unguided(x_t, t, condition)

    def denoise_by(self, weak: Denoiser, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """One pass of a weak network."""
        self.weak_evaluations += 1
        return weak(x_t, t, condition)

    def _denoise_both(
        self, x_t: Tensor, t: Tensor, condition: Condition, unconditional: Condition
    ) -> tuple[Prediction, Prediction]:
        self.evaluations += 2
        rows = len(x_t)
        both = self._unguided(torch.cat([x_t, x_t]), torch.cat([t, t]), stacked(condition, unconditional, rows))
        first, second = both.rows(slice(rows), condition), both.rows(slice(rows, None), unconditional)
        return replace(first, t=t), replace(second, t=t)  # the host may know this t, but not a part of another

    def _unguided(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """What the denoiser predicts; a ValueError if it is guided, as that expects to be called once a step."""
        prediction = self._denoiser(x_t, t, condition)
        if prediction.guided:
            raise ValueError("the denoiser to be guided is guided already: give all guidances to one GuidedDenoiser")
        return prediction


@dataclass(frozen=True, eq=False)
class Due:
    """What is due at one step.

    weights: the guidances that act, and by what scale at each row. computed: those of them whose Δ is computed; that of
    the others is used again. null: makes the condition of the unconditional pass, None where that pass is not made.
    """

    weights: Mapping[Guidance, Sequence[float]]
    computed: Sequence[Guidance]
    null: NullCondition | None

    @property
    def evaluations(self) -> int:
        """Network passes of the step, in units of one pass of x_t."""
        return 1 + (self.null is not None) + sum(guidance.passes for guidance in self.computed)

    @property
    def weak_evaluations(self) -> int:
        """Passes of weak networks."""
        return sum(guidance.weak_passes for guidance in self.computed)


class Timetable:
    """Which network passes the steps of one trajectory make.

    Guidances with scale 0, and steps outside a guidance's schedule, cost none. Inside the schedule of a guidance that
    needs the unconditional pass, the base is unconditional for all guidances, also where that guidance's own difference
    is used again: the pass is made at every step where a guidance that uses it is computed.
    """

    def __init__(self, guidances: Sequence[Guidance], process: NoiseLevels):
        self.guidances = [guidance for guidance in guidances if guidance.scale != 0]
        if len({guidance.unconditional_by() for guidance in self.guidances} - {None}) > 1:
            raise ValueError("guidances with different null conditions cannot share the unconditional pass")
        self._factors = {guidance: guidance.schedule.factors(process) for guidance in self.guidances}
        self._steps_guided = dict.fromkeys(self.guidances, 0)

    def next(self, times: Sequence[int]) -> Due:
        """What is due at the step that follows, with its rows at `times`."""
        rows = {guidance: [guidance.scale * factors[t] for t in times] for guidance, factors in self._factors.items()}
        inside = {guidance: weights for guidance, weights in rows.items() if any(weights)}
        computed = [guidance for guidance in inside if self._steps_guided[guidance] % guidance.schedule.every == 0]
        null = None
        if any(guidance.uses_base for guidance in computed):
            null = next((asked for guidance in inside if (asked := guidance.unconditional_by())), None)
        for guidance in inside:
            self._steps_guided[guidance] += 1
        return Due(inside, computed, null)


def evaluations(guidances: Sequence[Guidance], process: NoiseLevels) -> int:
    """The network evaluations that a trajectory of a process takes, counted without making any."""
    return sum(due.evaluations for due in _all_due(guidances, process))


def weak_evaluations(guidances: Sequence[Guidance], process: NoiseLevels) -> int:
    """Those of weak networks."""
    return sum(due.weak_evaluations for due in _all_due(guidances, process))


def _all_due(guidances: Sequence[Guidance], process: NoiseLevels) -> list[Due]:
    timetable = Timetable(guidances, process)
    return [timetable.next([t]) for t in reversed(range(process.num_timesteps))]


class GuidedDenoiser:
    """A denoiser with guidances added: itself a denoiser, for one trajectory, to be called once a step.

    Make a new one for every trajectory: between steps it remembers differences that are used again, and what guidances
    keep. So another one cannot guide it again: a ValueError. `last_step` is the newest Step; `evaluations` counts
    network passes of the whole trajectory, `weak_evaluations` those of weak networks. samples: which samples the rows
    are, for random choices that belong to a sample.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: NoiseLevels,
        guidances: Sequence[Guidance] = (),
        samples: Samples | None = None,
    ):
        self._denoiser = denoiser
        self._samples = samples
        self._timetable = Timetable(guidances, process)
        self._differences: dict[Guidance, Tensor] = {}
        self._memory: dict[Any, Any] = {}
        self.last_step: Step | None = None
        self.evaluations = self.weak_evaluations = 0

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        # Nothing waits for the device, unless the host does not know the time.
        due = self._timetable.next(on_host(t) if self._timetable.guidances else ())
        step = self.last_step = Step(
            self._denoiser, x_t, t, condition, due.computed, due.null, self._samples, self._memory
        )
        eps, x0 = step.conditional.eps, step.conditional.raw_x0
        for guidance, weights in due.weights.items():
            if guidance in due.computed:
                self._differences[guidance] = guidance.acting(guidance.transformed(step))
            weight = weights[0]
            if len(set(weights)) > 1:
                weight = torch.tensor(weights, dtype=eps.dtype, device=eps.device).reshape(-1, *[1] * (eps.ndim - 1))
            eps = eps + weight * self._differences[guidance]
            x0 = x0 + weight * guidance.acting(guidance.x0_difference(step))
        self.evaluations += step.evaluations
        self.weak_evaluations += step.weak_evaluations
        given = step.conditional.with_eps(eps, otherwise=x0) if due.weights else step.conditional
        return replace(given, guided=True)
