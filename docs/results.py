"""Put the results of committed JSON files into the tables of the pages: what stands between two markers is made here.

  python docs/results.py            # write the tables
  python docs/results.py --check    # status 1 where a page says otherwise than the files

A place is `<!-- results: NAME -->` to `<!-- end -->` in README.md, docs/ or the cards of configs/models/.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from guided_diffusion.commands.disturbances import shown  # noqa: E402
from guided_diffusion.tables.figures import cost  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs" / "models").glob("*.md"))]
PLACE = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def number(found: dict[str, Any], shape: str = ".3f") -> str:
    """value ± error."""
    return f"{found['value']:{shape}} ± {found['error']:{shape.lstrip('+')}}"


def rows(head: str, lines: list[list[str]]) -> str:
    """A table of Markdown."""
    columns = head.count("|") + 1
    return "\n".join([f"| {head} |", "|" + "---|" * columns, *(f"| {' | '.join(line)} |" for line in lines)])


def measured(plan: str, group: str) -> str:
    """The measured rows of a plan's group, each with its paired difference to the first.

    Evaluations are the network's, with those of a weak one by their multiply-adds. Where rows stand again in a group
    called steps_N, whose first row is unguided with as many steps, the difference to that one is a column.
    """
    found = [row for row in read(f"configs/tables/results/{plan}.json")["rows"] if row["metrics"]]
    asked = [row for row in found if row["group"] == group]
    steps = {row["same_as"]: row for row in found if row["group"].startswith("steps_")}
    beside = any(row["name"] in steps for row in asked)

    def away(row: dict[str, Any] | None) -> list[str]:
        minus = ((row or {}).get("difference") or {}).get("metrics", {}).get("frechet_distance")
        return [number(minus, "+.2f"), f"{minus['errors']:+.1f}"] if minus else ["–", "–"]

    lines = [
        [
            row["label"], f"{row['network_evaluations_per_sample'] if cost(row) is None else cost(row):.3g}",
            number(row["metrics"]["frechet_distance"], ".2f"), *away(row),
            *(away(steps.get(row["name"]))[:1] if beside else []),
            *(number(row["metrics"][name]) for name in ("precision", "recall")),
        ]
        for row in asked
    ]  # fmt: skip
    head = "row | evaluations | Fréchet distance | minus the first row, ± paired error | in standard errors"
    return rows(f"{head}{' | minus as many unguided steps' if beside else ''} | precision | recall", lines)


PAPER = {(8, "1"): ".16 → .23", (8, "1.3"): ".09 → .14", (16, "1"): ".18 → .25", (16, "1.3"): ".05 → .11"}
"""IoU with objects of random masks and of the attention's, Table 9."""


def attention() -> str:
    """What masks of the embedded model's maps select of its training pictures."""
    lines = [
        [
            f"{size['map'][0]}²", threshold, number(found["excess"]),
            f"{number(found['iou_random'])} → {number(found['iou'])}", PAPER[size["map"][0], threshold],
            number(found["iou_gain"]), number(found["iou_centre"]),
        ]
        for size in read("configs/models/emoji32_attention.json")["study"]["sizes"]
        for threshold, found in size["over_steps"].items()
    ]  # fmt: skip
    head = "map | ψ | log-spectrum, mask − whole image | IoU with the object, random → attention"
    return rows(f"{head} | paper (Table 9) | attention − random | IoU of the middle", lines)


def disturbances() -> str:
    """What the Fréchet distance of the emoji features sees."""
    found = read("docs/disturbances/emoji.json")
    lines = [line for line in shown(found | {"samples": {}}).splitlines() if line.startswith("|")]
    said = [f"{found['n']} pictures, undisturbed at {number(found['undisturbed'], '.2f')}"]
    said += [f"{Path(name).stem}, {row['n']} pictures: {number(row, '.1f')}" for name, row in found["samples"].items()]
    return "\n".join([*lines, "", "; ".join(said) + "."])


