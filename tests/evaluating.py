"""Running the evaluator in this process as if from the command line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EVALUATOR = Path(__file__).parents[1] / "evaluations" / "evaluator.py"


def evaluate(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluator.py", *map(str, arguments)])
        runpy.run_path(str(EVALUATOR), run_name="__main__")


def result(tmp_path, *arguments):
    evaluate(*arguments, "--json", tmp_path / "result.json")
    return json.loads((tmp_path / "result.json").read_text())


def refused(capsys, *arguments):
    """The one line that the evaluator says when it refuses its input with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        evaluate(*arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: ")
    return error.splitlines()[-1]
