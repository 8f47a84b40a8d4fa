"""Reading arrays of an npz without trusting it: headers first, data a block of rows at a time, never a pickle."""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

import blobfile as bf
import numpy as np
from numpy.typing import NDArray

BROKEN = (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError, RuntimeError, KeyError, OSError)

# Without this, blobfile tries for ever where there is no network, and prints as it does.
bf.configure(retry_limit=2, log_callback=lambda message: None)


class ArrayFile:
    """One array of an npz: its dtype and shape from the header, and its rows.

    A ValueError names file, array and what is wrong. The file stays open between reads of rows that follow each other.
    """

    def __init__(self, path: str, name: str):
        self.path, self.name = path, name
        with self._errors(), self._file() as file, zipfile.ZipFile(file) as archive:
            self._check_member(archive)
            with archive.open(f"{name}.npy") as stream:
                self.shape, self.fortran, self.dtype, self._offset = _header(stream)
                size = archive.getinfo(f"{name}.npy").file_size
        wanted = self._offset + math.prod(self.shape) * self.dtype.itemsize
        if self.dtype.hasobject:
            raise self._wrong("wanted plain numbers, got Python objects")
        if size != wanted:
            raise self._wrong(f"its header promises {wanted} bytes, the file holds {size}")
        self._stream: BinaryIO | None = None
        self._next = 0  # the row that follows what was read

    def _file(self) -> BinaryIO:
        return bf.BlobFile(self.path, "rb", streaming="://" in self.path)

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {self.name}: {what}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise ValueError(f"{self.path}: no such file") from None
        except BROKEN as error:
            raise ValueError(f"{self.path}: not a whole npz of arrays ({type(error).__name__}: {error})") from None

    def _check_member(self, archive: zipfile.ZipFile) -> None:
        count = [info.filename for info in archive.infolist()].count(f"{self.name}.npy")
        if count != 1:
            raise self._wrong(f"wanted one array of this name, got {count or 'none'}")

    def read(self, start: int, stop: int) -> NDArray:
        """Rows start to stop, a copy. Going back opens the file anew."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        with self._errors():
            if self._stream is None or start < self._next:
                self._stream = zipfile.ZipFile(self._file()).open(f"{self.name}.npy")  # noqa: SIM115 (stays open)
            self._stream.seek(self._offset + start * row)
            data = self._stream.read((stop - start) * row)
            if stop == len(self):
                self._stream.read(1)  # the end: here the archive's checksum is compared
        self._next = stop
        if len(data) != (stop - start) * row:
            raise self._wrong(f"ends before row {stop}")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def all(self) -> NDArray:
        """The whole array."""
        return self.read(0, len(self)) if self.shape else self._wrong_scalar()

    def _wrong_scalar(self) -> NDArray:
        raise self._wrong("wanted an array, got a single number")

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_stream": None, "_next": 0}


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an npy format of version {version} is not known")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype, stream.tell()


def names(path: str) -> list[str]:
    """The arrays of an npz."""
    try:
        with bf.BlobFile(path, "rb", streaming="://" in path) as file, zipfile.ZipFile(file) as archive:
            return [info.filename.removesuffix(".npy") for info in archive.infolist()]
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file or folder") from None
    except BROKEN as error:
        raise ValueError(f"{path}: not a whole npz of arrays ({type(error).__name__}: {error})") from None
