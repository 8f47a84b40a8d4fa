"""The settings of guidances that came after self-attention guidance, each a group of its own; 0 is off."""

import math
from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, ClassVar

from .guidance import idle
from .options import option


def _check_finite(group: Any, *names: str) -> None:
    for name in names:
        if not math.isfinite(getattr(group, name)):
            raise ValueError(f"{name}: wanted a finite number, got {getattr(group, name)}")


class Method(ABC):
    """The settings of one guidance. prefix: how the names of its scale and of its schedule begin."""

    prefix: ClassVar[str]

    def __post_init__(self):
        _check_finite(self, f"{self.prefix}_scale")

    def remark(self, _given: Container[str], explicit: Container[str]) -> str:
        """A warning about its flags where it is off, or nothing."""
        return idle(self, self.prefix, explicit)

    @property
    def scale(self) -> float:
        """Its strength, 0 = off."""
        return getattr(self, f"{self.prefix}_scale")

    @property
    def schedule(self) -> tuple[str, str]:
        """The flag of its schedule, and what that says."""
        name = f"{self.prefix}_schedule"
        return name, getattr(self, name)

    @property
    @abstractmethod
    def said(self) -> str:
        """For people: what it is, and its parameters."""


@dataclass(frozen=True)
class AutoguidanceConfig(Method):
    """autoguidance: away from what a weaker network of the same kind predicts"""

    prefix = "autoguidance"  # no field

    autoguidance_scale: float = option(0.0, "strength: the paper's w − 1; needs weak_model_path", later=True)
    weak_model_path: str = option(
        "",
        "weights of the weak network, whose shapes say its size; all else is as the sampled network's",
        path=True,
        later=True,
    )
    autoguidance_schedule: str = option("", "as sag_schedule, for autoguidance", later=True)

    def __post_init__(self):
        super().__post_init__()
        if self.autoguidance_scale and not self.weak_model_path:
            raise ValueError("weak_model_path: autoguidance_scale needs the weights of a weak network")
        if self.weak_model_path and not self.autoguidance_scale:
            raise ValueError("autoguidance_scale: weak_model_path needs a strength other than 0")

    @property
    def said(self) -> str:
        return f"autoguidance: s = {self.scale:g}"


@dataclass(frozen=True)
class IndependentConditionConfig(Method):
    """independent condition guidance: another class, drawn at every step, in the place of a null label"""

    prefix = "icg"  # no field

    icg_scale: float = option(0.0, "strength: the paper's w_ICG − 1; needs a network with classes", later=True)
    icg_schedule: str = option("", "as sag_schedule, for independent condition guidance", later=True)

    @property
    def said(self) -> str:
        return f"independent condition guidance: s = {self.scale:g}"


@dataclass(frozen=True)
class TimeStepConfig(Method):
    """time-step guidance: noise on the embedding of the timestep"""

    prefix = "tsg"  # no field

    tsg_scale: float = option(0.0, "strength: the paper's w_TSG − 1", later=True)
    tsg_noise: float = option(1.0, "the noise's s, in units of the embedding's standard deviation", later=True)
    tsg_power: float = option(1.0, "α: the noise grows as (t/T)^α", later=True)
    tsg_schedule: str = option("", "as sag_schedule, for time-step guidance", later=True)

    def __post_init__(self):
        super().__post_init__()
        _check_finite(self, "tsg_noise", "tsg_power")

    @property
    def said(self) -> str:
        return f"time-step guidance: s = {self.scale:g}, noise {self.tsg_noise:g} (t/T)^{self.tsg_power:g}"


@dataclass(frozen=True)
class TokenPerturbationConfig(Method):
    """token perturbation guidance: shuffled tokens in tpg_blocks"""

    prefix = "tpg"  # no field

    tpg_scale: float = option(0.0, "strength s", later=True)
    tpg_blocks: str = option("middle_block.1", "attention blocks, as pag_blocks", later=True)
    tpg_schedule: str = option("", "as sag_schedule, for token perturbation guidance", later=True)

    @property
    def said(self) -> str:
        return f"token perturbation guidance: s = {self.scale:g} at {self.tpg_blocks}"


