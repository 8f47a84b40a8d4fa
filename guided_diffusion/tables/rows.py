"""Rows of a plan run one after the other: sampled, measured, and drawn."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evaluations.ranks import BadInputError, Ranks

from ..runs.prepare import CLASSIFIER_GROUPS, IMAGE_GROUPS, Configs, Prepared, image_run
from ..runs.ranks import Job, Lost
from ..runs.run import run
from ..settings.options import BadInput, parse_args
from ..storage.fetch import local_path
from . import comparison, results
from .page import measured
from .plans import Plan, Row


def prepare(row: Row, device: torch.device, weights: bool = True) -> Prepared:
    """What the row's sampling script would run; a ValueError says why it cannot. weights: as in `image_run`."""
    groups = CLASSIFIER_GROUPS if row.script == "classifier_sample" else IMAGE_GROUPS
    try:
        return image_run(Configs.of(parse_args("", groups, row.arguments())), device, weights)
    except BadInput as refusal:
        raise ValueError(refusal.message) from None


def fetch(rows: Sequence[Row]) -> Iterator[str]:
    """Bring checkpoints and reference batches to the cache: lines of where they are. A ValueError says what fails."""
    for address in dict.fromkeys(address for row in rows if not row.missing for address in row.addresses):
        yield f"{address}: {local_path(address)}"


def run_rows(
    plan: Plan,
    rows: Sequence[Row],
    changes: Mapping[str, Any],
    folder: Path,
    inception: Path | None,
    job: Job,
    ranks: Ranks,
) -> int:
    """Run and measure rows of a plan that can be run, by all ranks together, and write the results after each.

    Returns how many were measured, on rank 0.

    changes: settings of every row, instead of the plan's. inception: weights of the evaluator's network.
    """
    done: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.missing or row.same_as:
            continue
        if ranks.rank == 0:
            sys.stderr.write(f"\n{row.name}: {row.label}\n")
        asked = row.with_settings({**changes, "out_dir": folder / row.name})
        before = results.known(folder, plan).get(row.name, {})
        try:
            prepared = ranks.agree(partial(prepare, asked, job.device))
            found = measure(row, plan, prepared, inception, job, ranks, before)
        except BadInputError as refusal:
            found = {"reason": str(refusal)}
            if ranks.rank == 0:
                sys.stderr.write(f"{row.name}: not run: {refusal}\n")
        if ranks.rank == 0:
            done[row.name] = results.unmeasured(row, "") | found
            for name, number in done[row.name]["metrics"].items():
                sys.stderr.write(f"{row.name}: {name} {measured(number)}\n")
            results.write(folder, plan, done, job.device)
    if ranks.rank == 0 and not done:
        results.write(folder, plan, done, job.device)
    return sum(bool(found["metrics"]) for found in done.values())


def measure(
    row: Row, plan: Plan, prepared: Prepared, inception: Path | None, job: Job, ranks: Ranks, before: dict[str, Any]
) -> dict[str, Any]:
    """Sample and evaluate one row; what was found, on rank 0. before: what is known of it from an earlier run.

    A row without a reference is measured by its cost alone.
    """
    folder, pipeline = Path(prepared.pipeline.config.out_dir), prepared.pipeline
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    store, about = run(pipeline, prepared.settings, prepared.guidance_line, job)
    if job.lost and row.reference:
        raise Lost("the row's samples are there, but all ranks together must measure them")
    n = pipeline.num_samples
    found = {"metrics": cost(about, n, before)}
    if row.reference:
        found = judged(row.reference, folder, n, plan, inception, ranks)
    if ranks.rank:
        return {}
    comparison.draw(pipeline, folder)
    made = about["samples_made_now"]
    return found | {
        "n": n,
        "network_evaluations_per_sample": about["network_evaluations_per_sample"],
        "classifier_gradients_per_sample": pipeline.num_steps if pipeline.cond_fn else 0,
        "images_per_s": round(made / about["seconds"], 3) if made else before.get("images_per_s"),
        "guidance": prepared.guidance_line,
        "fidelity": prepared.settings["fidelity"],
        "hash": store.hash,
        "made_by": about["made_by"],
    }


def judged(reference: str, folder: Path, n: int, plan: Plan, inception: Path | None, ranks: Ranks) -> dict[str, Any]:
    """The metrics of a folder's n samples against a reference, on rank 0: of all, and of the first `common_n`."""
    from evaluations.judge import Settings, judge

    settings = Settings(
        ranks.first(lambda: str(local_path(reference))),
        str(folder),
        features=plan.features,
        inception=inception,
        pr_dtype=plan.pr_dtype,
        cache=folder.parent / "features",
    )
    result = judge(settings, ranks)
    of_common_n = result
    if 0 < plan.common_n < n:
        of_common_n = judge(replace(settings, num_samples=plan.common_n), ranks)
    if ranks.rank:
        return {}
    return {
        "metrics": result["metrics"],
        "common": of_common_n["metrics"] if 0 < plan.common_n <= n else {},
        "not_comparable": result["comparable"]["because"],
        "weights_sha256": result["provenance"]["weights_sha256"],
    }


def cost(about: Mapping[str, Any], n: int, before: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Time of a run that made all its samples at once, and on a GPU its peak memory; else what is known from before."""
    if about.get("samples_made_now") != n:
        return before.get("metrics", {})
    found = {"seconds": {"value": about["seconds"], "error": None}}
    if torch.cuda.is_available():
        found["memory_mb"] = {"value": torch.cuda.max_memory_allocated() / 2**20, "error": None}
    return found
