"""The likelihood of a folder of images: the bound itself, for any ranks and batches, and resumed."""

import hashlib
import json

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from guided_diffusion.diffusion.noise import SampleNoise, choice
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.runs.likelihood import BY_STEP, measure
from guided_diffusion.runs.ranks import Job
from guided_diffusion.script_util import create_gaussian_diffusion, create_model_and_diffusion
from guided_diffusion.settings.runs import LikelihoodConfig
from guided_diffusion.storage.images import ImageFolder
from running import SCRIPTS, ended, mpiexec, refused, run
from small import SMALL, randomised

COUNT = 5
NETWORK = SMALL | {"class_cond": True, "num_classes": 2, "learn_sigma": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(network, diffusion, path of its weights)."""
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(**NETWORK)
    path = tmp_path_factory.mktemp("weights") / "ema_0.9999_000001.pt"
    torch.save(randomised(network).state_dict(), path)
    return network, diffusion, path


@pytest.fixture
def flags(model, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(COUNT, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(data / f"{'ab'[i % 2]}_{i}.png")
    return NETWORK | {"model_path": model[2], "data_dir": data, "out_dir": tmp_path / "out", "batch_size": 2}


def result_in(folder):
    with np.load(folder / "terms.npz") as terms:
        return json.loads((folder / "nll.json").read_text()), dict(terms)


@pytest.fixture
def expected(model, flags):
    """What calc_bpd_loop says of the five images as one batch, in the order of their names."""
    network, diffusion, _ = model
    files = sorted(flags["data_dir"].iterdir())
    x0 = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files]) / 127.5 - 1
    labels = torch.tensor(["ab".index(path.name[0]) for path in files])
    noise = SampleNoise(0, range(COUNT), (3, 16, 16))
    return diffusion.calc_bpd_loop(network, x0, model_kwargs={"y": labels}, step_noise=noise)


def assert_as_expected(folder, expected):
    result, terms = result_in(folder)
    for name in ("total_bpd", "prior_bpd"):
        assert result[name]["value"] == pytest.approx(expected[name].mean().item(), rel=1e-5)
        assert result[name]["error"] == pytest.approx(expected[name].std().item() / COUNT**0.5, rel=1e-4)
    assert result["n"] == COUNT
    assert result["network_evaluations_per_image"] == 8
    assert set(terms) == set(BY_STEP)
    for name in BY_STEP:
        np.testing.assert_allclose(terms[name], expected[name].mean(dim=0), rtol=2e-4)


def test_it_is_the_bound_of_calc_bpd_loop(flags, expected, capsys):
    run("image_nll", **flags)
    assert_as_expected(flags["out_dir"], expected)
    total = result_in(flags["out_dir"])[0]["total_bpd"]
    said = f"{total['value']:.4f} ± {total['error']:.4f} bits per dimension, of which prior 1e-05; "
    said += f"N = 5 of 5 images of 2 of the network's 2 classes in {flags['data_dir']}\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_and_batches_do_not_matter(flags, expected, ranks):
    flags |= {"batch_size": 1, "json": True}
    process = mpiexec(ranks, [SCRIPTS / "image_nll.py", *(f"--{key}={value}" for key, value in flags.items())])
    said, errors = ended(process)
    assert process.returncode == 0, errors
    assert_as_expected(flags["out_dir"], expected)
    assert json.loads(said) == result_in(flags["out_dir"])[0]


def test_a_stopped_run_goes_on(flags):
    run("image_nll", **flags)
    result, terms = result_in(flags["out_dir"])
    [folder] = flags["out_dir"].glob("parts_*")
    parts = sorted(folder.iterdir())
    assert len(parts) == 3
    before = [path.stat().st_mtime_ns for path in parts]
    parts[0].unlink()
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    run("image_nll", **flags)
    again, terms_again = result_in(flags["out_dir"])
    assert again["total_bpd"] == result["total_bpd"]
    assert all(np.array_equal(terms[name], terms_again[name]) for name in BY_STEP)
    assert [path.stat().st_mtime_ns == time for path, time in zip(parts, before, strict=True)] == [False, False, True]
    run("image_nll", **flags | {"seed": 1})
    assert len(list(flags["out_dir"].glob("parts_*"))) == 2
    assert result_in(flags["out_dir"])[0]["total_bpd"] != result["total_bpd"]


def times(folder):
    """When each part of a folder was written, by its name."""
    [parts] = folder.glob("parts_*")
    return {path.name: path.stat().st_mtime_ns for path in sorted(parts.iterdir())}


def test_more_images_in_the_same_folder(flags, expected):
    run("image_nll", **flags | {"num_samples": 4})
    before = times(flags["out_dir"])
    run("image_nll", **flags)
    assert_as_expected(flags["out_dir"], expected)
    now = times(flags["out_dir"])
    assert len(now) == len(before) + 1
    assert {name: now[name] for name in before} == before


def test_images_are_known_by_their_contents(flags, tmp_path):
    """A picture becomes another one of the same name and size: its part alone is measured again."""
    flags["draw"] = False
    run("image_nll", **flags)
    before, was = times(flags["out_dir"]), result_in(flags["out_dir"])[0]["total_bpd"]
    third = sorted(flags["data_dir"].iterdir())[2]
    size = third.stat().st_size
    Image.new("RGB", (16, 16)).save(third)
    third.write_bytes(third.read_bytes().ljust(size, b"\0"))
    assert third.stat().st_size == size
    run("image_nll", **flags)
    now = times(flags["out_dir"])
    assert [name for name in now if now[name] != before[name]] == ["part_000001.npz"]
    run("image_nll", **flags | {"out_dir": tmp_path / "fresh"})
    found, fresh = result_in(flags["out_dir"])[0], result_in(tmp_path / "fresh")[0]
    assert found["total_bpd"] == fresh["total_bpd"]
    assert found["total_bpd"]["value"] != was["value"]


def test_an_image_of_another_class_is_another_image(flags):
    """The fourth picture of five goes from the second class to the first, and stays the fourth."""
    flags["draw"] = False
    run("image_nll", **flags)
    before = times(flags["out_dir"])
    (flags["data_dir"] / "b_1.png").rename(flags["data_dir"] / "a_9.png")
    run("image_nll", **flags)
    now = times(flags["out_dir"])
    assert [name for name in now if now[name] != before[name]] == ["part_000001.npz"]


def test_a_part_with_other_numbers_than_were_written_is_measured_again(flags):
    run("image_nll", **flags)
    was = result_in(flags["out_dir"])[0]["total_bpd"]
    [path] = flags["out_dir"].glob("parts_*/part_000001.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"vb": arrays["vb"] + 1})
    run("image_nll", **flags)
    assert result_in(flags["out_dir"])[0]["total_bpd"] == was


def test_a_second_run_in_the_same_folder_is_refused(flags, capsys):
    flags["out_dir"].mkdir()
    with FileLock(flags["out_dir"] / ".lock"):
        assert "another run is writing here" in refused(capsys, "image_nll", **flags)
    run("image_nll", **flags)


def test_one_job_measures_several_times(model, flags, expected):
    """The second one neither waits for the first one's counters nor reads its files."""
    network, diffusion, _ = model
    network.eval()
    images, job = ImageFolder(str(flags["data_dir"]), 16, class_cond=True), Job()
    found = []
    for seed in (0, 1, 0):
        out_dir = str(flags["out_dir"] / str(len(found)))
        config = LikelihoodConfig(data_dir="there", model_path="here", out_dir=out_dir, seed=seed, batch_size=2)
        found.append(measure(images, network, diffusion, config, {"seed": seed}, job)["total_bpd"])
    assert found[0]["value"] == pytest.approx(expected["total_bpd"].mean().item(), rel=1e-5)
    assert found[2] == found[0] != found[1]


def test_images_are_drawn_by_the_seed(model, flags, capsys):
    """Two of the five, not the first two; which they were is known by their contents, the noise by their names."""
    network, diffusion, _ = model
    run("image_nll", **flags | {"num_samples": 2})
    result, terms = result_in(flags["out_dir"])
    files = sorted(flags["data_dir"].iterdir())
    order = choice(0, COUNT)[:2]
    assert order != [0, 1]
    contents = b"".join(hashlib.sha256(files[i].read_bytes()).digest() for i in order)
    assert result["images"] == {"of": 5, "classes": 2, "drawn": True, "sha256": hashlib.sha256(contents).hexdigest()}
    x0 = torch.stack([torch.from_numpy(np.array(Image.open(files[i]))).permute(2, 0, 1) for i in order]) / 127.5 - 1
    labels = torch.tensor(["ab".index(files[i].name[0]) for i in order])
    noise = SampleNoise(0, order, (3, 16, 16))
    expected = diffusion.calc_bpd_loop(network, x0, model_kwargs={"y": labels}, step_noise=noise)
    np.testing.assert_allclose(terms["vb"], expected["vb"].mean(dim=0), rtol=2e-4)
    assert capsys.readouterr().out.endswith(
        f"; N = 2 of 5 images of 2 of the network's 2 classes in {flags['data_dir']}, drawn by seed 0\n"
    )
    run("image_nll", **flags | {"num_samples": 2, "draw": False})
    assert capsys.readouterr().out.endswith(
        f"; N = 2 of 5 images of 2 of the network's 2 classes in {flags['data_dir']}, the first by name\n"
    )
    assert result_in(flags["out_dir"])[0]["images"]["sha256"] != result["images"]["sha256"]


def test_the_prior_is_part_of_the_bound(model, flags):
    """Three small steps leave much of the image in x_T."""
    diffusion = GaussianDiffusion(
        betas=np.full(3, 0.1), model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )  # fmt: skip
    images = ImageFolder(str(flags["data_dir"]), 16, class_cond=True)
    config = LikelihoodConfig(data_dir="there", model_path="here", out_dir=str(flags["out_dir"]))
    found = measure(images, model[0], diffusion, config, {}, Job())
    terms = result_in(flags["out_dir"])[1]
    assert found["prior_bpd"]["value"] > 0.1
    assert found["total_bpd"]["value"] == pytest.approx(terms["vb"].sum() + found["prior_bpd"]["value"], rel=1e-5)


def test_one_image_has_no_standard_error(flags, expected, capsys):
    run("image_nll", **flags | {"num_samples": 1, "draw": False})
    result, _ = result_in(flags["out_dir"])
    assert result["n"] == 1
    assert result["total_bpd"]["error"] is None
    assert result["total_bpd"]["value"] == pytest.approx(expected["total_bpd"][0].item(), rel=1e-5)
    assert "±" not in capsys.readouterr().out


def test_a_configuration_for_sampling_will_do(flags, expected, tmp_path):
    config = tmp_path / "config.yaml"
    lines = {**{key: flags.pop(key) for key in NETWORK}, "sag_scale": 1.0, "labels": "none", "cfg_scale": 1}
    config.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    run("image_nll", config=config, **flags)
    assert_as_expected(flags["out_dir"], expected)


def test_the_bound_of_a_network_that_knows_the_image():
    """Where the network says x_0 itself, every term but the last is 0: the posterior is met exactly."""
    diffusion = create_gaussian_diffusion(steps=50, predict_xstart=True, sigma_small=True)
    x0 = torch.randint(0, 256, (2, 3, 8, 8)) / 127.5 - 1
    bound = diffusion.calc_bpd_loop(lambda x, t: x0, x0)
    assert bound["vb"][:, :-1].abs().max() < 1e-5
    assert bound["xstart_mse"].max() == 0
    assert bound["mse"].max() < 1e-6


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"data_dir": ""}, "data_dir: give a folder of images"),
        ({"model_path": ""}, "model_path: give the weights"),
        ({"num_samples": 0}, "num_samples: wanted 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size: wanted 1 or more, got 0"),
        ({"seed": -1}, "seed: wanted a number"),
        ({"num_classes": 1}, "num_classes: 1, but data_dir has 2 classes"),
        ({"num_channels": 64}, "num_channels is 64, should be 32"),
        ({"sag_scale": 1}, "unknown flag --sag_scale"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, capsys, wrong, said):
    assert said in refused(capsys, "image_nll", **flags | wrong)
    assert not flags["out_dir"].exists()


def test_a_broken_image_is_named(flags, capsys):
    (flags["data_dir"] / "a_0.png").write_bytes((flags["data_dir"] / "a_0.png").read_bytes()[:200])
    assert "a_0.png: not an image that can be read" in refused(capsys, "image_nll", **flags)
