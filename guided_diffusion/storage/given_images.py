"""Images that a run is given to begin with: a folder of pictures, one picture, or an npz."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ..settings.options import exit_on_bad_input
from .files import open_regular, read_arrays
from .images import check_images, class_indices, class_names, fitted, list_image_files, read_picture, scaled


def read_npz(
    path: str, wanted: Mapping[str, tuple[DTypeLike, tuple[int | None, ...]]], flag: str
) -> dict[str, NDArray[Any]]:
    """As `read_arrays`, of a local file, with a row at least; a ValueError names the flag and what is wrong."""
    try:
        with open_regular(path) as file:
            arrays = read_arrays(file, {name: (np.dtype(kind), shape) for name, (kind, shape) in wanted.items()})
    except FileNotFoundError:
        raise ValueError(f"{flag}: no such file {path!r}") from None
    except OSError as error:
        raise ValueError(f"{flag}: {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{flag}: {path}: {error}") from None
    if not all(map(len, arrays.values())):
        raise ValueError(f"{flag}: {path}: holds no image")
    return arrays


def list_given(path: str, flag: str) -> list[Path]:
    """The pictures that `GivenImages` reads: those of a folder, or the one; none of an npz."""
    if path.endswith(".npz"):
        return []
    return [Path(path)] if Path(path).is_file() else list_image_files(path, flag)


class GivenImages:
    """Images of one size in a fixed order, used round and round, and read when they are asked for (an npz at once).

    path: a folder of pictures at any depth, in the order of their names, or one picture, of which the middle is taken;
    or an npz with arr_0, uint8 [N, height, width, 3]. flag: what a ValueError names. num_classes: read `labels` too,
    [N] int64: of an npz arr_1, of pictures named label_name.png their classes in the order of names, which must be all
    there are. files: the pictures, none of an npz.
    """

    labels: NDArray[np.int64] | None = None

    def __init__(self, path: str, height: int, width: int, flag: str, num_classes: int | None = None):
        self.files = list_given(path, flag)
        self._cut = partial(fitted, height=height, width=width)
        if self.files:
            check_images(self.files, flag)
        else:
            wanted = {"arr_0": (np.uint8, (None, height, width, 3))}
            arrays = read_npz(path, wanted | ({} if num_classes is None else {"arr_1": (np.int64, (None,))}), flag)
            self._images, self.labels = arrays["arr_0"], arrays.get("arr_1")
        if num_classes is None:
            return
        if self.files:
            count = len(class_names(self.files, flag))
            if count != num_classes:
                raise ValueError(
                    f"{flag}: {path}: wanted pictures of all {num_classes} classes of the network, got {count}; "
                    "give an npz with arr_1, labels"
                )
            self.labels = np.array(class_indices(self.files))
        elif not (len(self.labels) == len(self) and 0 <= self.labels.min() <= self.labels.max() < num_classes):
            raise ValueError(f"{flag}: {path}: arr_1: wanted one label from 0 to {num_classes - 1} for each image")

    def __len__(self) -> int:
        return len(self.files or self._images)

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """The image of a sample, [H, W, 3]; a picture that cannot be read is `BadInput`."""
        item = index % len(self)
        if not self.files:
            return self._images[item]
        with exit_on_bad_input():
            return read_picture(self.files[item], self._cut)

    def read(self, indices: Sequence[int]) -> Tensor:
        """The images of samples, [N, 3, H, W] float32 in [−1, 1]."""
        return torch.stack([scaled(self.pixels(index)) for index in indices])
