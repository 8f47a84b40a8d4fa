"""Every command that users of the three upstream repositories type, on networks made small."""

import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from golden import flags
from guided_diffusion.networks.building import build_classifier, build_network
from guided_diffusion.script_util import sr_create_model_and_diffusion
from guided_diffusion.settings.model import ClassifierConfig, DiffusionConfig, NetworkConfig
from guided_diffusion.settings.options import merge

ROOT = Path(__file__).parents[2]
COMMANDS = [line for line in (ROOT / "tests" / "commands.txt").read_text().splitlines() if line and line[0] != "#"]


def small(command):
    """(script, flags) of a command with width, depth, steps and number of samples replaced, and files to be made."""
    script, *rest = shlex.split(command)
    given = flags(shlex.join(rest))
    given |= {"num_channels": "64", "num_samples": "1", "batch_size": "1"}
    # Out.8 stands in the second of three attention levels where there are two blocks a level.
    given["num_res_blocks"] = "2" if given.get("sel_attn_depth") == "8" else "1"
    steps = "2" if int(given.get("diffusion_steps", "1000")) == 1000 else "3"
    given["timestep_respacing"] = "ddim" + steps if given.get("use_ddim") == "True" else steps
    if "classifier_path" in given:
        given |= {"classifier_width": "64", "classifier_depth": "1"}
    return script, given


def settings(given, group):
    [config] = merge((group,), ("", {key: value for key, value in given.items() if hasattr(group, key)}))
    return config


def make_files(given, folder):
    """Random weights (and images) for what a command names."""
    network, diffusion = settings(given, NetworkConfig), settings(given, DiffusionConfig)
    made = {"model_path": folder / "model.pt", "out_dir": folder / "out"}
    if "large_size" in given:
        sizes = int(given["large_size"]), int(given["small_size"])
        kept = {key: value for key, value in vars(network).items() if key not in ("image_size", "channel_mult")}
        model, _ = sr_create_model_and_diffusion(*sizes, **kept, learn_sigma=diffusion.learn_sigma)
        made["base_samples"] = folder / "base.npz"
        np.savez(made["base_samples"], np.zeros((2, sizes[1], sizes[1], 3), np.uint8), np.array([3, 999]))
    else:
        model = build_network(network, diffusion.learn_sigma)
    torch.save(model.state_dict(), made["model_path"])
    if "classifier_path" in given:
        made["classifier_path"] = folder / "classifier.pt"
        classifier = build_classifier(network.image_size, settings(given, ClassifierConfig))
        torch.save(classifier.state_dict(), made["classifier_path"])
    return made


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_command(command, tmp_path, monkeypatch, capsys):
    script, given = small(command)
    given |= make_files(given, tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *(str(part) for key in given for part in (f"--{key}", given[key]))])
    runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    side = int(given.get("large_size", given.get("image_size", 64)))
    with np.load(tmp_path / "out" / f"samples_1x{side}x{side}x3.npz") as file:
        assert file["arr_0"].shape == (1, side, side, 3)
        has_labels = given.get("class_cond") == "True" or (
            "classifier_path" in given and given.get("classifier_guidance") != "False"
        )
        assert ("arr_1" in file) == has_labels
    said = capsys.readouterr().err
    if "guide_scale" in given:
        assert f"s = {float(given['guide_scale']) - 1:g}" in said
    if "classifier_path" in given:
        assert ("classifier guidance: scale" in said) == (given.get("classifier_guidance") != "False")
