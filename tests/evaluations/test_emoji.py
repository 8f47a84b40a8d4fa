"""The embedded feature network and its reference images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.emoji import emoji_features
from evaluations.judge import Settings, judge
from guided_diffusion.settings.shipped import shipped
from running import run

MODELS = shipped("models")


def reference(name="train"):
    with np.load(MODELS / f"emoji32_{name}.npz") as arrays:
        return arrays["arr_0"]


def distance(tmp_path, images):
    np.savez(tmp_path / "changed.npz", images)
    settings = Settings(
        str(MODELS / "emoji32_train.npz"), str(tmp_path / "changed.npz"), features="emoji", cache=tmp_path / "cache"
    )
    return judge(settings)["metrics"]["frechet_distance"]["value"]


def test_damage_makes_the_distance_grow(tmp_path):
    """Blur, noise and missing glyphs each cost distance, and more of them costs more."""
    images = reference()
    rng = np.random.default_rng(0)

    def noisy(sigma):
        return (images + sigma * rng.standard_normal(images.shape)).clip(0, 255).astype(np.uint8)

    def smaller(side):
        return np.stack([np.asarray(Image.fromarray(x).resize((side, side)).resize((32, 32))) for x in images])

    for worse in (
        [images, noisy(8), noisy(24), noisy(48)],
        [images, smaller(24), smaller(16), smaller(8)],
        [images, images[::2], images[::8]],
    ):
        distances = [distance(tmp_path, x) for x in worse]
        assert distances[0] == pytest.approx(0, abs=1e-6)
        assert distances == sorted(distances)
        assert distances[1] > 0.1


def test_mirrored_pictures_are_in_the_reference():
    for name, glyphs in (("train", 371), ("held_out", 70)):
        images = reference(name)
        assert images.shape == (2 * glyphs, 32, 32, 3)
        assert np.array_equal(images[:glyphs], images[glyphs:, :, ::-1])


def test_committed_distances_name_the_embedded_files():
    weights = emoji_features().weights
    for name in ("unguided", "guided"):
        for part in ("train", "held_out"):
            result = json.loads((MODELS / "distances" / f"{name}_{part}.json").read_text())
            assert result["provenance"]["weights_sha256"] == weights
            assert result["n"] >= 2000
            assert result["provenance"]["reference"]["images"] == len(reference(part))


def test_training_script(tmp_path, capsys):
    for number, image in enumerate(reference()[:6]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    run("train_emoji_features", tmp_path, steps=3, batch_size=4, out=tmp_path / "new.safetensors")
    assert "6 glyphs" in capsys.readouterr().out
    network = emoji_features(tmp_path / "new.safetensors")
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).pool.shape == (2, 128)
    with pytest.raises(SystemExit) as stop:
        run("train_emoji_features", tmp_path / "nothing")
    assert stop.value.code == 2


def test_benchmark_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit) as stop:
        run("benchmark", only="nothing")
    assert stop.value.code == 2
    assert "wanted some of steps, network, " in capsys.readouterr().err
