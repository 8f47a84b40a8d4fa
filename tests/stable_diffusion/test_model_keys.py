"""Keys of a model's configurations that change what numbers mean: applied as diffusers does, or refused."""

import json
import shutil

import pytest
import torch

import latents
from guided_diffusion.stable_diffusion.model import load
from latents import noise

MOMENTS = {
    "latents_mean": [-1.66, 1.89, -1.38, 2.52],
    "latents_std": [8.49, 5.90, 6.55, 5.23],
    "scaling_factor": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def extra():
    latents.diffusers()


def changed(folder, part, **keys):
    """The model in a folder, with other keys in the configuration of a part."""
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    return load(str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return changed(latents.variant(tmp_path_factory.mktemp("models") / "xl", "xl"), "vae", **MOMENTS)


def public(model, kind):
    """A pipeline of diffusers around the same networks."""
    made = getattr(latents.diffusers(), kind)(
        model.vae, *model.text_encoders, *model.tokenizers, model.unet, model.scheduler, add_watermarker=False
    )
    made.set_progress_bar_config(disable=True)
    return made


def test_decoding_is_that_of_the_public_pipeline(model):
    pipeline, given = public(model, "StableDiffusionXLPipeline"), noise(1, 8, 8)
    ends = {
        kind: pipeline("a cat", height=64, width=64, num_inference_steps=1, latents=given, output_type=kind).images
        for kind in ("latent", "pt")
    }
    ours = model.decode(ends["latent"])
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), ends["pt"], rtol=0, atol=1e-5)
    plain = model.vae.decode(ends["latent"] / 0.5, return_dict=False)[0]
    assert (ours - plain).abs().max() > 0.1


def test_encoding_is_that_of_the_public_pipeline(model, monkeypatch):
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as theirs

    monkeypatch.setattr(theirs, "retrieve_latents", lambda encoded, **_settings: encoded.latent_dist.mode())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = public(model, "StableDiffusionXLImg2ImgPipeline").prepare_latents(
        images, None, 2, 1, torch.float32, "cpu", add_noise=False
    )
    torch.testing.assert_close(model.latents(images), wanted, rtol=0, atol=1e-6)


def test_what_is_decoded_and_encoded_are_the_same_numbers(model):
    """The decoder is handed back what the encoder gave."""
    images, handed = torch.zeros(1, 3, 64, 64), []
    handle = model.vae.decoder.register_forward_pre_hook(lambda _decoder, args: handed.append(args[0]))
    model.decode(model.latents(images))
    handle.remove()
    encoded = model.vae.post_quant_conv(model.vae.encode(images).latent_dist.mode())
    torch.testing.assert_close(handed[0], encoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "shift_factor", 0.1),
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "num_class_embeds", 10),
    ],
)
def test_what_is_not_done_here_is_refused(tmp_path, part, key, value):
    shutil.copytree(latents.DATA / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / part / "config.json").read_text()) | {key: value}
    network = getattr(latents.diffusers(), config["_class_name"]).from_config(config)
    network.save_pretrained(tmp_path / "model" / part)
    with pytest.raises(ValueError, match=f"{part}: {key}: such networks are not read; wanted none, got"):
        load(str(tmp_path / "model"))


def test_other_networks_are_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(latents.DATA / "model", folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="wanted a UNet2DConditionModel, got a UNet2DModel"):
        load(str(folder))
