"""The samples of a run on disk: shards, a manifest that says what they are, the merge into one npz, and PNGs."""

import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import blobfile as bf
import numpy as np
from numpy.typing import DTypeLike

from ..storage import pictures
from ..storage.files import is_address, join, json_text, plain, write_atomically
from .ranks import jobs
from .shards import Made, Shards

RESULT = re.compile(r"samples_\d+(x\d+)*\.npz|grid\.png|comparison\.png|config\.yaml")
"""The files of a finished run, beside its manifest, shards and PNGs."""


@dataclass(frozen=True, eq=False)
class Shard:
    """Samples: images uint8 [N, H, W, 3], labels int64 [N] or None, and the network evaluations each of them took."""

    images: np.ndarray
    labels: np.ndarray | None
    evaluations: float


@dataclass(frozen=True)
class SampleStore(Shards):
    """The folder of one run, which holds samples of one identity.

    shape: of a sample, (H, W, 3), uint8. labelled: whether samples have a class.
    """

    shape: tuple[int, int, int]
    labelled: bool

    def path(self, number: int) -> str:
        return join(self.folder, "shards", f"shard_{number:06d}.npz")

    @property
    def rows(self) -> dict[str, tuple[DTypeLike, tuple[int, ...]]]:
        """Images, and classes where there are any."""
        return {"arr_0": (np.uint8, self.shape)} | ({"arr_1": (np.int64, ())} if self.labelled else {})

    @property
    def manifest_path(self) -> str:
        return join(self.folder, "manifest.json")

    @property
    def samples_path(self) -> str:
        size = "x".join(map(str, (self.num_samples, *self.shape)))
        return join(self.folder, f"samples_{size}.npz")

    def check(self) -> str:
        """Compare the folder's manifest with this run; a ValueError names what differs. Returns a word for the log."""
        if not bf.exists(self.manifest_path):
            self._check_free()
            return ""
        theirs = read_manifest(self.folder).get("identity")
        if not isinstance(theirs, dict):
            return f"{self.manifest_path} is damaged and is written again; shards tell by themselves what they are\n"
        theirs, ours = plain(theirs), plain(dict(self.identity))
        different = [
            f"{key} was {_said(theirs, key)}, is {_said(ours, key)}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        if different and self._holds_shards():
            raise ValueError(
                f"{self.folder} holds samples made otherwise: {'; '.join(different)}; give another --out_dir, or "
                "--overwrite True to delete them"
            )
        return ""

    def _check_free(self) -> None:
        """A ValueError where the folder's description is of something else, such as a training."""
        path = join(self.folder, "config.yaml")
        if bf.exists(path) and not self._holds_shards():
            raise ValueError(
                f"{path} is not of a run of samples, but of a training or another's, and samples would overwrite it; "
                "give another --out_dir"
            )

    def begun_by_this_job(self) -> bool:
        """Whether an earlier start of this very job, which the scheduler started again, began this very run here."""
        manifest = read_manifest(self.folder)
        begun_by = manifest.get("begun_by")
        again = isinstance(begun_by, list) and any(job in begun_by for job in jobs(started_again=True))
        return again and manifest.get("hash") == self.hash

    def _holds_shards(self) -> bool:
        shards = join(self.folder, "shards")
        return bf.isdir(shards) and any(name.endswith(".npz") for name in bf.listdir(shards))

    def clear(self) -> None:
        """Delete what an earlier run left: all samples and pictures of them, and what describes them."""
        if not bf.exists(self.manifest_path):
            self._check_free()
        if bf.isdir(join(self.folder, "shards")):
            (bf.rmtree if is_address(self.folder) else shutil.rmtree)(join(self.folder, "shards"))
        for path in [*self._pngs(), *self._results()]:
            bf.remove(path)
        if bf.exists(self.manifest_path):
            bf.remove(self.manifest_path)

    def _results(self) -> list[str]:
        """What a finished run leaves beside its shards."""
        names = sorted(bf.listdir(self.folder)) if bf.isdir(self.folder) else []
        return [join(self.folder, name) for name in names if RESULT.fullmatch(name)]

    def write_manifest(self, about: Mapping[str, Any]) -> None:
        """Write manifest.json: the identity, its hash, and what is known about the run."""
        manifest = {"identity": self.identity, "hash": self.hash, "samples": self.num_samples, **about}
        write_atomically(self.manifest_path, lambda file: file.write(json_text(manifest, indent=1).encode()))

    def write(self, number: int, shard: Shard, made_by: Mapping[str, Any] | None = None) -> None:
        """Write a shard. made_by: as `identity.made_by`, None if not known."""
        labels = {} if shard.labels is None else {"arr_1": shard.labels}
        self.write_arrays(number, {"arr_0": shard.images, **labels}, shard.evaluations, made_by or {})

    def read(self, number: int) -> Shard:
        """A shard; `DamagedError` if it is not what this run would write."""
        arrays, made = self.read_arrays(number)
        return Shard(arrays["arr_0"], arrays.get("arr_1"), made.evaluations)

    def merge(self) -> list[Made]:
        """Write all shards as one npz (arr_0 images, arr_1 labels), one shard in memory at a time.

        Returns how each of them was made.
        """
        made: list[Made] = []

        def stream(file: BinaryIO) -> None:
            labels = []
            with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_samples, *self.shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                    for number in self.shards:
                        arrays, how = self.read_arrays(number)
                        member.write(arrays["arr_0"].data)
                        labels.append(arrays.get("arr_1"))
                        made.append(how)
                if self.labelled:
                    with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                        np.lib.format.write_array(member, np.concatenate(labels), version=(1, 0))

        write_atomically(self.samples_path, stream)
        return made

    def png_path(self, index: int) -> str:
        return join(self.folder, "images", f"{index:06d}.png")

    def _pngs(self) -> list[str]:
        """The pictures of samples that are there, of this run or another."""
        folder = join(self.folder, "images")
        names = sorted(bf.listdir(folder)) if bf.isdir(folder) else []
        return [join(folder, name) for name in names if re.fullmatch(r"\d{6,}\.png", name)]

    def write_pngs(self, begin: Callable[[int], Callable[[int], None]]) -> None:
        """Leave every sample as a PNG of its own: those that are missing, and in the place of another run's.

        begin: is told how many are there, and gives what is told of each new one.
        """
        there = set()
        for path in self._pngs():
            if pictures.maker_of_png(path) == self.hash:
                there.add(path)
            else:
                bf.remove(path)
        missing = [index for index in range(self.num_samples) if self.png_path(index) not in there]
        written = begin(self.num_samples - len(missing))
        for number, indices in itertools.groupby(missing, lambda index: index // self.shard_size):
            images = self.read(number).images
            for index in indices:
                pictures.save_png(images[index - self.indices(number)[0]], self.png_path(index), made_by=self.hash)
                written(1)

    def first(self, count: int) -> np.ndarray:
        """The first `count` samples, or all if there are fewer: uint8 [N, H, W, 3]."""
        needed = -(-min(count, self.num_samples) // self.shard_size)
        return np.concatenate([self.read(number).images for number in range(needed)])[:count]


def _said(identity: Mapping[str, Any], key: str) -> str:
    """A setting's value; one that is not written down is at its default."""
    return repr(identity[key]) if key in identity else "the default"


def read_manifest(folder: str) -> dict[str, Any]:
    """What a folder's manifest says, {} where there is none or it is damaged."""
    try:
        with bf.BlobFile(join(folder, "manifest.json"), "rb") as file:
            manifest = json.loads(file.read(2**24))
    except (OSError, ValueError, RecursionError, bf.Error):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def batch_size_of(folder: str) -> int:
    """The batch size that a folder's manifest tells, or 0."""
    try:
        return max(0, int(read_manifest(folder).get("batch_size", 0)))
    except (ValueError, TypeError, OverflowError):
        return 0


def batches(indices: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """A shard's samples cut into batches, always in the same way."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
