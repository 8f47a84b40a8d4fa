"""Measures of attention masks: how much of an image's frequencies they select, and how well they cover its object."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

LEAST_PATCH = 8
"""Pixels: a smaller patch tells too few frequencies apart."""

PATCH_NUMBERS = 2**23
"""Pixels of patches that are looked at together."""


@dataclass
class Mean:
    """Mean and standard error of values that come batch after batch, element by element; NaN does not count."""

    n: NDArray = field(default_factory=lambda: np.zeros(()))
    _sum: NDArray = field(default_factory=lambda: np.zeros(()))
    _squares: NDArray = field(default_factory=lambda: np.zeros(()))

    def add(self, values: Tensor) -> None:
        """One batch, [N, …], of independent rows."""
        rows = values.double().cpu().numpy()
        known = ~np.isnan(rows)
        rows = np.where(known, rows, 0.0)
        self.n = self.n + known.sum(axis=0)
        self._sum = self._sum + rows.sum(axis=0)
        self._squares = self._squares + (rows**2).sum(axis=0)

    @property
    def value(self) -> NDArray[np.float64]:
        """The mean, NaN where nothing was known."""
        return np.where(self.n > 0, self._sum / np.maximum(self.n, 1), np.nan)

    @property
    def error(self) -> NDArray[np.float64]:
        """The standard error of the mean, NaN where fewer than two values were known."""
        variance = (self._squares - self._sum**2 / np.maximum(self.n, 1)) / np.maximum(self.n - 1, 1)
        return np.where(self.n > 1, np.sqrt(np.maximum(variance, 0) / np.maximum(self.n, 1)), np.nan)


def intersection_over_union(masks: Tensor, objects: Tensor) -> Tensor:
    """|M ∩ O| / |M ∪ O| of bool masks [N, 1, H, W] and [N, 1, H, W]: [N], NaN where both are empty."""
    both = (masks & objects).flatten(1).sum(dim=1)
    either = (masks | objects).flatten(1).sum(dim=1)
    return torch.where(either > 0, both / either, torch.nan)


def as_many(like: Tensor, order: Tensor) -> Tensor:
    """Masks with as many cells as each row of `like` has, those that come first by `order`: bool [N, 1, h, w].

    order: [N or 1, at least h · w]; numbers drawn uniformly make every choice of cells as likely.
    """
    cells = like[0].numel()
    places = order[:, :cells].argsort(dim=1, stable=True).argsort(dim=1).to(like.device)
    return (places < like.flatten(1).sum(dim=1, keepdim=True)).reshape(like.shape)


def from_centre(grid: tuple[int, int]) -> Tensor:
    """The distance of every cell of a map from its middle, [1, h · w], in sides of the map."""
    down, across = ((torch.arange(side) + 0.5) / side - 0.5 for side in grid)
    return (down.square()[:, None] + across.square()).sqrt().flatten()[None]


def patch_side(side: int, grids: list[tuple[int, int]]) -> int:
    """Side P of the patches of `log_spectra`, in pixels, for images of that side: a cell of the coarsest map, even.

    At least 8 (and no more than the image). One P for all maps, so that their curves can be compared.
    """
    coarsest = max(-(-side // min(grid)) for grid in grids)
    wanted = max(LEAST_PATCH, coarsest + coarsest % 2)
    return min(wanted, side - side % 2)


@cache
def _annuli(patch: int) -> Tensor:
    """How much each number of an rfft2 counts in the mean over annulus k = 1 … P/2: [P · (P/2 + 1), P/2] float32."""
    down = torch.fft.fftfreq(patch)[:, None] * patch
    across = torch.fft.rfftfreq(patch)[None] * patch
    radius = (down.square() + across.square()).sqrt().round().flatten().long()
    # All columns but the first and last stand for their mirror images too.
    twice = torch.where((across > 0) & (across < patch / 2), 2.0, 1.0).expand(patch, -1).flatten()
    weights = torch.stack([twice * (radius == k) for k in range(1, patch // 2 + 1)], dim=1)
    return weights / weights.sum(dim=0)


def magnitudes(patches: Tensor) -> Tensor:
    """|F| of patches [..., P, P] under a Hann window, [..., P, P/2 + 1] (rfft2), in the units of the pixels.

    The patch's (windowed) mean is taken away first. Scaled so that a sine of amplitude A and a whole number k ≥ 2 of
    periods a patch gives A/2 at k, and A/4 at k ± 1 along its axis.
    """
    patch = patches.shape[-1]
    window = torch.hann_window(patch, dtype=patches.dtype, device=patches.device)
    window = window[:, None] * window / window.sum().square()
    centred = patches - (patches * window).sum(dim=(-2, -1), keepdim=True)
    return torch.fft.rfft2(centred * window).abs()


def log_spectra(images: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The spectrum around every cell of a map: images [N, C, H, W] in levels 0 … 255 to [N, rows · columns, P/2].

    Our definition (Hong et al., Fig. 11, shows curves and does not define its patches). The patch of a cell is the
    P × P pixels around the cell's centre, borders reflected: the same P for maps of every size, so a patch is the cell
    and its surroundings where cells are smaller. Its log-magnitude spectrum is ln(1 + |F|), |F| in grey levels
    (`magnitudes`), so that what is below one level, such as a plain background, counts as nothing; averaged over
    channels and over the annuli of k = 1 … P/2 periods a patch (rounded), that is k/P cycles a pixel.
    """
    channels, height, width = images.shape[1:]
    cell = (height // grid[0], width // grid[1])
    if cell[0] * grid[0] != height or cell[1] * grid[1] != width or not max(cell) <= patch:
        raise ValueError(
            f"a map of {grid[0]}×{grid[1]} cells and patches of {patch} do not tile {height}×{width} pixels"
        )
    top, left = ((patch - side) // 2 for side in cell)
    padded = F.pad(images, (left, patch - cell[1] - left, top, patch - cell[0] - top), mode="reflect")
    annuli = _annuli(patch).to(images)
    # Patches overlap, so together they are far larger than the images.
    at_once = max(1, PATCH_NUMBERS // (grid[0] * grid[1] * patch**2))
    spectra = []
    for planes in padded.flatten(0, 1)[:, None].split(at_once):
        patches = F.unfold(planes, patch, stride=cell).transpose(1, 2).unflatten(2, (patch, patch))
        spectra.append(magnitudes(patches).log1p().flatten(2) @ annuli)
    return torch.cat(spectra).unflatten(0, (-1, channels)).mean(dim=1)


def selected_mean(spectra: Tensor, masks: Tensor) -> Tensor:
    """The mean of the cells in a mask: [N, cells, F] and bool [N, 1, h, w] to [N, F]; NaN where the mask is empty."""
    chosen = masks.flatten(1).to(spectra)
    return torch.einsum("nt,ntf->nf", chosen, spectra) / chosen.sum(dim=1, keepdim=True)
