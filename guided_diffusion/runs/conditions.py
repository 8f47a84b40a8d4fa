"""What samples are made of: classes as the flags ask, and images to begin with."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.noise import sample_labels
from ..settings.runs import SamplingConfig
from ..storage.given_images import GivenImages

ConditionOf = Callable[[SamplingConfig, Sequence[int]], dict[str, Tensor]]
"""The condition of samples by settings and their indices, rows first, on the CPU."""


def unconditional(_config: SamplingConfig, _indices: Sequence[int]) -> dict[str, Tensor]:
    """The condition of samples without one."""
    return {}


def choose_labels(labels: str, seed: int, indices: Sequence[int], num_classes: int, null_label: bool) -> Tensor:
    """The class of every sample, [N] int64, for the flag --labels."""
    if labels == "random":
        return sample_labels(seed, indices, num_classes)
    if labels == "none":
        if not null_label:
            raise ValueError("labels: none needs a network with a null label (null_label)")
        return torch.full((len(indices),), num_classes)
    if not re.fullmatch(r"-?\d+(,-?\d+)*", labels):
        raise ValueError(f"labels: wanted random, none, or classes like 3 or 0,7,7, got {labels!r}")
    given = [int(part) for part in labels.split(",")]
    for label in given:
        if not 0 <= label < num_classes:
            raise ValueError(f"labels: wanted classes from 0 to {num_classes - 1}, got {label}")
    return torch.tensor([given[index % len(given)] for index in indices])


@dataclass(frozen=True)
class Classes:
    """The classes of samples, `{"y": [N]}`, as --labels asks; a ValueError where that flag is wrong.

    null_label: whether "none" is a possible class.
    """

    num_classes: int
    null_label: bool

    def __call__(self, config: SamplingConfig, indices: Sequence[int]) -> dict[str, Tensor]:
        if config.balanced_labels:
            return {"y": torch.tensor(indices) % self.num_classes}
        return {"y": choose_labels(config.labels, config.seed, indices, self.num_classes, self.null_label)}


def base_condition(images: GivenImages) -> ConditionOf:
    """low_res in [−1, 1], and y where they have labels, of images: sample i is made of image i, round and round."""

    def condition_of(_config: SamplingConfig, indices: Sequence[int]) -> dict[str, Tensor]:
        condition = {"low_res": images.read(indices)}
        if images.labels is not None:
            condition["y"] = torch.from_numpy(images.labels[np.asarray(indices) % len(images)])
        return condition

    return condition_of
