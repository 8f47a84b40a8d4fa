"""What any guidance's Δ may go through before it is added: APG, CFG-Zero*, another scale for low frequencies.

Norms, products and projections are those of each sample, over all of its channels and pixels. A step with ᾱ = 0 has no
Δ in ε that says anything of x̂_0; Δ in x̂_0 of such a step is added as it is.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import Guidance, Step


def _product(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of each sample, shaped to broadcast over it."""
    return (a.float() * b.float()).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def _share(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ / ⟨b, b⟩: how much of b there is in a; 0 where b is 0."""
    square = _product(b, b)
    return torch.where(square > 0, _product(a, b) / square, 0.0).to(a.dtype)


@dataclass(frozen=True, eq=False)
class ProjectedGuidance:
    """Adaptive projected guidance (Sadat et al., ICLR 2025, arXiv 2410.02416), of Δ in x̂_0.

    First momentum, Δ_i ← Δ_i + β Δ_{i−1}, whose Δ_{i−1} had its own; then the cap, Δ ← Δ · min(1, r / ‖Δ‖); then the
    projection, Δ ← Δ_⊥ + η Δ_∥, Δ_∥ being the part along x̂_0(x_t, c). eta: η, the paper's 0, or 1 for no projection.
    cap: r, inf for none. momentum: β, which the paper takes below 0; 0 for none.
    """

    eta: float = 0.0
    cap: float = math.inf
    momentum: float = 0.0

    def __post_init__(self):
        if not math.isfinite(self.eta):
            raise ValueError(f"apg_eta: wanted a finite number, got {self.eta}")
        if not self.cap > 0:
            raise ValueError(f"apg_cap: wanted more than 0 (inf: none), got {self.cap}")
        if not -1 < self.momentum < 1:
            raise ValueError(f"apg_momentum: wanted more than -1 and less than 1, got {self.momentum}")

    def __call__(self, difference: Tensor, step: Step, guidance: Guidance) -> Tensor:
        given = step.conditional
        process, t = given.process, given.t
        signal = process.has_signal(t, difference)
        # By how much Δ in x̂_0 is larger than Δ in ε, up to its sign.
        factor = process.at("eps_factors", t, difference) / process.at("x0_factors", t, difference)
        factor = torch.where(signal, factor, 1.0)
        if self.momentum:
            difference = difference + self.momentum * step.memory.get((self, guidance), 0.0) / factor
            step.memory[self, guidance] = torch.where(signal, factor * difference, 0.0)
        if self.cap < math.inf:
            norm = factor * _product(difference, difference).sqrt().to(difference.dtype)
            difference = torch.where(signal, difference * (self.cap / norm).clamp(max=1), difference)
        parallel = _share(difference, given.raw_x0) * given.raw_x0
        return torch.where(signal, difference - (1 - self.eta) * parallel, difference)


def optimised(difference: Tensor, step: Step, _guidance: Guidance) -> Tensor:
    """CFG-Zero*'s optimised scale (Fan et al. 2025, arXiv 2503.18886): v − s* v', s* = ⟨v, v'⟩ / ‖v'‖², as ε.

    v is what the network puts out at (x_t, c), as in `momentum`; v' is the output that ε − Δ stands for, from which the
    guidance leads away. The paper's first steps at velocity 0 are no matter of Δ and left out.
    """
    given = step.conditional
    weak = given.with_eps(given.eps - difference).output
    return given.eps - given.with_output(_share(given.output, weak) * weak).eps


def _smoothed(x: Tensor) -> Tensor:
    """Blurred by 1, 4, 6, 4, 1 sixteenths along each axis, with reflected borders: means of neighbours, four times."""
    x = F.pad(x, (2, 2, 2, 2), "reflect")
    for _ in range(4):
        x = F.avg_pool2d(x, 2, stride=1)
    return x


def low_frequencies(x: Tensor) -> Tensor:
    """The coarse level of a Laplacian pyramid of two, at full size: blurred and halved, doubled and blurred."""
    half = F.interpolate(_smoothed(x), [side // 2 for side in x.shape[2:]], mode="bilinear")
    return _smoothed(F.interpolate(half, x.shape[2:], mode="bilinear"))


@dataclass(frozen=True, eq=False)
class FrequencyScale:
    """Frequency-decoupled guidance (Sadat et al. 2025, arXiv 2506.19713): Δ_high + share · Δ_low.

    share: (w_low − 1) / (w_high − 1), of guidance whose scale is w_high − 1.
    """

    share: float

    def __post_init__(self):
        if not math.isfinite(self.share):
            raise ValueError(f"low_frequencies: wanted a finite number, got {self.share}")

    def __call__(self, difference: Tensor, _step: Step, _guidance: Guidance) -> Tensor:
        if min(difference.shape[2:]) < 6:
            raise ValueError(f"low_frequencies: wanted at least 6×6 pixels, got {list(difference.shape[2:])}")
        return difference - (1 - self.share) * low_frequencies(difference)
