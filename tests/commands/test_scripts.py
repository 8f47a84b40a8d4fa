"""The scripts as a user runs them: what they write, that it repeats, and how they refuse bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from guided_diffusion.networks.building import build_classifier
from guided_diffusion.networks.precision import _say
from guided_diffusion.networks.unet import UNetModel
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.model import ClassifierConfig
from running import refused, run
from small import randomised

NETWORK = {
    "image_size": "32",
    "num_channels": "32",
    "num_res_blocks": "1",
    "attention_resolutions": "16,8",
    "class_cond": "True",
    "num_classes": "5",
    "null_label": "True",
    "learn_sigma": "True",
}
FORWARD = UNetModel.forward
CLASSIFIER = {"classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "8"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Paths of a small network's and a small classifier's weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(randomised(create_model_and_diffusion(**NETWORK)[0]).state_dict(), folder / "network.pt")
    config = ClassifierConfig(**CLASSIFIER)
    torch.save(randomised(build_classifier(32, config, 5)).state_dict(), folder / "classifier.pt")
    return folder


@pytest.fixture
def base(weights, tmp_path):
    """Flags of a quick run."""
    return NETWORK | {
        "model_path": weights / "network.pt",
        "timestep_respacing": "3",
        "num_samples": "5",
        "batch_size": "2",
        "out_dir": tmp_path / "out",
    }


def samples(folder):
    [path] = Path(folder).glob("samples_*.npz")
    with np.load(path) as file:
        return path.name, file["arr_0"], file.get("arr_1")


def test_what_a_run_writes(base):
    run("image_sample", **base)
    name, images, labels = samples(base["out_dir"])
    assert name == "samples_5x32x32x3.npz"
    assert images.shape == (5, 32, 32, 3)
    assert images.dtype == np.uint8
    assert len(np.unique(images)) > 10
    assert labels.shape == (5,)
    assert labels.dtype == np.int64
    assert set(labels) <= set(range(5))
    left = {path.name for path in base["out_dir"].iterdir()}
    assert left == {name, "grid.png", "config.yaml", "manifest.json", "shards", ".lock"}
    assert Image.open(base["out_dir"] / "grid.png").size[0] >= 3 * 32
    manifest = json.loads((base["out_dir"] / "manifest.json").read_text())
    assert manifest["network_evaluations_per_sample"] == 3
    assert manifest["settings"]["seed"] == 0


def test_a_written_configuration_gives_the_same_samples(base, tmp_path):
    guidance = {"sag_scale": 0.5, "sag_block": "middle_block.1"}
    run("image_sample", **base, **guidance)
    run("image_sample", config=base["out_dir"] / "config.yaml", out_dir=tmp_path / "again")
    assert np.array_equal(samples(base["out_dir"])[1], samples(tmp_path / "again")[1])


def test_samples_do_not_depend_on_the_batch(base, tmp_path):
    base |= {"num_samples": 7, "sag_scale": 0.5, "sag_block": "middle_block.1"}
    results = []
    for batch_size in (1, 4, 7):
        run("image_sample", **base | {"batch_size": batch_size, "out_dir": tmp_path / str(batch_size)})
        results.append(samples(tmp_path / str(batch_size))[1:])
    (alone, labels), *others = results
    for images, other_labels in others:
        assert np.array_equal(labels, other_labels)
        difference = np.abs(alone.astype(int) - images)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_guidance_changes_samples_and_scale_zero_does_not(base, tmp_path, capsys):
    run("image_sample", **base)
    plain = samples(base["out_dir"])[1]
    chosen = {"sel_attn_block": "output", "sel_attn_depth": 2, "blur_sigma": 1}
    for scale, evaluations in [("1.0", 3), ("1.8", 6)]:
        out_dir = tmp_path / scale
        run("image_sample", **base | {"out_dir": out_dir}, guide_scale=scale, **chosen)
        assert np.array_equal(samples(out_dir)[1], plain) == (scale == "1.0")
        manifest = json.loads((out_dir / "manifest.json").read_text())
        assert manifest["network_evaluations_per_sample"] == evaluations
    assert "s = 0.8, ψ = 1, σ = 1 at output_blocks.2.1, 3 of 3 steps, corrected" in capsys.readouterr().err


def test_labels(base, tmp_path):
    for flag, expected in [("3", [3] * 5), ("0,4", [0, 4, 0, 4, 0]), ("none", [5] * 5)]:
        run("image_sample", **base | {"out_dir": tmp_path / flag}, labels=flag)
        assert samples(tmp_path / flag)[2].tolist() == expected


def test_ddim(base):
    run("image_sample", **base | {"timestep_respacing": "ddim4"}, use_ddim="True", ddim_eta="0.3")
    assert len(samples(base["out_dir"])[1]) == 5


@pytest.mark.parametrize(
    ("capabilities", "dtype", "word"),
    [({"avx512_bf16": True}, torch.bfloat16, "bfloat16"), ({}, torch.float32, "going on in float32")],
)
def test_half_precision_on_a_cpu_is_what_the_cpu_has_and_says_so_once(
    base, tmp_path, caplog, monkeypatch, capabilities, dtype, word
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    run("image_sample", **base)
    plain = samples(base["out_dir"])[1].astype(int)
    _say.cache_clear()
    called = []
    monkeypatch.setattr(
        UNetModel, "forward", lambda self, *args, **kw: called.append(self.dtype) or FORWARD(self, *args, **kw)
    )
    for name in ("one", "two"):
        run("image_sample", **base | {"out_dir": tmp_path / name}, use_fp16="True")
        difference = abs(samples(tmp_path / name)[1].astype(int) - plain)
        assert difference.any() == (dtype is not torch.float32)
        assert np.median(difference) <= 1
    assert set(called) == {dtype}
    assert caplog.text.count("use_fp16") == 1
    assert word in caplog.text


def test_compile_reaches_the_network(base, monkeypatch):
    compiled = []
    monkeypatch.setattr(UNetModel, "compile_blocks", lambda self: compiled.append(self))
    run("image_sample", **base, compile="True")
    assert len(compiled) == 1


def test_the_classifier_moves_samples_and_goes_with_guidance(weights, base, tmp_path):
    def sampled(name, **flags):
        run("classifier_sample", **base | {"out_dir": tmp_path / name}, **flags)
        return samples(tmp_path / name)[1]

    with_classifier = CLASSIFIER | {"classifier_path": weights / "classifier.pt", "classifier_scale": 3}
    plain = sampled("plain")
    guided = sampled("guided", **with_classifier)
    off = sampled("off", **with_classifier, classifier_guidance="False")
    both = sampled("both", **with_classifier, sag_scale=1, sag_block="middle_block.1")
    assert np.array_equal(plain, off)
    assert not np.array_equal(plain, guided)
    assert not np.array_equal(guided, both)


def test_a_run_without_out_dir_goes_below_runs(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    del base["out_dir"]
    run("image_sample", **base)
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("network-")
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    run("image_sample", **base)
    assert np.array_equal(samples(folder)[1], samples(tmp_path / "logs")[1])


BAD = {
    "num_samples": ["0", "-3", "many"],
    "batch_size": ["0"],
    "model_path": ["nowhere.pt", ""],
    "timestep_respacing": ["0", "2000", "ddim999", "logsnr0", "logsnr2000", "x"],
    "sampler": ["euler", "DDIM"],
    "labels": ["5", "-1", "cat"],
    "seed": ["-1"],
    "ddim_eta": ["-1", "nan", "2"],
    "image_size": ["0", "31"],
    "shard_size": ["-1"],
    "blur_sigma": ["-1", "nan"],
    "blur_kernel": ["4"],
    "sag_threshold": ["nan", "inf"],
    "sag_scale": ["inf", "nan"],
    "sag_block": ["output_blocks.99.1"],
    "guide_start": ["-1"],
    "guide_interval": ["1,0"],
    "guide_every": ["0"],
    "sag_schedule": ["now", "t=1,0"],
    "fidelity": ["perfect"],
    "channel_mult": ["a", "1,2,4,8,16,32,64"],
    "num_channels": ["33"],
    "attention_resolutions": ["x"],
    "noise_schedule": ["steep"],
    "class_cond": ["perhaps"],
    "config": ["nowhere.yaml"],
}


@pytest.mark.parametrize(("flag", "value"), [(flag, value) for flag, values in BAD.items() for value in values])
def test_bad_input_is_one_sentence_and_writes_nothing(base, capsys, monkeypatch, tmp_path, flag, value):
    monkeypatch.chdir(tmp_path)
    flags = {"sag_scale": "1", "sag_block": "middle_block.1"} | base | {flag: value}
    error = refused(capsys, "image_sample", **flags)
    assert flag in error or str(value) in error
    assert not base["out_dir"].exists()


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("num_classes", 7, "num_classes is 7, should be 5; tensors: 1 of another shape, first label_emb.weight"),
        ("learn_sigma", False, "learn_sigma is False, should be True"),
        ("num_channels", 64, "num_channels is 64, should be 32"),
        ("class_cond", False, "class_cond is False, should be True"),
    ],
)
def test_the_flag_that_does_not_fit_the_weights_is_named(base, capsys, flag, value, said):
    error = refused(capsys, "image_sample", **base | {flag: value})
    assert str(base["model_path"]) in error
    assert said in error


def test_unknown_flags_are_refused(base, capsys):
    assert "--sag_skale; did you mean --sag_scale?" in refused(capsys, "image_sample", **base, sag_skale="1")


def test_a_folder_holds_one_network(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (32, 32)).save(data / "a_0.png")
    flags = NETWORK | {"data_dir": data, "out_dir": tmp_path / "run", "lr_anneal_steps": 1, "batch_size": 1}
    run("image_train", **flags)
    capsys.readouterr()
    assert "a run of another network" in refused(capsys, "image_train", **flags | {"num_channels": 64})
    (data / "b_0.png").write_text("no image")
    with pytest.raises(SystemExit) as stop:
        run("image_train", **flags | {"lr_anneal_steps": 9})
    assert stop.value.code == 2
    assert "b_0.png (not one of BMP, GIF, JPEG, PNG, WEBP)" in capsys.readouterr().err


def test_training_then_sampling(tmp_path):
    data, out_dir = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for i in range(6):
        Image.new("RGB", (32, 32), (40 * i, 10, 200)).save(data / f"{'ab'[i % 2]}_{i}.png")
    flags = NETWORK | {
        "num_classes": "2", "data_dir": data, "out_dir": out_dir, "batch_size": 2, "lr_anneal_steps": 3,
        "label_dropout": 0.2, "bf16": "True",
    }  # fmt: skip
    run("image_train", **flags)
    assert {path.name for path in out_dir.iterdir()} == {
        ".lock", "checkpoint.pt", "classes.json", "config.yaml", "model000003.pt", "ema_0.9999_000003.pt"
    }  # fmt: skip
    assert json.loads((out_dir / "classes.json").read_text()) == ["a", "b"]
    run(
        "image_sample", config=out_dir / "config.yaml", model_path=out_dir / "ema_0.9999_000003.pt", num_samples=2,
        timestep_respacing=2, out_dir=tmp_path / "out",
    )  # fmt: skip
    assert len(samples(tmp_path / "out")[1]) == 2


def test_without_a_number_of_classes_training_takes_the_folders(tmp_path, capsys):
    for name in ("cat_0.png", "dog_0.png", "dog_1.png"):
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    flags = {key: value for key, value in NETWORK.items() if key != "num_classes"}
    flags |= {"data_dir": tmp_path, "batch_size": 1, "lr_anneal_steps": 1}
    run("image_train", **flags, out_dir=tmp_path / "own")
    assert f"3 images of 2 of the network's 2 classes in {tmp_path}" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())["num_classes"] == 2
    labels = torch.load(tmp_path / "own" / "model000001.pt", weights_only=True)["label_emb.weight"]
    assert len(labels) == 2 + yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())["null_label"]
    run("image_train", **flags, out_dir=tmp_path / "given", num_classes=1000)
    assert "3 images of 2 of the network's 1,000 classes" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "given" / "config.yaml").read_text())["num_classes"] == 1000
    run("image_train", **flags | {"class_cond": False, "null_label": False}, out_dir=tmp_path / "none")
    assert f"3 images in {tmp_path}" in capsys.readouterr().out


def test_a_classifiers_scale_without_a_classifier(base, capsys):
    flags = base | {"num_samples": 1, "timestep_respacing": 1}
    error = refused(capsys, "classifier_sample", **flags, classifier_scale=3)
    assert "classifier_path: classifier_scale 3 needs" in error
    run("classifier_sample", **flags)
    assert "classifier guidance: off, no classifier_path is given" in capsys.readouterr().err


def test_training_begins_with_weights_from_elsewhere(weights, tmp_path):
    """A plain state dict under upstream's names, of the step it says; the file that training leaves is one again."""
    Image.new("RGB", (32, 32)).save(tmp_path / "0_a.png")
    given = torch.load(weights / "network.pt", weights_only=True)
    torch.save(given, tmp_path / "model010000.pt")
    run(
        "image_train", **NETWORK, data_dir=tmp_path, out_dir=tmp_path / "run", batch_size=1, lr_anneal_steps=10001,
        lr=1e-9, resume_checkpoint=tmp_path / "model010000.pt",
    )  # fmt: skip
    left = torch.load(tmp_path / "run" / "ema_0.9999_010001.pt", weights_only=True)
    assert list(left) == list(given)
    for name, tensor in given.items():
        torch.testing.assert_close(left[name], tensor, atol=1e-6, rtol=0)


