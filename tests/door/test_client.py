"""A client that does what guided-diffusion's scripts do, alone and on two ranks."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import client
import training_client
from golden import fill
from running import ended, mpiexec, started

SCRIPT = str(Path(client.__file__))


def made(folder):
    """What the client needs."""
    (folder / "pictures").mkdir(parents=True)
    training_client.pictures(folder / "pictures")
    networks = {
        "network": client.model_and_diffusion()[0],
        "classifier": client.classifier(),
        "upsampler": client.upsampler_and_diffusion()[0],
    }
    for name, network in networks.items():
        torch.save(fill(network).state_dict(), folder / f"{name}.pt")
    return folder


def run_of(folder, ranks):
    """The folder after the client ran in it."""
    made(folder)
    process = mpiexec(2, [SCRIPT, folder]) if ranks == 2 else started(sys.executable, SCRIPT, folder)
    _, errors = ended(process)
    assert process.returncode == 0, errors
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("scripts") / "alone", 1)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("scripts") / "together", 2)


@pytest.fixture(params=[1, 2], ids=["alone", "two ranks"])
def ran(request):
    """(ranks, the folder of their run)."""
    return request.param, request.getfixturevalue("alone" if request.param == 1 else "together")


def arrays(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_training_goes_on_where_it_stopped(ran):
    ranks, folder = ran
    names = {path.name for path in (folder / "image_train").glob("*.pt")}
    assert names == {f"{kind}00000{step}.pt" for kind in ("model", "opt", "ema_0.5_") for step in (0, 1)}
    rows = table(folder / "image_train" / "progress.csv") + table(folder / "resumed" / "progress.csv")
    assert [row["step"] for row in rows] == ["0", "1", "1", "2", "3"]
    assert [int(row["samples"]) for row in rows] == [client.BATCH * ranks * n for n in (1, 2, 2, 3, 4)]
    before, after = (
        torch.load(folder / path, weights_only=True) for path in ("image_train/opt000001.pt", "resumed/opt000003.pt")
    )
    assert (before["state"][0]["step"].item(), after["state"][0]["step"].item()) == (2, 5)
    for script in ("image_train", "resumed", "super_res_train"):
        [sums] = arrays(folder / script / "sums.npz")
        assert len(sums) == ranks
        assert (sums == sums[0]).all()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_samples_are_those_of_the_seed(ran, sampler):
    ranks, folder = ran
    images, labels = arrays(folder / "image_sample" / f"{sampler}.npz")
    assert images.shape == (2 * ranks * client.BATCH, client.SIZE, client.SIZE, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (len(images),)
    again, other = (arrays(folder / "image_sample" / f"{sampler}_{run}.npz") for run in ("again", "other"))
    assert (again[0] == images).all()
    assert (again[1] == labels).all()
    assert (other[0] != images).mean() > 0.1
    assert len({image.tobytes() for image in images}) == len(images)


def test_a_rank_samples_as_if_alone(alone, together):
    for of_one, of_two in zip(*(arrays(f / "image_sample" / "ddpm.npz") for f in (alone, together)), strict=True):
        by_rank = of_two.reshape(2, 2, client.BATCH, *of_two.shape[1:])  # batch, rank, row
        assert (by_rank[:, 0].reshape(of_one.shape) == of_one).all()
        assert (by_rank[:, 0] != by_rank[:, 1]).mean() > 0.1


def test_a_classifier_moves_samples(ran):
    ranks, folder = ran
    unmoved, moved = (arrays(folder / "classifier_sample" / f"{name}.npz") for name in ("unmoved", "moved"))
    assert unmoved[0].shape == moved[0].shape == (ranks * client.BATCH, client.SIZE, client.SIZE, 3)
    assert (unmoved[1] == moved[1]).all()
    assert all((one != other).mean() > 0.01 for one, other in zip(unmoved[0], moved[0], strict=True))


def test_a_classifier_is_trained(ran):
    _, folder = ran
    rows = table(folder / "classifier_train" / "progress.csv")
    assert [row["step"] for row in rows] == ["0", "1"]
    assert all(float(row["train_loss"]) > 0 and float(row["grad_norm"]) > 0 for row in rows)
    state = torch.load(folder / "classifier_train" / "model000001.pt", weights_only=True)
    client.classifier().load_state_dict(state)


def test_upsampled_images_have_the_large_size(ran):
    ranks, folder = ran
    [images] = arrays(folder / "super_res_sample" / "samples.npz")
    assert images.shape == (ranks * client.BATCH, client.SIZE, client.SIZE, 3)
    assert images.std() > 1


def test_bits_are_the_mean_of_all_ranks(ran):
    ranks, folder = ran
    *terms, own, mean = arrays(folder / "image_nll" / "terms.npz")
    assert all(term.shape == (ranks * client.BATCH, 4) for term in terms)
    assert len(own) == ranks
    assert mean == pytest.approx(own.mean(), rel=1e-6)
    assert (terms[0] > 0).all()
