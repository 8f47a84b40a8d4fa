"""Folders of pictures, with upstream's class labels from file names (`label_name.png`), and their crops."""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..settings.options import exit_on_bad_input
from .files import open_regular

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp"}
# Pillow knows dozens more by their contents, some of which start other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
MOST_PIXELS = 10**8


HEADERS_CHECKED = 10_000
BAD_FILES_NAMED = 5


def list_image_files(data_dir: str, flag: str = "data_dir") -> list[Path]:
    """All image files below data_dir and the folders that links lead to, sorted.

    A ValueError, which names the flag, if there is none.
    """
    if not data_dir:
        raise ValueError(f"{flag}: give a folder of images")
    if not Path(data_dir).is_dir():
        raise ValueError(f"{flag}: no such file or folder {data_dir!r}")
    files = []
    for folder, folders, names in os.walk(data_dir, followlinks=True):
        paths = (Path(folder, name) for name in (*folders, *names))
        files += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        # A link to a folder that it lies in would lead round and round.
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to(Path(folder, name).resolve())]
    files.sort()
    if not files:
        raise ValueError(f"{flag}: no image file below {data_dir!r}")
    return files


def _label(path: Path) -> str:
    """The class in a file's name, empty if it has none."""
    label, underscore, _ = path.name.partition("_")
    return label if underscore else ""


def class_names(files: list[Path], flag: str = "data_dir") -> list[str]:
    """The classes of files named label_name.png, sorted: class i of the data is item i.

    A ValueError names the flag and a file that has no class.
    """
    without = [path for path in files if not _label(path)]
    if without:
        raise ValueError(
            f"{flag}: {len(without)} of {len(files)} files have no class in their name (wanted label_name.png), "
            f"first {without[0]}"
        )
    return sorted({_label(path) for path in files})


def found(data_dir: str, images: int, classes: int, num_classes: int) -> str:
    """For people: how many images of how many classes a folder holds for a network of `num_classes`."""
    if not classes:
        return f"{images:,} images in {data_dir}"
    return f"{images:,} images of {classes:,} of the network's {num_classes:,} classes in {data_dir}"


def class_indices(files: list[Path]) -> list[int]:
    """The class of every file, by its place in `class_names`."""
    index = {name: i for i, name in enumerate(class_names(files))}
    return [index[_label(path)] for path in files]


def shrink(image: Image.Image, smaller_side: int) -> Image.Image:
    """Scale so that the smaller side has this many pixels: halving by boxes while it can, then bicubic."""
    while min(image.size) >= 2 * smaller_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = smaller_side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{image.width}×{image.height} pixels are too long a strip to scale to {width}×{height}")
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of the image at size × size pixels."""
    image = shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest middle part of the image that has this shape, at height × width pixels."""
    if height == width:
        return center_crop(image, height)
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def random_crop(image: Image.Image, size: int, chance: np.random.Generator, min_fraction: float = 0.8) -> Image.Image:
    """A square at a random place whose side is min_fraction to 1 of the image's smaller side."""
    image = shrink(image, int(chance.integers(size, math.ceil(size / min_fraction), endpoint=True)))
    left, top = (int(chance.integers(side - size, endpoint=True)) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "not one of " + ", ".join(FORMATS) if path.stat().st_size else "an empty file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_images(files: list[Path], flag: str = "data_dir") -> None:
    """Look at the headers of the files; a ValueError names the flag and those that are no images, at most five.

    Of more than 10,000 files as many are looked at, evenly spread: the rest is found when it is read.
    """
    bad = []
    for path in files[:: -(-len(files) // HEADERS_CHECKED)]:
        try:
            with open_regular(path) as file:
                Image.open(file, formats=FORMATS)
        except Exception as error:  # Pillow reports broken files by many types
            bad.append(f"{path} ({_reason(path, error)})")
    if bad:
        more = f", and {len(bad) - BAD_FILES_NAMED} more" if len(bad) > BAD_FILES_NAMED else ""
        raise ValueError(f"{flag}: not images that can be read: {', '.join(bad[:BAD_FILES_NAMED])}{more}")


def read_picture(path: Path, cut: Callable[[Image.Image], Image.Image], mode: str = "RGB") -> NDArray[np.uint8]:
    """The pixels of `cut` of a picture, [H, W, 3], or [H, W] for the mode L; a ValueError names a file that is none.

    As upstream: transparency is dropped, an animation is its first frame, and EXIF rotation is ignored. Of 16-bit
    pixels the high byte is kept (upstream: grey ones become white).
    """
    try:
        with open_regular(path) as stream, Image.open(stream, formats=FORMATS) as file:
            file.info.pop("transparency", None)
            wide = file.mode.startswith("I")
            image = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8)) if wide else file
            return np.asarray(cut(image.convert(mode)))
    except Exception as error:  # Pillow reports broken files by many types
        raise ValueError(f"{path}: not an image that can be read ({_reason(path, error)})") from None


class ImageFolder:
    """(image [3, S, S] float32 in [−1, 1], class index or 0) of every file in a folder: the middle square of it.

    A ValueError says what is wrong with the folder; an image that cannot be read is `BadInput`.
    """

    def __init__(self, data_dir: str, image_size: int, class_cond: bool):
        self.files = list_image_files(data_dir)
        self.class_names = class_names(self.files) if class_cond else []
        self.labels = class_indices(self.files) if class_cond else [0] * len(self.files)
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return scaled(self.pixels(item)), self.labels[item]

    def pixels(self, item: int, crop: Callable[..., Image.Image] = center_crop) -> NDArray[np.uint8]:
        """The picture [S, S, 3] of a file, cut by `crop(image, size=S)`."""
        with exit_on_bad_input():
            return read_picture(self.files[item], partial(crop, size=self.image_size))


def scaled(pixels: NDArray[np.uint8]) -> Tensor:
    """Pixels [H, W, 3] as [3, H, W] float32 in [−1, 1]."""
    return torch.from_numpy(pixels.transpose(2, 0, 1) / np.float32(127.5) - 1)