@dataclass(frozen=True)
class SkippedLayersConfig(Method):
    """skip-layer and S² guidance: layers left out"""

    prefix = "skip"  # no field

    skip_scale: float = option(0.0, "strength: S²'s ω", later=True)
    skip_layers: str = option(
        "middle_block.1",
        "attention blocks and residual blocks that keep their shape, like middle_block.1,input_blocks.2.0",
        later=True,
    )
    skip_drawn: int | None = option(
        None, "leave out so many of them, drawn for every sample and step (S²); empty: all of them", later=True
    )
    skip_schedule: str = option("", "as sag_schedule, for skip-layer guidance", later=True)

    @property
    def said(self) -> str:
        drawn = "" if self.skip_drawn is None else f"{self.skip_drawn} of "
        return f"skip-layer guidance: s = {self.scale:g}, without {drawn}{self.skip_layers}"


@dataclass(frozen=True)
class MomentumConfig(Method):
    """momentum guidance: away from the average of earlier steps, without a network pass"""

    prefix = "momentum"  # no field

    momentum_scale: float = option(0.0, "strength: the paper's α; for ddim, dpm++2m, unipc (no noise)", later=True)
    momentum_decay: float = option(0.6, "β of the average; 0 is the step before alone (SG-prev)", later=True)
    momentum_schedule: str = option("", "as sag_schedule, for momentum guidance", later=True)

    @property
    def said(self) -> str:
        return f"momentum guidance: s = {self.scale:g}, β = {self.momentum_decay:g}"


@dataclass(frozen=True)
class TransformConfig:
    """what the differences of guidances go through before they are added"""

    transformed: str = option(
        "",
        "of which guidances: the beginnings of their scales, like cfg,autoguidance (and sag); empty: of all",
        later=True,
    )
    cfg_zero: bool = option(
        False, "CFG-Zero*: the output v − s* v', s* = ⟨v, v'⟩ / ‖v'‖², in the place of Δ's v − v'", later=True
    )
    apg_eta: float = option(1.0, "APG: η, how much of Δ along x̂_0 is kept; the paper's 0; 1 = all", later=True)
    apg_cap: float = option(
        math.inf, "APG: r, the most that Δ in x̂_0 may measure, of a sample; inf = any", later=True, infinite=True
    )
    apg_momentum: float = option(0.0, "APG: β, below 0 in the paper; 0 = none", later=True)
    low_frequencies: float = option(
        1.0, "frequency-decoupled guidance: low frequencies by so much of the scale, (w_low − 1) / (w_high − 1)",
        later=True,
    )  # fmt: skip

    def __post_init__(self):
        _check_finite(self, "apg_eta", "apg_momentum", "low_frequencies")
        if self.transformed and not self.said:
            raise ValueError("transformed: says of which guidances, but nothing of the kind is on")

    @property
    def projects(self) -> bool:
        """Whether APG is on."""
        return (self.apg_eta, self.apg_cap, self.apg_momentum) != (1.0, math.inf, 0.0)

    @property
    def said(self) -> str:
        """For people, empty where nothing is on."""
        parts = []
        if self.cfg_zero:
            parts.append("CFG-Zero*")
        if self.projects:
            parts.append(f"APG (η = {self.apg_eta:g}, r = {self.apg_cap:g}, β = {self.apg_momentum:g})")
        if self.low_frequencies != 1:
            parts.append(f"low frequencies × {self.low_frequencies:g}")
        return ", ".join(parts)


METHODS = (
    AutoguidanceConfig,
    IndependentConditionConfig,
    TimeStepConfig,
    TokenPerturbationConfig,
    SkippedLayersConfig,
    MomentumConfig,
    TransformConfig,
)
"""All groups of this file."""
