"""Random numbers of a training step: a function of (seed, step, row of the global batch) alone, for any ranks."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.noise import DROPOUT, TRAINING, generator

_drawing = ThreadPoolExecutor(1, thread_name_prefix="draws")

Drawn = tuple[Tensor, Tensor]


class Draws:
    """What is drawn for rows `first`, `first + 1`, … of the global batch.

    Calling it with a step and the images' shape [n, C, H, W] gives uniform numbers [3, n] float64 in [0, 1), for
    timesteps, dropped labels and the strength of the noise, and standard normal noise of that shape, float32; all on
    the CPU. The next step's are then begun in another thread.
    """

    def __init__(self, seed: int, first: int = 0, purpose: int = TRAINING):
        self._seed, self._first, self._purpose = seed, first, purpose
        self._ahead: tuple[tuple[int, Sequence[int]], Future[Drawn]] | None = None

    def __call__(self, step: int, shape: Sequence[int]) -> Drawn:
        asked = (step, tuple(shape))
        drawn = self._ahead[1].result() if self._ahead and self._ahead[0] == asked else self._draw(*asked)
        self._ahead = ((step + 1, asked[1]), _drawing.submit(self._draw, step + 1, asked[1]))
        return drawn

    def _draw(self, step: int, shape: Sequence[int]) -> Drawn:
        uniform, noise = np.empty((shape[0], 3)), np.empty(shape, dtype=np.float32)
        for row in range(shape[0]):
            stream = generator(self._seed, self._first + row, self._purpose, step)
            stream.random(out=uniform[row, :2])
            stream.standard_normal(dtype=np.float32, out=noise[row])
            uniform[row, 2] = stream.random()
        return torch.from_numpy(uniform.T.copy()), torch.from_numpy(noise)


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed torch for the dropout inside a network, the one thing that depends on how rows are cut among ranks."""
    torch.manual_seed(int(generator(seed, rank, DROPOUT, step).integers(2**63)))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a batch with what was drawn for them, on the network's device.

    x0, noise: [n, C, H, W]; condition: by name, rows first; t: [n] steps, and the weights [n] of their losses;
    for_label, for_noise: [n] in [0, 1), by which labels are dropped and the noise is scaled.
    """

    x0: Tensor
    condition: dict[str, Tensor]
    t: Tensor
    weights: Tensor
    noise: Tensor
    for_label: Tensor
    for_noise: Tensor

    def __len__(self) -> int:
        return len(self.x0)

    def part(self, start: int, size: int) -> "Rows":
        """`size` rows from `start` on, or what there is of them."""
        part = slice(start, start + size)
        condition = {name: values[part] for name, values in self.condition.items()}
        drawn = (self.t, self.weights, self.noise, self.for_label, self.for_noise)
        return Rows(self.x0[part], condition, *(values[part] for values in drawn))
