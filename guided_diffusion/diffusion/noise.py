"""Random numbers that belong to a sample: a function of (seed, sample index) alone, on any machine and any ranks."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..settings.options import check_seed

# The purpose of a stream and the step stand in the high words of Philox's counter, so streams never meet.
X_T, STEP, LABEL, MASK, ORDER, CROP, TRAINING, VALIDATION, DROPOUT, CHOICE = range(10)
OTHER_CLASS, TIME_STEP, TOKENS, BLOCKS = range(10, 14)

_drawing = ThreadPoolExecutor(1, thread_name_prefix="noise")


def generator(seed: int, index: int, purpose: int, step: int = 0, place: int = 0) -> np.random.Generator:
    """The random numbers of sample `index` for one purpose and step; place: one of several of them."""
    key = np.array([seed, index], dtype=np.uint64)  # of a list numpy would make floats from 2^63 on
    return np.random.Generator(np.random.Philox(key=key, counter=[0, place, purpose, step]))


def choice(seed: int, of: int) -> list[int]:
    """The numbers 0 … of − 1 in the order in which a seed draws them, so that fewer are the beginning of more."""
    return generator(seed, 0, CHOICE).permutation(of).tolist()


def sample_labels(seed: int, indices: Sequence[int], num_classes: int) -> Tensor:
    """A random class for every sample: [N] int64 in [0, num_classes)."""
    return torch.tensor([int(generator(seed, index, LABEL).integers(num_classes)) for index in indices])


@dataclass(frozen=True)
class Samples:
    """Which samples the rows of a batch are."""

    seed: int
    indices: Sequence[int]

    def uniform(self, steps: Sequence[int], count: int, purpose: int = MASK, place: int = 0) -> Tensor:
        """Numbers in [0, 1) of each row at its step, for masks or another purpose: [N, count] float64."""
        return self._drawn(steps, purpose, place, lambda numbers: numbers.random(count))

    def normal(self, steps: Sequence[int], count: int, purpose: int) -> Tensor:
        """Standard normal numbers of each row at its step: [N, count] float64."""
        return self._drawn(steps, purpose, 0, lambda numbers: numbers.standard_normal(count))

    def _drawn(
        self, steps: Sequence[int], purpose: int, place: int, draw: Callable[[np.random.Generator], np.ndarray]
    ) -> Tensor:
        rows = [
            draw(generator(self.seed, index, purpose, step, place))
            for index, step in zip(self.indices, steps, strict=True)
        ]
        return torch.from_numpy(np.stack(rows))


def sent(rows: Tensor, device: torch.device) -> Tensor:
    """Rows of the host on a device; a GPU goes on with its work while they are on their way.

    From pinned memory, which torch keeps and gives away again only when the copy is made.
    """
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


class SampleNoise:
    """Standard normal noise of samples `indices`, shape (C, H, W) each, float32 on `device`.

    `x_T()` is the first noise; calling the object with a step gives that step's noise and begins to draw the noise
    of the step below it in another thread, which on a GPU also sends it, beside the GPU's work.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"):
        check_seed(seed)
        self._seed, self._indices, self._shape, self._device = seed, list(indices), tuple(shape), torch.device(device)
        self._beside = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def x_T(self) -> Tensor:
        return self._arrived(self._draw(X_T, 0))

    def __call__(self, step: int) -> Tensor:
        ready = self._ahead if self._ahead and self._ahead[0] == step else None
        noise = self._arrived(ready[1].result() if ready else self._draw(STEP, step))
        self._ahead = (step - 1, _drawing.submit(self._draw, STEP, step - 1)) if step > 1 else None
        return noise

    def _draw(self, purpose: int, step: int) -> Tensor:
        rows = torch.empty(len(self._indices), *self._shape, pin_memory=self._beside is not None)
        for row, index in zip(rows.numpy(), self._indices, strict=True):
            generator(self._seed, index, purpose, step).standard_normal(dtype=np.float32, out=row)
        with torch.cuda.stream(self._beside):  # of None, nothing
            return rows.to(self._device, non_blocking=self._beside is not None)

    def _arrived(self, rows: Tensor) -> Tensor:
        """The rows, which the GPU's work waits for from here on, but not the host."""
        if self._beside is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._beside)
            rows.record_stream(torch.cuda.current_stream(self._device))
        return rows


def torch_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator for each sample, begun from its own stream, for samplers that draw their noise themselves."""
    return [
        torch.Generator().manual_seed(int(generator(seed, index, STEP).integers(2**63, dtype=np.uint64)))
        for index in indices
    ]
