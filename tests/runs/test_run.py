"""Runs that are stopped, damaged, repeated and spread over ranks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion.runs.prepare import IMAGE_GROUPS, Configs, image_run
from guided_diffusion.runs.progress import Signals
from guided_diffusion.runs.ranks import Job
from guided_diffusion.runs.run import run as run_pipeline
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.options import parse_args
from running import LIMIT_S, SCRIPTS, ended, environment, free_port, mpiexec, refused, run, torchrun
from small import SMALL, randomised

FLAGS = SMALL | {"class_cond": True, "num_classes": 4, "timestep_respacing": 3, "num_samples": 10, "batch_size": 2}
FLAGS |= {"shard_size": 4, "sag_scale": 0.5, "sag_block": "middle_block.1"}
MANY = 4000
"""Samples of a run that is stopped, so many that it is not at its end before."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network, _ = create_model_and_diffusion(**SMALL, class_cond=True, num_classes=4)
    path = tmp_path_factory.mktemp("weights") / "network.pt"
    torch.save(randomised(network).state_dict(), path)
    return path


@pytest.fixture
def flags(weights, tmp_path):
    return FLAGS | {"model_path": weights, "out_dir": tmp_path / "out"}


def result(folder, count=10):
    return (Path(folder) / f"samples_{count}x16x16x3.npz").read_bytes()


def command(flags):
    return [str(SCRIPTS / "image_sample.py"), *(str(part) for key in flags for part in (f"--{key}", flags[key]))]


def test_a_finished_run_makes_nothing_again(flags, capsys):
    run("image_sample", **flags)
    first = result(flags["out_dir"])
    capsys.readouterr()
    run("image_sample", **flags)
    said = capsys.readouterr()
    assert "0 samples" in said.out
    assert "(10 were there)" in said.out
    assert "3 of 3 shards are there already" in said.err
    assert result(flags["out_dir"]) == first


def test_missing_and_damaged_shards_are_made_again(flags):
    run("image_sample", **flags)
    first, shards = result(flags["out_dir"]), flags["out_dir"] / "shards"
    (shards / "shard_000000.npz").unlink()
    (shards / "shard_000001.npz").write_bytes((shards / "shard_000001.npz").read_bytes()[:-9])
    (flags["out_dir"] / "manifest.json").write_text("{")
    run("image_sample", **flags)
    assert result(flags["out_dir"]) == first


def test_more_samples_go_into_the_same_folder(flags):
    run("image_sample", **flags | {"num_samples": 4})
    four = (flags["out_dir"] / "shards" / "shard_000000.npz").read_bytes()
    run("image_sample", **flags)
    assert (flags["out_dir"] / "shards" / "shard_000000.npz").read_bytes() == four
    shutil.rmtree(flags["out_dir"])
    grown = flags["out_dir"]
    run("image_sample", **flags)
    assert (grown / "shards" / "shard_000000.npz").read_bytes() == four


def test_other_settings_in_the_same_folder_are_refused(flags, capsys, weights, tmp_path):
    run("image_sample", **flags)
    first = result(flags["out_dir"])
    capsys.readouterr()
    assert "sag_scale was 0.5, is 0.7" in refused(capsys, "image_sample", **flags | {"sag_scale": 0.7})
    assert "batch_size was 2, is 4" in refused(capsys, "image_sample", **flags | {"batch_size": 4})
    assert result(flags["out_dir"]) == first
    copy = tmp_path / "renamed.pt"
    shutil.copy(weights, copy)
    run("image_sample", **flags | {"model_path": copy})  # the same weights by another name are the same run
    run("image_sample", **flags | {"sag_scale": 0.7, "overwrite": True})
    assert result(flags["out_dir"]) != first


def test_a_start_that_makes_nothing_leaves_what_is_known_of_the_making(flags):
    run("image_sample", **flags)
    path = flags["out_dir"] / "manifest.json"
    first = json.loads(path.read_text())
    assert first["uint8"] == "trunc(127.5x + 127.5)"
    assert "uint8" not in first["identity"]
    assert first["made_by"][0]["device"] == "cpu"
    assert first["made_by"][0]["samples"] == first["samples_made_now"] == 10
    path.write_text(json.dumps(first | {"seconds": 1234.5, "ranks": 8}))
    run("image_sample", **flags)
    again = json.loads(path.read_text())
    assert again == first | {"seconds": 1234.5, "ranks": 8}


