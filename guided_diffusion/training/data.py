"""Folders of images as endless batches, with upstream's class labels from file names (`label_name.png`)."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from guided_diffusion.config import BadInput

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp"}


def list_image_files(data_dir: str) -> list[Path]:
    """All image files below data_dir, sorted; a ValueError if there is none."""
    if not data_dir:
        raise ValueError("data_dir: give a folder of images")
    if not Path(data_dir).is_dir():
        raise ValueError(f"data_dir: no such folder {data_dir!r}")
    files = sorted(path for path in Path(data_dir).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"data_dir: no image file below {data_dir!r}")
    return files


def class_names(files: list[Path]) -> list[str]:
    """The classes of files named label_name.png, sorted: class i of the data is item i."""
    return sorted({path.name.split("_")[0] for path in files})


def _shrink(image: Image.Image, smaller_side: int) -> Image.Image:
    """Scale so that the smaller side has this many pixels: halving by boxes while it can, then bicubic."""
    while min(image.size) >= 2 * smaller_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = smaller_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of the image at size × size pixels."""
    image = _shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, min_fraction: float = 0.8) -> Image.Image:
    """A square at a random place whose side is min_fraction to 1 of the image's smaller side."""
    image = _shrink(image, random.randint(size, int(size / min_fraction)))
    left, top = random.randint(0, image.width - size), random.randint(0, image.height - size)
    return image.crop((left, top, left + size, top + size))


class ImageFolder(Dataset):
    """(image [3, S, S] float32 in [−1, 1], class index or 0) of every file in a folder."""

    def __init__(self, data_dir: str, image_size: int, class_cond: bool, crop: bool, flip: bool):
        self.files = list_image_files(data_dir)
        self.class_names = class_names(self.files) if class_cond else []
        index = {name: i for i, name in enumerate(self.class_names)}
        self.labels = [index[path.name.split("_")[0]] if class_cond else 0 for path in self.files]
        self.image_size, self.crop, self.flip = image_size, crop, flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        try:
            with Image.open(self.files[i]) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise BadInput(f"{self.files[i]}: not an image that can be read ({error})") from None
        image = (random_crop if self.crop else center_crop)(image, self.image_size)
        if self.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1) / np.float32(127.5) - 1)
        return pixels, self.labels[i]


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless batches (images [N, 3, S, S] in [−1, 1], {"y": labels [N]} or {}), epoch after epoch.

    Every epoch has a new order, and what does not fill its last batch waits for the next one; deterministic: always
    the order of the file names. Random numbers come from torch's and Python's generators.
    """
    data = ImageFolder(data_dir, image_size, class_cond, random_crop, random_flip)
    whole_batches = len(data) >= batch_size
    loader = DataLoader(data, batch_size, shuffle=not deterministic, num_workers=num_workers, drop_last=whole_batches)
    while True:
        for images, labels in loader:
            yield images, {"y": labels} if class_cond else {}
