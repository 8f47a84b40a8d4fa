"""Running a script in this process as if from the command line."""

import runpy
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
