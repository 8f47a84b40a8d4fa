"""What samples are made of: classes as the flags ask, and images to begin with."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..diffusion.noise import sample_labels
from ..settings.sampling import SamplingConfig
from ..storage.files import read_arrays

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


def base_condition(path: str, small_size: int, num_classes: int | None) -> ConditionOf:
    """low_res in [−1, 1], and y where the network has classes, of the images in an npz; a ValueError if wrong.

    Sample i is made of image i, round and round.
    """
    wanted: dict[str, tuple[np.dtype, tuple[int | None, ...]]] = {
        "arr_0": (np.dtype(np.uint8), (None, small_size, small_size, 3))
    }
    if num_classes is not None:
        wanted["arr_1"] = (np.dtype(np.int64), (None,))
    try:
        with open(path, "rb") as file:
            arrays = read_arrays(file, wanted)
    except FileNotFoundError:
        raise ValueError(f"base_samples: no such file {path!r}") from None
    except ValueError as error:
        raise ValueError(f"base_samples: {path}: {error}") from None
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if not len(images):
        raise ValueError(f"base_samples: {path}: holds no image")
    if labels is not None and not (len(labels) == len(images) and 0 <= labels.min() <= labels.max() < num_classes):
        raise ValueError(f"base_samples: {path}: arr_1: wanted one label from 0 to {num_classes - 1} for each image")

    def condition_of(_config: SamplingConfig, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = np.asarray(indices) % len(images)
        low_res = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"low_res": low_res} | ({} if labels is None else {"y": torch.from_numpy(labels[rows])})

    return condition_of
