"""guided-diffusion's image data: crops, flips and order drawn from the global generators of Python and torch."""

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import dist_util
from .storage.fetch import local_path
from .storage.images import center_crop, class_indices, list_image_files, read_picture, scaled, shrink


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless batches (images [N, 3, S, S] in [−1, 1], {"y": labels [N]} or {}) of this rank's share of a folder.

    deterministic: in the order of the files' names. A ValueError says what is wrong with the folder.
    """
    files = _list_image_files_recursively(data_dir)
    rank, size = dist_util.place()
    dataset = ImageDataset(
        image_size,
        files,
        classes=class_indices([Path(file) for file in files]) if class_cond else None,
        shard=rank,
        num_shards=size,
        random_crop=random_crop,
        random_flip=random_flip,
    )
    if len(dataset) < batch_size:
        own = f"{len(dataset)} images for rank {rank} of {size}"
        raise ValueError(f"data_dir: {own} are fewer than a batch of {batch_size}")
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=not deterministic, num_workers=1, drop_last=True)
    return (batch for _ in iter(int, 1) for batch in loader)


def _list_image_files_recursively(data_dir: str) -> list[str]:
    return [str(file) for file in list_image_files(data_dir)]


class ImageDataset(Dataset):
    """(image [3, S, S] float32 in [−1, 1], {"y": class} or {}) of every `num_shards`-th file from `shard` on."""

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
    ):
        super().__init__()
        self.resolution, self.random_crop, self.random_flip = resolution, random_crop, random_flip
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, Any]]:
        crop = random_crop_arr if self.random_crop else center_crop_arr
        pixels = read_picture(local_path(self.local_images[idx]), lambda image: crop(image, self.resolution))
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        condition = {} if self.local_classes is None else {"y": np.int64(self.local_classes[idx])}
        return scaled(pixels).numpy(), condition


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """The pixels [S, S, 3] of the middle square."""
    return np.array(center_crop(pil_image, image_size))


def random_crop_arr(
    pil_image: Image.Image, image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0
) -> np.ndarray:
    """The pixels [S, S, 3] of a square whose side is a fraction of the image's smaller side, at a random place."""
    most, least = (math.ceil(image_size / fraction) for fraction in (min_crop_frac, max_crop_frac))
    image = shrink(pil_image, random.randrange(least, most + 1))
    top = random.randrange(image.height - image_size + 1)
    left = random.randrange(image.width - image_size + 1)
    return np.array(image.crop((left, top, left + image_size, top + image_size)))
