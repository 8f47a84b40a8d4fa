"""Rows of a plan run one after the other: sampled, measured, and drawn."""

import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from evaluations.ranks import BadInputError, Ranks

from ..guidance.methods.autoguidance import Autoguidance
from ..runs.pipeline import ImagePipeline
from ..runs.prepare import CLASSIFIER_GROUPS, IMAGE_GROUPS, Configs, Prepared, image_run
from ..runs.ranks import Job, Lost
from ..runs.run import run
from ..settings.options import BadInput, parse_args
from ..storage.fetch import local_path
from . import comparison, results
from .judging import Judge
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

    Returns how many were measured, on rank 0. A row that shows another's run asks for that one.

    changes: settings of every row, instead of the plan's. inception: weights of the evaluator's network.
    """
    judge = Judge(plan, folder, inception, ranks)
    runs = {row.run for row in rows}
    own = [row for row in plan.rows if row.name in runs and not row.missing]
    count = 0
    for number, row in enumerate(own, 1):
        if ranks.rank == 0:
            sys.stderr.write(f"\n{row.name}: {row.label}\n")
        asked = row.with_settings({**changes, "out_dir": folder / row.name})
        before = results.known(folder, plan).get(row.name, {})
        try:
            prepared = ranks.agree(partial(prepare, asked, job.device))
            found = measure(row, prepared, judge, job, before)
        except BadInputError as refusal:
            found = {"reason": str(refusal)}
            if ranks.rank == 0:
                sys.stderr.write(f"{row.name}: not run: {refusal}\n")
        if ranks.rank == 0:
            found = results.unmeasured(row, "") | found
            for name, value in found["metrics"].items():
                sys.stderr.write(f"{row.name}: {name} {measured(value)}\n")
            results.write(folder, plan, {row.name: found}, job.device)
            count += bool(found["metrics"])
        compare(row, {other.name for other in own[number:]}, judge, job)
    if ranks.rank == 0 and not own:
        results.write(folder, plan, {}, job.device)
    return count


def compare(row: Row, later: Set[str], judge: Judge, job: Job) -> None:
    """Write the differences between a row that was just measured and those that are there.

    later: rows whose turn comes. What another command writes meanwhile is found by that command: each writes first.
    """
    known = judge.ranks.first(lambda: results.known(judge.folder, judge.plan))
    there = {name for name, found in known.items() if results.compares(found)}
    pairs = [pair for pair in judge.plan.compared(row.name, later) if {each.run for each in pair} <= there]
    differences = judge.differences(pairs, known)
    if differences and judge.ranks.rank == 0:
        results.write(judge.folder, judge.plan, {}, job.device, differences)


def measure(row: Row, prepared: Prepared, judge: Judge, job: Job, before: dict[str, Any]) -> dict[str, Any]:
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
        found = judge.metrics(row, n)
    if judge.ranks.rank:
        return {}
    comparison.draw(pipeline, folder)
    made = about["samples_made_now"]
    return found | {
        "n": n,
        "network_evaluations_per_sample": about["network_evaluations_per_sample"],
        "weak_network_evaluations_per_sample": about.get("weak_network_evaluations_per_sample", 0),
        "weak_network_pass": weak_network_pass(pipeline),
        "classifier_gradients_per_sample": pipeline.num_steps if pipeline.cond_fn else 0,
        "images_per_s": round(made / about["seconds"], 3) if made else before.get("images_per_s"),
        "guidance": prepared.guidance_line,
        "fidelity": prepared.settings["fidelity"],
        "hash": store.hash,
        "made_by": about["made_by"],
    }


@torch.no_grad()
def weak_network_pass(pipeline: ImagePipeline) -> float | None:
    """Multiply-adds of a pass of autoguidance's weak network over those of the network's; None where there is none."""
    weak = [each.weak for each in pipeline.guidances if isinstance(each, Autoguidance) and each.scale]
    if not weak:
        return None
    x, t = torch.zeros(1, *pipeline.x_shape, device=pipeline.device), torch.zeros(1, dtype=torch.int64)
    counts = []
    for denoise in (*weak, pipeline.denoiser):
        with FlopCounterMode(display=False) as counter:
            denoise(x, t.to(x.device), pipeline.condition([0]))
        counts.append(counter.get_total_flops())
    return round(sum(counts[:-1]) / counts[-1], 3)


def cost(about: Mapping[str, Any], n: int, before: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Time of a run that made all its samples at once, and on a GPU its peak memory; else what is known from before."""
    if about.get("samples_made_now") != n:
        return before.get("metrics", {})
    found = {"seconds": {"value": about["seconds"], "error": None}}
    if torch.cuda.is_available():
        found["memory_mb"] = {"value": torch.cuda.max_memory_allocated() / 2**20, "error": None}
    return found
