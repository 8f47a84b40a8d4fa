"""Flow models: the straight path from image to noise, and the ODE along it (Liu et al. 2023; Ma et al. 2024, SiT)."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .denoiser import Condition, Denoiser, Prediction
from .process import NoiseLevels
from .samplers import Noise, State, ddim_belief, descend
from .times import every_row


class LinearPath(NoiseLevels):
    """x_t = (1 − u) x_0 + u ε, from an image (u = 0) straight to noise (u = 1).

    times: [T] u of every step, rising, in (0, 1]. Networks are SiT's, which count from noise to image: what they are
    told, 1 − u in float32, and the velocity of their time, x_0 − ε, are known here alone.
    """

    def __init__(self, times: np.ndarray):
        times = np.asarray(times, dtype=np.float64)
        super().__init__(1 - times, times, (1 - times).astype(np.float32))

    @cached_property
    def widths(self) -> np.ndarray:
        """How far each step leads towards the image, [T] in u."""
        return np.diff(self.sigmas, prepend=0.0)

    def first(self, steps: int) -> "LinearPath":
        """The path of the first so many of these steps, those nearest to the image."""
        return LinearPath(self.sigmas[:steps])

    def for_heun(self) -> "LinearPath":
        """The same path with a step for each network call of `heun`: two at every level but the first, at noise."""
        return LinearPath(np.repeat(self.sigmas, 2)[:-1])

    def velocity(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:  # noqa: ARG002
        """v = x_0 − ε."""
        return x0 - eps

    def from_velocity(self, x_t: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂_0, ε) of a v at x_t: x_t + u v and x_t − (1 − u) v."""
        return x_t + self.at("sigmas", t, x_t) * v, x_t - self.at("alphas", t, x_t) * v


def slope(prediction: Prediction) -> Tensor:
    """dx/du = ε − x̂_0 that a belief leads along."""
    x0, eps = ddim_belief(prediction)
    return eps - x0


def euler_step(prediction: Prediction, noise: Tensor | None = None) -> Tensor:  # noqa: ARG001
    """x at the next u on the straight line of a belief; no noise."""
    x_t = prediction.x_t
    return x_t - prediction.process.at("widths", prediction.t, x_t) * slope(prediction)


def euler(
    denoiser: Denoiser,
    process: LinearPath,
    x_T: Tensor,
    condition: Condition,
    noise: Noise | None = None,  # noqa: ARG001
) -> Iterator[State]:
    """Euler's method from x_T, [N, C, H, W]: one network call a step; noise is never asked for."""
    return descend(euler_step, denoiser, process, x_T, condition, None)


def heun(
    denoiser: Denoiser,
    process: LinearPath,
    x_T: Tensor,
    condition: Condition,
    noise: Noise | None = None,  # noqa: ARG001
) -> Iterator[State]:
    """Heun's method from x_T, [N, C, H, W]: Euler's steps, each made again with the mean slope of its two ends.

    process: `LinearPath.for_heun`, a ValueError where it is not. One State a network call; x is what the denoiser is
    shown next. The last step is Euler's: it ends at the image, where no network is called. Noise is never asked for.
    """
    if process.widths[1::2].any():
        raise ValueError("process: wanted that of LinearPath.for_heun, a step for each network call")
    x = halfway = x_T
    for t in reversed(range(process.num_timesteps)):
        is_end = t % 2
        with torch.no_grad():
            prediction = denoiser(x, every_row(t, x), condition)
            move = -float(process.widths[t + is_end]) * slope(prediction)
            halfway, x = (halfway, halfway + move / 2) if is_end else (x + move / 2, x + move)
        yield State(t, x, prediction)
