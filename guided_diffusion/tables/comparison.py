"""Pictures that compare samples from the same noise without and with guidance, and where the guidance looked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..diffusion.samplers import State
from ..guidance.base import GuidedDenoiser
from ..guidance.masked_blur import MaskedBlur
from ..runs.pipeline import ImagePipeline
from ..storage import pictures


class MaskCounter:
    """Watches a run (an observer of `run`) and counts how often each pixel of a sample was in a guidance's mask."""

    def __init__(self, guidance: MaskedBlur, num_samples: int, side: int):
        self._guidance = guidance
        self._selected = np.zeros((num_samples, side, side))
        self._steps = np.zeros(num_samples)

    def __call__(self, indices: Sequence[int], _state: State, guided: GuidedDenoiser) -> None:
        if self._guidance in guided.last_step.recorded:
            self._selected[list(indices)] += self._guidance.mask(guided.last_step)[:, 0].cpu().numpy()
            self._steps[list(indices)] += 1

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of guided steps at which each pixel was in the mask, [N, H, W] in [0, 1]."""
        return self._selected / np.maximum(self._steps, 1)[:, None, None]


@dataclass(frozen=True, eq=False)
class SameNoise:
    """Samples without and with guidance, uint8 [N, H, W, 3], and the share of steps in the mask [N, H, W], if any."""

    unguided: NDArray[np.uint8]
    share: NDArray[np.float64] | None
    guided: NDArray[np.uint8]


def same_noise(pipeline: ImagePipeline, count: int) -> SameNoise:
    """The first samples of a run made twice, without any guidance and with all of it."""
    indices = range(min(count, pipeline.config.num_samples))

    def made(pipeline: ImagePipeline, observe: MaskCounter | None = None) -> NDArray[np.uint8]:
        for state, guided in pipeline.trajectory(indices):
            if observe:
                observe(indices, state, guided)
        return pictures.to_uint8(state.x)

    masked = [guidance for guidance in pipeline.guidances if isinstance(guidance, MaskedBlur) and guidance.scale]
    counter = MaskCounter(masked[0], len(indices), pipeline.side) if masked else None
    unguided = made(replace(pipeline, guidances=(), cond_fn=None))
    guided = made(pipeline, counter)
    return SameNoise(unguided, counter.share if counter else None, guided)
