"""Running a script in this process as if from the command line, or in processes of its own."""

import itertools
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"

LIMIT_S = 300
"""Seconds after which a process waits for ever: so many that a busy machine does not matter."""

PORTS = itertools.count(20000 + os.getpid() % 100 * 100)


def run(script, *arguments, **flags):
    """Run scripts/SCRIPT.py with arguments and --flags."""
    argv = [f"{script}.py", *map(str, arguments)]
    for key, value in flags.items():
        argv += [f"--{key}", str(value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")


def refused(capsys, script, *arguments, **flags):
    """The one line that a script says when it refuses its input with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run(script, *arguments, **flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def environment(**more):
    """The variables of a process of its own: no launcher's, one thread."""
    kept = {key: value for key, value in os.environ.items() if not re.match("PMI|OMPI|MPI|RANK|WORLD", key)}
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | more


def started(*words, **variables):
    """A process of its own, whose output is read by `ended`."""
    return subprocess.Popen(
        [*map(str, words)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**variables),
    )  # fmt: skip


def ended(process):
    """What a process has written to stdout and stderr when it ends; one that waits for ever is an error."""
    try:
        return process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()


def mpiexec(ranks, arguments):
    """Python with arguments under the `mpiexec` of the extra `mpi`."""
    launcher = Path(sys.executable).parent / "mpiexec"
    if not launcher.exists():
        pytest.skip("mpiexec of the extra `mpi` is not installed")
    return started(launcher, "-n", ranks, sys.executable, *arguments)


def torchrun(ranks, arguments, *flags):
    """Python with arguments under torchrun. flags: torchrun's own, else --standalone."""
    flags = flags or ("--standalone",)
    return started(sys.executable, "-m", "torch.distributed.run", *flags, "--nproc_per_node", ranks, *arguments)


def free_port():
    """A port of this process's own, below those that the system gives out by itself."""

    def is_free(port):
        with socket.socket() as server:
            return server.connect_ex(("127.0.0.1", port)) != 0

    return next(filter(is_free, PORTS))
