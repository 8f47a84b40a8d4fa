"""The gain of noise: known networks have known gains, the embedded model's is the one its page names."""

import json

import numpy as np
import pytest
import torch

from guided_diffusion.analysis.noise_gain import NoiseGain
from guided_diffusion.diffusion.denoiser import Prediction
from guided_diffusion.diffusion.diffusion import build_diffusion
from guided_diffusion.diffusion.flow import LinearPath
from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.settings.model import DiffusionConfig
from guided_diffusion.settings.shipped import shipped
from running import run

PROCESS = build_diffusion(DiffusionConfig(noise_schedule="cosine", timestep_respacing="20")).process


@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("excess", [0.2, -0.5])
def test_known_networks(gain, excess):
    """A network that sees the share 1 − c of the excess, and takes the told amount away besides."""
    x0 = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def denoiser(x_t, t, condition):
        eps = SampleNoise(0, range(6), (3, 8, 8), "cpu").x_T()
        alpha, sigma = (
            torch.tensor(table)[t].float().reshape(-1, 1, 1, 1) for table in (PROCESS.alphas, PROCESS.sigmas)
        )
        believed = x0 + gain * (x_t - alpha * x0 - sigma * eps) / alpha
        return Prediction(PROCESS, x_t, t, condition, eps, believed)

    measured = NoiseGain(denoiser, PROCESS, [2, 10, 18], excess)
    measured.add(range(6), x0, {})
    for row in measured.results():
        assert row["c"]["value"] == pytest.approx(gain, abs=1e-4)
        assert row["c"]["error"] < 1e-4
        assert row["c"]["n"] == 6


def test_as_a_user_runs_it(tmp_path, capsys):
    train = shipped("models") / "emoji32_train.npz"
    run("noise_gain", config="emoji", data_dir=train, known_images=8, batch_size=8, noise_levels="0.3,0.7",
        json=tmp_path / "gain.json")  # fmt: skip
    assert "| 0.30 |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "gain.json").read_text())["gain"]
    assert [row["t"] for row in rows] == [0.3, 0.7]
    assert all(0 <= row["c"]["value"] < 1 for row in rows)


def test_of_own_samples(capsys):
    run("noise_gain", config="emoji", num_samples=2, batch_size=2, timestep_respacing=4, noise_levels="0.5")
    assert capsys.readouterr().out.count("\n") == 3


def test_bad_settings(capsys):
    for flags, said in (({"excess": 0}, "excess: wanted"), ({"noise_levels": "2"}, "noise_levels: wanted numbers"),
                        ({"batch_size": "auto"}, "batch_size: wanted a number")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            run("noise_gain", config="emoji", **flags)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_noise_alone_has_no_gain():
    process = LinearPath(np.array([0.5, 1.0]))
    NoiseGain(None, process, [0], 0.1)
    with pytest.raises(ValueError, match="noise_levels: the highest one is noise alone"):
        NoiseGain(None, process, [0, 1], 0.1)
