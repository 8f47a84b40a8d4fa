"""Stable Diffusion that begins with pictures: --init_image and --strength."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import latents
from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.settings.stable_diffusion import StableDiffusionConfig
from guided_diffusion.stable_diffusion.sampling import LatentPipeline, latent_guidance
from guided_diffusion.storage.given_images import GivenImages
from latents import golden_model
from running import refused, run

SCRIPT = "stable_diffusion_sample"
SIZE = {"height": 64, "width": 96}

# numpy's about tensors, in several schedulers of diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@pytest.fixture(autouse=True)
def extra():
    latents.diffusers()


@pytest.fixture
def folder(tmp_path):
    """Two pictures that are no multiple of anything."""
    (tmp_path / "pictures").mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((130, 101), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


@pytest.fixture
def flags(folder, tmp_path):
    return SIZE | {
        "model": latents.DATA / "model", "prompt": "a cat", "steps": 4, "num_images": 3, "batch_size": 2, "compare": 0,
        "png": False, "init_image": folder, "out_dir": tmp_path / "out",
    }  # fmt: skip


def pipeline(folder, guidances=(), **settings):
    config = StableDiffusionConfig(
        model=str(latents.DATA / "model"), prompt="a cat", num_images=3, init_image=str(folder), **SIZE | settings
    )
    return LatentPipeline(config, golden_model(), ["a cat"], guidances)


def last(made):
    for state, _ in made.trajectory(range(made.num_samples)):
        pass
    return state.x


def encoded(folder):
    """The latents of samples 0 to 2."""
    return golden_model().latents(GivenImages(str(folder), 64, 96, "init_image").read(range(3)))


def samples(folder):
    [path] = folder.glob("samples_*.npz")
    with np.load(path) as file:
        return file["arr_0"]


@pytest.mark.parametrize("strength", [0.4, 0.8])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "euler", "heun", "unipc"])
def test_it_is_the_public_pipeline(folder, scheduler, strength, monkeypatch):
    from diffusers import StableDiffusionImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as theirs

    ours = pipeline(folder, scheduler=scheduler, steps=5, strength=strength, negative_prompt="a dog")
    model = golden_model()
    public = StableDiffusionImg2ImgPipeline(
        model.vae, model.text_encoders[0], model.tokenizers[0], model.unet, ours.scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    public.set_progress_bar_config(disable=True)
    noise = SampleNoise(0, range(3), model.latent_shape(64, 96)).x_T()
    monkeypatch.setattr(theirs, "randn_tensor", lambda *_args, **_settings: noise)
    wanted = public(
        ["a cat"] * 3, image=encoded(folder), strength=strength, num_inference_steps=5, guidance_scale=7.5,
        negative_prompt=["a dog"] * 3, output_type="latent",
    ).images  # fmt: skip
    got = last(ours)
    torch.testing.assert_close(got, wanted, atol=1e-4 * max(1.0, wanted.abs().max().item()), rtol=0)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm++_sde", "euler_a", "lcm"])
def test_less_strength_comes_back_nearer_to_the_image(folder, scheduler):
    far = []
    for strength in (0.0, 0.1, 0.3):
        made = pipeline(folder, scheduler=scheduler, steps=40, strength=strength, guidance_scale=1.0)
        far.append(float((last(made) - encoded(folder)).square().mean().sqrt()))
    assert far == sorted(far)
    assert far[0] < 0.3
    assert far[-1] > 3 * far[0]


def test_all_steps_begin_with_noise(folder):
    made = pipeline(folder, spacing="trailing", steps=3, strength=1)
    noise = SampleNoise(0, range(3), golden_model().latent_shape(64, 96)).x_T()
    first, _ = next(made.trajectory(range(3)))
    alpha, sigma = made.levels.alphas[-1], made.levels.sigmas[-1]
    torch.testing.assert_close(first.prediction.x_t, (alpha * encoded(folder) + sigma * noise).float())
    assert alpha < 0.1
    assert made.num_steps == 3


def test_self_attention_guidance_acts_in_its_part_of_the_steps(folder):
    plain = last(pipeline(folder, steps=4))
    sag = latent_guidance(golden_model().unet, 0.75)
    guided = pipeline(folder, [sag], steps=4)
    assert (last(guided) - plain).abs().max() > 1e-2
    assert guided.describe() == (
        "DDIMScheduler, 2 network calls; from 2 given images: the last 2 of 4 steps; classifier-free guidance: 7.5; "
        "self-attention guidance: s = 0.75, ψ = 1, σ = 1 in eps, 2 of 2 calls"
    )


def test_a_stopped_run_goes_on_and_batches_do_not_matter(flags, tmp_path, capsys):
    run(SCRIPT, **flags | {"compare": 1})
    whole = samples(flags["out_dir"])
    assert whole.shape == (3, 64, 96, 3)
    assert (flags["out_dir"] / "comparison.png").exists()
    assert json.loads((flags["out_dir"] / "manifest.json").read_text())["network_evaluations_per_sample"] == 6
    (flags["out_dir"] / "shards" / "shard_000001.npz").unlink()
    capsys.readouterr()
    run(SCRIPT, **flags)
    assert "1 samples" in capsys.readouterr().out
    assert np.array_equal(samples(flags["out_dir"]), whole)
    run(SCRIPT, **flags | {"batch_size": 3, "out_dir": tmp_path / "threes"})
    assert np.abs(samples(tmp_path / "threes").astype(int) - whole).max() <= 1
    # Images go round: the third is of the first picture, with noise of its own.
    run(SCRIPT, **flags | {"init_image": flags["init_image"] / "a.png", "out_dir": tmp_path / "one"})
    alone = samples(tmp_path / "one")
    assert np.abs(alone[[0, 2]].astype(int) - whole[[0, 2]]).max() <= 1
    assert np.abs(alone[1].astype(int) - whole[1]).max() > 1
    assert "strength was the default, is 0.25" in refused_later(capsys, **flags | {"strength": 0.25})


def refused_later(capsys, **flags):
    """The last line of a run that is refused after it has said what it would do."""
    with pytest.raises(SystemExit) as stop:
        run(SCRIPT, **flags)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"strength": 2}, "strength: wanted 0 to 1, got 2.0"),
        ({"init_image": "", "strength": 0.3}, "strength: goes with images to begin with; give --init_image"),
        ({"init_image": "nowhere"}, "init_image: no such file or folder 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(flags, capsys, wrong, said):
    assert said in refused(capsys, SCRIPT, **flags | wrong)
    assert not flags["out_dir"].exists()


def test_an_npz_has_the_size_of_the_images(flags, capsys, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 96, 64, 3), np.uint8))
    said = refused(capsys, SCRIPT, **flags | {"init_image": tmp_path / "images.npz"})
    assert "arr_0: wanted uint8 [N, 64, 96, 3], got uint8 [2, 96, 64, 3]" in said


def test_runge_kutta_steps_cannot_begin_in_the_middle():
    model = golden_model()
    own = latents.diffusers().PNDMScheduler.from_config(model.scheduler.config, skip_prk_steps=False)
    with pytest.raises(ValueError, match="give --scheduler pndm"):
        latents.start(own, 10, made=5)
