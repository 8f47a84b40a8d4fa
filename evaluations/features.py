"""Features of images, computed block by block over the ranks and kept on disk, so that nothing is computed twice."""

import hashlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from evaluations.networks import FeatureNetwork, Features
from evaluations.ranks import Ranks
from evaluations.sources import Images

BLOCK = 512
"""Images in a file of the cache."""

DIGEST_SIZE = hashlib.sha256().digest_size


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """One kind of features of all images, [N, D] float32, read from the cache's files as they are asked for."""

    files: Sequence[Path]
    block: int
    n: int
    columns: slice

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.n)
        pieces = []
        for number in range(start // self.block, -(-stop // self.block)):
            array = np.load(self.files[number], mmap_mode="r", allow_pickle=False)
            low, high = max(start - number * self.block, 0), stop - number * self.block
            pieces.append(torch.from_numpy(np.array(array[low:high, self.columns])))
        return torch.cat(pieces)

    def blocks(self) -> Iterator[Tensor]:
        """All rows, a file at a time."""
        for start in range(0, self.n, self.block):
            yield self[start : start + self.block]


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What is known of a set of images: rows by the name of the feature (pool, spatial, logits), and a digest."""

    rows: dict[str, FeatureRows]
    digest: str


def _joined(features: Features) -> NDArray[np.float32]:
    """All features side by side, [N, sum of D]."""
    parts = [part for part in (features.pool, features.spatial, features.logits) if part is not None]
    return torch.cat(parts, dim=1).float().cpu().numpy()


def feature_columns(network: FeatureNetwork, size: tuple[int, int]) -> dict[str, slice]:
    """Where each kind of features lies among the joined columns, for images of a size (H, W)."""
    features = network(torch.zeros((1, 3, *size), dtype=torch.uint8))
    columns, start = {}, 0
    for name in ("pool", "spatial", "logits"):
        if (part := getattr(features, name)) is not None:
            columns[name] = slice(start, start + part.shape[1])
            start += part.shape[1]
    return columns


def extract(
    images: Images, network: FeatureNetwork, cache: Path, ranks: Ranks, batch_size: int, description: str
) -> ImageFeatures:
    """The features of all images, over all ranks: blocks that the cache holds are taken from there.

    A block's file is named by the SHA-256 of its images; its folder by the network and its weights. What was computed
    stays when the evaluation is stopped.
    """
    folder = cache / f"{network.name}-{network.weights[:16]}"
    columns = ranks.agree(lambda: feature_columns(network, images.size))
    width = max(part.stop for part in columns.values())
    blocks = range(-(-len(images) // BLOCK))
    mine = blocks[ranks.rank :: ranks.size]

    def compute() -> dict[int, str]:
        folder.mkdir(parents=True, exist_ok=True)
        digests = {}
        quiet = None if ranks.rank == 0 else True
        bar = tqdm(total=len(images), desc=description, unit="image", disable=quiet, dynamic_ncols=True)
        if bar.disable and ranks.rank == 0 and len(blocks) > 4:
            sys.stderr.write(f"{description}: features of {len(images)} images on {network.device}\n")
        with bar, ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(_read, images, mine[0]) if mine else None
            for turn, number in enumerate(mine):
                batch, digest = upcoming.result()
                if turn + 1 < len(mine):
                    upcoming = reader.submit(_read, images, mine[turn + 1])
                digests[number] = digest
                path = folder / f"{digest}.npy"
                if not _is_whole(path, (len(batch), width)):
                    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2)
                    rows = np.concatenate([_joined(network(part)) for part in pixels.split(batch_size)])
                    if not np.isfinite(rows).all():
                        raise ValueError(f"{description}: features that are not finite; are the network's weights?")
                    _write(path, rows)
                bar.update(len(batch) * (ranks.size if ranks.rank == 0 else 1))
        return digests

    digests: dict[int, str] = {}
    for part in ranks.gather(ranks.agree(compute)):
        digests |= part
    files = [folder / f"{digests[number]}.npy" for number in blocks]
    rows = {name: FeatureRows(files, BLOCK, len(images), place) for name, place in columns.items()}
    return ImageFeatures(rows, hashlib.sha256("".join(digests[number] for number in blocks).encode()).hexdigest())


def _read(images: Images, number: int) -> tuple[NDArray[np.uint8], str]:
    """Block `number` of the images, and its SHA-256 with its shape."""
    block = np.array(images.read(number * BLOCK, min((number + 1) * BLOCK, len(images))))
    digest = hashlib.sha256(str(block.shape).encode())
    digest.update(block)
    return block, digest.hexdigest()


def _is_whole(path: Path, shape: tuple[int, int]) -> bool:
    """Whether a file of the cache is as `_write` left it: an array of this shape, and behind it its SHA-256."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    if hashlib.sha256(data[:-DIGEST_SIZE]).digest() != data[-DIGEST_SIZE:]:
        return False
    array = np.load(io.BytesIO(data), allow_pickle=False)
    return array.shape == shape and array.dtype == np.float32


def _write(path: Path, array: NDArray) -> None:
    """Write an array, and behind it the SHA-256 of all before, whole or not at all; an OSError names the file."""
    stream = io.BytesIO()
    np.save(stream, array)
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(stream.getbuffer())
                file.write(hashlib.sha256(stream.getbuffer()).digest())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from None
