"""What a guidance is, the step it sees, and the sum: ε̃ = ε + Σ scale · Δ."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..diffusion.denoiser import Condition, Denoiser, Prediction, stacked
from ..diffusion.noise import Samples
from ..diffusion.process import ForwardProcess, NoiseLevels
from ..networks.attention import Attends

NullCondition = Callable[[Condition], Condition]
"""What makes of a condition the one of the unconditional pass: the same keys and shapes."""


@dataclass(frozen=True)
class Interval:
    """The part of the process that is guided: low ≤ t/T < high (1 = noise) and, in respaced steps, t < start."""

    low: float = 0.0
    high: float = 1.0
    start: int | None = None

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"guide_interval: wanted 0 ≤ low < high ≤ 1, got {self.low},{self.high}")
        if self.start is not None and self.start < 0:
            raise ValueError(f"guide_start: wanted 0 or more, got {self.start}")

    def contains(self, t: Tensor, num_timesteps: int) -> Tensor:
        """Which of the steps [N] are guided, [N] bool."""
        fraction = t.double() / num_timesteps
        inside = (fraction >= self.low) & (fraction < self.high)
        return inside if self.start is None else inside & (t < self.start)


@dataclass(frozen=True, eq=False, kw_only=True)
class Guidance(ABC):
    """One difference Δ in ε; the guided prediction is ε(x, c) + Σ scale · Δ.

    scale: the paper's s, 0 = off. every: Δ is computed at guided steps 0, every, 2·every, … and used again between.
    """

    uses_base: ClassVar[bool] = True
    """Whether `difference` looks at `step.base` or at what was recorded, and not at `step.conditional` alone."""

    passes: ClassVar[int] = 1
    """Network passes that one difference takes beside the shared ones."""

    scale: float
    interval: Interval = field(default_factory=Interval)
    every: int = 1

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale: wanted a finite number, got {self.scale}")
        if self.every < 1:
            raise ValueError(f"guide_every: wanted 1 or more, got {self.every}")

    def record(self) -> AbstractContextManager[dict[Attends, Tensor]]:
        """The recorder to hold open during the shared pass; what it yields comes back as `step.recorded[self]`."""
        return nullcontext({})

    def unconditional_by(self) -> NullCondition | None:
        """What makes the condition of the unconditional pass, if Δ needs that pass."""
        return None

    @abstractmethod
    def difference(self, step: "Step") -> Tensor:
        """Δ of x_t's shape, without the scale."""

    def x0_difference(self, step: "Step") -> Tensor | float:  # noqa: ARG002
        """Δ in x̂_0, where the step has ᾱ = 0 and ε says nothing of x̂_0; 0 if the technique knows none."""
        return 0.0


class Step:
    """One sampling step as guidances see it: the shared predictions, what was recorded, and more passes.

    conditional: ε(x, c), which guidance is added to. base: what guidances degrade, the unconditional ε(x, ∅) where
    `null` makes its condition (Hong et al., Eq. 25), else the conditional one. Both come from one batch. recorded:
    attention of the base's rows, by guidance. evaluations: network passes made so far, in units of one pass of x_t.
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
    ):
        self._denoiser = denoiser
        self._samples = samples
        self.evaluations = 0
        rows = len(x_t)
        with ExitStack() as stack:
            recorded = {guidance: stack.enter_context(guidance.record()) for guidance in due}
            if null is None:
                self.base = self.conditional = self.denoise(x_t, t, condition)
            else:
                self.conditional, self.base = self._denoise_both(x_t, t, condition, null(condition))
        self.recorded = {
            guidance: {block: score[-rows:] for block, score in scores.items()} for guidance, scores in recorded.items()
        }

    @property
    def indices(self) -> Sequence[int]:
        """Which samples the rows are; where that is not known, their places in the batch."""
        return self._samples.indices if self._samples else range(len(self.base.x_t))

    def uniform(self, count: int) -> Tensor:
        """Numbers in [0, 1) for masks, [N, count] float64 on the CPU, the same for every guidance of a step.

        A function of sample and step alone; where the samples are not known, from torch's generator.
        """
        if self._samples:
            return self._samples.uniform(self.base.t.tolist(), count)
        return torch.rand(len(self.base.x_t), count, dtype=torch.float64)

    def denoise(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """One more network pass."""
        self.evaluations += 1
        return self._denoiser(x_t, t, condition)

    def _denoise_both(
        self, x_t: Tensor, t: Tensor, condition: Condition, unconditional: Condition
    ) -> tuple[Prediction, Prediction]:
        self.evaluations += 2
        rows = len(x_t)
        both = self._denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), stacked(condition, unconditional, rows))
        return both.rows(slice(rows), condition), both.rows(slice(rows, None), unconditional)


def evaluations(guidances: Sequence[Guidance], num_timesteps: int) -> int:
    """The network evaluations that a trajectory of so many steps takes, counted without making any."""
    guidances = [guidance for guidance in guidances if guidance.scale != 0]
    guided, total = dict.fromkeys(guidances, 0), 0
    for t in reversed(range(num_timesteps)):
        active = [g for g in guidances if bool(g.interval.contains(torch.tensor([t]), num_timesteps))]
        due = [g for g in active if guided[g] % g.every == 0]
        unconditional = any(g.unconditional_by() for g in active) and any(g.uses_base for g in due)
        total += 1 + unconditional + sum(g.passes for g in due)
        for guidance in active:
            guided[guidance] += 1
    return total


class GuidedDenoiser:
    """A denoiser with guidances added: itself a denoiser, for one trajectory.

    Make a new one for every trajectory: between steps it remembers differences that are used again. Guidances with
    scale 0, and steps outside a guidance's interval, cost no network pass. Inside the interval of a guidance that needs
    the unconditional pass, `step.base` is unconditional for all guidances, also where that guidance's own difference is
    used again: the pass is made at every step where a guidance that uses it is computed. `last_step` is the newest
    Step; `evaluations` counts network passes of the whole trajectory. samples: which samples the rows are, for masks
    that belong to a sample.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: ForwardProcess | NoiseLevels,
        guidances: Sequence[Guidance] = (),
        samples: Samples | None = None,
    ):
        self._denoiser = denoiser
        self._process = process
        self._samples = samples
        self._guidances = [guidance for guidance in guidances if guidance.scale != 0]
        if len({guidance.unconditional_by() for guidance in self._guidances} - {None}) > 1:
            raise ValueError("guidances with different null conditions cannot share the unconditional pass")
        self._steps_guided = dict.fromkeys(self._guidances, 0)
        self._differences: dict[Guidance, Tensor] = {}
        self.last_step: Step | None = None
        self.evaluations = 0

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        inside = {g: g.interval.contains(t, self._process.num_timesteps) for g in self._guidances}
        active = [g for g in self._guidances if inside[g].any()]
        due = [g for g in active if self._steps_guided[g] % g.every == 0]
        null = None
        if any(g.uses_base for g in due):
            null = next((asked for g in active if (asked := g.unconditional_by())), None)
        step = self.last_step = Step(self._denoiser, x_t, t, condition, due, null, self._samples)
        eps, x0 = step.conditional.eps, step.conditional.raw_x0
        for guidance in active:
            if guidance in due:
                self._differences[guidance] = guidance.difference(step)
            self._steps_guided[guidance] += 1
            weight = guidance.scale * inside[guidance].reshape(-1, *[1] * (x_t.ndim - 1))
            eps = eps + weight * self._differences[guidance]
            x0 = x0 + weight * guidance.x0_difference(step)
        self.evaluations += step.evaluations
        return step.conditional.with_eps(eps, otherwise=x0) if active else step.conditional
