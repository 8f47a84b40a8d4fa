"""Images of known content for an analysis, and the masks of their objects: folders of pictures, or npz files."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..storage.given_images import GivenImages, read_npz
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
        self._objects = objects
        self._images = GivenImages(path, side, side, "data_dir")
        self._masks: list[Path] = []
        self._cut = partial(center_crop, size=side)
        if objects.endswith(".npz"):
            self._opacity = read_npz(objects, {"arr_0": (np.uint8, (None, side, side))}, "object_masks")["arr_0"]
            if len(self._opacity) != len(self):
                raise ValueError(f"object_masks: {objects}: wanted {len(self)} masks, got {len(self._opacity)}")
        elif objects:
            self._masks = _named_alike(self._images.files, path, objects)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def has_objects(self) -> bool:
        return bool(self._objects)

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Images [N, 3, side, side] in levels 0 … 255 and their objects, bool [N, 1, side, side]."""
        rows = list(indices)
        levels = torch.from_numpy(np.stack([self._images.pixels(i) for i in rows])).permute(0, 3, 1, 2).float()
        if not self._objects:
            return levels, None
        masks = [read_picture(self._masks[i], self._cut, "L") if self._masks else self._opacity[i] for i in rows]
        opacity = np.stack(masks)
        largest = opacity.reshape(len(rows), -1).max(axis=1)
        for i, value in zip(rows, largest, strict=True):
            if 0 < value < OPAQUE:
                name = self._masks[i] if self._masks else f"{self._objects}: mask {i}"
                raise ValueError(f"object_masks: {name}: wanted 255 where the object is, got at most {value}")
        return levels, torch.from_numpy(opacity >= OPAQUE)[:, None]


def _named_alike(files: Sequence[Path], path: str, objects: str) -> list[Path]:
    """The masks of these pictures below `path`, which are called as they are."""
    if not files:
        raise ValueError(f"object_masks: the images are {path}, give an npz of masks in the same order")
    if not Path(objects).is_dir():
        raise ValueError(f"object_masks: no such folder {objects!r}")
    found = {file.relative_to(objects).with_suffix(""): file for file in list_image_files(objects, "object_masks")}
    names = [file.relative_to(path).with_suffix("") for file in files]
    for name in names:
        if name not in found:
            raise ValueError(f"object_masks: {objects}: has no picture called {name}")
    return [found[name] for name in names]
