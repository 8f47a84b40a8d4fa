"""Reading arrays of a pickle without trusting it: nothing that it names is looked up, called or made."""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any

import blobfile as bf
import numpy as np
from numpy.typing import NDArray

LARGEST = 2**30
"""Bytes of a file."""
OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "REDUCE", "BUILD", "GLOBAL", "STACK_GLOBAL",
    "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
"""What a dict of arrays, numbers and strings is pickled by, from protocol 2 on."""

PUT, GET = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
LEAVES_THE_TOP = {"PROTO", "FRAME", "BUILD"}
MOST = 10_000
"""Operations; the statistics of a network take about 80."""


class _RefusedError(Exception):
    """Says what a pickle has that no dict of arrays needs."""


class _Type:
    """Stands for a dtype of plain numbers."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch("[fiu][1248]", code):
            raise _RefusedError(f"an array of {code!r:.20}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])

    def array(self, data: bytes | bytearray, shape: tuple[int, ...], order: str) -> NDArray:
        """The numbers that the file holds: a shape asks for no memory of its own."""
        return np.frombuffer(data, self.dtype).reshape(shape, order=order)


class _Array:
    """Stands for an array; its value comes with its state."""

    value: NDArray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, of, fortran, data = state
        self.value = of.array(data, shape, "F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: bytearray, of: _Type, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.value = of.array(data, shape, order)
    return array


def _scalar(of: _Type, data: bytes) -> int | float:
    return of.array(data, (), "C").item()


def _no_call(*_: Any) -> None:
    raise _RefusedError("a call of numpy.ndarray")


NAMES: dict[tuple[str, str], Callable] = {("numpy", "ndarray"): _no_call, ("numpy", "dtype"): _Type}
for _core in ("numpy.core", "numpy._core"):
    NAMES[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    NAMES[f"{_core}.multiarray", "scalar"] = _scalar
    NAMES[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Named:
    """What stands for one of numpy's names: it can be called, and nothing can be set on it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise _RefusedError("a change of numpy's names")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Named:
        if (module, name) not in NAMES:
            raise _RefusedError(f"{module:.40}.{name:.40}")
        return _Named(NAMES[module, name])


def _check_operations(data: bytes) -> None:
    """A refusal where a pickle does what no dict of arrays needs, or asks for memory or time that its size does not.

    A tuple of itself twice, and that again and again, has a hash that takes for ever; a very deep one overflows.
    """
    places, tuples, top_is_tuple = set(), set(), False
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        name = operation.name
        if name not in OPERATIONS:
            raise _RefusedError(f"the operation {name}")
        if count > MOST:
            raise _RefusedError(f"more than {MOST} operations")
        if name in PUT:
            place = len(places) if name == "MEMOIZE" else argument
            if place > count:
                raise _RefusedError(f"a place {place} in its memo")
            places.add(place)
            if top_is_tuple:
                tuples.add(place)
        elif name in GET and argument in tuples:
            raise _RefusedError("a tuple in two places")
        elif name not in LEAVES_THE_TOP:
            top_is_tuple = "TUPLE" in name


def load_pickle(path: str) -> dict[str, Any]:
    """A pickled dict whose values are numbers, strings, arrays, or dicts of these; a ValueError where it is not."""
    try:
        if (size := bf.stat(path).size) > LARGEST:
            raise ValueError(f"{path}: wanted a pickle of at most {LARGEST >> 20} MiB, got {size >> 20} MiB")
        with bf.BlobFile(path, "rb", streaming="://" in path) as file:
            data = file.read()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    try:
        _check_operations(data)
        found = _Unpickler(io.BytesIO(data)).load()
    except _RefusedError as error:
        wanted = "wanted a pickle of arrays, numbers, strings and dicts and nothing else"
        raise ValueError(f"{path}: {wanted}, got {error}; nothing of it was executed") from None
    except Exception as error:  # whatever a broken or hostile one makes of the stand-ins
        raise ValueError(f"{path}: not a whole pickle of arrays ({type(error).__name__})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path}: wanted a dict with names, got something else")
    return {key: _plain(value) for key, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: part.value if isinstance(part, _Array) else part for key, part in value.items()}
    return value.value if isinstance(value, _Array) else value
