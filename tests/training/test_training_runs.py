"""Training scripts as a user runs them: over ranks, killed, stopped, and with a loss that explodes."""

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.diffusion.noise import SampleNoise
from guided_diffusion.networks.building import build_network
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.settings.model import DiffusionConfig, NetworkConfig
from guided_diffusion.storage.files import alone_in
from guided_diffusion.storage.pictures import to_uint8
from guided_diffusion.training.run import SAMPLES, sample_grid
from running import SCRIPTS, ended, mpiexec, refused, run, started, torchrun
from trainings import log_of

NETWORK = {
    "image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1", "attention_resolutions": "8",
    "learn_sigma": True, "class_cond": True, "num_classes": 2, "null_label": True,
}  # fmt: skip
TRAINING = {"batch_size": 8, "label_dropout": 0.3, "schedule_sampler": "loss-second-moment", "log_interval": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve pictures of noise in two classes."""
    folder, numbers = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(numbers.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{'ab'[i % 2]}_{i}.png")
    return folder


@pytest.fixture
def flags(data):
    return NETWORK | TRAINING | {"data_dir": data, "random_crop": True}


def command(flags):
    return [str(SCRIPTS / "image_train.py"), *(str(part) for key in flags for part in (f"--{key}", flags[key]))]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_two_ranks_train_as_one(flags, tmp_path):
    flags |= {"lr_anneal_steps": 3, "microbatch": 2, "sample_interval": 3}
    flags |= {"diffusion_steps": 20, "noise_schedule": "cosine", "use_checkpoint": True}
    process = mpiexec(2, command(flags | {"out_dir": tmp_path / "two"}))
    run("image_train", **flags, out_dir=tmp_path / "one")
    _, errors = ended(process)
    assert process.returncode == 0, errors
    one, two = (
        [[float(value or "nan") for value in row.values()] for row in log_of(tmp_path / name)]
        for name in ("one", "two")
    )
    assert len(one) == 3
    np.testing.assert_allclose(two, one, rtol=1e-4)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert int(one["schedule_sampler"]["counts"].sum()) == 24
    torch.testing.assert_close(two["schedule_sampler"], one["schedule_sampler"], rtol=1e-4, atol=1e-6)
    gradients = [[moments["exp_avg"] for moments in state["optimizer"]["state"].values()] for state in (one, two)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients[0]) > 0.01
    assert Image.open(tmp_path / "two" / "samples_000003.png").size[0] >= 4 * 16


def test_samples_on_the_way_are_of_the_same_noise(tmp_path):
    """And they are those of DDIM with the given condition."""
    settings = DiffusionConfig(diffusion_steps=20, noise_schedule="cosine", learn_sigma=True)
    torch.manual_seed(0)
    network = build_network(NetworkConfig(**{key: NETWORK[key] for key in NETWORK if key != "learn_sigma"}), True)
    condition = {"y": torch.arange(SAMPLES) % 2}
    for name in ("a.png", "b.png"):
        sample_grid(network, tmp_path / name, diffusion=settings, image_size=16, condition=condition, seed=3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    x_T = SampleNoise(3, range(SAMPLES), (3, 16, 16)).x_T()
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine", learn_sigma=True)
    with torch.no_grad():
        x0 = diffusion.ddim_sample_loop(network, x_T.shape, noise=x_T, model_kwargs=condition)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    times = picture.shape[0] // (4 * 16)
    assert (picture[: 16 * times : times, : 16 * times : times] == to_uint8(x0)[0]).all()
    assert to_uint8(x0).std() > 10


NOT_A_NUMBER = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    from guided_diffusion.settings.options import BadInput
    from guided_diffusion.runs.ranks import command, start
    from guided_diffusion.training import run
    from trainings import IMAGES, loop_of
    def main():
        job = start()
        images = IMAGES.clone()
        images[6] = float("nan")    # row 2 of step 1, on the second rank
        run.run(loop_of({folder!r}, images, job, lr_anneal_steps=4, save_interval=1))
    command(main)()
"""


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_loss_that_is_no_number_on_one_rank_stops_all(tmp_path, launcher):
    script = tmp_path / "script.py"
    text = textwrap.dedent(NOT_A_NUMBER.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "run")))
    script.write_text(text)
    if launcher == "mpiexec":
        process = mpiexec(2, [script])
    else:
        process = torchrun(2, [script])
    _, errors = ended(process)
    assert process.returncode
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert set(said) == {
        f"error: step 1: the loss is nan at rows 2 of the batch; {tmp_path}/run/checkpoint.pt holds the weights of "
        "this loss; begin with older ones (--resume_checkpoint)"
    }
    assert errors.count("Traceback") == (launcher == "torchrun")  # its own, about a rank that failed
    assert checkpoint(tmp_path / "run")["step"] == 1


