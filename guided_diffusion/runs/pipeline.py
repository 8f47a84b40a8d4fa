"""What makes sample i, of any kind of model; and the one of ADM and IDDPM networks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.diffusion import Diffusion
from ..diffusion.noise import SampleNoise, Samples
from ..diffusion.samplers import State
from ..diffusion.solvers import SAMPLERS
from ..guidance.base import Guidance, GuidedDenoiser
from ..guidance.classifier import with_classifier
from ..settings.sampling import RunConfig, SamplingConfig
from .conditions import ConditionOf, unconditional


class Pipeline(Protocol):
    """What makes sample i, of any kind of model.

    name: of the model, for a folder. shape: (H, W, 3) of an image. labelled: whether samples have a class, `y` of their
    condition. num_steps: States of a trajectory.
    """

    config: RunConfig
    device: torch.device
    name: str
    num_samples: int
    shape: tuple[int, int, int]
    labelled: bool
    num_steps: int
    guidances: Sequence[Guidance]

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""

    def images(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [−1, 1] of what the last state holds."""


@dataclass(frozen=True, eq=False)
class ImagePipeline:
    """Everything that makes sample i, but i itself. side: of the images; condition_of: what sample i is made of."""

    config: SamplingConfig
    side: int
    network: Callable[..., Tensor]
    diffusion: Diffusion
    device: torch.device
    condition_of: ConditionOf = unconditional
    guidances: Sequence[Guidance] = ()
    cond_fn: Callable[..., Tensor] | None = None

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
    def labelled(self) -> bool:
        return "y" in self.condition_of([0])

    @property
    def num_steps(self) -> int:
        return self.diffusion.num_timesteps

    def images(self, x: Tensor) -> Tensor:
        """Samples are images already."""
        return x

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""
        config, process = self.config, self.diffusion.process
        noise = SampleNoise(config.seed, indices, (3, self.side, self.side), self.device)
        condition = {name: rows.to(self.device) for name, rows in self.condition_of(indices).items()}
        denoiser = self.diffusion.denoiser(self.network, config.clip_denoised)
        guided = GuidedDenoiser(denoiser, process, self.guidances, Samples(config.seed, indices))
        denoiser = with_classifier(guided, self.cond_fn) if self.cond_fn else guided
        of_ddim = {"eta": config.ddim_eta} if config.sampler_name == "ddim" else {}
        sample = SAMPLERS[config.sampler_name]
        for state in sample(denoiser, process, noise.x_T(), condition, noise, **of_ddim):
            yield state, guided
