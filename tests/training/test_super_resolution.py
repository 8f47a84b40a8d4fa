"""Training a super-resolution model, and sampling with what it leaves."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.script_util import sr_create_model_and_diffusion
from guided_diffusion.training.loop import TrainLoop
from running import SCRIPTS, environment, refused, run

NETWORK = {
    "large_size": 64,
    "small_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": "8",
    "class_cond": "True",
    "num_classes": 2,
    "learn_sigma": "True",
}


@pytest.fixture
def flags(tmp_path):
    """Flags of a training on six pictures of two classes."""
    data = tmp_path / "data"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(6, 64, 70, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(data / f"{'ab'[i % 2]}_{i}.png")
    return NETWORK | {"data_dir": data, "out_dir": tmp_path / "run", "batch_size": 2, "lr_anneal_steps": 3}


def test_training_then_upsampling(flags, tmp_path):
    argv = [sys.executable, SCRIPTS / "super_res_train.py", *(f"--{key}={value}" for key, value in flags.items())]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "trained 3 steps" in done.stdout
    ema = flags["out_dir"] / "ema_0.9999_000003.pt"
    assert {path.name for path in flags["out_dir"].iterdir()} == {
        ".lock", "checkpoint.pt", "classes.json", "config.yaml", "model000003.pt", ema.name
    }  # fmt: skip
    assert json.loads((flags["out_dir"] / "classes.json").read_text()) == ["a", "b"]
    state = torch.load(ema, weights_only=True)
    known = inspect.signature(sr_create_model_and_diffusion).parameters
    names = {key: value for key, value in NETWORK.items() if key in known}
    network, _ = sr_create_model_and_diffusion(**names)
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()
    }
    np.savez(tmp_path / "base.npz", np.zeros((2, 16, 16, 3), np.uint8), np.array([0, 1]))
    run(
        "super_res_sample", config=flags["out_dir"] / "config.yaml", model_path=ema, num_samples=2,
        base_samples=tmp_path / "base.npz", timestep_respacing=2, out_dir=tmp_path / "out",
    )  # fmt: skip
    with np.load(tmp_path / "out" / "samples_2x64x64x3.npz") as file:
        assert file["arr_0"].shape == (2, 64, 64, 3)
        assert file["arr_1"].tolist() == [0, 1]


def test_the_network_sees_its_own_image_made_small(flags, monkeypatch):
    seen = []
    losses = TrainLoop._losses
    monkeypatch.setattr(TrainLoop, "_losses", lambda loop, rows: (seen.append(rows), losses(loop, rows))[1])
    run("super_res_train", **flags | {"lr_anneal_steps": 1, "microbatch": 1})
    assert len(seen) == 2
    for rows in seen:
        assert rows.x0.shape == (1, 3, 64, 64)
        assert rows.condition["low_res"].shape == (1, 3, 16, 16)
        means = rows.x0.unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean(dim=(3, 5))
        torch.testing.assert_close(rows.condition["low_res"], means)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"small_size": 0}, "small_size: wanted 1 to large_size (64), got 0"),
        ({"small_size": 65}, "small_size: wanted 1 to large_size (64), got 65"),
        ({"large_size": 63, "small_size": 16}, "63"),
        ({"image_size": 64}, "unknown flag --image_size"),
        ({"num_classes": 1}, "num_classes: 1, but data_dir has 2 classes"),
        ({"data_dir": "nowhere"}, "data_dir: no such file or folder 'nowhere'"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, capsys, wrong, said):
    assert said in refused(capsys, "super_res_train", **flags | wrong)
    assert not flags["out_dir"].exists()
