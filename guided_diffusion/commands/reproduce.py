"""Run a plan row by row: sample, evaluate, and report published and measured numbers side by side.

A plan is a file of configs/tables (its name is enough) or of your own: table1 … table11, scales and baselines of the
paper, and demo for the embedded model. Writes results.json, report.md and report.html to --out_dir after every row; the
same command goes on where it stopped. Under mpiexec or torchrun all ranks share the work of each row.

  python scripts/reproduce.py demo --samples 64 --rows unguided,sag
  python scripts/reproduce.py table1 --dry_run
  mpiexec -n 8 python scripts/reproduce.py table1 --rows 'adm256_uncond*'
"""

import argparse
import fnmatch
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from evaluations.judge import Settings, judge
from evaluations.ranks import BadInputError, Ranks
from evaluations.ranks import start as start_ranks

from ..guidance.base import evaluations
from ..runs.identity import versions
from ..runs.prepare import CLASSIFIER_GROUPS, IMAGE_GROUPS, Prepared, classifier_run, image_run
from ..runs.ranks import Job, command, start
from ..runs.run import run
from ..settings.options import BadInput, parse_args, read_yaml
from ..storage import pictures
from ..storage.fetch import local_path
from ..storage.files import is_address, write_atomically
from ..tables import report
from ..tables.comparison import same_noise
from ..tables.plans import Plan, Row, read_plan
from ..tables.timing import seconds_per_step

SHOWN = 8
SHOWN_HEIGHT = 320
PICTURES = ("unguided", "mask", "guided")
FILES = ("model_path", "classifier_path")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="a name in configs/tables, or a YAML file")
    parser.add_argument("--rows", default="*", help="names of rows, comma-separated, with * and ? (default: all)")
    parser.add_argument("--samples", type=int, help="samples of each row, instead of the plan's")
    parser.add_argument("--batch_size", help="images at a time, or auto, instead of the plan's")
    parser.add_argument("--out_dir", type=Path, help="folder of the results (default: runs/tables/PLAN)")
    parser.add_argument("--inception", type=Path, help="weights of the evaluator's Inception (default: fetched)")
    parser.add_argument("--dry_run", action="store_true", help="print the rows, their cost and the expected hours")
    parser.add_argument("--fetch", action="store_true", help="bring the files of the rows to the cache, and stop")
    args = parser.parse_args()
    if args.samples is not None and args.samples < 1:
        parser.error(f"--samples: wanted 1 or more, got {args.samples}")
    return args


