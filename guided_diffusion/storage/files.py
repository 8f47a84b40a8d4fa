"""Writing files whole or not at all, strict JSON, and reading arrays without trusting them."""

import errno
import hashlib
import json
import math
import os
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import blobfile as bf
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import DTypeLike

LARGE, MOST_COMPRESSED = 2**28, 500
"""Bytes of an array from which it may be so many times larger than its compressed form; zeros are 1000 times."""

NAME_KEPT = 200
"""Of a file's name, what a temporary one begins with."""


class UnwrittenError(OSError):
    """A file cannot be written: one sentence."""


def cache_folder() -> Path:
    """$SAG_CACHE, else self-attention-guidance in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SAG_CACHE") or Path(base, "self-attention-guidance"))


def is_address(path: str | Path) -> bool:
    """Whether `path` names something remote (https://, gs://, az://, …)."""
    return "://" in str(path)


def join(folder: str | Path, *names: str) -> str:
    """A path below a folder, local or remote."""
    return bf.join(str(folder), *names) if is_address(folder) else os.path.join(folder, *names)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite as the texts inf and -inf, and null for NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(float(value))
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes, as Python's own Infinity and NaN are none, in ASCII, which any stream takes."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def sha256(path: str | Path) -> str:
    """SHA-256 of the contents of a local file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Name the file in errors of the system that come up while it is written: `UnwrittenError`."""
    try:
        yield
    except UnwrittenError:
        raise
    except (OSError, RuntimeError, bf.Error) as error:
        # torch.save hides the system's error behind its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, (OSError, bf.Error)):
            raise
        reason = getattr(cause, "strerror", None) or str(cause)
        other = getattr(cause, "filename", None)
        if other and not os.path.basename(other).startswith(f".{os.path.basename(path)[:NAME_KEPT]}."):
            reason += f": {other}"
        raise UnwrittenError(f"{path}: cannot be written ({reason})") from None


def write_atomically(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a temporary file, then move it to `path`: the whole file or none; else `UnwrittenError`.

    A local file is synced to disk before it is renamed; a remote one is uploaded in one piece when it is complete.
    """
    remote = is_address(path)
    if not remote and os.path.exists(path) and not os.path.isfile(path):
        raise UnwrittenError(f"{path}: cannot be written ({'a folder' if os.path.isdir(path) else 'not a file'})")
    folder, name = (None, "upload") if remote else (os.path.dirname(path) or ".", os.path.basename(path))
    with writing(path):
        if folder:
            os.makedirs(folder, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name[:NAME_KEPT]}.", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if folder is None:
                bf.copy(temporary, str(path), overwrite=True)
            else:
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
                _sync_folder(folder)
        finally:
            Path(temporary).unlink(missing_ok=True)


@contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Keep other runs out of a local folder while this one works; a ValueError if one is there."""
    os.makedirs(folder, exist_ok=True)
    lock = FileLock(os.path.join(folder, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another run is writing here; give another --out_dir") from None
    except NotImplementedError:
        sys.stderr.write(f"{folder}: this file system has no locks, so that nobody keeps a second run out\n")
    try:
        yield
    finally:
        lock.release()


def _sync_folder(folder: str) -> None:
    """Make a rename in a folder survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a local file to read; an OSError for a pipe or a device, which could keep us waiting for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))
    return open(path, "rb")


def read_arrays(
    file: BinaryIO, wanted: dict[str, tuple[DTypeLike | Sequence[DTypeLike], tuple[int | None, ...]]]
) -> dict[str, np.ndarray]:
    """The arrays of these names, dtypes (one, or one of several) and shapes (None: any length) of an npz, nothing else.

    Headers are compared before any data is read, so that a file cannot make us take more memory than was asked for.
    A ValueError says what is wrong.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = [info.filename for info in archive.infolist()]
            return {name: _read_array(archive, members, name, *wanted[name]) for name in wanted}
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(f"not an npz of arrays, or damaged ({type(error).__name__})") from None


def _read_array(
    archive: zipfile.ZipFile,
    members: list[str],
    name: str,
    dtypes: DTypeLike | Sequence[DTypeLike],
    shape: tuple[int | None, ...],
) -> np.ndarray:
    member = f"{name}.npy"
    if members.count(member) != 1:
        raise ValueError(f"wanted one array {name}, got {members.count(member)}")
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name}: an npy format of version {version} is not known")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        got_shape, fortran, got_dtype = read_header(stream)
        fits = len(got_shape) == len(shape) and all(w is None or w == g for w, g in zip(shape, got_shape, strict=True))
        known = [np.dtype(dtype) for dtype in (dtypes if isinstance(dtypes, Sequence) else [dtypes])]
        if got_dtype not in known or not fits or fortran:
            text = ", ".join("N" if size is None else str(size) for size in shape)
            kinds = " or ".join(map(str, known))
            raise ValueError(f"{name}: wanted {kinds} [{text}], got {got_dtype} {list(got_shape)}")
        size = math.prod(got_shape) * got_dtype.itemsize
        if size > max(LARGE, MOST_COMPRESSED * archive.getinfo(member).compress_size):
            raise ValueError(f"{name}: {size} bytes in {archive.getinfo(member).compress_size}: not images, but a bomb")
        if archive.getinfo(member).file_size != stream.tell() + size:
            raise ValueError(f"{name}: its header and its size do not agree")
        data = stream.read()
    return np.frombuffer(data, dtype=got_dtype).reshape(got_shape)
