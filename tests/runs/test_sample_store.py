"""The store: whole shards or none, damage noticed, other settings refused, merging by streams."""

import hashlib
import io
import json
import os
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from guided_diffusion.runs import ranks
from guided_diffusion.runs.identity import distinct, what_differs
from guided_diffusion.runs.ranks import jobs
from guided_diffusion.runs.sample_store import SampleStore, Shard, batches
from guided_diffusion.runs.shards import DamagedError, Made
from guided_diffusion.storage.files import alone_in, join, read_arrays, write_atomically

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (10, 4, 4, 3)).astype(np.uint8)
LABELS = RANDOM.randint(0, 5, 10)
CPU = {"device": "cpu", "dtype": "float32", "versions": {"torch": "2.0"}}
GPU = CPU | {"device": "A GPU", "versions": {"torch": "2.1"}}


@pytest.fixture
def store(tmp_path):
    return SampleStore(str(tmp_path / "run"), {"seed": 3, "sigma": 1.5}, 10, 4, (4, 4, 3), labelled=True)


def fill(store, numbers=None, made_by=CPU):
    for number in store.shards if numbers is None else numbers:
        indices = list(store.indices(number))
        store.write(number, Shard(IMAGES[indices], LABELS[indices], evaluations=float(number)), made_by)