def test_shards_of_two_devices_are_said_to_be(flags, monkeypatch, capsys):
    run("image_sample", **flags)
    assert "made alike" not in capsys.readouterr().err
    (flags["out_dir"] / "shards" / "shard_000001.npz").unlink()
    monkeypatch.setattr("guided_diffusion.runs.identity.device_name", lambda _: "A GPU")
    run("image_sample", **flags)
    assert "up to rounding only: device cpu (6), A GPU (4).\n" in capsys.readouterr().err
    makers = json.loads((flags["out_dir"] / "manifest.json").read_text())["made_by"]
    assert [(maker["device"], maker["dtype"], maker["samples"]) for maker in makers] == [
        ("cpu", "float32", 6), ("A GPU", "float32", 4)
    ]  # fmt: skip


def test_overwriting_clears_once_in_a_job_that_is_started_again(flags, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run("image_sample", **flags, overwrite=True)
    first = json.loads((flags["out_dir"] / "manifest.json").read_text())
    shard = flags["out_dir"] / "shards" / "shard_000001.npz"
    shard.unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    run("image_sample", **flags, overwrite=True)
    assert "4 samples in" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    run("image_sample", **flags, overwrite=True)
    assert "0 samples in" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    run("image_sample", **flags, overwrite=True)
    assert "10 samples in" in capsys.readouterr().out
    assert json.loads((flags["out_dir"] / "manifest.json").read_text())["hash"] == first["hash"]
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    run("image_sample", **flags, overwrite=True)
    assert "10 samples in" in capsys.readouterr().out


def run_watched(flags, watch):
    """image_sample in this process, with somebody who watches: watch(indices, state, guided)."""
    argv = command(flags)[1:]
    prepared = image_run(Configs.of(parse_args("", IMAGE_GROUPS, argv)), Job().device)
    run_pipeline(prepared.pipeline, prepared.settings, prepared.guidance_line, Job(), watch)


def test_a_watched_run_is_made_anew_also_in_a_job_that_is_started_again(flags, monkeypatch):
    """Of samples that are there, the demo could not count where their masks were."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    seen = []
    for restarts in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        seen.append(0)

        def watch(indices, *_):
            seen[-1] += len(indices)

        run_watched(flags | {"overwrite": True}, watch)
    assert seen == [30, 30]


def test_an_unwritable_folder_is_refused(flags, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(capsys, "image_sample", **flags | {"out_dir": tmp_path / "file" / "below"})


def test_a_full_disk_is_one_sentence_and_loses_nothing(flags, capsys, monkeypatch):
    from guided_diffusion.runs import shards

    write, calls = shards.write_atomically, []

    def full(path, write_to):
        calls.append(path)
        if "shard_000001" in path:
            raise OSError(28, "No space left on device")
        return write(path, write_to)

    monkeypatch.setattr(shards, "write_atomically", full)
    with pytest.raises(SystemExit) as stop:
        run("image_sample", **flags)
    assert stop.value.code == 2
    assert "error: out_dir: [Errno 28] No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    run("image_sample", **flags)
    assert "1 of 3 shards are there" in capsys.readouterr().err


def test_labels_in_equal_numbers(flags):
    run("image_sample", **flags | {"num_samples": 8}, balanced_labels=True)
    with np.load(flags["out_dir"] / "samples_8x16x16x3.npz") as file:
        assert np.bincount(file["arr_1"]).tolist() == [2, 2, 2, 2]


def test_progress_as_json_lines(flags, capsys):
    run("image_sample", **flags, log_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert lines[-1]["samples"] == lines[-1]["of"] == 10
    assert lines[-1]["images_per_s"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on(flags, tmp_path, number):
    slow = flags | {"num_samples": MANY, "out_dir": tmp_path / "slow"}
    process = subprocess.Popen(
        [sys.executable, *command(slow)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    shards = tmp_path / "slow" / "shards"
    while not (shards / "shard_000001.npz").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(number)
    _, said = ended(process)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; the same command goes on" in said
    assert "Traceback" not in said
    run("image_sample", **slow | {"num_samples": 10})
    run("image_sample", **flags)
    assert result(tmp_path / "slow") == result(flags["out_dir"])


def test_a_second_ctrl_c_ends_at_once_also_during_grace(monkeypatch):
    """One that a launcher passes on right after the first is no second one; SIGTERM comes as often as it likes."""
    now = 100.0
    monkeypatch.setattr("guided_diffusion.runs.progress.time.monotonic", lambda: now)
    signals = Signals(60, Job(), "stopped")
    with signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.1
        os.kill(os.getpid(), signal.SIGINT)
        now += 10
        os.kill(os.getpid(), signal.SIGTERM)
        signals.stop_if_asked(shard_is_done=False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            signals.stop_if_asked(shard_is_done=True)
    assert stop.value.code == 130


@pytest.mark.parametrize(("grace", "whole"), [(0, 1), (60, 2)])
def test_grace_lets_the_shard_in_hand_be_finished(flags, grace, whole):
    def watch(indices, *_):
        if indices[0] == 4:  # in the second shard
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        run_watched(flags | {"grace": grace}, watch)
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(list((flags["out_dir"] / "shards").glob("shard_*.npz"))) == whole


def test_ranks_of_mpi_make_the_same_file(flags, tmp_path):
    run("image_sample", **flags)
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        process = mpiexec(ranks, command(flags | {"out_dir": folder}))
        said, errors = ended(process)
        assert process.returncode == 0, errors
        assert said.count("network evaluations each") == 1
        assert json.loads((folder / "manifest.json").read_text())["ranks"] == ranks
        assert result(folder) == result(flags["out_dir"])


def test_a_refusal_under_mpi_is_said_once_and_ends_all(flags):
    process = mpiexec(2, command(flags | {"sag_block": "nowhere"}))
    _, errors = ended(process)
    assert process.returncode == 2
    assert errors.count("error: ") == 1


def shared_memory(pid):
    """The files of mpich's that a process has in its memory."""
    return {Path(path) for path in re.findall(r"/dev/shm/mpich\S+", Path(f"/proc/{pid}/maps").read_text())}


def test_the_death_of_a_rank_ends_the_job_and_the_next_start_goes_on(flags, tmp_path):
    """At once: not when the patience of the other is at an end."""
    slow = flags | {"num_samples": MANY, "out_dir": tmp_path / "slow"}
    process = mpiexec(2, command(slow | {"patience": 3 * LIMIT_S}))
    while not (tmp_path / "slow" / "shards" / "shard_000002.npz").exists():
        time.sleep(0.05)
        assert process.poll() is None
    children = subprocess.run(["pgrep", "-f", str(tmp_path / "slow")], capture_output=True, text=True, check=True)
    ranks = [int(pid) for pid in children.stdout.split() if int(pid) != process.pid]
    killed = [pid for pid in ranks if "python" in Path(f"/proc/{pid}/exe").resolve().name][-1]
    shared = shared_memory(killed)
    os.kill(killed, signal.SIGKILL)
    ended(process)
    assert process.returncode != 0
    assert shared
    assert not [path for path in shared if path.exists()]
    run("image_sample", **slow | {"num_samples": 10})
    run("image_sample", **flags)
    assert result(tmp_path / "slow") == result(flags["out_dir"])


def test_torchrun(flags, tmp_path):
    process = torchrun(2, command(flags), "--master_port", free_port())
    _, errors = ended(process)
    assert process.returncode == 0, errors
    assert json.loads((flags["out_dir"] / "manifest.json").read_text())["ranks"] == 2
    run("image_sample", **flags | {"out_dir": tmp_path / "alone"})
    assert result(flags["out_dir"]) == result(tmp_path / "alone")


def test_a_launcher_without_its_library_is_named(flags, monkeypatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert "4 ranks, but MPI cannot be loaded" in refused(capsys, "image_sample", **flags)


def test_without_a_launcher_mpi_is_not_loaded(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    run("image_sample", **flags)
