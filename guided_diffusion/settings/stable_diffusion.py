"""The settings of Stable Diffusion: sampling, and self-attention guidance in latents."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .guidance import SCHEDULE
from .options import MOST_AT_A_TIME, MOST_SIDE, option
from .runs import RunConfig

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"
"""The layer that the paper and the public pipeline take for Stable Diffusion."""

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_single": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
"""Our names of diffusers' classes, and what of their configuration the name means."""

SPACINGS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}

DTYPES = ("float32", "bfloat16", "float16")

PRESETS = {
    "paper": {"space": "eps", "blur_sigma": 1.0, "blur_kernel": 9, "threshold": 1.0},
    "diffusers": {"space": "model", "blur_sigma": 1.0, "blur_kernel": 9, "threshold": 1.0},
}
"""Hyper-parameters of self-attention guidance: the paper's rule, and that of diffusers' own pipeline."""


def check_names(scheduler: str, spacing: str) -> None:
    """Raise a ValueError for a name that is not known; empty is."""
    for key, name, known in (("scheduler", scheduler, SCHEDULERS), ("spacing", spacing, SPACINGS)):
        if name and name not in known:
            raise ValueError(f"{key}: {name!r} is none of {', '.join(known)}")


@dataclass(frozen=True)
class StableDiffusionConfig(RunConfig):
    """Stable Diffusion"""

    model: str = option("", "local folder of diffusers' format (unet, vae, …), or one .safetensors file", path=True)
    model_config: str = option(
        "", "for one file: folder of diffusers' format with configurations, tokenizer and scheduler", path=True
    )
    prompt: str = option("", "what to make pictures of")
    prompts: str = option("", "file of prompts instead, one a line", path=True)
    negative_prompt: str = option("", "what the unconditional pass of classifier-free guidance is given")
    num_images: int = option(1, "images of each prompt; image i is of prompt i, round and round")
    guidance_scale: float = option(7.5, "classifier-free guidance, 1 + s_c; 1 = off, only --prompt is used")
    cfg_schedule: str = option("", f"when and how strongly classifier-free guidance acts: {SCHEDULE}", later=True)
    scheduler: str = option("", f"{', '.join(SCHEDULERS)}; empty: the model's own")
    spacing: str = option("", f"{', '.join(SPACINGS)}; empty: the scheduler's own")
    steps: int = option(50, "steps of the scheduler; heun and kdpm2 call the network twice a step")
    height: int = option(0, "pixels; 0: what the model was made for", most=MOST_SIDE)
    width: int = option(0, "pixels; 0: what the model was made for", most=MOST_SIDE)
    image: str = option("", "picture to paint into, for inpainting models; scaled to height × width", path=True)
    image_mask: str = option("", "where to paint: white in this picture", path=True)
    dtype: str = option("float32", f"of the UNet: {', '.join(DTYPES)}")
    batch_size: int = option(4, "images at a time", most=MOST_AT_A_TIME)
    png: bool = option(True, "write the samples as PNGs too: images/000000.png and so on")
    compare: int = option(4, "images to show in comparison.png, at the cost of making them twice more; 0: none")

    def __post_init__(self):
        super().__post_init__()
        if not self.model:
            raise ValueError("model: give a local folder of diffusers' format")
        if self.prompt and self.prompts:
            raise ValueError("prompt, prompts: two ways to say what to make; give one")
        for name in ("num_images", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")
        for name in ("height", "width", "compare"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: wanted 0 or more, got {getattr(self, name)}")
        if not np.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale: wanted a finite number, got {self.guidance_scale}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: wanted {', '.join(DTYPES)}, got {self.dtype!r}")
        check_names(self.scheduler, self.spacing)


@dataclass(frozen=True)
class LatentGuidanceConfig:
    """self-attention guidance: ε̃ = ε + s (ε(x_t) − ε(x̂_t)), of the unconditional ε where there is one"""

    sag_scale: float = option(0.75, "s; 0 = off")
    preset: str = option("paper", "what the flags below are that are not given: paper or diffusers (its own pipeline)")
    sag_block: str = option(MIDDLE, "self-attention layer whose map makes the mask")
    sag_threshold: float | None = option(None, "ψ: blurred is what gets more attention than ψ times the mean")
    sag_space: str | None = option(None, "eps: the difference is one of ε; model: of what the network predicts")
    blur_sigma: float | None = option(
        None, "σ of the Gaussian blur in latent pixels; 0 = none, inf = the mean", infinite=True
    )
    blur_kernel: int | None = option(None, "odd width of the blur's window in latent pixels")
    guide_interval: str = option("0,1", "guide while lo ≤ t/T < hi, t of the T network calls made are left; 1 is noise")
    guide_every: int = option(1, "compute the guidance every so many guided steps, and use it again between")
    sag_schedule: str = option("", f"the same two and more, over them: {SCHEDULE}", later=True)

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"preset: wanted {', '.join(PRESETS)}, got {self.preset!r}")
