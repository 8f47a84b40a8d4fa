"""--png: every sample as a picture of its own, of this run and no other."""

import os

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.storage import pictures
from running import run
from small import EMBEDDED


@pytest.fixture
def flags(tmp_path):
    return EMBEDDED | {"num_samples": 3, "out_dir": tmp_path / "out", "png": True}


def samples(folder, count):
    with np.load(folder / f"samples_{count}x32x32x3.npz") as file:
        return file["arr_0"]


def shown(folder):
    """The pictures by name."""
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())}


def is_shown(folder, count):
    found = shown(folder)
    assert list(found) == [f"{index:06d}.png" for index in range(count)]
    assert np.array_equal(np.stack(list(found.values())), samples(folder, count))
    return True


def test_pngs_are_the_samples(flags):
    run("image_sample", **flags | {"png": False})
    assert not (flags["out_dir"] / "images").exists()
    # The flag makes no other run: all samples are there.
    run("image_sample", **flags)
    assert is_shown(flags["out_dir"], 3)


def test_only_those_missing_are_written(flags, monkeypatch):
    run("image_sample", **flags)
    images = flags["out_dir"] / "images"
    (images / "000001.png").unlink()
    (images / "000002.png").write_bytes(b"\x89PNG")
    written, save = [], pictures.save_png

    def noted(picture, path, **more):
        written.append(os.path.basename(path))
        save(picture, path, **more)

    monkeypatch.setattr(pictures, "save_png", noted)
    run("image_sample", **flags | {"num_samples": 5})
    assert is_shown(flags["out_dir"], 5)
    assert [name for name in written if name != "grid.png"] == [f"00000{index}.png" for index in (1, 2, 3, 4)]


@pytest.mark.parametrize("how", ["overwritten", "its shards were deleted"])
def test_pictures_of_another_run_are_replaced(flags, how):
    folder = flags["out_dir"]
    run("image_sample", **flags)
    Image.new("RGB", (4, 4)).save(folder / "images" / "mine.png")
    first = samples(folder, 3)
    if how != "overwritten":
        for shard in (folder / "shards").iterdir():
            shard.unlink()
    run("image_sample", **flags | {"seed": 1, "num_samples": 2, "overwrite": how == "overwritten"})
    (folder / "images" / "mine.png").unlink()
    assert is_shown(folder, 2)
    assert not np.array_equal(samples(folder, 2), first[:2])


def test_overwriting_leaves_no_pictures_of_another_run(flags):
    run("image_sample", **flags)
    run("image_sample", **flags | {"seed": 1, "overwrite": True, "png": False})
    assert shown(flags["out_dir"]) == {}


def test_a_png_tells_what_made_it(tmp_path):
    path = tmp_path / "x.png"
    assert pictures.maker_of_png(path) == ""
    pictures.save_png(np.zeros((4, 4, 3), np.uint8), path)
    assert pictures.maker_of_png(path) == ""
    pictures.save_png(np.zeros((4, 4, 3), np.uint8), path, made_by="a run")
    assert pictures.maker_of_png(path) == "a run"
    path.write_bytes(b"no picture")
    assert pictures.maker_of_png(path) == ""
