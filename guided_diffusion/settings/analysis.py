"""The settings of the attention report, and of the measure of noise."""

import math
from dataclasses import dataclass
from functools import cached_property

from .options import numbers, option


def _distinct(key: str, text: str) -> list[float]:
    return list(dict.fromkeys(numbers(key, text, float)))


@dataclass(frozen=True)
class ReportConfig:
    """attention report"""

    blocks: str = option("all", "attention blocks to look at: all, or names like middle_block.1,output_blocks.2.1")
    shown_steps: int = option(10, "steps of the run to look at, evenly spread")
    thresholds: str = option("1.0,1.3", "values of ψ; differences and the ranking are for the first")
    blur_sigmas: str = option(
        "", "values of σ in pixels to compare; inf is always among them; empty: 1, ¼, ½ and 2 times blur_sigma"
    )
    animation: str = option("webp", "what is written over the steps: webp or gif")
    data_dir: str = option(
        "",
        "known images: a folder, or an npz with arr_0 (uint8 [N, side, side, 3]); a network with classes sees image i "
        "under the class of sample i (labels)",
        path=True,
    )
    object_masks: str = option(
        "",
        "where their objects are, 255 inside: a folder of pictures of the same names, or an npz with arr_0 (uint8 "
        "[N, side, side])",
        path=True,
    )
    known_images: int = option(0, "known images to use, the first so many; 0: all")
    noise_levels: str = option(
        "0.1,0.3,0.5,0.7,0.9", "where known images are noised to: t/T from 0 (image) to 1 (noise)"
    )

    def __post_init__(self):
        if self.shown_steps < 1 or self.known_images < 0:
            raise ValueError(
                f"shown_steps, known_images: wanted 1 and 0 or more, got {self.shown_steps}, {self.known_images}"
            )
        if self.animation not in ("webp", "gif"):
            raise ValueError(f"animation: wanted webp or gif, got {self.animation!r}")
        if self.object_masks and not self.data_dir:
            raise ValueError("object_masks: the masks of which images? give data_dir")
        if not all(0 <= level <= 1 for level in self.levels):
            raise ValueError(f"noise_levels: wanted numbers from 0 to 1, got {self.noise_levels}")
        if not all(math.isfinite(threshold) for threshold in self.psi):
            raise ValueError(f"thresholds: wanted finite numbers, got {self.thresholds}")

    @cached_property
    def levels(self) -> list[float]:
        return _distinct("noise_levels", self.noise_levels)

    @cached_property
    def psi(self) -> list[float]:
        return _distinct("thresholds", self.thresholds)

    def sigmas(self, of_the_run: float) -> list[float]:
        """The values of σ, that of the guidance or the first given one first."""
        if self.blur_sigmas:
            return list(dict.fromkeys([*_distinct("blur_sigmas", self.blur_sigmas), math.inf]))
        return list(dict.fromkeys([*(of_the_run * part for part in (1, 0.25, 0.5, 2)), math.inf]))


@dataclass(frozen=True)
class NoiseGainConfig:
    """noise gain"""

    data_dir: str = option(
        "",
        "pictures: a folder, or an npz with arr_0 (uint8 [N, side, side, 3]); empty: samples of the model",
        path=True,
    )
    known_images: int = option(64, "pictures of data_dir to use, the first so many; 0: all")
    noise_levels: str = option("0.1,0.3,0.5,0.7,0.9", "where they are noised to: t/T from 0 (image) to 1 (noise)")
    excess: float = option(0.2, "how much more noise than the network is told, as a share")
    json: str = option("", "write the result to this file as well", path=True)

    def __post_init__(self):
        if self.known_images < 0:
            raise ValueError(f"known_images: wanted 0 or more, got {self.known_images}")
        if self.excess <= -1 or self.excess == 0:
            raise ValueError(f"excess: wanted more than -1, and not 0, got {self.excess}")
        if not all(0 <= level <= 1 for level in self.levels):
            raise ValueError(f"noise_levels: wanted numbers from 0 to 1, got {self.noise_levels}")

    @cached_property
    def levels(self) -> list[float]:
        return _distinct("noise_levels", self.noise_levels)
