"""Autoguidance: away from what a weaker network predicts (Karras et al., NeurIPS 2024, arXiv 2406.02507)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...diffusion.denoiser import Denoiser
from ..base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class Autoguidance(Guidance):
    """Δ = ε(x_t, c) − ε_weak(x_t, c); scale is w − 1 of D_w = w D_1 + (1 − w) D_0 (Karras et al., Eq. 3).

    weak: a smaller or less trained network for the same data, condition and process, as a denoiser. Its pass is no pass
    of the guided network and is counted by itself. network: its module, which moves from device to device.
    """

    uses_base: ClassVar[bool] = False
    passes: ClassVar[int] = 0
    weak_passes: ClassVar[int] = 1

    weak: Denoiser
    network: nn.Module | None = None

    def networks(self) -> Sequence[nn.Module]:
        return () if self.network is None else (self.network,)

    def difference(self, step: Step) -> Tensor:
        strong = step.conditional
        return strong.eps - step.denoise_by(self.weak, strong.x_t, strong.t, strong.condition).eps
