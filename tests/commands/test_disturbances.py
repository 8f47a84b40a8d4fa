"""The disturbance test as a user runs it, and what each disturbance does to pictures."""

import json

import numpy as np
import pytest

from evaluations.disturbances import DISTURBANCES
from guided_diffusion.settings.shipped import shipped
from running import run

TRAIN = shipped("models") / "emoji32_train.npz"
PICTURES = np.random.default_rng(0).integers(0, 256, (40, 16, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_more_is_further_away(name):
    """Pictures keep their shape; each level changes more pixels, or the same ones by more."""
    disturbance = DISTURBANCES[name]
    before = PICTURES.copy()
    away = []
    for level in disturbance.levels:
        found = disturbance.apply(PICTURES, level, np.random.default_rng(1))
        assert (found.shape, found.dtype) == (PICTURES.shape, np.uint8)
        assert np.array_equal(found, disturbance.apply(PICTURES, level, np.random.default_rng(1)))
        away.append(np.abs(found.astype(int) - PICTURES).mean())
    assert np.array_equal(PICTURES, before)
    if name != "missing":  # its pictures change places
        assert away == sorted(away)
        assert away[-1] > away[0]


def test_known_amounts():
    grey = np.full((200, 16, 16, 3), 128, np.uint8)
    apply = {name: disturbance.apply for name, disturbance in DISTURBANCES.items()}
    rng = np.random.default_rng
    assert (apply["noise"](grey, 8, rng(0)).astype(float) - 128).std() == pytest.approx(8, rel=0.02)
    assert (apply["salt"](grey, 0.05, rng(0)) != 128).all(axis=3).mean() == pytest.approx(0.05, rel=0.1)
    erased = apply["erased"](np.concatenate([grey, grey[:10] * 0]), 0.25, rng(0))
    assert (erased[-10:] == 128).mean() == 0.25
    assert (apply["brightness"](grey, 10, rng(0)) == 138).all()
    grey_of = apply["saturation"](PICTURES, 1, rng(0))
    assert np.ptp(grey_of, axis=3).max() == 0
    kept = {picture.tobytes() for picture in apply["missing"](PICTURES, 0.75, rng(0))}
    assert kept == {picture.tobytes() for picture in PICTURES[:10]}
    assert (apply["spoiled"](grey, 0.08, rng(0)) != 128).any(axis=(1, 2, 3)).sum() == 16


@pytest.mark.parametrize("sigma", [0.5, 1, 2])
def test_blur_is_that_of_a_gaussian(sigma):
    """A bright line spreads with a variance of σ² and that of a pixel."""
    line = np.zeros((1, 33, 33, 3), np.uint8)
    line[:, :, 16] = 255
    across = DISTURBANCES["blur"].apply(line, sigma, np.random.default_rng(0))[0, 16, :, 0].astype(float)
    variance = (across * (np.arange(33) - 16) ** 2).sum() / across.sum()
    assert variance == pytest.approx(sigma**2 + 1 / 12, rel=0.08)


def test_as_a_user_runs_it(tmp_path, capsys):
    held_out = shipped("models") / "emoji32_held_out.npz"
    run("disturbances", TRAIN, "--samples", held_out, features="emoji", num_samples=24, json=tmp_path / "seen.json")
    table = capsys.readouterr().out
    assert "24 pictures, undisturbed" in table
    assert "| noise, σ in levels | 2 |" in table
    found = json.loads((tmp_path / "seen.json").read_text())
    assert list(found["disturbances"]) == list(DISTURBANCES)
    assert found["samples"][str(held_out)]["n"] == 140
    assert found["features"] == "emoji"


def test_refusals(tmp_path, capsys):
    np.savez(tmp_path / "few.npz", PICTURES[:5, :16, :16].repeat(2, axis=1).repeat(2, axis=2))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for path, said in ((tmp_path / "few.npz", "wanted more pictures than the 320 dimensions, got 5"),
                       (tmp_path / "statistics.npz", "wanted pictures, got statistics alone"),
                       (tmp_path / "nowhere", "no such file")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run("disturbances", path, features="emoji")
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
