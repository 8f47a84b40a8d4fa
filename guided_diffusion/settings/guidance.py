"""The settings of guidance: self-attention guidance by the authors' flags and ours, a classifier's, and others."""

import math
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Any

from .options import option

SCHEDULE = (
    "words of t=lo,hi (lo ≤ t/T < hi, 1 is noise), sigma=lo,hi (lo < σ ≤ hi, the noise by the image), every=k, "
    "scale=t:factor,t:factor,… and sigma_scale=σ:factor,… (of the scale; linear between, in log σ)"
)
"""What a flag of a guidance's schedule may say."""


def idle(group: Any, prefix: str, explicit: Container[str]) -> str:
    """A warning about explicit flags of a guidance whose scale is 0 and was not given with them; else nothing."""
    scale = f"{prefix}_scale"
    if getattr(group, scale) or scale in explicit:
        return ""
    names = [name for field in fields(group) if (name := field.name).startswith(f"{prefix}_") and name in explicit]
    return f"{', '.join(names)}: without effect, as {scale} is 0" if names else ""


@dataclass(frozen=True)
class GuidanceConfig:
    """self-attention guidance: ε̃ = ε(x_t) + s (ε(x_t) − ε(x̂_t)), x̂_t = x_t blurred where the network attends"""

    guide_scale: float = option(1.0, "1 + s: the strength as the authors' code counts it; 1 = off")
    sag_scale: float | None = option(None, "s: the strength as the paper counts it, instead of guide_scale; 0 = off")
    sag_block: str = option("", "block whose attention makes the mask, like output_blocks.8.1 (the paper's Out.8)")
    sag_mask: str = option(
        "self-attention",
        "what is blurred: self-attention, or for comparison global, high-frequency, random, square, or a FILE.npz with "
        "an array `maps` [M, h, w] for samples 0 … M − 1, round and round: floats (the highest) or bool (as it is)",
        path=".npz",
        later=True,
    )
    sag_mask_share: float = option(
        0.4, "share of the image that the masks high-frequency, random, square and maps of floats cover", later=True
    )
    sel_attn_block: str = option("output", "the authors' way to name the block: input, middle or output")
    sel_attn_depth: int = option(8, "and its number, where sag_block is not given")
    sag_threshold: float = option(1.0, "ψ: blurred is what gets more attention than ψ times the mean")
    blur_sigma: float = option(3.0, "σ of the Gaussian blur in pixels; 0 = none, inf = the mean pixel", infinite=True)
    sag_channels: int | None = option(
        None, "act on the first so many channels of ε only (latents have 4); empty: on all", later=True
    )
    blur_kernel: int | None = option(None, "odd width of the blur's window in pixels; default ⌈3σ⌉ to each side")
    guide_start: int = option(
        250, "self-attention guidance acts at the last so many of the respaced steps only; 0 = never"
    )
    guide_interval: str = option(
        "0,1",
        "all guidances but a classifier act while lo ≤ t/T < hi, as lo,hi, T the steps that are made; 1 is noise, 0 "
        "the image",
    )
    guide_every: int = option(1, "compute each of these guidances every so many guided steps only, and use it again")
    sag_schedule: str = option(
        "", f"when and how strongly self-attention guidance acts, over these: {SCHEDULE}", later=True
    )
    fidelity: str = option("corrected", "corrected: as the paper; reference: as the authors' code computes")

    def __post_init__(self):
        if self.sag_scale is not None and self.guide_scale != 1:
            raise ValueError("sag_scale, guide_scale: two names of one strength (guide_scale = 1 + s); give one")
        for name in ("guide_scale", "sag_threshold"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: wanted a finite number, got {getattr(self, name)}")
        if self.sel_attn_block not in ("input", "middle", "output"):
            raise ValueError(f"sel_attn_block: wanted input, middle or output, got {self.sel_attn_block!r}")
        if self.fidelity not in ("corrected", "reference"):
            raise ValueError(f"fidelity: wanted corrected or reference, got {self.fidelity!r}")

    @property
    def scale(self) -> float:
        """The paper's s."""
        return self.guide_scale - 1 if self.sag_scale is None else self.sag_scale

    @property
    def block_name(self) -> str:
        """The chosen attention block as a module name."""
        if self.sag_block:
            return self.sag_block
        return (
            "middle_block.1"
            if self.sel_attn_block == "middle"
            else (f"{self.sel_attn_block}_blocks.{self.sel_attn_depth}.1")
        )


@dataclass(frozen=True)
class OtherGuidanceConfig:
    """other guidances: each adds scale · Δ to ε, alone or with self-attention guidance; 0 = off"""

    cfg_scale: float = option(
        0.0,
        "classifier-free guidance, Δ = ε(x, c) − ε(x, ∅): the paper's s_c (guidance_scale of other tools is 1 + s_c); "
        "needs classes and null_label; self-attention guidance then degrades ε(x, ∅) (the paper's Eq. 25)",
        later=True,
    )
    cfg_channels: int | None = option(
        None,
        "and acts on the first so many channels of ε only; empty: on all. DiT's published numbers: 3 of 4",
        later=True,
    )
    cfg_schedule: str = option("", "as sag_schedule, for classifier-free guidance", later=True)
    pag_scale: float = option(0.0, "perturbed-attention guidance: identity attention in pag_blocks", later=True)
    pag_blocks: str = option("middle_block.1", "attention blocks, like middle_block.1,output_blocks.2.1", later=True)
    pag_schedule: str = option("", "as sag_schedule, for perturbed-attention guidance", later=True)
    seg_scale: float = option(0.0, "smoothed energy guidance: blurred queries in seg_blocks", later=True)
    seg_blocks: str = option("middle_block.1", "attention blocks, as pag_blocks", later=True)
    seg_sigma: float = option(
        math.inf, "σ of the queries' blur in tokens; inf = the mean query", later=True, infinite=True
    )
    seg_schedule: str = option("", "as sag_schedule, for smoothed energy guidance", later=True)

    def __post_init__(self):
        for name in ("cfg_scale", "pag_scale", "seg_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: wanted a finite number, got {getattr(self, name)}")

    def remark(self, _given: Container[str], explicit: Container[str]) -> str:
        """A warning about flags of guidances that are off, or nothing."""
        return "; ".join(filter(None, (idle(self, prefix, explicit) for prefix in ("cfg", "pag", "seg"))))

    @property
    def on(self) -> bool:
        """Whether any of them guides."""
        return bool(self.cfg_scale or self.pag_scale or self.seg_scale)


@dataclass(frozen=True)
class ClassifierGuidanceConfig:
    """classifier guidance: scale · ∇ log p(y | x_t) moves every step"""

    classifier_path: str = option("", "weights of the classifier: .pt or .safetensors", path=True)
    classifier_scale: float = option(1.0, "strength of the classifier's gradient")
    classifier_guidance: bool | None = option(None, "on or off; default: on with a classifier_path and a scale not 0")

    @property
    def on(self) -> bool:
        if self.classifier_guidance is None:
            if not self.classifier_path and self.classifier_scale not in (0, type(self).classifier_scale):
                raise ValueError(
                    f"classifier_path: classifier_scale {self.classifier_scale:g} needs a classifier's weights"
                )
            return bool(self.classifier_path) and self.classifier_scale != 0
        if self.classifier_guidance and not self.classifier_path:
            raise ValueError("classifier_path: classifier_guidance needs the weights of a classifier")
        return self.classifier_guidance
