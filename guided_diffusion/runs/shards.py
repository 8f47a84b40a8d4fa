"""Numbered shards of a folder: each written whole, with a hash of its contents, and missing if it is anything else."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import blobfile as bf
import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..storage.files import alone_in, is_address, join, read_arrays, write_atomically

Arrays = Mapping[str, NDArray]
"""The arrays of a shard by their names, a row for each of its samples."""


def settings_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class DamagedError(ValueError):
    """A shard that is not what it should be: it is made again."""


@dataclass(frozen=True)
class Made:
    """How a shard was made: its number of samples, the network evaluations of each, and by whom, {} if not known."""

    samples: int
    evaluations: float
    by: Mapping[str, Any]


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


@dataclass(frozen=True)
class Shards(ABC):
    """What is known of `num_samples` samples, `shard_size` of them a file, the last file with the rest.

    folder: local or remote. identity: every setting that makes a sample what it is, and the cut into shards.
    """

    folder: str
    identity: Mapping[str, Any]
    num_samples: int
    shard_size: int

    @abstractmethod
    def path(self, number: int) -> str:
        """The file of a shard."""

    @property
    @abstractmethod
    def rows(self) -> Mapping[str, tuple[DTypeLike, tuple[int, ...]]]:
        """The dtype and the shape of a sample's row in every array, in the order in which they are hashed."""

    @property
    def hash(self) -> str:
        return settings_hash(self.identity)

    @property
    def shards(self) -> range:
        return range(-(-self.num_samples // self.shard_size))

    def indices(self, number: int) -> range:
        """The samples of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.num_samples))

    def lock(self) -> AbstractContextManager:
        """Keep other runs out of a local folder while this one works; a ValueError if one is there."""
        return nullcontext() if is_address(self.folder) else alone_in(self.folder)

    def sweep(self) -> None:
        """Delete the temporary files that a killed run left half-written in a local folder."""
        if is_address(self.folder):
            return
        for folder in (self.folder, os.path.dirname(self.path(0))):
            for name in os.listdir(folder) if os.path.isdir(folder) else []:
                if name.startswith(".") and ".npz." in name:
                    os.unlink(join(folder, name))

    def missing(self) -> list[int]:
        """The shards that are not there whole; damaged ones count as missing."""
        return [number for number in self.shards if not self._is_whole(number)]

    def _is_whole(self, number: int) -> bool:
        try:
            self.read_arrays(number)
        except (DamagedError, FileNotFoundError):
            return False
        return True

    def write_arrays(self, number: int, arrays: Arrays, evaluations: float, made_by: Mapping[str, Any]) -> None:
        """Write a shard. evaluations: of the network, for each of its samples. made_by: as `identity.made_by`."""
        about = {
            "hash": self.hash,
            "seed": self.identity.get("seed"),
            "first": self.indices(number)[0],
            "evaluations": evaluations,
            "sha256": _digest({name: arrays[name] for name in self.rows}),
            "made_by": made_by,
        }
        members = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays}
        write_atomically(self.path(number), lambda file: np.savez(file, **members))

    def read_arrays(self, number: int) -> tuple[Arrays, Made]:
        """The arrays of a shard and how they were made; `DamagedError` if it is not what this run would write."""
        count = len(self.indices(number))
        wanted = {name: (np.dtype(kind), (count, *shape)) for name, (kind, shape) in self.rows.items()}
        with bf.BlobFile(self.path(number), "rb", streaming=is_address(self.folder)) as file:
            try:
                arrays = read_arrays(file, {"about": (np.dtype(np.uint8), (None,)), **wanted})
                about = json.loads(arrays.pop("about").tobytes())
                found = (about["hash"], about["first"], about["sha256"])
                made = Made(len(self.indices(number)), float(about["evaluations"]), dict(about.get("made_by", {})))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DamagedError(f"{self.path(number)}: {error}") from None
        if found != (self.hash, self.indices(number)[0], _digest(arrays)):
            raise DamagedError(f"{self.path(number)}: not the samples of this run, or damaged")
        return arrays, made
