"""The settings of networks, diffusion and guidance: what upstream's, the authors' and our flags are called."""

import math
from collections.abc import Container
from dataclasses import dataclass

from guided_diffusion.config import option

NUM_CLASSES = 1000


@dataclass(frozen=True)
class NetworkConfig:
    """network (as the checkpoint was trained)"""

    image_size: int = option(64, "side of the images in pixels")
    num_channels: int = option(128, "channels of the first level")
    num_res_blocks: int = option(2, "residual blocks per level")
    num_heads: int = option(4, "attention heads, where num_head_channels is -1")
    num_heads_upsample: int = option(-1, "attention heads of the upward path; -1: as num_heads")
    num_head_channels: int = option(-1, "channels per attention head; -1: use num_heads")
    attention_resolutions: str = option("16,8", "sides of the feature maps that get attention")
    channel_mult: str = option("", "widths of the levels in units of num_channels, like 1,2,2; empty: by image_size")
    dropout: float = option(0.0, "dropout of the residual blocks")
    class_cond: bool = option(False, "the network takes class labels")
    num_classes: int = option(NUM_CLASSES, "number of classes, where class_cond")
    null_label: bool = option(False, "the network has one more label, which stands for no class")
    use_checkpoint: bool = option(False, "recompute activations in training to save memory")
    use_scale_shift_norm: bool = option(True, "the timestep scales and shifts the normalised features")
    resblock_updown: bool = option(False, "residual blocks resample, not plain convolutions")
    use_fp16: bool = option(False, "half precision: float16 on a GPU, bfloat16 on a CPU that has it")
    use_new_attention_order: bool = option(False, "q, k, v are stored one after the other (no shape shows it)")

    def __post_init__(self):
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class DiffusionConfig:
    """diffusion (as the checkpoint was trained, but for the respacing)"""

    learn_sigma: bool = option(False, "the network also predicts the variance Σ")
    diffusion_steps: int = option(1000, "steps T of the training process")
    noise_schedule: str = option("linear", "linear or cosine")
    timestep_respacing: str = option(
        "",
        "steps to sample with: 250, 10,15,20 (by thirds), ddim25, or logsnr20 (even in log α/σ); empty: all",
    )
    use_kl: bool = option(False, "train the variational bound")
    predict_xstart: bool = option(False, "the network predicts x_0, not ε")
    rescale_timesteps: bool = option(False, "the network sees timesteps scaled to [0, 1000)")
    rescale_learned_sigmas: bool = option(False, "train the bound scaled by T/1000 beside the MSE")

    def remark(self, given: Container[str]) -> str:
        """A warning about flags that were not among the given ones, or nothing."""
        if self.diffusion_steps <= 1000 or "rescale_timesteps" in given:
            return ""
        return (
            "rescale_timesteps is False as in guided-diffusion; a model of improved-diffusion trained with that "
            "repository's default needs --rescale_timesteps True, or it samples noise"
        )


@dataclass(frozen=True)
class SuperResolutionConfig:
    """super-resolution"""

    large_size: int = option(256, "side of the images to make")
    small_size: int = option(64, "side of the images to begin with")


OF_OTHER_SIZES = ("image_size", "channel_mult")
"""Settings of networks that follow from large_size in super-resolution."""


@dataclass(frozen=True)
class ClassifierConfig:
    """noisy-image classifier (as its checkpoint was trained)"""

    classifier_use_fp16: bool = option(False, "half precision: float16 on a GPU, bfloat16 on a CPU that has it")
    classifier_width: int = option(128, "channels of the first level")
    classifier_depth: int = option(2, "residual blocks per level")
    classifier_channel_mult: str = option(
        "", "widths of the levels in units of classifier_width, like 1,2,2; empty: by image_size", later=True
    )
    classifier_attention_resolutions: str = option("32,16,8", "sides of the feature maps that get attention")
    classifier_use_scale_shift_norm: bool = option(True, "the timestep scales and shifts the normalised features")
    classifier_resblock_updown: bool = option(True, "residual blocks resample, not plain convolutions")
    classifier_pool: str = option("attention", "head: adaptive, attention, spatial or spatial_v2")


@dataclass(frozen=True)
class GuidanceConfig:
    """self-attention guidance: ε̃ = ε(x_t) + s (ε(x_t) − ε(x̂_t)), x̂_t = x_t blurred where the network attends"""

    guide_scale: float = option(1.0, "1 + s: the strength as the authors' code counts it; 1 = off")
    sag_scale: float | None = option(None, "s: the strength as the paper counts it, instead of guide_scale; 0 = off")
    sag_block: str = option("", "block whose attention makes the mask, like output_blocks.8.1 (the paper's Out.8)")
    sag_mask: str = option(
        "self-attention",
        "what is blurred: self-attention, or for comparison global, high-frequency, random, square, or a FILE.npz with "
        "an array `maps` [M, h, w] for samples 0 … M − 1, round and round: float32 (the highest) or bool (as it is)",
        path=".npz",
        later=True,
    )
    sag_mask_share: float = option(
        0.4, "share of the image that the masks high-frequency, random, square and float32 maps cover", later=True
    )
    sel_attn_block: str = option("output", "the authors' way to name the block: input, middle or output")
    sel_attn_depth: int = option(8, "and its number, where sag_block is not given")
    sag_threshold: float = option(1.0, "ψ: blurred is what gets more attention than ψ times the mean")
    blur_sigma: float = option(3.0, "σ of the Gaussian blur in pixels; 0 = none, inf = the mean pixel")
    blur_kernel: int | None = option(None, "odd width of the blur's window in pixels; default ⌈3σ⌉ to each side")
    guide_start: int = option(
        250, "guide, in all ways but a classifier's, at the last so many of the respaced steps only; 0 = never"
    )
    guide_interval: str = option("0,1", "and while lo ≤ t/T < hi, as lo,hi; 1 is noise, 0 the image")
    guide_every: int = option(1, "compute each of these guidances every so many guided steps only, and use it again")
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
    pag_scale: float = option(0.0, "perturbed-attention guidance: identity attention in pag_blocks", later=True)
    pag_blocks: str = option("middle_block.1", "attention blocks, like middle_block.1,output_blocks.2.1", later=True)
    seg_scale: float = option(0.0, "smoothed energy guidance: blurred queries in seg_blocks", later=True)
    seg_blocks: str = option("middle_block.1", "attention blocks, as pag_blocks", later=True)
    seg_sigma: float = option(math.inf, "σ of the queries' blur in tokens; inf = the mean query", later=True)

    def __post_init__(self):
        for name in ("cfg_scale", "pag_scale", "seg_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: wanted a finite number, got {getattr(self, name)}")