def test_shards_cover_the_samples(store):
    assert [list(store.indices(number)) for number in store.shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [list(batch) for batch in batches(range(4, 9), 2)] == [[4, 5], [6, 7], [8]]


def test_what_is_written_is_read_and_merged(store):
    assert store.missing() == [0, 1, 2]
    fill(store)
    assert store.missing() == []
    assert store.merge() == [Made(4, 0.0, CPU), Made(4, 1.0, CPU), Made(2, 2.0, CPU)]
    with np.load(store.samples_path) as file:
        assert np.array_equal(file["arr_0"], IMAGES)
        assert np.array_equal(file["arr_1"], LABELS)
    assert np.array_equal(store.first(6), IMAGES[:6])
    assert np.array_equal(store.first(99), IMAGES)


def test_the_merged_file_depends_on_nothing_but_the_samples(store):
    fill(store)
    store.merge()
    first = Path(store.samples_path).read_bytes()
    fill(store, [1])
    os.utime(store.path(0), (1, 1))
    store.merge()
    assert Path(store.samples_path).read_bytes() == first


def test_samples_without_labels(tmp_path):
    store = SampleStore(str(tmp_path), {}, 10, 4, (4, 4, 3), labelled=False)
    for number in store.shards:
        store.write(number, Shard(IMAGES[list(store.indices(number))], None, 1.0), CPU)
    store.merge()
    with np.load(store.samples_path) as file:
        assert file.files == ["arr_0"]
        assert np.array_equal(file["arr_0"], IMAGES)


def flip(path, position):
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1
    Path(path).write_bytes(bytes(data))


def test_every_flipped_bit_of_a_shard_is_noticed_or_harmless(store):
    fill(store)
    whole = Path(store.path(1)).read_bytes()
    noticed = 0
    for position in range(0, len(whole), 7):
        flip(store.path(1), position)
        try:
            shard = store.read(1)
            assert np.array_equal(shard.images, IMAGES[4:8])
            assert np.array_equal(shard.labels, LABELS[4:8])
        except DamagedError:
            noticed += 1
        Path(store.path(1)).write_bytes(whole)
    assert noticed > 50


def test_every_truncation_of_a_shard_is_noticed(store):
    fill(store)
    whole = Path(store.path(0)).read_bytes()
    for length in range(0, len(whole), 11):
        Path(store.path(0)).write_bytes(whole[:length])
        assert store.missing() == [0]


@pytest.mark.parametrize("change", [{"identity": {"seed": 4, "sigma": 1.5}}, {"shard_size": 5}, {"shape": (4, 4, 1)}])
def test_shards_of_another_run_are_missing(store, change):
    fill(store)
    assert 0 in replace(store, **change).missing()


def test_a_shard_in_the_place_of_another_is_missing(store):
    fill(store)
    os.replace(store.path(0), store.path(1))
    assert store.missing() == [0, 1]


def test_more_samples_in_the_same_folder(store):
    fill(store)
    assert replace(store, num_samples=11).missing() == [2]
    assert replace(store, num_samples=8).missing() == []


def test_other_settings_are_refused_by_name(store):
    store.write_manifest({})
    assert store.check() == ""
    assert replace(store, num_samples=99).check() == ""
    other = replace(store, identity={"seed": 3, "sigma": 2.0, "new": True})
    assert other.check() == ""  # there is nothing to lose
    fill(store)
    with pytest.raises(ValueError, match=r"new was the default, is True; sigma was 1.5, is 2.0; .* --overwrite True"):
        other.check()
    fill(store)
    other.clear()
    assert other.check() == ""
    assert other.missing() == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"identity": 3}', "\x00\xff", '{"identity": ' + "[" * 9999])
def test_a_damaged_manifest_is_written_again(store, text):
    fill(store)
    Path(store.manifest_path).write_text(text, encoding="utf-8")
    assert "damaged" in store.check()
    store.write_manifest({})
    assert store.check() == ""
    assert store.missing() == []


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with alone_in(tmp_path):
        assert "this file system has no locks" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(store):
    with store.lock(), pytest.raises(ValueError, match="another run is writing here"), replace(store).lock():
        pass
    with store.lock():
        pass


def test_half_written_files_of_a_killed_run_are_swept(store):
    fill(store)
    half = Path(store.path(0)).with_name(".shard_000001.npz.x1y2")
    half.write_bytes(b"half")
    kept = sorted(path for path in Path(store.folder).rglob("*") if path != half)
    store.sweep()
    assert sorted(Path(store.folder).rglob("*")) == kept


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file


def test_arrays_are_read_only_as_they_were_asked_for():
    wanted = {"arr_0": (np.dtype(np.uint8), (None, 4, 4, 3))}
    assert np.array_equal(read_arrays(npz(arr_0=IMAGES, more=LABELS), wanted)["arr_0"], IMAGES)
    for wrong in [{"arr_1": IMAGES}, {"arr_0": IMAGES.astype(int)}, {"arr_0": IMAGES[0]}, {"arr_0": IMAGES[..., :2]}]:
        with pytest.raises(ValueError, match="arr_0"):
            read_arrays(npz(**wrong), wanted)
    with pytest.raises(ValueError, match="arr_0"):
        read_arrays(npz(arr_0=np.array([None, 1], dtype=object)), wanted)
    with pytest.raises(ValueError, match="arr_0: wanted"):
        read_arrays(npz(arr_0=np.asfortranarray(IMAGES)), wanted)


def test_a_zip_bomb_is_refused_by_its_header():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2, 4, 4, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(200):
            member.write(bytes(2**20))
    with pytest.raises(ValueError, match="do not agree"):
        read_arrays(file, {"arr_0": (np.dtype(np.uint8), (None, 4, 4, 3))})


def test_of_two_members_of_one_name_none_is_taken():
    file = npz(arr_0=IMAGES)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr("arr_0.npy", b"other")
    with pytest.raises(ValueError, match="got 2"):
        read_arrays(file, {"arr_0": (np.dtype(np.uint8), (None, 4, 4, 3))})


def test_a_remote_file_is_uploaded_whole(monkeypatch):
    """What blobfile would get: one copy of a finished file."""
    copies = []

    def copy(source, target, overwrite):
        copies.append((Path(source).read_bytes(), target, overwrite))

    monkeypatch.setattr("guided_diffusion.storage.files.bf.copy", copy)
    write_atomically("gs://bucket/run/x", lambda file: file.write(b"abc"))
    assert copies == [(b"abc", "gs://bucket/run/x", True)]
    assert join("gs://bucket/run", "shards", "x") == "gs://bucket/run/shards/x"

    def fail(file):
        file.write(b"part")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically("gs://bucket/run/x", fail)
    assert len(copies) == 1


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut after the rename must not leave a file of the name without its contents."""
    events, replace_file = [], os.replace

    def fsync(descriptor):
        found = os.fstat(descriptor)
        events.append("folder is synced" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes are synced")

    def renamed(source, target):
        events.append(f"{Path(target).name} has {Path(source).stat().st_size} bytes")
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    write_atomically(tmp_path / "x", lambda file: file.write(b"abc"))
    in_order = ["3 bytes are synced", "x has 3 bytes", *(["folder is synced"] if hasattr(os, "O_DIRECTORY") else [])]
    assert events == in_order


def test_the_manifest_tells_how_samples_were_made(store):
    store.write_manifest({"guidance": "off"})
    manifest = json.loads(Path(store.manifest_path).read_text())
    assert manifest["identity"] == {"seed": 3, "sigma": 1.5}
    assert manifest["hash"] == store.hash
    assert manifest["samples"] == 10
    assert manifest["guidance"] == "off"


def test_clearing_leaves_nothing_of_an_earlier_run_and_all_that_is_not_of_one(store, tmp_path):
    """An old npz beside a new manifest would be taken for the new run's."""
    fill(store)
    store.merge()
    store.write_manifest({})
    of_others = ["notes.txt", "model000100.pt", "ema_0.9_000100.pt", "samples_000100.png", "my_samples_4x4x4x3.npz"]
    for name in ["grid.png", "config.yaml", "comparison.png", "samples_6x4x4x3.npz", *of_others]:
        (tmp_path / "run" / name).touch()
    store.clear()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(of_others)
    store.clear()


def test_shards_know_who_made_them_and_what_differs_is_said(store):
    fill(store, [0, 2], CPU)
    fill(store, [1], GPU)
    makers = distinct((made.samples, made.by) for made in store.merge())
    assert makers == [CPU | {"samples": 6}, GPU | {"samples": 4}]
    assert what_differs(makers).endswith("rounding only: device cpu (6), A GPU (4); torch 2.0 (6), 2.1 (4).")
    assert what_differs(makers[:1]) == ""
    assert "device not known (6), A GPU (4)" in what_differs([{"samples": 6, "versions": 3}, GPU | {"samples": 4}])


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_description_of_a_training_is_not_overwritten(store, overwrite):
    config = Path(store.folder) / "config.yaml"
    config.parent.mkdir()
    config.write_text("image_size: 4")
    with pytest.raises(ValueError, match=r"config.yaml is not of a run of samples, .* give another --out_dir"):
        (store.clear if overwrite else store.check)()
    assert config.read_text() == "image_size: 4"


def test_a_job_that_is_started_again_is_known_by_its_name(store, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    store.write_manifest({"begun_by": jobs()})
    assert not store.begun_by_this_job()  # by hand, inside the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert not store.begun_by_this_job()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert store.begun_by_this_job()
    assert not replace(store, identity={"seed": 4}).begun_by_this_job()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not store.begun_by_this_job()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    store.write_manifest({"begun_by": jobs()})
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert not store.begun_by_this_job()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert store.begun_by_this_job()
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    store.write_manifest({"begun_by": jobs()})
    assert store.begun_by_this_job()
    monkeypatch.setattr(os, "getppid", lambda: -1)  # another torchrun without a name
    assert not store.begun_by_this_job()


def test_a_restart_for_another_machine_is_one_too(store, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # of this machine
    store.write_manifest({"begun_by": jobs()})
    assert not store.begun_by_this_job()
    monkeypatch.setattr(ranks, "_job", ranks.Job(started_again=True))
    assert store.begun_by_this_job()


def test_a_manifest_is_json_and_infinity_the_same_setting_as_before(store):
    infinite = replace(store, identity={"seed": 3, "sigma": float("inf")})
    fill(infinite)
    infinite.write_manifest({})
    text = Path(store.manifest_path).read_text()
    assert json.loads(text, parse_constant=pytest.fail)["identity"] == {"seed": 3, "sigma": "inf"}
    assert infinite.check() == ""
    Path(store.manifest_path).write_text(text.replace('"inf"', "Infinity"))  # as older versions wrote it
    assert infinite.check() == ""
    assert infinite.missing() == []
    assert infinite.hash == hashlib.sha256(b'{"seed": 3, "sigma": Infinity}').hexdigest()
    with pytest.raises(ValueError, match=r"sigma was 'inf', is 1\.5"):
        store.check()
