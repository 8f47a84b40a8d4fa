"""Sampling that begins with images: --init_image and --strength."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import guided_diffusion
from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.runs.prepare import load
from guided_diffusion.script_util import create_guidance, create_model_and_diffusion
from running import refused, run
from small import CONFIGS, EMBEDDED, SMALL, randomised

TRAINED_ON = CONFIGS / "models" / "emoji32_train.npz"


@pytest.fixture(scope="module")
def emoji():
    """Four pictures that the embedded model knows, uint8."""
    with np.load(TRAINED_ON) as file:
        return file["arr_0"][[0, 120, 240, 360]]


@pytest.fixture
def folder(emoji, tmp_path):
    """Three of them as pictures, by the order of their names the third, the second and the first."""
    (tmp_path / "pictures" / "a").mkdir(parents=True)
    for name, image in zip(("c", "b", "a/0"), emoji[:3], strict=True):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "pictures"


@pytest.fixture
def flags(folder, tmp_path):
    more = {"timestep_respacing": 4, "num_samples": 3, "init_image": folder, "out_dir": tmp_path / "out"}
    return EMBEDDED | more


def samples(folder):
    [path] = folder.glob("samples_*.npz")
    with np.load(path) as file:
        return file["arr_0"]


def rms(images, others):
    return float(np.sqrt(np.mean((images / 127.5 - others / 127.5) ** 2)))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small network with random weights, its file, and the whole diffusion of the door."""
    network, diffusion = create_model_and_diffusion(**SMALL)
    path = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save(randomised(network).state_dict(), path)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    np.savez(path.with_name("images.npz"), images)
    settings = SMALL | {"model_path": path, "init_image": path.with_name("images.npz")}
    return network, diffusion, settings, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(("strength", "made"), [(0.0, 1), (0.4, 3), (0.75, 6), (1.0, 8)])
def test_it_is_the_doors_loop(small, sampler, strength, made):
    """The loop of the door that leaves out the first steps, with the same noise and guidance."""
    network, diffusion, settings, images = small
    sag = {"sag_scale": 0.7, "sag_block": "middle_block.1", "blur_sigma": 2.0}
    pipeline = load(**settings, **sag, sampler=sampler, ddim_eta=1.0, strength=strength)
    states = [state for state, _ in pipeline.trajectory(range(3))]
    assert [state.t for state in states] == list(reversed(range(made)))
    assert pipeline.num_steps == made
    noise = SampleNoise(0, range(3), (3, 16, 16))
    loop, eta = (diffusion.p_sample_loop, {}) if sampler == "ddpm" else (diffusion.ddim_sample_loop, {"eta": 1.0})
    sample = loop(
        network, (3, 3, 16, 16), noise=noise.x_T(), step_noise=noise, skip_timesteps=8 - made,
        init_image=images[[0, 1, 0]], guidance=create_guidance(network, **sag), **eta,
    )  # fmt: skip
    # DDIM of the door computes ε from x̂_0.
    torch.testing.assert_close(states[-1].x, sample, atol=1e-4, rtol=0)


def test_all_steps_begin_with_the_noise_of_the_whole_process(small):
    _, diffusion, settings, images = small
    pipeline = load(**settings, strength=1)
    assert pipeline.diffusion.process.timestep_map == diffusion.process.timestep_map
    first, _ = next(pipeline.trajectory(range(2)))
    signal = float(diffusion.process.sqrt_alphas_cumprod[-1])
    assert signal < 0.01
    noise = SampleNoise(0, range(2), (3, 16, 16)).x_T()
    assert (first.prediction.x_t - noise).abs().max() <= signal + 1e-4
    torch.testing.assert_close(first.prediction.x_t - signal * images, (1 - signal**2) ** 0.5 * noise)


@pytest.mark.parametrize(("sampler", "respacing"), [("ddpm", "12"), ("unipc", "logsnr12"), ("dpm++2m-sde", "12")])
def test_less_strength_comes_back_nearer_to_the_image(emoji, folder, sampler, respacing):
    far = []
    for strength in (0.0, 0.25, 0.5, 1.0):
        pipeline = guided_diffusion.load(
            "emoji", init_image=str(folder), timestep_respacing=respacing, sampler=sampler, strength=strength
        )
        far.append(rms(pipeline.sample(3, guidance=None), emoji[[2, 1, 0]]))
    assert far == sorted(far)
    assert far[0] < 0.05
    assert far[-1] > 0.3


def test_what_a_run_makes(flags, emoji, capsys):
    """Without --num_samples as many as there are pictures, sample i of picture i in the order of names."""
    run("image_sample", **flags | {"strength": 0, "num_samples": ""})
    assert "from 3 given images: the last 1 of 4 steps" in capsys.readouterr().err
    images = samples(flags["out_dir"])
    assert len(images) == 3
    for image, picture in zip(images, (2, 1, 0), strict=True):
        assert rms(image, emoji[picture]) < 0.1 < min(rms(image, other) for other in np.delete(emoji, picture, 0))
    assert json.loads((flags["out_dir"] / "manifest.json").read_text())["settings"]["num_samples"] == 3
    # More go round; a configuration repeats the run.
    more = flags["out_dir"].parent / "more"
    run("image_sample", config=flags["out_dir"] / "config.yaml", num_samples=5, out_dir=more)
    assert np.array_equal(samples(more)[:3], images)
    assert rms(samples(more)[3], emoji[2]) < 0.1


