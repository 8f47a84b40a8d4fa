"""Stable Diffusion as a pipeline of the run's kind: settings, prompts, and sample i."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..diffusion.denoiser import Condition, NetworkDenoiser
from ..diffusion.noise import SampleNoise, Samples, torch_generators
from ..diffusion.process import NoiseLevels
from ..diffusion.samplers import State
from ..guidance.base import Guidance, GuidedDenoiser
from ..guidance.building import schedule_of
from ..guidance.classifier_free import ClassifierFreeGuidance
from ..guidance.schedule import Schedule, changed
from ..guidance.self_attention import SelfAttentionGuidance
from ..settings.stable_diffusion import MIDDLE, PRESETS, LatentGuidanceConfig, StableDiffusionConfig
from ..storage import pictures
from ..storage.files import open_regular
from ..storage.given_images import GivenImages
from ..storage.images import FORMATS
from .attention import find_layer
from .model import StableDiffusion
from .network import LatentNetwork
from .schedulers import calls, choose_scheduler, diffuse, mean_type, noise_levels, start


def latent_guidance(unet: torch.nn.Module, scale: float, preset: str = "paper", **settings: Any) -> Guidance:
    """Self-attention guidance for a diffusers UNet: a preset's hyper-parameters, changed by `settings`.

    block: the name of a self-attention layer, by default the middle one; all else as `SelfAttentionGuidance`.
    """
    block = find_layer(unet, settings.pop("block", MIDDLE))
    return SelfAttentionGuidance(scale=scale, block=block, **PRESETS[preset] | settings)


def build_latent_guidance(unet: torch.nn.Module, config: LatentGuidanceConfig) -> list[SelfAttentionGuidance]:
    """The self-attention guidance of a configuration, or none."""
    if config.sag_scale == 0:
        return []
    given = {
        "threshold": config.sag_threshold,
        "space": config.sag_space,
        "blur_sigma": config.blur_sigma,
        "blur_kernel": config.blur_kernel,
    }
    guidance = latent_guidance(
        unet,
        config.sag_scale,
        config.preset,
        block=config.sag_block,
        schedule=changed(schedule_of(config.guide_interval, config.guide_every), "sag_schedule", config.sag_schedule),
        **{name: value for name, value in given.items() if value is not None},
    )
    return [guidance]


def read_prompts(config: StableDiffusionConfig) -> list[str]:
    """The prompts of --prompt or --prompts; a ValueError if there is none."""
    if not config.prompts:
        return [config.prompt]
    try:
        lines = Path(config.prompts).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: {config.prompts}: cannot be read ({type(error).__name__})") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts: {config.prompts}: holds no prompt")
    return prompts


def _picture(key: str, path: str, size: tuple[int, int], mode: str) -> Tensor:
    try:
        with open_regular(path) as stream, Image.open(stream, formats=FORMATS) as file:
            picture = np.asarray(file.convert(mode).resize(size), dtype=np.float32) / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{key}: {path}: not a picture that can be read ({type(error).__name__})") from None
    return torch.from_numpy(picture.reshape(*size[::-1], -1)).permute(2, 0, 1)[None]


@dataclass(frozen=True, eq=False)
class LatentPipeline:
    """Everything that makes sample i, but i itself (`runs.pipeline.Pipeline`); a ValueError where they clash.

    guidances: beside classifier-free guidance, which is the configuration's.
    """

    samples_version: ClassVar[int] = 2
    nearest_levels: ClassVar[bool] = False

    config: StableDiffusionConfig
    model: StableDiffusion
    prompts: Sequence[str]
    guidances: Sequence[Guidance] = ()
    labelled: bool = False

    def __post_init__(self):
        # Whatever can be wrong is wrong for every sample: say so before any is made.
        self.model.latent_shape(*self.shape[:2])
        self.model.check_prompts([self.config.negative_prompt], "negative_prompt")
        self.model.check_prompts(self.prompts)
        _ = self.num_steps, self.inpaint, self.init_images, self.device, self.by_prompt

    @property
    def name(self) -> str:
        return Path(self.config.model).name.removesuffix(".safetensors")

    @property
    def num_samples(self) -> int:
        return self.config.num_images * len(self.prompts)

    @property
    def device(self) -> torch.device:
        return self.model.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.unet.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        side = self.model.unet.config.sample_size * self.model.autoencoder.factor
        return self.config.height or side, self.config.width or side, 3

    @cached_property
    def scheduler(self) -> Any:
        return choose_scheduler(self.model.scheduler, self.config.scheduler, self.config.spacing)

    def started(self) -> Any:
        """The scheduler, ready for the first step that is made."""
        config = self.config
        return start(self.scheduler, config.steps, made=config.steps_made(config.steps))

    @cached_property
    def by_prompt(self) -> Schedule:
        """When and how strongly classifier-free guidance acts."""
        return changed(Schedule(), "cfg_schedule", self.config.cfg_schedule)

    @cached_property
    def levels(self) -> NoiseLevels:
        """Those of the network calls that are made."""
        started = self.started()
        return noise_levels(started).first(len(calls(started)))

    @property
    def num_steps(self) -> int:
        return self.levels.num_timesteps

    @cached_property
    def init_images(self) -> GivenImages | None:
        """The pictures of --init_image."""
        path = self.config.init_image
        return GivenImages(path, *self.shape[:2], "init_image") if path else None

    @cached_property
    def inpaint(self) -> Tensor | None:
        """Mask and masked latents of --image, for inpainting models."""
        config, size = self.config, self.shape[1::-1]
        if not self.model.inpaints == bool(config.image) == bool(config.image_mask):
            kind = "an inpainting model, give both" if self.model.inpaints else "no inpainting model, it takes neither"
            raise ValueError(f"image, image_mask: {config.model} is {kind}")
        if not config.image:
            return None
        picture = _picture("image", config.image, size, "RGB") * 2 - 1
        mask = (_picture("image_mask", config.image_mask, size, "L") >= 0.5).float()
        return self.model.inpainting(picture.to(self.device), mask.to(self.device))

    def condition(self, indices: Sequence[int]) -> tuple[Condition, Condition]:
        """The UNet's arguments for samples, with their prompts and with the negative one."""
        prompts = [self.prompts[index % len(self.prompts)] for index in indices]
        size = self.shape[:2]
        shared = {} if self.inpaint is None else {"inpaint": self.inpaint.expand(len(indices), -1, -1, -1)}
        negative = self.model.encode_negative(self.config.negative_prompt, len(indices), *size)
        return self.model.encode(prompts, *size) | shared, negative | shared

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""
        config, device = self.config, self.device
        noise = SampleNoise(config.seed, indices, self.model.latent_shape(*self.shape[:2]), device)
        condition, negative = self.condition(indices)
        scheduler = self.started()
        network = LatentNetwork(self.model.unet, scheduler)
        denoiser = NetworkDenoiser(network, self.levels, mean_type(scheduler), None, clip_denoised=False)
        by_prompt = ClassifierFreeGuidance(
            scale=config.guidance_scale - 1, null=lambda _condition: negative, schedule=self.by_prompt
        )
        guidances = [by_prompt, *self.guidances]
        guided = GuidedDenoiser(denoiser, self.levels, guidances, Samples(config.seed, indices))
        image = self.model.latents(self.init_images.read(indices).to(device)) if self.init_images else None
        generators = torch_generators(config.seed, indices)
        for state in diffuse(scheduler, guided, noise.x_T(), condition, generators, image):
            yield state, guided

    def images(self, x: Tensor) -> Tensor:
        """The pictures that latents stand for."""
        return self.model.decode(x)

    def describe(self) -> str:
        """One line for people: scheduler, calls, and what guides."""
        config = self.config
        parts = [f"{type(self.scheduler).__name__}, {self.num_steps} network calls"]
        if self.init_images:
            made = f"the last {config.steps_made(config.steps)} of {config.steps} steps"
            parts.append(f"from {len(self.init_images)} given images: {made}")
        by_prompt = f"classifier-free guidance: {config.guidance_scale:g}"
        if config.cfg_schedule:
            by_prompt += f", {self.by_prompt.described(self.levels, 'calls')}"
        parts.append(by_prompt if config.guidance_scale != 1 else "no CFG")
        if not self.guidances:
            parts.append("self-attention guidance: off")
        return "; ".join([*parts, *map(self._describe, self.guidances)])

    def _describe(self, guidance: Guidance) -> str:
        calls = guidance.schedule.described(self.levels, "calls")
        if not isinstance(guidance, SelfAttentionGuidance):
            return f"{type(guidance).__name__}: s = {guidance.scale:g}, {calls}"
        return (
            f"self-attention guidance: s = {guidance.scale:g}, ψ = {guidance.threshold:g}, σ = {guidance.blur_sigma:g} "
            f"in {guidance.space}, {calls}"
        )

    def comparison(self, count: int) -> np.ndarray:
        """The first samples without `guidances`, where those of self-attention blur, and with them, as one picture."""
        by_attention = [guidance for guidance in self.guidances if isinstance(guidance, SelfAttentionGuidance)]
        indices, finals, selected, masks = range(count), [], 0.0, 0
        for pipeline in (replace(self, guidances=()), self):
            for state, guided in pipeline.trajectory(indices):
                for sag in by_attention:
                    if sag in guided.last_step.recorded:
                        selected = selected + sag.mask(guided.last_step)[:, 0].float()
                        masks += 1
            finals.append(pictures.to_uint8(self.images(state.x), self.nearest_levels))
        share = (selected / max(1, masks)) + torch.zeros(count, *state.x.shape[2:], device=state.x.device)
        pixels = share.repeat_interleave(self.model.autoencoder.factor, 1).repeat_interleave(
            self.model.autoencoder.factor, 2
        )
        return pictures.comparison(finals[0], pixels.cpu().numpy(), finals[1])
