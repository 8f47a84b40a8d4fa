"""Metrics of samples: features, moments, neighbours, scores, and the evaluator. Knows nothing of guided_diffusion."""

import os
from os import PathLike
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; waiting threads sleep


def evaluate(
    reference: str | PathLike,
    samples: str | PathLike,
    against: str | PathLike | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """What `evaluator.py --json` writes: `["metrics"]["fid"]["value"]`, `["error"]`, and where the numbers come from.

    reference, samples: npz files, folders of a run or of pictures. against: other samples of the same seed; then
    `["difference"]["metrics"]` has the metrics of `samples` minus theirs, with paired errors. settings: the evaluator's
    flags, by name (`evaluations.judge.Settings`): features="emoji", extended=True, num_samples=1000, … Bad input raises
    `evaluations.ranks.BadInputError`.
    """
    from evaluations.judge import Settings, judge

    return judge(Settings(str(reference), str(samples), None if against is None else str(against), **settings))
