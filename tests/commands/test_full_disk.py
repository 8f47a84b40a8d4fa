"""Where the system takes no more bytes: one sentence with the file's name, status 2, and no temporary file."""

import re

import numpy as np
import pytest
import torch
import yaml

from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.storage.checkpoints import save_atomically
from guided_diffusion.storage.files import UnwrittenError, write_atomically
from running import run
from sample_files import pictures
from small import SMALL


@pytest.fixture
def limited(tmp_path, capsys, full_disk):
    """Run a script with files that end at a size: how it ended, what it printed, and what it said."""

    def limited(size, script, *arguments, **flags):
        code = 0
        full_disk(size)
        try:
            run(script, *arguments, **flags)
        except SystemExit as stop:
            code = stop.code
        full_disk(2**30)
        out, error = capsys.readouterr()
        assert code in (0, 2)
        if code == 2:
            assert re.search(r"^error: (out_dir: )?\S+: cannot be written \(File too large\)$", error, re.MULTILINE), (
                error
            )
        left = [path for path in (tmp_path / "out").rglob(".*") if path.name != ".lock"]
        assert not left
        return code, out

    return limited


@pytest.fixture
def weights(tmp_path):
    network, _ = create_model_and_diffusion(**SMALL)
    save_atomically(network.state_dict(), tmp_path / "w.pt")
    return SMALL | {"model_path": tmp_path / "w.pt", "out_dir": tmp_path / "out"}


@pytest.fixture
def data(tmp_path):
    for number, image in enumerate(pictures(4, 16)):
        write_atomically(tmp_path / "data" / f"{'ab'[number % 2]}_{number}.npy", lambda file, i=image: np.save(file, i))
    from PIL import Image

    for path in (tmp_path / "data").glob("*.npy"):
        Image.fromarray(np.load(path)).save(path.with_suffix(".png"))
        path.unlink()
    return tmp_path / "data"


def test_sampling(limited, weights, tmp_path):
    more = {"num_samples": 4, "batch_size": 2, "png": True, "timestep_respacing": 2}
    codes = [limited(size, "image_sample", **weights | more)[0] for size in (300, 4000, 60_000)]
    assert codes[0] == 2
    assert codes[-1] == 0
    assert (tmp_path / "out" / "samples_4x16x16x3.npz").exists()


def test_likelihood_is_shown_before_it_is_written(limited, weights, data, tmp_path, capsys):
    flags = weights | {"data_dir": data, "batch_size": 4, "timestep_respacing": 2}
    assert limited(300, "image_nll", **flags)[0] == 2
    (tmp_path / "out" / "nll.json").mkdir()
    with pytest.raises(SystemExit) as stop:
        run("image_nll", **flags)
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert "bits per dimension" in out
    assert error.endswith("nll.json: cannot be written (a folder)\n")


def test_training(limited, data, tmp_path):
    flags = SMALL | {"data_dir": data, "batch_size": 2, "lr_anneal_steps": 2, "log_interval": 1, "num_workers": 0}
    codes = [limited(size, "image_train", **flags, out_dir=tmp_path / "out")[0] for size in (300, 30_000, 2**30)]
    assert codes[0] == 2
    assert codes[-1] == 0


def test_tables(limited, tmp_path):
    rows = [{"name": "off", "label": "off", "set": {"sag_scale": 0}}]
    plan = {"title": "x", "config": ["emoji"], "features": "emoji", "rows": rows,
            "set": {"num_samples": 2, "timestep_respacing": 2, "batch_size": 2}}  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert limited(1500, "reproduce", tmp_path / "plan.yaml", out_dir=tmp_path / "out")[0] == 2


@pytest.mark.parametrize("how", ["a folder", "below a file", "unsaved"])
def test_a_place_where_no_file_can_be_is_named(tmp_path, how, full_disk):
    place = {"a folder": tmp_path, "below a file": tmp_path / "x" / "y", "unsaved": tmp_path / "z"}[how]
    (tmp_path / "x").write_text("")
    if how == "unsaved":
        full_disk(3000)
    with pytest.raises(UnwrittenError) as error:
        write_atomically(place, lambda file: torch.save({"weight": torch.ones(2000)}, file))
    assert str(error.value).startswith(f"{place}: cannot be written (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
