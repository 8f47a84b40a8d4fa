"""Guidance from the keywords of two other forks: the SAG authors' code, and the PAG authors' that grew out of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .guidance.base import Guidance, Step
from .guidance.building import build_guidance
from .guidance.schedule import Schedule
from .settings.guidance import GuidanceConfig
from .settings.options import merge

OF_SAG = ("guide_start", "guide_scale", "blur_sigma")
OF_PAG = ("guidance_strategies", "guide_schedule")


@dataclass(frozen=True, eq=False, kw_only=True)
class _PerturbedCall(Guidance):
    """Δ = ε(x_t) − ε of the same network called with `perturb=mode`, which then perturbs itself (PAG's fork)."""

    mode: str

    def difference(self, step: Step) -> Tensor:
        base = step.base
        perturbed = step.denoise(base.x_t, base.t, {**base.condition, "perturb": self.mode})
        return base.eps - perturbed.eps


def guidances_of(
    guidance_kwargs: Mapping[str, Any], model: Any, block: Mapping[str, Any], num_timesteps: int
) -> list[Guidance]:
    """The guidances that a loop's `guidance_kwargs` ask for.

    SAG has guide_start, guide_scale and blur_sigma; block: its sel_attn_block and sel_attn_depth. PAG has guide_scale
    and guidance_strategies, {mode: [start, end]}: at the steps end ≤ t ≤ start, by `sag` as above, or by what the model
    does when it is called with perturb=mode. Both scales are 1 + s. A ValueError names a keyword that is neither's.
    """
    unknown = guidance_kwargs.keys() - {*OF_SAG, *OF_PAG}
    if unknown or guidance_kwargs.get("guide_schedule"):
        what = ", ".join(sorted(unknown)) or "guide_schedule"
        raise ValueError(f"guidance_kwargs: {what}: wanted {', '.join((*OF_SAG, 'guidance_strategies'))}")
    of_sag = {name: guidance_kwargs[name] for name in OF_SAG if name in guidance_kwargs}

    def sag(**when: Any) -> Guidance:
        settings = {"fidelity": "reference"} | dict(block) | of_sag | when
        [config] = merge((GuidanceConfig,), ("guidance_kwargs", settings))
        return build_guidance(model, config)

    if "guidance_strategies" not in guidance_kwargs:
        return [sag()]
    found: list[Guidance] = []
    for mode, (start, end) in guidance_kwargs["guidance_strategies"].items():
        low, high = max(0, end) / num_timesteps, min(num_timesteps, start + 1) / num_timesteps
        if mode == "sag":
            found.append(sag(guide_start=num_timesteps, guide_interval=f"{low},{high}"))
        else:
            scale = float(guidance_kwargs["guide_scale"]) - 1
            found.append(_PerturbedCall(scale=scale, schedule=Schedule(low, high), mode=mode))
    return found
