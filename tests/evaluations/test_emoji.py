"""The embedded feature network and its reference images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.emoji import emoji_features
from evaluations.moments import Moments
from evaluations.sources import open_source
from guided_diffusion.commands.disturbances import distance, pool, table
from guided_diffusion.settings.shipped import shipped
from running import run

MODELS = shipped("models")
DOCS = Path(__file__).parents[2] / "docs"
SAMPLES = 60.0
"""About what the embedded model's samples are away from its training pictures."""


def images_of(name="train"):
    with np.load(MODELS / f"emoji32_{name}.npz") as arrays:
        return arrays["arr_0"]


@pytest.fixture(scope="module")
def seen():
    """What the embedded features see of the reference pictures."""
    source = open_source(str(MODELS / "emoji32_train.npz"))
    return table(source, [], emoji_features(), 500, 256, 0)


def rise(seen, name, level):
    [row] = [row for row in seen["disturbances"][name] if row["level"] == level]
    return row


def test_every_step_of_every_disturbance_costs_distance(seen):
    for name, rows in seen["disturbances"].items():
        rises = [row["rise"] for row in rows]
        assert rises[0] > 0, name
        assert rises == sorted(rises), name


@pytest.mark.parametrize(("name", "level"), [("noise", 8), ("blur", 0.5), ("spoiled", 0.02)])
def test_what_must_be_seen_is_seen(seen, name, level):
    """It stands out of what two draws of pictures differ by."""
    assert rise(seen, name, level)["errors"] > 4


def test_what_is_mild_costs_less_than_a_model(seen):
    assert rise(seen, "noise", 4)["rise"] + rise(seen, "brightness", 3)["rise"] < SAMPLES / 3


def test_committed_disturbances_are_these(seen):
    committed = json.loads((DOCS / "disturbances" / "emoji.json").read_text())
    assert committed["weights_sha256"] == emoji_features().weights
    for name, rows in seen["disturbances"].items():
        for row, known in zip(rows, committed["disturbances"][name], strict=True):
            assert row["level"] == known["level"]
            assert row["rise"] == pytest.approx(known["rise"], rel=0.02, abs=0.02)


def test_held_out_glyphs_stay_near(seen):
    """New glyphs are away from the training glyphs, but less than these without their colours."""
    network = emoji_features()
    reference = Moments.of(pool(network, images_of(), 256)).gaussian()
    assert distance(pool(network, images_of("held_out"), 256), reference).value < rise(seen, "saturation", 1)["rise"]


def test_mirrored_pictures_are_in_the_reference():
    for name, glyphs in (("train", 371), ("held_out", 70)):
        images = images_of(name)
        assert images.shape == (2 * glyphs, 32, 32, 3)
        assert np.array_equal(images[:glyphs], images[glyphs:, :, ::-1])


def test_training_script(tmp_path, capsys):
    for number, image in enumerate(images_of()[:6]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    run("train_emoji_features", tmp_path, steps=3, batch_size=4, out=tmp_path / "new.safetensors")
    assert "6 glyphs" in capsys.readouterr().out
    network = emoji_features(tmp_path / "new.safetensors")
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).pool.shape == (2, 320)
    with pytest.raises(SystemExit) as stop:
        run("train_emoji_features", tmp_path / "nothing")
    assert stop.value.code == 2


def test_benchmark_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as stop:
        run("benchmark", only="nothing")
    assert stop.value.code == 2
    assert "wanted some of steps, network, " in capsys.readouterr().err
