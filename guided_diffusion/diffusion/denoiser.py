"""A denoiser turns (x_t, t, condition) into a Prediction; here is the one made of a network."""

import enum
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .process import NoiseLevels

Condition = Mapping[str, Any]
"""What the network is conditioned on, by argument name: tensors, rows first (`y`, `low_res`); values that are not
tensors, or have another number of rows, are shared by all rows; empty: nothing."""


class ModelMeanType(enum.Enum):
    """What the network's first channels predict."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()
    VELOCITY = enum.auto()
    """The process's v: that of Salimans & Ho (2022), or that of a `LinearPath`."""


class ModelVarType(enum.Enum):
    """Where the variance of p(x_{t−1} | x_t) comes from."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()

    @property
    def learned(self) -> bool:
        return self in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def _unrestricted(x0: Tensor) -> Tensor:
    return x0


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network believes at (x_t, t, condition); all of x_t's shape [N, C, H, W], t [N] int64.

    variance: None where the sampler has its own.
    """

    process: NoiseLevels
    x_t: Tensor
    t: Tensor
    condition: Condition
    eps: Tensor
    raw_x0: Tensor
    variance: Tensor | None = None
    log_variance: Tensor | None = None
    restrict: Callable[[Tensor], Tensor] = _unrestricted
    """What makes x̂_0 of the raw one: the user's denoised_fn and the clamp to [−1, 1]."""
    network_mean: Tensor | None = None
    """The posterior mean itself, where the network predicts x_{t−1}."""
    log_prob_grad: Tensor | None = None
    """scale · ∇ log p(y | x_t) of a classifier; every sampler applies it in its own way."""
    predicts: ModelMeanType = ModelMeanType.EPSILON
    """What the network's own output is."""
    guided: bool = False
    """Whether a `GuidedDenoiser` made it."""

    @cached_property
    def x0(self) -> Tensor:
        """x̂_0 after denoised_fn and clamp."""
        return self.restrict(self.raw_x0)

    @cached_property
    def mean(self) -> Tensor:
        """Mean of p(x_{t−1} | x_t), before any classifier's shift."""
        if self.network_mean is not None:
            return self.network_mean
        return self.process.q_posterior_mean(self.x0, self.x_t, self.t)

    @property
    def output(self) -> Tensor:
        """The network output that this belief stands for, also where guidance has changed it."""
        if self.predicts is ModelMeanType.EPSILON:
            return self.eps
        if self.predicts is ModelMeanType.START_X:
            return self.raw_x0
        if self.predicts is ModelMeanType.VELOCITY:
            return self.process.velocity(self.raw_x0, self.t, self.eps)
        return self.network_mean

    def with_output(self, output: Tensor) -> "Prediction":
        """What would be believed at the same x_t, had the network put out this."""
        eps, x0, mean = _beliefs(self.predicts, self.process, self.x_t, self.t, output)
        return replace(self, eps=eps, raw_x0=x0, network_mean=mean)

    def with_eps(self, eps: Tensor, otherwise: Tensor | None = None) -> "Prediction":
        """The same belief with another ε: x̂_0 and the mean follow it.

        Where ᾱ = 0 and ε says nothing of x̂_0, x̂_0 is `otherwise`, by default kept.
        """
        kept = self.raw_x0 if otherwise is None else otherwise
        raw_x0 = self.process.x0_from_eps(self.x_t, self.t, eps, otherwise=kept)
        mean = self.network_mean
        if mean is not None:
            mean = mean + self.process.q_posterior_mean(raw_x0, self.x_t, self.t)
            mean = mean - self.process.q_posterior_mean(self.raw_x0, self.x_t, self.t)
        return replace(self, eps=eps, raw_x0=raw_x0, network_mean=mean)

    def rows(self, part: slice, condition: Condition) -> "Prediction":
        """The same belief for some of the rows, which have this condition."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        cut = {name: value[part] for name, value in tensors.items() if isinstance(value, Tensor)}
        return replace(self, **cut, condition=condition)


Denoiser = Callable[[Tensor, Tensor, Condition], Prediction]


def _beliefs(
    predicts: ModelMeanType, process: NoiseLevels, x_t: Tensor, t: Tensor, output: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(ε, x̂_0, posterior mean or None), each straight from a network output at x_t."""
    if predicts is ModelMeanType.EPSILON:
        return output, process.x0_from_eps(x_t, t, output), None
    if predicts is ModelMeanType.VELOCITY:
        x0, eps = process.from_velocity(x_t, t, output)
        return eps, x0, None
    mean = output if predicts is ModelMeanType.PREVIOUS_X else None
    x0 = output if mean is None else process.x0_from_previous(x_t, t, mean)
    return process.eps_from_x0(x_t, t, x0), x0, mean


