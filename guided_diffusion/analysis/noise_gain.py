"""How much noise a network leaves in x̂_0 where x_t holds more of it than it is told: why ODE solvers leave grain."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Condition, Denoiser
from ..diffusion.noise import SampleNoise
from ..diffusion.process import NoiseLevels
from .measures import Mean
from .study import measured


class NoiseGain:
    """Streaming means of the gain c of a network at some steps, over images that are shown batch after batch.

    At x_t = α x_0 + f σ ε, with f = 1 + excess, a network that takes away what it was told leaves (f − 1) σ/α · ε in
    x̂_0, one that reads the noise from the picture leaves none. c is the share that is left:
    c = ⟨x̂_0(f) − x̂_0(1), ε⟩ / ((f − 1) σ/α ⟨ε, ε⟩). Along an ODE f − 1 then grows like e^{c Δλ}, λ = log(α/σ).
    A ValueError for a step of noise alone, α = 0.
    """

    def __init__(self, denoiser: Denoiser, process: NoiseLevels, steps: Sequence[int], excess: float, seed: int = 0):
        self._denoiser, self._process, self._seed = denoiser, process, seed
        self.steps, self.excess = list(steps), excess
        if any(process.alphas[step] == 0 for step in self.steps):
            raise ValueError("noise_levels: the highest one is noise alone, which has no gain; leave it out")
        self.gains = Mean()

    @torch.no_grad()
    def add(self, indices: Sequence[int], x0: Tensor, condition: Condition) -> None:
        """One batch of x_0 [N, C, H, W] and their condition; each image has its own ε at all steps."""
        eps = SampleNoise(self._seed, indices, x0.shape[1:], x0.device).x_T()
        gains = []
        for step in self.steps:
            t = torch.full((len(x0),), step, device=x0.device)
            one, more = (
                self._denoiser(self._process.q_sample(x0, t, factor * eps), t, condition).raw_x0
                for factor in (1, 1 + self.excess)
            )
            left = ((more - one) * eps).flatten(1).sum(dim=1) / eps.square().flatten(1).sum(dim=1)
            told = self.excess * self._process.sigmas[step] / self._process.alphas[step]
            gains.append(left / told)
        self.gains.add(torch.stack(gains, dim=1))

    def results(self) -> list[dict[str, Any]]:
        """Of each step: t/T, σ/α and c with its standard error over images."""
        rows = []
        for column, step in enumerate(self.steps):
            found = measured(self.gains.value[column], self.gains.error[column], self.gains.n[column])
            sigma = self._process.sigmas[step] / self._process.alphas[step]
            rows.append({"t": step / self._process.num_timesteps, "sigma": round(float(sigma), 6), "c": found})
        return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """The results for people, in Markdown."""
    lines = ["| t/T | σ/α | c |", "|---|---|---|"]
    for row in rows:
        error = row["c"]["error"]
        known = "" if error is None else f" ± {error:.3f}"
        lines.append(f"| {row['t']:.2f} | {row['sigma']:.3g} | {row['c']['value']:.3f}{known} |")
    return "\n".join(lines)
