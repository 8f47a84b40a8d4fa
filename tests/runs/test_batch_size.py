"""--batch_size auto, and what is said where memory does not suffice."""

import json

import numpy as np
import pytest
import torch

from guided_diffusion.runs import batch_size as batching
from guided_diffusion.runs.pipeline import ImagePipeline
from guided_diffusion.script_util import create_model_and_diffusion
from running import refused, run
from small import SMALL, randomised

FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def flags(tmp_path):
    torch.manual_seed(0)
    network, _ = create_model_and_diffusion(**SMALL)
    torch.save(randomised(network).state_dict(), tmp_path / "network.pt")
    given = {"model_path": tmp_path / "network.pt", "out_dir": tmp_path / "out", "timestep_respacing": 2}
    return SMALL | given | {"num_samples": 10, "batch_size": "auto", "sag_scale": 0.5, "sag_block": "middle_block.1"}


def most(sizes, fits):
    """A trajectory that takes the time that `sizes` gives a batch, if it fits."""

    def trajectory(_self, indices):
        if len(indices) > fits:
            raise FULL
        # The second step is the one that needs the memory.
        yield 0, None
        yield sizes(len(indices)), None
        raise AssertionError("two steps are enough")

    return trajectory


@pytest.mark.parametrize(
    ("sizes", "fits", "limit", "expected"),
    [
        (lambda _: 3, 1000, 64, 64),
        (lambda _: 3, 20, 64, 16),
        (lambda _: 3, 1000, 10, 8),
        (lambda size: 3 * max(4, size), 1000, 64, 4),
        (lambda _: 3, 0, 64, 1),
    ],
    ids=["limit", "memory", "no power of two", "no gain", "nothing fits"],
)
def test_the_best_batch_is_doubled_while_it_fits_and_gains(monkeypatch, sizes, fits, limit, expected):
    monkeypatch.setattr(ImagePipeline, "trajectory", most(sizes, fits))
    monkeypatch.setattr(batching, "seconds", lambda work: work())
    sampler = ImagePipeline(None, 16, None, None, torch.device("cpu"))
    assert batching.best_batch_size(sampler, limit) == expected


def test_memory_that_only_the_second_step_lacks_is_noticed(monkeypatch):
    def trajectory(_self, indices):
        yield 3, None
        if len(indices) > 4:
            raise FULL
        yield 3, None

    monkeypatch.setattr(ImagePipeline, "trajectory", trajectory)
    monkeypatch.setattr(batching, "seconds", lambda work: work())
    assert batching.best_batch_size(ImagePipeline(None, 16, None, None, torch.device("cpu")), 64) == 4


def test_another_error_is_no_lack_of_memory(monkeypatch):
    def broken(_self, _indices):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(ImagePipeline, "trajectory", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        batching.best_batch_size(ImagePipeline(None, 16, None, None, torch.device("cpu")), 4)


def test_auto_is_measured_with_guidance_written_down_and_kept(flags, capsys, monkeypatch):
    monkeypatch.setattr(batching, "GAIN", 0.0)  # every doubling is worth it
    run("image_sample", **flags, guide_start=0)
    assert "batch size: 8" in capsys.readouterr().err
    folder = flags["out_dir"]
    assert json.loads((folder / "manifest.json").read_text())["batch_size"] == 8
    [path] = folder.glob("samples_*.npz")
    first = path.read_bytes()
    (folder / "shards" / "shard_000001.npz").unlink()
    monkeypatch.setattr(batching, "best_batch_size", lambda *_: 1)
    run("image_sample", **flags, guide_start=0)
    assert "2 samples" in capsys.readouterr().out
    assert path.read_bytes() == first
    run("image_sample", **flags, guide_start=0, overwrite=True)
    assert "batch size: 1" in capsys.readouterr().err


def test_out_of_memory_says_which_size_to_take_which_the_same_folder_then_does(flags, capsys, monkeypatch):
    flags = flags | {"batch_size": 4}
    trajectory = ImagePipeline.trajectory

    def tight(self, indices):
        if len(indices) > 2:
            raise FULL
        return trajectory(self, indices)

    monkeypatch.setattr(ImagePipeline, "trajectory", tight)
    with pytest.raises(SystemExit) as stop:
        run("image_sample", **flags)
    assert stop.value.code == 2
    assert "batch_size: 4 images at a time do not fit the memory; try --batch_size 2, or auto" in stop.value.message
    run("image_sample", **flags | {"batch_size": 2})
    with np.load(flags["out_dir"] / "samples_10x16x16x3.npz") as file:
        assert len(file["arr_0"]) == 10
    monkeypatch.setattr(ImagePipeline, "trajectory", trajectory)
    capsys.readouterr()
    assert "holds samples made otherwise" in refused(capsys, "image_sample", **flags)


def test_a_cpu_that_is_full_says_so_too():
    assert batching.ran_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not batching.ran_out_of_memory(RuntimeError("expected a float"))


def test_only_auto_is_a_word(flags, capsys):
    assert "batch_size: wanted int, got 'most'" in refused(capsys, "image_sample", **flags | {"batch_size": "most"})