def calibration() -> str:
    """Claimed by true errors: of a metric, of a difference, of a difference of independent sets."""
    cases = read("docs/calibration.json")
    same = ("sfid", "inception_score_shuffled")  # of the script's features they are fid and inception_score
    names = list(dict.fromkeys(name for case in cases for name in case["metrics"] if name not in same))
    kinds = ("claimed_over_true", "difference_claimed_over_true", "difference_unpaired_over_true")
    lines = []
    for name in names:
        found = [case["metrics"].get(name) for case in cases]
        shapes = (".2f", ".2f", ".1f")
        pairs = list(zip(kinds, shapes, strict=True))
        cells = [each and "; ".join(f"{each[kind]:{shape}}" for kind, shape in pairs) for each in found]
        lines.append([name, *(cell or "–" for cell in cells)])
    head = " | ".join("N {n}, M {m}, D {d}".format(**case["case"]) for case in cases)
    return rows(f"metric | {head}", lines)


GPU, SAMPLES = 100e12, 50_000
"""Floating-point operations that the estimate lets a GPU do in a second, two for a multiply-add; samples of a row."""


def passes() -> str:
    """What a pass takes, and the hours of a row as it is configured, without and with its guidance."""
    lines = []
    for name, found in read("docs/cost.json").items():
        hours = found.get("evaluations", 0) * SAMPLES * 2 * found["multiply_adds"] / GPU / 3600
        lines.append([
            f"`{name}`", f"{found['parameters'] / 1e6:,.1f}", f"{found['multiply_adds'] / 1e9:,.1f}",
            f"{found['evaluations']:g}" if hours else "–", f"{hours:,.0f}" if hours else "–",
        ])  # fmt: skip
    head = "configuration | parameters, 10⁶ | multiply-adds a pass, 10⁹"
    return rows(f"{head} | evaluations an image | hours, estimated", lines)


def precision() -> str:
    """How exactly parts agree with their references."""
    lines = []
    for found in read("docs/precision.json"):
        numbers = [f"{found[key]:.0e}{word}" for key, word in (("rtol", ""), ("atol", " absolute")) if found[key]]
        tolerance = (
            f"{found['of_largest']:.0e} of the largest" if found["of_largest"] else " + ".join(numbers) or "equal"
        )
        worst = f"{found['worst']:.0e}" if found["worst"] else "0"
        lines.append([found["part"], found["reference"], tolerance, worst, f"`{found['test']}`"])
    return rows("part | reference | tolerance | worst seen | test", lines)


def benchmark() -> str:
    """What the benchmark found, section by section, and on which machine."""
    found = read("docs/benchmark.json")
    names = ("processor", "cores", "threads", "gpu", "torch", "python")
    about = ", ".join(f"{name} {found['machine'][name]}" for name in names if found["machine"][name])
    lines = [
        [row["section"], row["what"], f"{row['value']:,.{1 if row['value'] > 10 else 2}f} {row['unit']}".strip()]
        for row in found["rows"]
    ]
    return f"{rows('section | what | measured', lines)}\n\nMachine: {about}."


def toy() -> str:
    """How points of guidances differ from a density."""
    lines = []
    for name, found in read("docs/toy.json")["found"].items():
        passes = " + ".join(f"{found[by]}" for by in ("evaluations", "weak_evaluations") if found[by])
        shares = [f"{100 * found[share]:.1f} %" for share in ("outside", "moved")]
        lines.append([name, passes or "–", *shares, f"{1000 * found['distance']:z.1f}".replace("-", "−")])
    return rows("guidance | passes | outside | moved | distance", lines)


GROUPS = {
    "demo": ("main", "judged", "classes", "scale", "mask", "block", "when"),
    "guidances": ("main", "ode", "classes", "transforms"),
    "guidances_judged": ("24", "100"),
}
"""The groups of plans that pages show."""

TABLES: dict[str, Callable[[], str]] = {
    "benchmark": benchmark, "attention": attention, "disturbances": disturbances,
    "calibration": calibration, "cost": passes, "precision": precision, "toy": toy,
    **{f"{plan}-{group}": partial(measured, plan, group) for plan, groups in GROUPS.items() for group in groups},
}  # fmt: skip


def filled(text: str) -> str:
    """A page with its tables as the files have them."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page is wrong")
    check = parser.parse_args().check
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            if check:
                name = page.relative_to(ROOT)
                raise SystemExit(f"{name}: its tables are not those of the files; python docs/results.py")
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