HELD = """
    import os, runpy, sys, time
    from guided_diffusion.training.trainer import Trainer
    train_step = Trainer.train_step
    def held(self, *batch, **more):
        while self.step == 9 and not os.path.exists({go!r}):
            time.sleep(0.02)
        return train_step(self, *batch, **more)
    Trainer.train_step = held
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def go(tmp_path):
    """The file without which a training that was begun by `begun` makes no tenth step."""
    return tmp_path / "go"


def begun(flags, go):
    """A training of its own process, once it has logged its second step."""
    script = go.with_name("held.py")
    script.write_text(textwrap.dedent(HELD.format(go=str(go))))
    process = started(sys.executable, script, *command(flags))
    for line in process.stdout:
        if line.startswith("step 2 "):
            return process
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """The log of 12 steps in one go, and the weights after them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = NETWORK | TRAINING | {"data_dir": data, "random_crop": True, "lr_anneal_steps": 12, "out_dir": folder}
    run("image_train", **flags)
    return log_of(folder), checkpoint(folder)["network"]


@pytest.mark.parametrize("delay", [0.0, 0.13])
def test_a_killed_run_goes_on_as_if_it_had_not_been(flags, tmp_path, go, undisturbed, delay):
    flags |= {"lr_anneal_steps": 12, "save_interval": 2, "out_dir": tmp_path / "run"}
    process = begun(flags, go)
    time.sleep(delay)
    process.kill()
    process.communicate()
    steps = [int(line["step"]) for line in log_of(flags["out_dir"])]
    assert steps[-1] < 12
    saved = checkpoint(flags["out_dir"])["step"] if (flags["out_dir"] / "checkpoint.pt").exists() else 0
    assert steps[-1] - saved <= 2
    run("image_train", **flags)
    assert log_of(flags["out_dir"]) == undisturbed[0]
    torch.testing.assert_close(checkpoint(flags["out_dir"])["network"], undisturbed[1], rtol=0, atol=0)
    assert [name for name in os.listdir(flags["out_dir"]) if name.startswith(".")] == [".lock"]


def test_sigterm_saves_and_leaves_with_its_status(flags, tmp_path, go, undisturbed):
    flags |= {"lr_anneal_steps": 12, "save_interval": 1000, "out_dir": tmp_path / "run"}
    process = begun(flags, go)
    process.send_signal(signal.SIGTERM)
    go.touch()
    _, errors = ended(process)
    assert process.returncode == 128 + signal.SIGTERM
    step = checkpoint(flags["out_dir"])["step"]
    assert errors == f"stopped at step {step}; the same command goes on from there\n"
    assert 2 <= step < 12
    run("image_train", **flags)
    assert log_of(flags["out_dir"]) == undisturbed[0]


def test_a_folder_in_which_another_training_works_is_refused(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    flags |= {"lr_anneal_steps": 1}
    with alone_in(tmp_path / "logs"):
        said = refused(capsys, "image_train", **flags)
        assert said == f"error: {tmp_path / 'logs'}: another run is writing here; give another --out_dir\n"
        assert [path.name for path in (tmp_path / "logs").iterdir()] == [".lock"]
    run("image_train", **flags)
    assert (tmp_path / "logs" / "checkpoint.pt").is_file()


def test_a_folder_of_its_own_for_other_settings(flags, tmp_path, monkeypatch):
    """Without --out_dir: the same command goes on in its folder, also when made longer; other settings have another."""
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    monkeypatch.chdir(tmp_path)
    flags = {name: value for name, value in flags.items() if name != "out_dir"}
    run("image_train", **flags | {"lr_anneal_steps": 1})
    [first] = (tmp_path / "runs").glob("train-*")
    run("image_train", **flags | {"lr_anneal_steps": 2, "log_interval": 1})
    assert checkpoint(first)["step"] == 2
    run("image_train", **flags | {"lr_anneal_steps": 1, "seed": 7})
    assert len(list((tmp_path / "runs").glob("train-*"))) == 2
