"""What a distance sees: pictures against themselves, disturbed by known amounts (Heusel et al. 2017, Fig. 3).

A disturbance takes uint8 pictures [N, H, W, 3] in the order of their classes, its level and a source of random numbers,
and gives as many pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d
from scipy.special import ndtr

Pictures = NDArray[np.uint8]
CELLS = 8
"""Cells to a side that are erased one by one."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
NOISE = 64.0
"""Standard deviation, in levels, of pictures that are nothing but noise."""


def _levels(x: NDArray) -> Pictures:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def noise(pictures: Pictures, sigma: float, rng: np.random.Generator) -> Pictures:
    """White noise of σ levels (of 255)."""
    return _levels(pictures + sigma * rng.standard_normal(pictures.shape, dtype=np.float32))


def blur(pictures: Pictures, sigma: float, _: np.random.Generator) -> Pictures:
    """A Gaussian of σ pixels, integrated over each pixel, so that a small one is still one."""
    reach = int(np.ceil(4 * sigma))
    weights = np.diff(ndtr((np.arange(-reach, reach + 2) - 0.5) / sigma))
    blurred = pictures.astype(np.float32)
    for axis in (1, 2):
        blurred = correlate1d(blurred, weights / weights.sum(), axis, mode="nearest")
    return _levels(blurred)


def salt(pictures: Pictures, share: float, rng: np.random.Generator) -> Pictures:
    """A share of the pixels becomes black or white."""
    hit = rng.random(pictures.shape[:3]) < share
    disturbed = pictures.copy()
    disturbed[hit] = np.where(rng.random(hit.sum()) < 0.5, 0, 255)[:, None]
    return disturbed


def erase(pictures: Pictures, share: float, rng: np.random.Generator) -> Pictures:
    """A share of 8×8 cells is painted over in the median colour of all pictures."""
    order = rng.random((len(pictures), CELLS**2)).argsort(axis=1).reshape(-1, CELLS, CELLS)
    height, width = pictures.shape[1:3]
    rows, columns = np.arange(height) * CELLS // height, np.arange(width) * CELLS // width
    gone = (order < round(share * CELLS**2))[:, rows[:, None], columns]
    return np.where(gone[..., None], np.median(pictures, axis=(0, 1, 2)).astype(np.uint8), pictures)


def brighten(pictures: Pictures, levels: float, _: np.random.Generator) -> Pictures:
    """All pixels brighter by so many levels."""
    return _levels(pictures + np.float32(levels))


def fade(pictures: Pictures, share: float, _: np.random.Generator) -> Pictures:
    """A share of the saturation is taken away."""
    grey = (pictures @ LUMA)[..., None]
    return _levels(grey + (1 - share) * (pictures - grey))


def miss(pictures: Pictures, share: float, rng: np.random.Generator) -> Pictures:
    """A share of the pictures, the last ones, is replaced by others."""
    kept = round((1 - share) * len(pictures))
    return pictures[rng.permutation(len(pictures)) % kept]


def spoil(pictures: Pictures, share: float, rng: np.random.Generator) -> Pictures:
    """A share of the pictures is nothing but noise around middle grey."""
    disturbed, hit = pictures.copy(), rng.permutation(len(pictures))[: round(share * len(pictures))]
    disturbed[hit] = _levels(127.5 + NOISE * rng.standard_normal(disturbed[hit].shape))
    return disturbed


@dataclass(frozen=True)
class Disturbance:
    """A way to disturb pictures, with its levels, each worse than the one before."""

    title: str
    levels: tuple[float, ...]
    apply: Callable[[Pictures, float, np.random.Generator], Pictures]


DISTURBANCES = {
    "noise": Disturbance("noise, σ in levels", (2, 4, 8, 16, 32, 64), noise),
    "blur": Disturbance("blur, σ in pixels", (0.25, 0.5, 1, 2), blur),
    "salt": Disturbance("salt and pepper, share of pixels", (0.002, 0.01, 0.05, 0.2), salt),
    "erased": Disturbance("erased cells, share", (1 / 64, 1 / 16, 1 / 4), erase),
    "brightness": Disturbance("brightness, levels", (3, 10, 30), brighten),
    "saturation": Disturbance("saturation, share taken", (0.1, 0.3, 0.6, 1), fade),
    "missing": Disturbance("missing classes, share of pictures", (0.25, 0.5, 0.75), miss),
    "spoiled": Disturbance("pictures of noise, share", (0.005, 0.02, 0.08, 0.3), spoil),
}
