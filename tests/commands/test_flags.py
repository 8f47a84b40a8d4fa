"""A small part of the random flags of tests/flags.py; all of it is for `python tests/flags.py`."""

import shlex

import flags
import pytest

SEED = 7
SCRIPTS = [name for name in flags.BASES if name not in ("benchmark", "stable_diffusion_sample", "make_emoji_data")]
"""Those that are quick and need no extra."""


@pytest.mark.skipif(not hasattr(flags.os, "fork"), reason="this system cannot copy a process")
def test_every_script_ends_well_or_says_one_sentence():
    tried = list(flags.tries(3 * len(SCRIPTS), SCRIPTS, SEED))
    faults = [f"{one.ended}: {one.script} {shlex.join(one.words)}\n{one.said[-500:]}" for one in tried if one.is_fault]
    assert not faults, "\n".join(faults)
    assert {"well", "sentence"} <= {one.ended for one in tried}


def test_a_traceback_and_a_long_sentence_are_faults():
    assert flags._ended(2 << 8, "error: what is wrong") == "sentence"
    assert flags._ended(2 << 8, "warning\nimage.py: error: what is wrong\n") == "sentence"
    assert flags._ended(0, "") == "well"
    for status, said in [
        (1 << 8, "Traceback"), (2 << 8, "error: Traceback"), (2 << 8, "error: " + "x" * 5000),
        (2 << 8, "error: \x1b[31m"), (2 << 8, ""), (1 << 8, "error: x"), (9, ""), (None, ""),
    ]:  # fmt: skip
        assert flags.Tried("x", (), flags._ended(status, said), said, False, 0).is_fault
