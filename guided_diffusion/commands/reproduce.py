"""Run a plan row by row: sample, evaluate, and report published and measured numbers side by side.

A plan is a file of configs/tables (its name is enough) or of your own: table1 … table11, scales and baselines of the
paper, and demo for the embedded model. Writes results.json, report.md and report.html to --out_dir after every row; the
same command goes on where it stopped, and another one may run other rows in the same folder at the same time. Ends with
status 1 where no row could be measured. Under
mpiexec or torchrun all ranks share the work of each row.

  python scripts/reproduce.py demo --samples 64 --rows unguided,sag
  python scripts/reproduce.py table1 --dry_run
  mpiexec -n 8 python scripts/reproduce.py table1 --rows 'uncond_*'
"""

import argparse
from pathlib import Path

from evaluations.ranks import start as start_ranks

from ..runs.ranks import command, start
from ..settings.options import Parser, exit_on_bad_input, whole
from ..tables.forecast import forecast
from ..tables.plans import read_plan
from ..tables.rows import fetch, run_rows


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="a name in configs/tables, or a YAML file")
    parser.add_argument("--rows", default="*", help="names of rows, comma-separated, with * and ? (default: all)")
    parser.add_argument("--samples", type=whole(1), help="samples of each row, instead of the plan's")
    parser.add_argument("--batch_size", help="images at a time, or auto, instead of the plan's")
    parser.add_argument("--out_dir", type=Path, help="folder of the results (default: runs/tables/PLAN)")
    parser.add_argument("--inception", type=Path, help="weights of the evaluator's Inception (default: fetched)")
    parser.add_argument("--dry_run", action="store_true", help="print the rows and their cost, and stop")
    parser.add_argument("--timing", action="store_true", help="with --dry_run: time a few steps, print expected hours")
    parser.add_argument("--fetch", action="store_true", help="bring the files of the rows to the cache, and stop")
    args = parser.parse_args()
    if args.timing and not args.dry_run:
        parser.error("--timing: is of --dry_run")
    return args


@command
def main() -> None:
    args = arguments()
    job = start()
    changes = {"num_samples": args.samples, "batch_size": args.batch_size}
    changes = {key: value for key, value in changes.items() if value is not None}
    with exit_on_bad_input():
        plan = read_plan(args.plan)
        rows = plan.chosen(args.rows)
    if args.fetch or args.dry_run:
        if job.rank:
            return
        asked = [row.with_settings(changes) for row in rows]
        with exit_on_bad_input():
            for line in fetch(rows) if args.fetch else forecast(asked, job if args.timing else None):
                print(line)
        return
    ranks = start_ranks()
    folder = args.out_dir or Path("runs/tables") / plan.name
    with exit_on_bad_input("out_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    measured = run_rows(plan, rows, changes, folder, args.inception, job, ranks)
    if ranks.rank == 0:
        print((folder / "report.md").read_text(encoding="utf-8"))
        print(f"look at {folder / 'report.html'}")
        if not measured:
            raise SystemExit(f"none of {len(rows)} rows was measured; why not stands in the report")
