"""What an analysis needs of a model of any kind: its pipeline, its attention blocks, and passes on known images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..diffusion.denoiser import Condition, Denoiser, NetworkDenoiser, Prediction
from ..diffusion.process import NoiseLevels
from ..guidance.base import Guidance
from ..networks.attention import Attends, attention_blocks
from ..runs.pipeline import ImagePipeline
from ..runs.prepare import Configs, image_run
from ..settings.stable_diffusion import PRESETS, LatentGuidanceConfig, StableDiffusionConfig
from ..stable_diffusion.attention import self_attention_layers
from ..stable_diffusion.model import load
from ..stable_diffusion.network import LatentNetwork
from ..stable_diffusion.sampling import LatentPipeline, build_latent_guidance, read_prompts
from ..stable_diffusion.schedulers import mean_type


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to look into.

    blur_sigma: σ of its settings. encode: x_0 of images in [−1, 1]. condition: of known images, by their indices.
    guidance_line: for people.
    """

    pipeline: ImagePipeline | LatentPipeline
    blocks: Mapping[str, Attends]
    denoiser: Denoiser
    process: NoiseLevels
    encode: Callable[[Tensor], Tensor]
    condition: Callable[[Sequence[int]], Condition]
    blur_sigma: float
    guidance_line: str

    def watched(self, watching: Guidance) -> ImagePipeline | LatentPipeline:
        """Its pipeline with one more guidance."""
        return replace(self.pipeline, guidances=(*self.pipeline.guidances, watching))


def image_subject(configs: Configs, device: torch.device) -> Subject:
    """A network of images or of their latents. Known images have the condition of the samples of the same numbers."""
    prepared = image_run(configs, device)
    pipeline = prepared.pipeline
    return Subject(
        pipeline,
        attention_blocks(pipeline.network),
        pipeline.denoiser,
        pipeline.diffusion.process,
        pipeline.encode,
        pipeline.condition,
        configs.sag.blur_sigma,
        prepared.guidance_line,
    )


def latent_subject(config: StableDiffusionConfig, guidance: LatentGuidanceConfig, device: torch.device) -> Subject:
    """A Stable Diffusion model. Known images have the condition that self-attention guidance degrades."""
    model = load(config.model, getattr(torch, config.dtype), device, config.model_config)
    pipeline = LatentPipeline(config, model, read_prompts(config), build_latent_guidance(model.unet, guidance))
    sigma = PRESETS[guidance.preset]["blur_sigma"] if guidance.blur_sigma is None else guidance.blur_sigma

    def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        # Some schedulers scale the network's input by the step that they believe to be at.
        scheduler = pipeline.started()
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(len(scheduler.timesteps) - 1 - int(t[0]))
        network = LatentNetwork(model.unet, scheduler)
        return NetworkDenoiser(network, pipeline.levels, mean_type(scheduler), None, clip_denoised=False)(
            x_t, t, condition
        )

    def condition(indices: Sequence[int]) -> Condition:
        by_prompt, negative = pipeline.condition(indices)
        return by_prompt if config.guidance_scale == 1 else negative

    return Subject(
        pipeline,
        self_attention_layers(model.unet),
        denoiser,
        pipeline.levels,
        model.latents,
        condition,
        sigma,
        pipeline.describe(),
    )