def test_one_picture(flags, folder, emoji):
    run("image_sample", **flags | {"init_image": folder / "b.png", "strength": 0, "num_samples": 2})
    assert rms(samples(flags["out_dir"]), emoji[[1, 1]]) < 0.1


def test_self_attention_guidance_acts(flags):
    made = {}
    for scale in (0, 1):
        folder = flags["out_dir"] / str(scale)
        run("image_sample", **flags | {"sag_scale": scale, "out_dir": folder})
        evaluations = json.loads((folder / "manifest.json").read_text())["network_evaluations_per_sample"]
        assert evaluations == 2 * (1 + scale)
        made[scale] = samples(folder)
    assert rms(made[0], made[1]) > 0.01


def test_a_classifier_acts(flags):
    flags |= {"strength": 0.9, "labels": 1, "num_samples": 2, "sag_scale": 0}
    run("classifier_sample", **flags | {"out_dir": flags["out_dir"] / "without"})
    classifier = {"classifier_path": CONFIGS / "models" / "emoji32_classifier.safetensors"}
    configs = ["--config", CONFIGS / "emoji.yaml", "--config", CONFIGS / "emoji_classifier.yaml"]
    rest = {key: value for key, value in flags.items() if key != "config"}
    run("classifier_sample", *configs, **rest | classifier | {"out_dir": flags["out_dir"] / "with"})
    assert rms(samples(flags["out_dir"] / "with"), samples(flags["out_dir"] / "without")) > 0.005


def test_a_stopped_run_goes_on_and_batches_do_not_matter(flags, tmp_path, capsys):
    flags |= {"num_samples": 7, "shard_size": 3}
    run("image_sample", **flags)
    whole = samples(flags["out_dir"])
    (flags["out_dir"] / "shards" / "shard_000001.npz").unlink()
    next(flags["out_dir"].glob("samples_*.npz")).unlink()
    capsys.readouterr()
    run("image_sample", **flags)
    assert "3 samples" in capsys.readouterr().out
    assert np.array_equal(samples(flags["out_dir"]), whole)
    run("image_sample", **flags | {"batch_size": 3, "out_dir": tmp_path / "threes"})
    assert np.abs(samples(tmp_path / "threes").astype(int) - whole).max() <= 1


def test_the_pictures_count_and_not_their_names(flags, folder, tmp_path, capsys):
    run("image_sample", **flags)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "c.png").rename(copy / "cc.png")
    (copy / "read.me").write_text("not a picture")
    capsys.readouterr()
    run("image_sample", **flags | {"init_image": copy, "strength": 0.5})
    assert "0 samples" in capsys.readouterr().out
    assert "strength was the default, is 0.75" in refused(capsys, "image_sample", **flags | {"strength": 0.75})
    (copy / "cc.png").rename(copy / "a.png")
    assert "init_image was" in refused(capsys, "image_sample", **flags | {"init_image": copy})
    (copy / "a.png").unlink()
    assert "init_image was" in refused(capsys, "image_sample", **flags | {"init_image": copy})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"strength": 1.1}, "strength: wanted 0 to 1, got 1.1"),
        ({"strength": -0.1}, "strength: wanted 0 to 1, got -0.1"),
        ({"strength": "nan"}, "strength: wanted a finite number, got nan"),
        ({"init_image": "", "strength": 0.3}, "strength: goes with images to begin with; give --init_image"),
        ({"init_image": "nowhere"}, "init_image: no such file or folder 'nowhere'"),
        ({"init_image": "nowhere.npz"}, "init_image: no such file 'nowhere.npz'"),
        ({"init_image": CONFIGS / "models" / "emoji32_masks.npz"}, "arr_0: wanted uint8 [N, 32, 32, 3], got uint8"),
        ({"image_size": 64, "init_image": TRAINED_ON}, "arr_0: wanted uint8 [N, 64, 64, 3]"),
        ({"init_image": CONFIGS / "tables"}, "init_image: no image file below"),
        ({"init_image": CONFIGS / "emoji.yaml"}, "emoji.yaml (not one of BMP"),
        ({"num_samples": 0}, "num_samples: wanted 1 or more, got 0"),
    ],
    ids=range(11),
)
def test_bad_input_is_one_sentence(flags, capsys, wrong, said):
    assert said in refused(capsys, "image_sample", **flags | wrong)
    assert not flags["out_dir"].exists()


def test_a_picture_that_is_damaged_later_is_one_sentence(flags, folder, capsys):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:200])
    with pytest.raises(SystemExit) as stop:
        run("image_sample", **flags)
    assert stop.value.code == 2
    assert "b.png: not an image that can be read" in capsys.readouterr().err.splitlines()[-1]
    assert not list(flags["out_dir"].glob("shards/*"))
