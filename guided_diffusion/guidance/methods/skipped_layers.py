"""Skip-layer guidance, and S²-Guidance, which draws the layers (Chen et al., ICLR 2026, arXiv 2508.12880)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...diffusion.noise import BLOCKS, sent
from ...networks.altering import altered
from ..base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class SkippedLayersGuidance(Guidance):
    """Δ = ε(x_t, c) − ε̂(x_t, c, m_t), where ε̂ leaves out layers: what goes in comes out.

    layers: whose output has their input's shape. drawn: None leaves out all of them (skip-layer guidance); a number, so
    many of them, drawn anew for every sample and step (S², whose ω is the scale: ε̃ = … + ω (ε − ε̂), Eq. 4).
    """

    uses_base: ClassVar[bool] = False

    layers: tuple[nn.Module, ...]
    drawn: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.layers:
            raise ValueError("layers: wanted one or more, got none")
        if self.drawn is not None and not 1 <= self.drawn <= len(self.layers):
            raise ValueError(f"skip_drawn: wanted 1 to {len(self.layers)}, the number of layers, got {self.drawn}")

    def difference(self, step: Step) -> Tensor:
        given = step.conditional
        left_out = self._left_out(step)

        def skipped(number: int, rows: slice, x: Tensor, output: Tensor) -> Tensor:
            if output.shape != x.shape:
                raise ValueError(f"a layer of {list(x.shape)} to {list(output.shape)} cannot be left out")
            chosen = left_out[rows, number].reshape(-1, *[1] * (x.ndim - 1))
            return torch.where(chosen, x.to(output.dtype), output)

        with altered(*self.layers, rows=len(given.x_t), after=skipped):
            return given.eps - step.denoise(given.x_t, given.t, given.condition).eps

    def _left_out(self, step: Step) -> Tensor:
        """Which layers each row leaves out, [N, layers] bool."""
        x = step.conditional.x_t
        if self.drawn is None:
            return torch.ones(len(x), len(self.layers), dtype=torch.bool, device=x.device)
        ranks = step.uniform(len(self.layers), BLOCKS).argsort(dim=1).argsort(dim=1)
        return sent(ranks < self.drawn, x.device)
