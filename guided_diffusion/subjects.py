"""What an analysis needs of a model of any kind: its sampler, its attention blocks, and passes on known images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.attention import Attends, attention_blocks
from guided_diffusion.denoiser import Condition, Denoiser, NetworkDenoiser, Prediction
from guided_diffusion.guidance.base import Guidance
from guided_diffusion.prepare import image_run
from guided_diffusion.process import ForwardProcess, NoiseLevels
from guided_diffusion.sampling import Sampler
from guided_diffusion.stable_diffusion.attention import self_attention_layers
from guided_diffusion.stable_diffusion.model import load
from guided_diffusion.stable_diffusion.network import LatentNetwork
from guided_diffusion.stable_diffusion.sampling import (
    DTYPES,
    PRESETS,
    LatentGuidanceConfig,
    StableDiffusionConfig,
    StableDiffusionSampler,
    build_latent_guidance,
    read_prompts,
)
from guided_diffusion.stable_diffusion.schedulers import mean_type, start


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to look into.

    blur_sigma: σ of its settings. encode: x_0 of images in [−1, 1]. condition: of known images, by their indices.
    guidance_line: for people.
    """

    sampler: Sampler | StableDiffusionSampler
    blocks: Mapping[str, Attends]
    denoiser: Denoiser
    process: ForwardProcess | NoiseLevels
    encode: Callable[[Tensor], Tensor]
    condition: Callable[[Sequence[int]], Condition]
    blur_sigma: float
    guidance_line: str

    def watched(self, watching: Guidance) -> Sampler | StableDiffusionSampler:
        """Its sampler with one more guidance."""
        return replace(self.sampler, guidances=(*self.sampler.guidances, watching))


def image_subject(configs: Sequence[Any], device: torch.device) -> Subject:
    """Of configurations of IMAGE_GROUPS. Known images have the condition of the samples of the same numbers."""
    prepared = image_run(configs, device)
    sampler = prepared.sampler

    def condition(indices: Sequence[int]) -> Condition:
        return {name: rows.to(device) for name, rows in sampler.condition_of(indices).items()}

    return Subject(
        sampler,
        attention_blocks(sampler.network),
        sampler.diffusion.denoiser(sampler.network, sampler.config.clip_denoised),
        sampler.diffusion.process,
        lambda images: images,
        condition,
        configs[1].blur_sigma,
        prepared.guidance_line,
    )


def latent_subject(config: StableDiffusionConfig, guidance: LatentGuidanceConfig, device: torch.device) -> Subject:
    """A Stable Diffusion model. Known images have the condition that self-attention guidance degrades."""
    model = load(config.model, DTYPES[config.dtype], device, config.model_config)
    sampler = StableDiffusionSampler(config, model, read_prompts(config), build_latent_guidance(model.unet, guidance))
    sigma = PRESETS[guidance.preset]["blur_sigma"] if guidance.blur_sigma is None else guidance.blur_sigma

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        # Some schedulers scale the network's input by the step that they believe to be at.
        scheduler = start(sampler.scheduler, config.steps, device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(sampler.levels.num_timesteps - 1 - int(t[0]))
        network = LatentNetwork(model.unet, scheduler)
        return NetworkDenoiser(network, sampler.levels, mean_type(scheduler), None, clip_denoised=False)(
            x_t, t, condition
        )

    def condition(indices: Sequence[int]) -> Condition:
        by_prompt, negative = sampler.condition(indices)
        return by_prompt if config.guidance_scale == 1 else negative

    return Subject(
        sampler,
        self_attention_layers(model.unet),
        denoiser,
        sampler.levels,
        model.latents,
        condition,
        sigma,
        sampler.describe(),
    )
