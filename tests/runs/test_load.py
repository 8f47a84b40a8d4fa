"""`guided_diffusion.load`: a model from Python, whose samples are those of a run."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import guided_diffusion
from guided_diffusion.guidance.perturbed_attention import PerturbedAttentionGuidance
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.networks.attention import find_block
from guided_diffusion.networks.unet import UNetModel
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.shipped import read_yaml
from running import environment, run
from small import CONFIGS, EMBEDDED, SMALL, randomised

SETTINGS = {key: value for key, value in EMBEDDED.items() if key != "config"}
CLASSIFIER = read_yaml(str(CONFIGS / "emoji_classifier.yaml"))
CLASSIFIER["classifier_path"] = CONFIGS / CLASSIFIER["classifier_path"]


def samples_of(folder, script="image_sample", **flags):
    """The images of a run."""
    run(script, **EMBEDDED | flags, out_dir=folder)
    [path] = folder.glob("samples_*.npz")
    with np.load(path) as file:
        return file["arr_0"]


@pytest.fixture(scope="module")
def emoji():
    return guided_diffusion.load("emoji", **SETTINGS)


def test_what_is_loaded(emoji):
    assert isinstance(emoji.network, UNetModel)
    assert not emoji.network.training
    assert emoji.diffusion.num_timesteps == 2
    [guidance] = emoji.guidances
    assert (guidance.scale, guidance.blur_sigma) == (1.0, 1.5)
    assert guidance.block is find_block(emoji.network, "output_blocks.3.1")


def test_samples_are_those_of_a_run(emoji, tmp_path):
    images = emoji.sample(5)
    assert images.dtype == np.uint8
    assert images.shape == (5, 32, 32, 3)
    assert np.array_equal(images, samples_of(tmp_path / "run", num_samples=5))
    # Cut into shards, and these into batches, as a run is.
    other = guided_diffusion.load("emoji", **SETTINGS, shard_size=3)
    cut = samples_of(tmp_path / "shards", num_samples=5, shard_size=3)
    assert np.array_equal(other.sample(5), cut)


def test_seed_labels_and_guidance_are_those_of_the_flags(emoji, tmp_path):
    def is_run(name, images, **flags):
        assert np.array_equal(images, samples_of(tmp_path / name, num_samples=3, **flags)), name

    block = find_block(emoji.network, "output_blocks.3.1")
    sag = SelfAttentionGuidance(scale=2.0, block=block, blur_sigma=1.5)
    pag = PerturbedAttentionGuidance(scale=1.0, blocks=(find_block(emoji.network, "middle_block.1"),))
    is_run("seed", emoji.sample(3, seed=7), seed=7)
    is_run("random labels", emoji.sample(3, labels="random"), labels="random")
    is_run("listed labels", emoji.sample(3, labels=[0, 2]), labels="0,2")
    is_run("one guidance", emoji.sample(3, guidance=sag), sag_scale=2)
    is_run("two guidances", emoji.sample(3, guidance=[sag, pag]), sag_scale=2, pag_scale=1)
    unguided = emoji.sample(3, guidance=None)
    is_run("none", unguided, sag_scale=0)
    assert np.array_equal(unguided, emoji.sample(3, guidance=()))
    assert not np.array_equal(unguided, emoji.sample(3))


def test_a_file_and_the_folder_of_a_run_load_too(tmp_path):
    images = samples_of(tmp_path / "run", num_samples=3, seed=5, balanced_labels=True, labels="random")
    for given in (tmp_path / "run", str(tmp_path / "run" / "config.yaml")):
        pipeline = guided_diffusion.load(given)
        assert np.array_equal(pipeline.sample(3), images)
    assert np.array_equal(
        pipeline.sample(1, labels="none"), guided_diffusion.load("emoji", **SETTINGS).sample(1, seed=5)
    )


def test_a_network_with_a_classifier(tmp_path):
    pipeline = guided_diffusion.load("emoji", "emoji_classifier", **SETTINGS)
    made = samples_of(tmp_path / "both", "classifier_sample", num_samples=3, **CLASSIFIER)
    assert np.array_equal(pipeline.sample(3), made)
    # Without other guidances the classifier's stays.
    made = samples_of(tmp_path / "alone", "classifier_sample", num_samples=3, sag_scale=0, **CLASSIFIER)
    assert np.array_equal(pipeline.sample(3, guidance=None), made)


def test_the_network_of_a_classifier_without_classes_of_its_own_is_the_network(tmp_path):
    torch.manual_seed(0)
    network = randomised(create_model_and_diffusion(**SMALL | {"image_size": 32})[0])
    torch.save(network.state_dict(), tmp_path / "w.pt")
    flags = SMALL | {"image_size": 32, "model_path": str(tmp_path / "w.pt"), "batch_size": 2, "timestep_respacing": 2}
    pipeline = guided_diffusion.load("emoji_classifier", **flags)
    assert isinstance(pipeline.network, UNetModel)
    own = CONFIGS / "emoji_classifier.yaml"
    run("classifier_sample", **flags | {"config": own, "num_samples": 2, "out_dir": tmp_path / "run"})
    with np.load(tmp_path / "run" / "samples_2x32x32x3.npz") as file:
        assert np.array_equal(pipeline.sample(2), file["arr_0"])


def test_a_device_is_gone_to_and_back_from(monkeypatch):
    pipeline = guided_diffusion.load("emoji", "emoji_classifier", **SETTINGS, device="cpu")
    seen, to = [], nn.Module.to

    def noted(module, device):
        seen.append((module, device))
        return to(module, "cpu")

    def leave_early():
        with pipeline.on("cuda:1") as there:
            assert there.device == torch.device("cuda:1")
            raise InterruptedError

    monkeypatch.setattr(nn.Module, "to", noted)
    with pytest.raises(InterruptedError):
        leave_early()
    both = [pipeline.network, pipeline.cond_fn]
    assert seen == [(part, "cuda:1") for part in both] + [(part, torch.device("cpu")) for part in both]


def test_the_package_alone_loads_no_torch():
    code = """