OF_NETWORKS = (
    "num_channels num_res_blocks num_heads num_heads_upsample num_head_channels attention_resolutions dropout "
    "class_cond use_checkpoint use_scale_shift_norm resblock_updown use_fp16 use_new_attention_order learn_sigma "
    "diffusion_steps noise_schedule timestep_respacing use_kl predict_xstart rescale_timesteps rescale_learned_sigmas"
)
UPSTREAM_FLAGS = {
    "image_nll": "data_dir clip_denoised num_samples batch_size model_path image_size channel_mult",
    "super_res_sample": "clip_denoised num_samples batch_size use_ddim base_samples model_path large_size small_size",
    "super_res_train": "data_dir schedule_sampler lr weight_decay lr_anneal_steps batch_size microbatch ema_rate "
    "log_interval save_interval resume_checkpoint fp16_scale_growth large_size small_size",
}


@pytest.mark.parametrize("script", UPSTREAM_FLAGS)
def test_upstream_flags_are_there(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    assert stop.value.code == 0
    said = set(capsys.readouterr().out.split())
    assert {f"--{flag}" for flag in f"{UPSTREAM_FLAGS[script]} {OF_NETWORKS}".split()} <= said


@pytest.mark.parametrize(
    "flags", [{"data_dir": "nowhere"}, {"data_dir": ""}, {"lr": "-1"}, {"num_classes": "1"}, {"label_dropout": 2}]
)
def test_bad_training_input_is_one_sentence(tmp_path, capsys, flags):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a_0.png", "b_0.png"):
        Image.new("RGB", (32, 32)).save(data / name)
    refused(capsys, "image_train", **NETWORK | {"data_dir": data, "out_dir": tmp_path / "run"} | flags)
    assert not (tmp_path / "run").exists()