def stacked(first: Any, second: Any, rows: int) -> Any:
    """Two conditions as one of 2·rows rows: tensors of `rows` rows are joined, also inside of dicts and lists.

    So are two tensors of a single row: it stands for all rows. Anything else is shared by all rows and must be the same
    in both, a tensor the very same one, as to compare their numbers is to wait for the device: a ValueError if it is
    not, or if the two have different keys.
    """
    if isinstance(first, Mapping):
        if first.keys() != second.keys():
            raise ValueError(f"null condition: wanted the keys {sorted(first)}, got {sorted(second)}")
        return {name: stacked(value, second[name], rows) for name, value in first.items()}
    if isinstance(first, (list, tuple)):
        return type(first)(stacked(one, other, rows) for one, other in zip(first, second, strict=True))
    if isinstance(first, Tensor):
        if first.ndim and len(first) == rows:
            return torch.cat([first, second])
        if first is second:
            return first
        if first.ndim and len(first) == 1:
            return torch.cat([part.expand(rows, *part.shape[1:]) for part in (first, second)])
        raise ValueError(
            f"condition: wanted tensors of {rows} rows or of one, or the same one in the null condition too, "
            f"got {list(first.shape)}"
        )
    if first is not second and first != second:
        raise ValueError(f"null condition: {first!r} and {second!r} cannot stand in one batch; only tensors may differ")
    return first


def may_be_compiled() -> bool:
    """Whether anything is compiled: all that is has imported Dynamo, which takes seconds."""
    return "torch._dynamo" in sys.modules


def hooks_seen() -> AbstractContextManager[None]:
    """A context in which a network that `torch.compile` has compiled looks at the hooks of its modules.

    What was compiled outside of it does not. It acts in this thread alone.
    """
    if not may_be_compiled():
        return nullcontext()
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)


class NetworkDenoiser:
    """A network as a Denoiser: reads its output by mean and variance type.

    `network(x_t, timesteps, **condition)` gives [N, C, H, W], or [N, 2C, H, W] where the variance is learned.
    var_type: None where the sampler has its own variance.
    denoised_fn is applied to x̂_0 before the clamp.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        process: NoiseLevels,
        mean_type: ModelMeanType = ModelMeanType.EPSILON,
        var_type: ModelVarType | None = ModelVarType.LEARNED_RANGE,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ):
        self.network = network
        self.process = process
        self.mean_type = mean_type
        self.var_type = var_type
        self.clip_denoised = clip_denoised
        self.denoised_fn = denoised_fn

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        # Also where no guidance listens yet, or the next step's would not be heard.
        with hooks_seen():
            output = self.network(x_t, self.process.network_timesteps(t), **condition)
        return self.read(output, x_t, t, condition)

    def read(self, output: Tensor, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """The Prediction that a network output stands for, in x_t's precision where that is the higher one."""
        output = output.to(torch.promote_types(output.dtype, x_t.dtype))
        variance, log_variance = self._variance(output, x_t, t)
        eps, x0, mean = _beliefs(self.mean_type, self.process, x_t, t, output[:, : x_t.shape[1]])
        return Prediction(
            self.process,
            x_t,
            t,
            condition,
            eps,
            x0,
            variance,
            log_variance,
            self._restrict,
            network_mean=mean,
            predicts=self.mean_type,
        )

    def _restrict(self, x0: Tensor) -> Tensor:
        if self.denoised_fn is not None:
            x0 = self.denoised_fn(x0)
        return x0.clamp(-1, 1) if self.clip_denoised else x0

    def _variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.var_type is None:
            return None, None
        channels = x_t.shape[1]
        wanted = 2 * channels if self.var_type.learned else channels
        if output.shape != (x_t.shape[0], wanted, *x_t.shape[2:]):
            raise ValueError(
                f"learn_sigma: the network gives {tuple(output.shape)}, variance type {self.var_type.name} of a "
                f"{tuple(x_t.shape)} input needs {wanted} channels"
            )
        if self.var_type is ModelVarType.LEARNED:
            log_variance = output[:, channels:]
            return log_variance.exp(), log_variance
        if self.var_type is ModelVarType.LEARNED_RANGE:
            low = self.process.at("posterior_log_variance_clipped", t, x_t)
            fraction = (output[:, channels:] + 1) / 2
            log_variance = fraction * self.process.at("log_betas", t, x_t) + (1 - fraction) * low
            return log_variance.exp(), log_variance
        if self.var_type is ModelVarType.FIXED_LARGE:
            tables = "fixed_large_variance", "fixed_large_log_variance"
        else:
            tables = "posterior_variance", "posterior_log_variance_clipped"
        variance, log_variance = (self.process.at(name, t, x_t).expand_as(x_t) for name in tables)
        return variance, log_variance