import os, sys
import guided_diffusion
assert "torch" not in sys.modules
print(os.environ["OMP_WAIT_POLICY"])
from guided_diffusion import load
assert "torch" in sys.modules
assert load is guided_diffusion.load
guided_diffusion.nothing
"""
    variables = {key: value for key, value in environment().items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert done.stdout == "PASSIVE\n"
    assert done.stderr.endswith("AttributeError: module 'guided_diffusion' has no attribute 'nothing'\n")


@pytest.mark.parametrize(
    ("given", "settings", "said"),
    [
        ("no_such_name", {}, "no_such_name.yaml: no such configuration; there are adm_"),
        ("emoji", {"sag_scal": 1}, "load: unknown key 'sag_scal'; did you mean 'sag_scale'"),
        ("emoji", {"labels": "5"}, "labels: wanted classes from 0 to 2, got 5"),
        ("emoji", {"sag_block": "nowhere"}, "no attention block 'nowhere'"),
        ("adm_upsampler_64_256", {}, "unknown key 'large_size'"),
    ],
)
def test_what_cannot_be_loaded_is_a_value_error(given, settings, said):
    with pytest.raises(ValueError, match=said):
        guided_diffusion.load(given, **settings)


def test_what_cannot_be_sampled_is_a_value_error(emoji, tmp_path):
    for arguments, said in (
        ({"n": 0}, "n: wanted 1 or more, got 0"),
        ({"n": 1, "seed": -1}, "seed: wanted"),
        ({"n": 1, "labels": [3]}, "labels: wanted classes from 0 to 2, got 3"),
        ({"n": 1, "labels": []}, "labels: wanted random, none, or classes"),
    ):
        with pytest.raises(ValueError, match=said):
            emoji.sample(**arguments)
    torch.save(create_model_and_diffusion(**SMALL)[0].state_dict(), tmp_path / "w.pt")
    without = guided_diffusion.load(**SMALL, model_path=str(tmp_path / "w.pt"))
    with pytest.raises(ValueError, match="labels: this model has no classes"):
        without.sample(1, labels="random")
    other = SelfAttentionGuidance(scale=1.0, block=find_block(without.network, "middle_block.1"))
    with pytest.raises(ValueError, match="was not heard"):
        emoji.sample(1, guidance=other)
