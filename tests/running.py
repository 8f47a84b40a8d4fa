"""Running a script in this process as if from the command line."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


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


def mpiexec(ranks, arguments):
    """Python with arguments under the `mpiexec` of the extra `mpi`."""
    launcher = Path(sys.executable).parent / "mpiexec"
    if not launcher.exists():
        pytest.skip("mpiexec of the extra `mpi` is not installed")
    return subprocess.Popen(
        [launcher, "-n", str(ranks), sys.executable, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
