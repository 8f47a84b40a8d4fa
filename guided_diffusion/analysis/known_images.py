"""Images of known content for an analysis, and the masks of their objects: folders of pictures, or npz files."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..storage.files import read_arrays
from ..storage.images import center_crop, list_image_files, read_picture

OPAQUE = 128
"""The least value of an object mask that counts as object."""


class KnownImages:
    """Images at the network's size, in a fixed order, read when they are asked for (an npz is read whole).

    path: a folder (squares are cut from the middle), or an npz with arr_0, uint8 [N, side, side, 3]. objects: masks of
    the same images, 255 inside: a folder of pictures of the same names, or an npz with arr_0, uint8 [N, side, side];
    empty: none. A ValueError says what is wrong.
    """

    def __init__(self, path: str, objects: str, side: int):
        self._side, self._objects = side, objects
        self._files: list[Path] = []
        self._masks: list[Path] = []
        if path.endswith(".npz"):
            self._images = _array("data_dir", path, (None, side, side, 3))
        else:
            self._files = list_image_files(path)
        if objects.endswith(".npz"):
            self._opacity = _array("object_masks", objects, (None, side, side))
            if len(self._opacity) != len(self):
                raise ValueError(f"object_masks: {objects}: wanted {len(self)} masks, got {len(self._opacity)}")
        elif objects:
            self._masks = self._named_alike(path, objects)

    def __len__(self) -> int:
        return len(self._files or self._images)

    @property
    def has_objects(self) -> bool:
        return bool(self._objects)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Images [N, 3, side, side] in levels 0 … 255 and their objects, bool [N, 1, side, side]."""
        rows = list(indices)
        images = np.stack([self._picture(self._files[i], "RGB") for i in rows]) if self._files else self._images[rows]
        levels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        if not self._objects:
            return levels, None
        opacity = np.stack([self._picture(self._masks[i], "L") for i in rows]) if self._masks else self._opacity[rows]
        largest = opacity.reshape(len(rows), -1).max(axis=1)
        for i, value in zip(rows, largest, strict=True):
            if 0 < value < OPAQUE:
                name = self._masks[i] if self._masks else f"{self._objects}: mask {i}"
                raise ValueError(f"object_masks: {name}: wanted 255 where the object is, got at most {value}")
        return levels, torch.from_numpy(opacity >= OPAQUE)[:, None]

    def _picture(self, path: Path, mode: str) -> NDArray[np.uint8]:
        return read_picture(path, partial(center_crop, size=self._side), mode)

    def _named_alike(self, path: str, objects: str) -> list[Path]:
        if path.endswith(".npz"):
            raise ValueError(f"object_masks: the images are {path}, give an npz of masks in the same order")
        if not Path(objects).is_dir():
            raise ValueError(f"object_masks: no such folder {objects!r}")
        found = {file.relative_to(objects).with_suffix(""): file for file in list_image_files(objects)}
        names = [file.relative_to(path).with_suffix("") for file in self._files]
        for name in names:
            if name not in found:
                raise ValueError(f"object_masks: {objects}: has no picture called {name}")
        return [found[name] for name in names]


def _array(key: str, path: str, shape: tuple[int | None, ...]) -> NDArray[np.uint8]:
    try:
        with open(path, "rb") as file:
            array = read_arrays(file, {"arr_0": (np.dtype(np.uint8), shape)})["arr_0"]
    except FileNotFoundError:
        raise ValueError(f"{key}: no such file {path!r}") from None
    except ValueError as error:
        raise ValueError(f"{key}: {path}: {error}") from None
    if not len(array):
        raise ValueError(f"{key}: {path}: holds nothing")
    return array
