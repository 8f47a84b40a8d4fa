"""Pickles of arrays: numpy's own, of every protocol and name, are read; of all others nothing is executed."""

import builtins
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from evaluations.pickles import LARGEST, load_pickle

RNG = np.random.default_rng(0)
STATISTICS = {
    "fid": {"mu": RNG.random(3), "sigma": np.asfortranarray(RNG.random((3, 3)))},
    "fd_dinov2": {"mu": RNG.random(2).astype(">f4"), "sigma": RNG.integers(0, 9, (2, 2)), "of": ["a", (1, 2.5, None)]},
    "num_images": np.int64(50_000),
    "note": "é",
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_what_numpy_writes_is_read(tmp_path, protocol, core):
    data = pickle.dumps(STATISTICS, protocol=protocol)
    for module in (b"multiarray", b"numeric"):
        name = b"numpy._core." + module
        for head, pack in ((b"\x8c", "<B"), (b"c", "")):  # a short text, and the text of a GLOBAL
            if pack:
                old = head + struct.pack(pack, len(name)) + name
                data = data.replace(old, head + struct.pack(pack, len(core + b"." + module)) + core + b"." + module)
            else:
                data = data.replace(head + name + b"\n", head + core + b"." + module + b"\n")
    if protocol > 3:  # frames tell their length, which changed
        start = data.index(b"\x95")
        data = data[: start + 1] + struct.pack("<Q", len(data) - start - 9) + data[start + 9 :]
    assert (core + b".m" in data) or (core + b".n" in data)
    (tmp_path / "a.pkl").write_bytes(data)
    found = load_pickle(str(tmp_path / "a.pkl"))
    assert found.keys() == STATISTICS.keys()
    for entry in ("fid", "fd_dinov2"):
        for name in ("mu", "sigma"):
            assert found[entry][name].dtype == STATISTICS[entry][name].dtype
            np.testing.assert_array_equal(found[entry][name], STATISTICS[entry][name])
    assert found["num_images"] == 50_000
    assert (found["note"], found["fd_dinov2"]["of"]) == ("é", ["a", (1, 2.5, None)])


class Call:
    """Pickled as a call, which a careless reader makes."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def made(*operations):
    """A pickle of these operations: a dict whose value they leave on the stack."""
    return b"\x80\x04}\x8c\x03fid" + b"".join(operations) + b"s."


RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n"
NDARRAY = b"cnumpy\nndarray\n"
GIANT = b"\x8a\x06" + (10**12).to_bytes(6, "little")

HOSTILE = {
    "system": (pickle.dumps({"fid": Call(os.system, "touch executed")}), f"got {os.name}.system; nothing"),
    "eval": (pickle.dumps({"fid": Call(builtins.eval, "open('executed', 'w')")}), "got builtins.eval; nothing"),
    "protocol 0": (b"cos\nsystem\n(S'touch executed'\ntR.", "got the operation STRING; nothing"),
    "numpy": (pickle.dumps({"fid": Call(np.save, "executed", np.ones(2))}), "got numpy.save; nothing"),
    "fromfile": (pickle.dumps({"fid": Call(np.fromfile, "secret")}), "got numpy.fromfile; nothing"),
    "dotted": (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", "got numpy.ndarray.__class__; nothing"),
    "ndarray": (made(NDARRAY, b"(", GIANT, b"t\x85R"), "got a call of numpy.ndarray; nothing"),
    "objects": (pickle.dumps({"fid": {"mu": np.array([{}, 1])}}), "got an array of 'O8'; nothing"),
    "void": (made(b"cnumpy\ndtype\n(\x8c\x0aV999999999tR"), "got an array of 'V999999999'; nothing"),
    "names changed": (made(NDARRAY, b"}\x8c\x08__call__K\x01sb"), "got a change of numpy's names; nothing"),
    "new object": (made(b"cnumpy\ndtype\n)\x81"), "got the operation NEWOBJ; nothing"),
    "persistent": (b"\x80\x04\x8c\x01aQ.", "got the operation BINPERSID; nothing"),
    "memo": (b"\x80\x04}r\xff\xff\xff\x7f.", "got a place 2147483647 in its memo; nothing"),
    "giant bytes": (made(b"\x8e", (10**12).to_bytes(8, "little")), "not a whole pickle of arrays (ValueError)"),
    "giant array": (
        made(RECONSTRUCT, NDARRAY, GIANT, b"\x85C\x01b\x87R(K\x01", GIANT, b"\x85cnumpy\ndtype\n",
             b"\x8c\x02f8\x85R\x89C\x0812345678tb"),
        "not a whole pickle of arrays (ValueError)",
    ),
    "a hash for ever": (b"\x80\x04}(K\x01)\x86q\x00" + b"h\x00h\x00\x86q\x00" * 50 + b"K\x01u.", "got a tuple in two"),
    "the same, hidden": (b"\x80\x04}(K\x01\x85Nbq\x00" + b"h\x00h\x00\x86q\x00" * 50 + b"K\x01u.", "a tuple in two"),
    "too deep": (b"\x80\x04})" + b"\x85" * 10**6 + b"K\x01s.", "got more than 10000 operations; nothing"),
    "cut": (pickle.dumps(STATISTICS)[:-40], "not a whole pickle of arrays"),
    "empty": (b"", "not a whole pickle of arrays"),
    "a list": (pickle.dumps([1]), "wanted a dict with names, got something else"),
    "numbers for names": (pickle.dumps({1: 2}), "wanted a dict with names, got something else"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_executed(tmp_path, monkeypatch, name):
    data, sentence = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(b"12345678")
    (tmp_path / "a.pkl").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^a\.pkl: ") as refusal:
        load_pickle("a.pkl")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl", "secret"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_pickle(str(tmp_path / "none.pkl"))
    with open(tmp_path / "large.pkl", "wb") as file:
        file.truncate(LARGEST * 2)  # a hole: no disk is used
    with pytest.raises(ValueError, match="wanted a pickle of at most 1024 MiB, got 2048 MiB"):
        load_pickle(str(tmp_path / "large.pkl"))
