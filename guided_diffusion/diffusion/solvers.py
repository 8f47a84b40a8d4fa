"""Solvers that need few steps because they remember earlier ones: DPM-Solver++(2M), its SDE variant, and UniPC.

They step with x̂_0 in λ = log(α/σ), through the steps that respacing kept, and end with x_0 = x̂_0. In all of them h is
the width of a step in λ, and a point at the part r of a step counts e^{−h(1 − r)}.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .denoiser import Condition, Denoiser
from .flow import euler, heun
from .process import ForwardProcess, half_log_snr
from .samplers import Noise, State, ddim, ddim_belief, ddpm
from .times import every_row


class _Node(NamedTuple):
    """A noise level: x = α x_0 + σ ε, λ = log(α/σ)."""

    alpha: float
    sigma: float
    lambda_: float


def _nodes(process: ForwardProcess) -> list[_Node]:
    """The level of x_t is at t + 1; the first one is the image's, where σ = 0 and λ = ∞."""
    alphas_cumprod = np.append(1.0, process.alphas_cumprod)
    tables = np.sqrt(alphas_cumprod), np.sqrt(1 - alphas_cumprod), half_log_snr(alphas_cumprod)
    return [_Node(*numbers) for numbers in np.stack(tables, axis=1).tolist()]


def _advance(x: Tensor, x0: Tensor, start: _Node, end: _Node, noise: Tensor | None = None) -> Tensor:
    """x at `end` of x at `start`, exactly if x̂_0 is the same all the way; noise: of x's shape, for the SDE."""
    shrink = end.sigma / start.sigma
    decay = shrink * start.alpha / end.alpha  # e^{−h}, also where λ is infinite
    if noise is None:
        return shrink * x + end.alpha * (1 - decay) * x0
    fresh = 1 - decay**2
    return shrink * decay * x + end.alpha * fresh * x0 + end.sigma * math.sqrt(fresh) * noise


def _ahead(x0: Tensor, before: Tensor, h: float, h_before: float) -> Tensor:
    """x̂_0 in the middle of the next step, on the line through the last two."""
    return x0 + h / (2 * h_before) * (x0 - before)


def _behind(after: Tensor, believed: Sequence[Tensor], h: float, h_before: float) -> Tensor:
    """x̂_0 of a whole step, on the parabola through its end, its start and the start before it (Zhao et al. 2023).

    believed: x̂_0 at its start, and at the start before it; where that is missing, the middle of the other two.
    """
    x0, *earlier = believed
    if not earlier:
        return (x0 + after) / 2
    full = -math.expm1(-h)
    mean_r = 1 / full - 1 / h
    mean_r2 = 1 / full - 2 * mean_r / h
    ratio = h_before / h
    bend = (mean_r2 - mean_r) / (1 + ratio)
    return x0 + (mean_r + bend) * (after - x0) + bend / ratio * (earlier[0] - x0)


def _multistep(
    denoiser: Denoiser,
    process: ForwardProcess,
    x_T: Tensor,
    condition: Condition,
    noise: Noise | None = None,
    correct: bool = False,
) -> Iterator[State]:
    nodes = _nodes(process)
    widths = [end.lambda_ - start.lambda_ for end, start in itertools.pairwise(nodes)] + [math.inf, math.inf]
    believed: list[Tensor] = []  # x̂_0 of the last two steps, the later one first
    x = start = x_T
    for t in reversed(range(process.num_timesteps)):
        with torch.no_grad():
            prediction = denoiser(x, every_row(t, x), condition)
            x0, _ = ddim_belief(prediction)
            if correct and believed:
                # The step that led here, once more: now x̂_0 at its end is known.
                whole = _behind(x0, believed, widths[t + 1], widths[t + 2])
                x = _advance(start, whole, nodes[t + 2], nodes[t + 1])
            start = x
            # The last step is infinitely wide: no line leads over it.
            line = believed and t
            constant = _ahead(x0, believed[0], widths[t], widths[t + 1]) if line else x0
            x = _advance(x, constant, nodes[t + 1], nodes[t], noise(t) if noise and t else None)
            believed = [x0, *believed[:1]]
        yield State(t, x, prediction)


def dpm_solver_2m(
    denoiser: Denoiser,
    process: ForwardProcess,
    x_T: Tensor,
    condition: Condition,
    noise: Noise,
    stochastic: bool = False,
) -> Iterator[State]:
    """DPM-Solver++(2M) from x_T, [N, C, H, W] (Lu et al. 2022, Algorithm 2).

    stochastic: SDE-DPM-Solver++(2M) of the same paper; noise is asked for only then.
    """
    return _multistep(denoiser, process, x_T, condition, noise if stochastic else None)


def unipc(
    denoiser: Denoiser,
    process: ForwardProcess,
    x_T: Tensor,
    condition: Condition,
    noise: Noise,  # noqa: ARG001
) -> Iterator[State]:
    """UniPC-2 with B_2(h) from x_T, [N, C, H, W] (Zhao et al. 2023): each step is corrected by the next one's x̂_0.

    One network evaluation a step, no noise. A State's x is not corrected yet, it is what the denoiser is shown next.
    """
    return _multistep(denoiser, process, x_T, condition, correct=True)


SAMPLERS: dict[str, Callable[..., Iterator[State]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++2m": dpm_solver_2m,
    "dpm++2m-sde": partial(dpm_solver_2m, stochastic=True),
    "unipc": unipc,
    "euler": euler,
    "heun": heun,
}
"""The names of samplers, for the flag --sampler."""
