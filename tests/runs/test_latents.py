"""Runs of a small transformer in the latents of a small autoencoder: sampled, resumed, decoded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import dits
from guided_diffusion import load
from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.networks.dit import DiT
from guided_diffusion.runs.identity import identity
from guided_diffusion.runs.prepare import Configs, image_run
from guided_diffusion.settings.options import merge
from guided_diffusion.settings.scripts import SCRIPTS
from guided_diffusion.storage import pictures
from guided_diffusion.storage.fetch import _terms
from guided_diffusion.storage.given_images import GivenImages
from guided_diffusion.tables.comparison import same_noise
from latents import DATA, diffusers
from running import refused, run

VAE = DATA / "model" / "vae"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "dit.pt"
    torch.save(dits.filled(DiT(8, 2, 4, 32, 3, 2, num_classes=5)).state_dict(), path)
    return path


@pytest.fixture
def base(weights):
    """Flags of a short run, guided by CFG on 3 channels and SAG."""
    diffusers()
    return {
        "model_path": weights, "network": "DiT-32x3x2/2", "latent_factor": 8, "vae_path": VAE, "image_size": 64,
        "class_cond": True, "num_classes": 5, "null_label": True, "learn_sigma": True, "clip_denoised": False,
        "timestep_respacing": "3", "cfg_scale": 0.5, "cfg_channels": 3, "sag_scale": 0.1, "sag_block": "blocks.1",
        "blur_sigma": 1, "batch_size": 2,
    }  # fmt: skip


def pipeline(flags):
    read = merge(SCRIPTS["image_sample"].groups, ("test", flags))
    return image_run(Configs.of(read), torch.device("cpu")).pipeline


def test_a_run_is_stored_and_resumed(base, tmp_path, capsys):
    run("image_sample", **base, num_samples=2, out_dir=tmp_path)
    said = capsys.readouterr()
    assert "classifier-free guidance: s_c = 0.5 on the first 3 channels, 3 of 3 steps" in said.err
    assert "9 network evaluations each" in said.out
    run("image_sample", **base, num_samples=3, out_dir=tmp_path)
    assert "1 samples in" in (said := capsys.readouterr().out)
    assert "(2 were there)" in said
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["uint8"] == "trunc(127.5x + 128)"
    assert manifest["settings"]["vae_path"] == str(VAE)
    with np.load(tmp_path / "samples_3x64x64x3.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (3, 64, 64, 3)
    # By hand: the last state, divided by 0.18215, decoded, and rounded as DiT does.
    made = pipeline(base | {"num_samples": 3})
    for state, _ in made.trajectory([2]):
        assert state.x.shape == (1, 4, 8, 8)
    decoded = made.autoencoder.vae.decode(state.x / 0.18215).sample.detach()
    by_hand = np.trunc(np.clip(127.5 * decoded.numpy().astype(np.float64) + 128, 0, 255))
    assert abs(images[2].astype(int) - by_hand[0].transpose(1, 2, 0)).max() <= 1
    assert (images[2] != by_hand[0].transpose(1, 2, 0)).mean() < 1e-3
    assert labels[2] == state.prediction.condition["y"].item()
    assert "cfg_channels was 3, is 4" in refused(
        capsys, "image_sample", **base | {"cfg_channels": 4}, num_samples=3, out_dir=tmp_path
    )


def test_from_python_with_images_to_begin_with(base, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "given.npz", arr_0=images)
    flags = base | {"init_image": tmp_path / "given.npz", "strength": 0.1, "timestep_respacing": "20"}
    model = load(**flags, device="cpu")
    assert model.sample(2).shape == (2, 64, 64, 3)
    state, _ = next(model.trajectory([0]))
    encoded = model.autoencoder.encode(GivenImages(str(tmp_path / "given.npz"), 64, 64, "init_image").read([0]))
    process = model.diffusion.process
    noisy = process.q_sample(encoded, torch.tensor([1]), model_noise(model, 0))
    torch.testing.assert_close(state.prediction.x_t, noisy)


def model_noise(model, index):
    """x_T of a sample that begins with noise."""
    return SampleNoise(model.config.seed, [index], model.x_shape).x_T()


def test_the_autoencoder_is_part_of_what_a_run_is(tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(VAE, copied)
    same, at_another_place = (identity({"vae_path": str(path)}) for path in (VAE, copied))
    assert same == at_another_place
    (copied / "notes.md").write_text("not read")
    assert identity({"vae_path": str(copied)}) == same
    with open(copied / "diffusion_pytorch_model.safetensors", "ab") as file:
        file.write(b" ")
    assert identity({"vae_path": str(copied)}) != same
    assert identity({"network": "", "latent_factor": 0, "vae_path": "", "cfg_channels": None}) == {}


def test_the_rules_of_rounding():
    x = torch.tensor([-1.2, -1.0, 0.0, 0.0039, 1.0, 1.2]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert pictures.to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 127, 127, 255, 255]
    assert pictures.to_uint8(x, nearest=True)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_a_transformer_may_see_images(tmp_path, base):
    torch.save(dits.filled(DiT(8, 2, 3, 32, 3, 2, num_classes=5)).state_dict(), tmp_path / "dit.pt")
    flags = base | {"latent_factor": 0, "vae_path": "", "image_size": 8, "model_path": tmp_path / "dit.pt"}
    made = pipeline(flags | {"cfg_channels": 3})
    assert made.x_shape == (3, 8, 8)
    assert made.autoencoder is None
    assert not made.nearest_levels


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_out_channels": [4, 4, 8]}, "wanted latents of factor 8, got 4"),
        ({"_class_name": "VQModel"}, "wanted a AutoencoderKL, got a VQModel"),
        ({"shift_factor": 0.1}, "shift_factor: such networks are not read; wanted none, got 0.1"),
        (None, "has no .safetensors file; other formats are not read"),
    ],
)
def test_another_autoencoder_is_refused(base, tmp_path, capsys, change, said):
    library = diffusers()
    folder = tmp_path / "vae"
    config = json.loads((VAE / "config.json").read_text()) | (change or {})
    if change and "block_out_channels" in change:
        config |= {key: config[key][:3] for key in ("down_block_types", "up_block_types")}
        library.AutoencoderKL.from_config(config).save_pretrained(folder)
    else:
        shutil.copytree(VAE, folder)
        (folder / "config.json").write_text(json.dumps(config))
    if change is None:
        (folder / "diffusion_pytorch_model.safetensors").unlink()
    error = refused(capsys, "image_sample", **base | {"vae_path": folder}, out_dir=tmp_path / "out")
    assert error.startswith(f"error: vae_path: {folder}")
    assert said in error


def test_a_classifier_of_images_sees_no_latents(base, capsys, tmp_path):
    flags = base | {"classifier_path": tmp_path / "none.pt"}
    assert "a classifier of images does not see the latents" in refused(capsys, "classifier_sample", **flags)


def test_the_attention_report_looks_into_a_transformer(base, tmp_path):
    flags = base | {"cfg_scale": 0, "timestep_respacing": "2", "num_samples": 2, "noise_levels": "0.5"}
    run("attention_report", **flags, shown_steps=1, blocks="blocks.0,blocks.2", out_dir=tmp_path)
    found = json.loads((tmp_path / "attention.json").read_text())
    assert {row["block"] for row in found["ranking"]} == {"blocks.0", "blocks.2"}


def test_masks_of_latents_are_drawn_over_the_images(base):
    seen = same_noise(pipeline(base | {"num_samples": 2}), 2)
    assert seen.unguided.shape == seen.guided.shape == (2, 64, 64, 3)
    of_tokens = seen.share.reshape(2, 4, 16, 4, 16)
    assert (of_tokens == of_tokens[:, :, :1, :, :1]).all()
    assert 0 < seen.share.mean() < 1


def test_the_licence_is_said_before_anything_is_fetched():
    path = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"
    assert "licence: CC BY-NC 4.0, code and weights of DiT: not for commercial use" in _terms(path, None)
    assert Path(path).name in _terms(path, None)
