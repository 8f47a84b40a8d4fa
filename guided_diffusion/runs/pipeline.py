"""What makes sample i, of any kind of model; and the one of ADM and IDDPM networks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Condition, Denoiser
from ..diffusion.diffusion import Diffusion
from ..diffusion.noise import SampleNoise, Samples
from ..diffusion.process import NoiseLevels
from ..diffusion.samplers import State
from ..diffusion.solvers import SAMPLERS
from ..guidance.base import Guidance, GuidedDenoiser
from ..guidance.classifier import with_classifier
from ..settings.runs import RunConfig, SamplingConfig
from ..stable_diffusion.autoencoder import Autoencoder
from ..storage import pictures
from ..storage.given_images import GivenImages
from .conditions import Classes, ConditionOf, unconditional
from .progress import Progress
from .ranks import Job
from .sample_store import Shard, batches

Observer = Callable[[Sequence[int], State, GuidedDenoiser], None]
"""Is shown every step of every batch: the samples' indices, the state, and the denoiser that knows the guidance."""


class Pipeline(Protocol):
    """What makes sample i, of any kind of model.

    name: of the model, for a folder. shape: (H, W, 3) of an image. labelled: whether samples have a class, `y` of their
    condition. num_steps: States of a trajectory. levels: the noise at those that guidances count.
    nearest_levels: how images become uint8 (`to_uint8`).
    samples_version: a change of the code after which sample i is another raises it; samples of different versions do
    not share a folder. dtype: of the network's weights.
    """

    samples_version: int

    config: RunConfig
    device: torch.device
    name: str
    num_samples: int
    shape: tuple[int, int, int]
    labelled: bool
    num_steps: int
    nearest_levels: bool
    levels: NoiseLevels
    guidances: Sequence[Guidance]
    dtype: torch.dtype

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""

    def images(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [−1, 1] of what the last state holds."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products on a GPU have TF32's short mantissa; as before on leaving."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def pixels(pipeline: Pipeline, x: Tensor) -> np.ndarray:
    """The images of what the last state holds, uint8 [N, H, W, 3]; a FloatingPointError where they are not finite."""
    return pictures.to_uint8(pipeline.images(x), pipeline.nearest_levels)


def first_spoiled(state: State, before: Tensor | None) -> Tensor:
    """The t of the first step after which each sample was not finite, −1 where all is well: [N] int64 on the device.

    before: what this gave for the step before, None for the first.
    """
    finite = state.x.flatten(1).isfinite().all(dim=1)
    before = torch.full((len(finite),), -1, device=finite.device) if before is None else before
    return torch.where(finite | (before >= 0), before, state.t)


def _check_finite(batch: Sequence[int], spoiled: Tensor, pipeline: "Pipeline") -> None:
    """Raise a FloatingPointError that says which samples are not finite, since when, and what may be the cause."""
    steps = spoiled.tolist()
    wrong = [index for index, t in zip(batch, steps, strict=True) if t >= 0]
    if not wrong:
        return
    names = ", ".join(map(str, wrong[:8])) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
    cause = "weights that are not finite, or a scale that is too large"
    if pipeline.dtype is torch.float16:
        cause = "float16 overflows: try bfloat16 or float32"
    raise FloatingPointError(
        f"samples {names} are not finite after the step t = {max(steps)} of {pipeline.num_steps} (the first is "
        f"t = {pipeline.num_steps - 1}); likely {cause}; their shard is not written"
    )


def make_shard(pipeline: Pipeline, indices: Sequence[int], batch_size: int, observe: Observer) -> Shard:
    """Samples `indices`, so many at a time; a FloatingPointError if any is not finite."""
    images, labels, evaluations = [], [], 0.0
    for batch in batches(indices, batch_size):
        spoiled = None  # the t after which a sample was not finite for the first time, −1 where it still is
        for state, guided in pipeline.trajectory(batch):
            spoiled = first_spoiled(state, spoiled)
            observe(batch, state, guided)
        _check_finite(batch, spoiled, pipeline)
        try:
            images.append(pixels(pipeline, state.x))
        except FloatingPointError as error:
            raise FloatingPointError(f"samples {batch[0]} to {batch[-1]}: after decoding, {error}") from None
        evaluations += guided.evaluations * len(batch) / len(indices)
        if (y := state.prediction.condition.get("y")) is not None:
            labels.append(y.cpu().numpy())
    return Shard(np.concatenate(images), np.concatenate(labels) if labels else None, evaluations)


def called(network: nn.Module, conditional: bool) -> Callable[..., Tensor]:
    """A network as it is called with a condition, which it may not take."""
    return network if conditional else lambda x, t, **_condition: network(x, t)


@dataclass(frozen=True, eq=False)
class ImagePipeline:
    """Everything that makes sample i, but i itself.

    side: of the images. condition_of: what sample i is made of. conditional: whether the network takes that condition;
    else only the classifier of `cond_fn` does. init_images: what samples begin with, under the noise of the first
    step that the diffusion makes (SDEdit, Meng et al. 2022). latent_shape: (C, h, w) of what the network sees, where
    those are the latents of `autoencoder`, which is needed for images. others_kept_off: whether `guide_start` once
    kept other guidances than self-attention guidance from acting.
    """

    config: SamplingConfig
    side: int
    network: nn.Module
    diffusion: Diffusion
    device: torch.device
    condition_of: ConditionOf = unconditional
    guidances: Sequence[Guidance] = ()
    cond_fn: Callable[..., Tensor] | None = None
    conditional: bool = True
    init_images: GivenImages | None = None
    latent_shape: tuple[int, int, int] | None = None
    autoencoder: Autoencoder | None = None
    others_kept_off: bool = False

    @property
    def samples_version(self) -> int:
        """2 where samples once were others: with guidances kept off, and in bfloat16 with a first layer of it."""
        return 2 if self.others_kept_off or self.dtype is torch.bfloat16 else 1

    @property
    def name(self) -> str:
        return Path(self.config.model_path).stem

    @property
    def num_samples(self) -> int:
        return self.config.num_samples

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, 3

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is sampled and the network sees."""
        return self.latent_shape or (3, self.side, self.side)

    @property
    def levels(self) -> NoiseLevels:
        return self.diffusion.process

    @property
    def nearest_levels(self) -> bool:
        """Decoded latents, as DiT has it, are rounded to the nearest level."""
        return self.latent_shape is not None

    @property
    def labelled(self) -> bool:
        return "y" in self.condition([0])

    @property
    def num_steps(self) -> int:
        return self.diffusion.num_timesteps

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def denoiser(self) -> Denoiser:
        """The network as a denoiser, without any guidance."""
        return self.diffusion.denoiser(called(self.network, self.conditional), self.config.clip_denoised)

    def condition(self, indices: Sequence[int]) -> Condition:
        """What samples are made of, on the device."""
        return {name: rows.to(self.device) for name, rows in self.condition_of(self.config, indices).items()}

    def images(self, x: Tensor) -> Tensor:
        """Samples are images already, or latents of some."""
        return self.autoencoder.decode(x) if self.autoencoder else x

    def encode(self, images: Tensor) -> Tensor:
        """What the network sees of images [N, 3, H, W] in [−1, 1]."""
        return self.autoencoder.encode(images) if self.autoencoder else images

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""
        config, process = self.config, self.diffusion.process
        noise = SampleNoise(config.seed, indices, self.x_shape, self.device)
        guided = GuidedDenoiser(self.denoiser, process, self.guidances, Samples(config.seed, indices))
        denoiser = with_classifier(guided, self.cond_fn) if self.cond_fn else guided
        of_ddim = {"eta": config.ddim_eta} if config.sampler_name == "ddim" else {}
        sample = SAMPLERS[config.sampler_name]
        x = noise.x_T()
        if self.init_images:
            noisiest = torch.full((len(x),), process.num_timesteps - 1, device=x.device)
            x = process.q_sample(self.encode(self.init_images.read(indices).to(x)), noisiest, x)
        for state in sample(denoiser, process, x, self.condition(indices), noise, **of_ddim):
            yield state, guided

    def sample(
        self,
        n: int,
        seed: int | None = None,
        labels: str | Sequence[int] | None = None,
        guidance: Guidance | Sequence[Guidance] | Literal["published"] | None = "published",
        device: torch.device | str | None = None,
    ) -> np.ndarray:
        """Samples 0 … n − 1 of a run with these settings, uint8 [n, H, W, 3], cut into batches as the run cuts them.

        seed, labels: as the flags, labels also as a list of classes that is gone through again and again; by default
        what the configuration says. guidance: one Guidance, several, or none (None or ()) in the place of `guidances`;
        a classifier's stays. device: where to compute this time; the networks go there and back, in their dtype. Where
        batch_size is auto, batches are of its default. A ValueError says what is wrong.
        """
        if n < 1:
            raise ValueError(f"n: wanted 1 or more, got {n}")
        config = self.config if seed is None else replace(self.config, seed=seed)
        if labels is not None:
            if not isinstance(self.condition_of, Classes):
                raise ValueError("labels: this model has no classes to choose from")
            text = labels if isinstance(labels, str) else ",".join(str(int(label)) for label in labels)
            config = replace(config, labels=text, balanced_labels=False)
        guidances = self.guidances if guidance == "published" else guidance or ()
        pipeline = replace(self, config=config, guidances=[guidances] if isinstance(guidances, Guidance) else guidances)
        batch_size = config.batch_size or RunConfig.batch_size
        progress = Progress(Job(), "steps", n, 0, self.num_steps, log_json=False)
        with closing(progress), tf32(config.tf32), pipeline.on(device or self.device) as there:
            shards = [
                make_shard(there, indices, batch_size, lambda batch, *_step: progress.add(len(batch)))
                for indices in batches(range(n), config.shard_size or batch_size)
            ]
        return np.concatenate([shard.images for shard in shards])

    @contextmanager
    def on(self, device: torch.device | str) -> Iterator["ImagePipeline"]:
        """This pipeline on a device, where its networks are for as long as the `with` lasts."""
        networks = [part for part in (self.network, self.cond_fn, self.autoencoder) if isinstance(part, nn.Module)]
        networks += [network for guidance in self.guidances for network in guidance.networks()]
        try:
            for network in networks:
                network.to(device)
            yield replace(self, device=torch.device(device))
        finally:
            for network in networks:
                network.to(self.device)
