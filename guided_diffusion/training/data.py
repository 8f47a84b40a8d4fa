"""Folders of images as endless batches, with upstream's class labels from file names (`label_name.png`).

Which images a batch holds, their crops and flips are functions of the seed and the batch's number alone.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.noise import CROP, ORDER, generator
from ..settings.options import check_seed
from ..storage.images import ImageFolder, center_crop, check_images, random_crop, scaled

Batches = Iterator[tuple[Tensor, dict[str, Tensor]]]

BATCHES_AHEAD = 2


class VariedImages(ImageFolder):
    """A folder of images as they are cropped and flipped: item epoch · N + i is image i of the N in that epoch."""

    def __init__(self, data_dir: str, image_size: int, class_cond: bool, crop: bool, flip: bool, seed: int = 0):
        super().__init__(data_dir, image_size, class_cond)
        self.crop, self.flip, self.seed = crop, flip, seed

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        epoch, i = divmod(item, len(self))
        chance = generator(self.seed, i, CROP, epoch)
        pixels = self.pixels(i, partial(random_crop, chance=chance) if self.crop else center_crop)
        if self.flip and chance.random() < 0.5:
            pixels = pixels[:, ::-1]
        return scaled(pixels), self.labels[i]


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
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
    start_batch: int = 0,
) -> Batches:
    """Endless batches (images [n, 3, S, S] in [−1, 1], {"y": labels [n]} or {}), epoch after epoch.

    batch_size: of all ranks together; this `rank` of `size` gets its n = batch_size / size rows. Every epoch has every
    image once, in an order of its own, and a batch may span two; deterministic: always the order of the file names.
    num_workers: threads that read ahead; 0: none. start_batch: the first batch, counted from 0.
    A ValueError says what is wrong with the arguments or the folder; an image that cannot be read is `BadInput`.
    """
    check_seed(seed)
    if batch_size < 1 or batch_size % size:
        raise ValueError(f"batch_size: wanted a multiple of the {size} ranks, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers: wanted 0 or more, got {num_workers}")
    data = VariedImages(data_dir, image_size, class_cond, random_crop, random_flip, seed)
    if rank == 0:  # one rank's look is enough
        check_images(data.files)
    items = _items(len(data), None if deterministic else seed, start_batch * batch_size)
    own = slice(rank * batch_size // size, (rank + 1) * batch_size // size)
    batches = (list(islice(items, batch_size))[own] for _ in iter(int, 1))
    return _stacked(_read(data, batches, num_workers), class_cond)


def _items(count: int, seed: int | None, start: int) -> Iterator[int]:
    """Items of VariedImages of `count` images from the `start`-th on, endless; without seed in file order."""
    epoch, done = divmod(start, count)
    while True:
        order = np.arange(count) if seed is None else generator(seed, epoch, ORDER).permutation(count)
        yield from (epoch * count + order[done:]).tolist()
        epoch, done = epoch + 1, 0


def _read(data: VariedImages, batches: Iterator[list[int]], num_workers: int) -> Iterator[list[tuple[Tensor, int]]]:
    """The rows of every batch, read by this thread, or ahead by others."""
    if not num_workers:
        yield from ([data[item] for item in batch] for batch in batches)
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="images")
    ahead: deque[list[Future[tuple[Tensor, int]]]] = deque()
    try:
        for batch in batches:
            ahead.append([pool.submit(data.__getitem__, item) for item in batch])
            if len(ahead) > BATCHES_AHEAD:
                yield [row.result() for row in ahead.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _stacked(batches: Iterator[list[tuple[Tensor, int]]], class_cond: bool) -> Batches:
    for rows in batches:
        images, labels = zip(*rows, strict=True)
        yield torch.stack(images), {"y": torch.tensor(labels)} if class_cond else {}


def with_low_res(batches: Batches, small_size: int) -> Batches:
    """Batches whose condition also has `low_res`, [n, 3, s, s]: the images with pixels averaged by areas."""
    for images, condition in batches:
        yield images, {**condition, "low_res": F.interpolate(images, small_size, mode="area")}
