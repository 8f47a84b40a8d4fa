"""Make the figures of a plan's page from the folder of its results: docs/PLAN.png and docs/PLAN_cost.svg.

  python docs/figures.py runs/tables/guidances              # the pictures are of the plan's first group
  python docs/figures.py runs/tables/guidances --group 100

PLAN.png shows four noises under every measured row of a group, from the samples in the folders of the rows;
PLAN_cost.svg distance against network evaluations, from results.json alone: a path of such a file makes it by itself.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.font_manager import findfont
from PIL import ImageFont

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from guided_diffusion.storage import pictures  # noqa: E402
from guided_diffusion.tables import comparison  # noqa: E402
from guided_diffusion.tables.figures import cost_curves  # noqa: E402

NOISES = 4


def draw_costs(results: Mapping[str, Any], path: Path) -> None:
    """The figure of methods over network evaluations, the same bytes for the same results."""
    curves = cost_curves(results)
    if len(curves) != 1:
        raise SystemExit(f"wanted one reference with labels measured at several costs, got {len(curves)}")
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        curves[0].draw().savefig(path, metadata={"Date": None})
    print(f"{path}: {curves[0].caption}")


def draw_noises(folder: Path, results: Mapping[str, Any], group: str, path: Path) -> None:
    """The same noises under every measured row of a group."""
    rows = [row for row in results["rows"] if row["group"] == group and row["metrics"]]
    labels = {row["label"]: folder / (row["same_as"] or row["name"]) for row in rows}
    if not rows:
        raise SystemExit(f"--group: no measured row is of {group!r}; there are {', '.join(results['groups'])}")
    try:
        images = comparison.side_by_side(labels, NOISES)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    font = ImageFont.truetype(findfont("DejaVu Sans"), 13)  # Pillow's own font has neither − nor η
    columns = [f"noise {number}" for number in range(NOISES)]
    pictures.save_png(pictures.labelled_grid(images, list(labels), columns, "", font=font), path)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the folder of a plan's results, or results.json alone")
    parser.add_argument("--group", help="whose pictures (default: the plan's first)")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    is_folder = args.results.is_dir()
    file = args.results / "results.json" if is_folder else args.results
    results = json.loads(file.read_text(encoding="utf-8"))
    if is_folder:
        group = args.group or results["rows"][0]["group"]
        draw_noises(args.results, results, group, args.out_dir / f"{results['plan']}.png")
    draw_costs(results, args.out_dir / f"{results['plan']}_cost.svg")


if __name__ == "__main__":
    main()
