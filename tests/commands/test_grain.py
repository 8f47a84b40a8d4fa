"""Grain and squares of noise on a plain ground."""

import json

import numpy as np
import pytest

from guided_diffusion.settings.shipped import shipped
from running import run


def test_known_pictures(tmp_path, capsys):
    rng = np.random.default_rng(0)
    clean = np.load(shipped("models") / "emoji32_train.npz")["arr_0"][:20]
    grainy, squares = clean.copy(), clean.copy()
    grainy[:5, 0, :8] += 5
    squares[:3] = rng.integers(0, 256, squares[:3].shape, dtype=np.uint8)
    for name, images in (("clean", clean), ("grainy", grainy), ("squares", squares)):
        np.savez(tmp_path / f"{name}.npz", images)
    paths = [str(tmp_path / f"{name}.npz") for name in ("clean", "grainy", "squares")]
    run("grain", *paths, json=tmp_path / "grain.json")
    assert "grainy.npz: 20 samples, grain 25.0% ± 9.9%, squares 0.0% ± 0.0%" in capsys.readouterr().out
    found = json.loads((tmp_path / "grain.json").read_text())
    shares = [(found[path]["grain"]["value"], found[path]["squares"]["value"]) for path in paths]
    assert shares == [(0, 0), (0.25, 0), (0.15, 0.15)]


def test_refusals(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", np.zeros((2, 8, 8, 3), np.uint8))
    for arguments, said in (((tmp_path / "a.npz", "--border", 4), "--border: wanted 1 to 3"),
                            ((tmp_path / "no.npz",), "no such file")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run("grain", *arguments)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