def chosen(plan: Plan, patterns: str) -> list[str]:
    """The names of rows that patterns ask for; `BadInput` if one asks for none."""
    names = [row.name for row in plan.rows]
    for pattern in patterns.split(","):
        if not fnmatch.filter(names, pattern):
            raise BadInput(f"--rows: no row is called {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns.split(","))]


def flags(row: Row, args: argparse.Namespace, folder: Path) -> list[str]:
    """The row's flags with what this command changes of them."""
    more = {"num_samples": args.samples, "batch_size": args.batch_size, "out_dir": folder}
    return row.arguments() + [text for key, value in more.items() if value for text in (f"--{key}", str(value))]


def prepare(row: Row, argv: list[str], device: torch.device, weights: bool = True) -> Prepared:
    """What the row's sampling script would run; a ValueError says why it cannot."""
    groups, build = (
        (CLASSIFIER_GROUPS, classifier_run) if row.script == "classifier_sample" else (IMAGE_GROUPS, image_run)
    )
    try:
        return build(parse_args("", groups, argv), device, weights)
    except BadInput as refusal:
        raise ValueError(refusal.message) from None


def fetch(plan: Plan, names: list[str]) -> None:
    """Bring checkpoints and reference batches to the cache."""
    wanted: dict[str, None] = {}
    for row in plan.rows:
        if row.name in names and not row.missing:
            settings: dict[str, Any] = {}
            for path in row.config:
                settings |= read_yaml(path)
            settings |= row.settings
            wanted |= dict.fromkeys(str(settings[key]) for key in FILES if settings.get(key))
            wanted |= {row.reference: None} if row.reference else {}
    for address in [address for address in wanted if is_address(address)]:
        try:
            print(f"{address}: {local_path(address)}")
        except ValueError as error:
            raise BadInput(str(error)) from None


def dry_run(plan: Plan, names: list[str], args: argparse.Namespace, job: Job) -> None:
    """Print each row's command, network evaluations, and how long it would take with all ranks."""
    times: dict[tuple[Any, ...], tuple[float, float]] = {}
    total = 0.0
    for row in plan.rows:
        if row.name not in names or row.same_as or row.missing:
            continue
        try:
            prepared = prepare(row, flags(row, args, Path("OUT")), job.device, weights=False)
        except ValueError as error:
            raise BadInput(f"{plan.name}: row {row.name}: {error}") from None
        pipeline = prepared.pipeline
        key = (row.config, pipeline.config.batch_size, pipeline.cond_fn is not None)
        if key not in times:
            times[key] = seconds_per_step(prepared.pipeline)
        steps = pipeline.diffusion.num_timesteps
        each = evaluations(pipeline.guidances, steps)
        seconds = pipeline.config.num_samples * (each * times[key][0] + steps * times[key][1]) / job.size
        total += seconds
        n, hours = pipeline.config.num_samples, f"{seconds / 3600:.1f}"
        print(f"{row.name}: {row.label}")
        print(f"  python scripts/{row.script}.py {shlex.join(_short(row.arguments()))}")
        print(f"  {n} samples, {each} network evaluations each, about {hours} hours")
    for row in plan.rows:
        if row.missing and row.name in names:
            print(f"{row.name}: {row.label}\n  cannot be run: {row.missing}")
    print(f"about {total / 3600:.1f} hours in all with {job.size} rank(s) on {job.device} (from a short timing)")


def empty(row: Row, reason: str) -> dict[str, Any]:
    """The result of a row that was not run."""
    return {
        "name": row.name,
        "label": row.label,
        "group": row.group,
        "x": row.x,
        "note": row.note,
        "same_as": row.same_as,
        "command": f"python scripts/{row.script}.py {shlex.join(_short(row.arguments()))}",
        "published": dict(row.published),
        "reason": reason,
        "n": None,
        "metrics": {},
        "common": {},
    }


def _short(argv: list[str]) -> list[str]:
    """Flags with the project's own files named from its root."""
    root = f"{Path(__file__).resolve().parent.parent}/"
    return [text.removeprefix(root) for text in argv]


def measure(
    row: Row, plan: Plan, prepared: Prepared, inception: Path | None, job: Job, ranks: Ranks, before: dict[str, Any]
) -> dict[str, Any]:
    """Sample and evaluate one row; the result on rank 0. before: what an earlier run measured of it.

    A row without a reference is measured by its cost alone.
    """
    folder = Path(prepared.pipeline.config.out_dir)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    store, about = run(prepared.pipeline, prepared.settings, prepared.guidance_line, job)
    n, steps = prepared.pipeline.config.num_samples, prepared.pipeline.diffusion.num_timesteps
    found: dict[str, Any] = {"metrics": cost(about, n, before), "common": {}}
    if row.reference:
        reference = ranks.first(lambda: str(local_path(row.reference)))
        settings = Settings(
            reference, str(folder), plan.features, inception, pr_dtype=plan.pr_dtype, cache=folder.parent / "features"
        )
        result = judge(settings, ranks)
        at_common_n = result
        if 0 < plan.common_n < n:
            at_common_n = judge(replace(settings, num_samples=plan.common_n), ranks)
        if ranks.rank:
            return {}
        found = {
            "metrics": result["metrics"],
            "common": at_common_n["metrics"] if 0 < plan.common_n <= n else {},
            "not_comparable": result["comparable"]["because"],
            "weights_sha256": result["provenance"]["weights_sha256"],
        }
    if ranks.rank:
        return {}
    draw(prepared, folder)
    made = about["samples_made_now"]
    return empty(row, "") | {
        "n": n,
        **found,
        "network_evaluations_per_sample": about["network_evaluations_per_sample"],
        "classifier_gradients_per_sample": steps if prepared.pipeline.cond_fn else 0,
        "images_per_s": round(made / about["seconds"], 3) if made else before.get("images_per_s"),
        "guidance": prepared.guidance_line,
        "fidelity": prepared.settings["fidelity"],
        "hash": store.hash,
    }


def cost(about: dict[str, Any], n: int, before: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Time of a run that made all its samples at once, and on a GPU its peak memory; else what is known from before."""
    if about.get("samples_made_now") != n:
        return before.get("metrics", {})
    found = {"seconds": {"value": about["seconds"], "error": None}}
    if torch.cuda.is_available():
        found["memory_mb"] = {"value": torch.cuda.max_memory_allocated() / 2**20, "error": None}
    return found


def draw(prepared: Prepared, folder: Path) -> None:
    """Write the pictures of the first samples, unguided, mask and guided, unless they are there."""
    if not any(guidance.scale for guidance in prepared.pipeline.guidances) and not prepared.pipeline.cond_fn:
        return
    if (folder / "guided.png").exists():
        return
    seen = same_noise(prepared.pipeline, SHOWN)
    share = pictures.heat(seen.share) if seen.share is not None else None
    for name, images in zip(PICTURES, (seen.unguided, share, seen.guided), strict=True):
        if images is not None:
            grid = pictures.grid(images, min(SHOWN // 2, len(images)))
            pictures.save_png(pictures.enlarge(grid, SHOWN_HEIGHT * 2), folder / f"{name}.png")


def write(out_dir: Path, plan: Plan, rows: list[dict[str, Any]], job: Job) -> None:
    """Write results.json and both reports."""
    results = {
        "plan": plan.name,
        "title": plan.title,
        "paper": plan.paper,
        "note": plan.note,
        "features": plan.features,
        "pr_dtype": plan.pr_dtype,
        "common_n": plan.common_n,
        "groups": dict(plan.groups),
        "device": job.device.type if job.device.type == "cpu" else torch.cuda.get_device_name(job.device),
        "versions": versions(),
        "rows": rows,
    }
    shown = {}
    for row in rows:
        found = [out_dir / row["name"] / f"{name}.png" for name in PICTURES]
        if row["metrics"] and found[0].exists() and found[2].exists():
            shown[row["name"]] = tuple(path.read_bytes() if path.exists() else None for path in found)
    texts = {
        "results.json": json.dumps(results, indent=1, ensure_ascii=False) + "\n",
        "report.md": report.markdown(results),
        "report.html": report.html(results, shown),
    }
    for name, text in texts.items():
        write_atomically(out_dir / name, lambda file, text=text: file.write(text.encode()))


def earlier(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of results.json as an earlier run left them, by name."""
    try:
        return {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@command
def main() -> None:
    args = arguments()
    job = start()
    try:
        plan = read_plan(args.plan)
    except ValueError as error:
        raise BadInput(str(error)) from None
    names = chosen(plan, args.rows)
    if args.fetch:
        if job.rank == 0:
            fetch(plan, names)
        return
    if args.dry_run:
        if job.rank == 0:
            dry_run(plan, names, args, job)
        return
    ranks = start_ranks()
    out_dir = args.out_dir or Path("runs/tables") / plan.name
    # What an earlier run found of a row counts as long as the plan asks for the same.
    found = {
        row.name: result
        for row in plan.rows
        if (result := earlier(out_dir / "results.json").get(row.name))
        and result["command"] == empty(row, "")["command"]
        and not row.missing
    }
    done: dict[str, dict[str, Any]] = {}

    def table() -> list[dict[str, Any]]:
        rows = []
        for row in plan.rows:
            of = next((other for other in plan.rows if other.name == row.same_as), row)
            result = done.get(of.name) or found.get(of.name) or empty(row, row.missing or "not yet")
            own = ("name", "label", "group", "x", "note", "same_as", "published")
            rows.append(result | {key: empty(row, "")[key] for key in own})
        report.add_relative_times(rows)
        return rows

    for row in plan.rows:
        if row.name not in names or row.missing or row.same_as:
            continue
        argv = flags(row, args, out_dir / row.name)
        if ranks.rank == 0:
            sys.stderr.write(f"\n{row.name}: {row.label}\n")
        try:
            prepared = ranks.agree(lambda row=row, argv=argv: prepare(row, argv, job.device))
            done[row.name] = measure(row, plan, prepared, args.inception, job, ranks, found.get(row.name, {}))
        except BadInputError as refusal:
            if ranks.rank == 0:
                sys.stderr.write(f"{row.name}: not run: {refusal}\n")
                done[row.name] = empty(row, str(refusal))
        if ranks.rank == 0:
            write(out_dir, plan, table(), job)
    if ranks.rank == 0:
        write(out_dir, plan, table(), job)
        print((out_dir / "report.md").read_text(encoding="utf-8"))
        print(f"look at {out_dir / 'report.html'}")
