"""Distances of a plan's rows as figures: over the parameter of a group, and over network evaluations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .page import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    "fid": "FID",
    "frechet_distance": "Fréchet distance",
    "sfid": "sFID",
    "inception_score": "IS",
    "precision": "precision",
    "recall": "recall",
    "memory_mb": "memory, MB",
    "seconds": "seconds",
    "relative_time": "time / unguided",
}
DISTANCES = ("fid", "frechet_distance")

MARKERS = "osD^vP*X<>"
MOST_LINES = len(MARKERS)

ERRORS = "Bars are standard errors of the samples' side."
SHARED_ERRORS = (
    f"{ERRORS} Rows that begin from the same noise share part of them: paired differences, as in tables, are mostly "
    "sharper than the bars of the distances suggest."
)

Result = Mapping[str, Any]
"""One row of results.json."""

Measured = Mapping[str, Any]
"""A value and its standard error, None where that is not known."""


def at_common_n(row: Result) -> tuple[str, Measured] | None:
    """The distance that compares with other rows': its name and value with error."""
    for source in (row["common"], row["metrics"]):
        for name in DISTANCES:
            if name in source:
                return name, source[name]
    return None


def samples_of(row: Result, common_n: int) -> int:
    """The number of samples that this distance is of."""
    return common_n if row["common"] else row["n"]


def _comparable(results: Mapping[str, Any]) -> list[Result]:
    return [row for row in results["rows"] if row["metrics"] and at_common_n(row) and not row["same_as"]]


def costed(results: Mapping[str, Any]) -> list[Result]:
    """Measured rows whose cost is known in network evaluations: a classifier's gradients cost as well."""
    return [row for row in _comparable(results) if cost(row) is not None]


def cost(row: Result) -> float | None:
    """The network evaluations of a sample, those of a weak network by their multiply-adds; None where not known."""
    weak, part = row.get("weak_network_evaluations_per_sample", 0), row.get("weak_network_pass")
    if row.get("classifier_gradients_per_sample") or (weak and part is None):
        return None
    return row["network_evaluations_per_sample"] + (weak * part if weak else 0)


@dataclass(frozen=True)
class Point:
    """A distance at x, and the paired difference to what stands at 0, where it is known."""

    x: float
    distance: Measured
    difference: Measured | None = None


@dataclass(frozen=True)
class Titles:
    """Of the axes."""

    x: str
    distance: str
    difference: str


def _difference(row: Result) -> Measured | None:
    """A row's paired difference in the distance."""
    metrics = (row["difference"] or {}).get("metrics", {})
    return next((metrics[name] for name in DISTANCES if name in metrics), None)


def curves_by_x(rows: Sequence[Result], title: str, common_n: int) -> list[Curve]:
    """Of a group's rows that have an x; none where no row has one."""
    asked = [row for row in rows if row["x"] is not None]
    there = sorted((row for row in asked if at_common_n(row)), key=lambda row: row["x"])
    if not asked:
        return []
    if len(there) < 2:
        return [Curve(None, f"No curve: {len(there)} of {len(asked)} rows of it measured.")]
    first = rows[0]
    paired = any(_difference(row) for row in there)
    nought = {"value": 0.0, "error": None} if paired else None
    points = [Point(row["x"], at_common_n(row)[1], nought if row is first else _difference(row)) for row in there]
    said = [SHARED_ERRORS if paired else ERRORS]
    if len(points) < 3:
        said.append("Two points make no line.")
    if missing := [row["label"] for row in asked if row not in there]:
        said.append(f"Not measured, so not here: {', '.join(missing)}.")
    numbers = {row["label"]: samples_of(row, common_n) for row in there}
    if len(set(numbers.values())) > 1:
        unlike = ", ".join(f"{label} N = {n}" for label, n in numbers.items())
        said.append(f"Not of the same number of samples, which moves distances: {unlike}.")
    if unknown := [row["label"] for row in there if at_common_n(row)[1]["error"] is None]:
        said.append(f"Without a bar, as the error is not known: {', '.join(unknown)}.")
    titles = Titles(title, TITLES[at_common_n(there[0])[0]], f"minus that of {first['label']}")
    return [Curve(partial(draw, {title: points}, titles, joined=len(points) > 2), " ".join(said))]


def cost_curves(results: Mapping[str, Any]) -> list[Curve]:
    """Labels that were measured at two or more numbers of network evaluations: a figure for each reference.

    Rows of one label and one N are one method, in whatever group; the first row of a group is what others differ from.
    """
    references: dict[str, list[Result]] = {}
    for row in _comparable(results):
        references.setdefault(row.get("reference", ""), []).append(row)
    firsts = {row["group"]: row for row in reversed(results["rows"])}
    found = [_cost_curve(rows, firsts, results["common_n"]) for rows in references.values()]
    return [curve for curve in found if curve]


def _cost_curve(rows: Sequence[Result], firsts: Mapping[str, Result], common_n: int) -> Curve | None:
    """The figure of one reference. firsts: by group."""
    methods: dict[tuple[str, int], list[Result]] = {}
    uncosted = list(dict.fromkeys(row["label"] for row in rows if cost(row) is None))
    for row in sorted((row for row in rows if cost(row) is not None), key=cost):
        methods.setdefault((row["label"], samples_of(row, common_n)), []).append(row)
    methods = {of: rows for of, rows in methods.items() if len(rows) > 1}
    unclear = [of for of, rows in methods.items() if len({round(cost(row)) for row in rows}) < len(rows)]
    kept = [of for of in methods if of not in unclear]
    if not kept:
        return None
    black = [of for of in kept if all(row is firsts[row["group"]] for row in methods[of])]
    kept.sort(key=lambda of: (of not in black, at_common_n(methods[of][-1])[1]["value"]))
    kept, crowded = kept[:MOST_LINES], kept[MOST_LINES:]
    several = len({n for _, n in methods}) > 1
    names = {of: f"{of[0]}, N = {of[1]}" if several else of[0] for of in methods}

    def point(row: Result) -> Point:
        first = firsts[row["group"]]
        same = first["metrics"] and cost(first) is not None and round(cost(first)) == round(cost(row))
        return Point(cost(row), at_common_n(row)[1], _difference(row) if same else None)

    lines = {names[of]: [point(row) for row in methods[of]] for of in kept}
    said = [SHARED_ERRORS]
    reasons = {
        f"a figure shows {MOST_LINES} at most": [names[of] for of in crowded],
        "several of their rows took the same number": [names[of] for of in unclear],
        "not all that they cost is known in network evaluations": uncosted,
    }
    said += [f"Left out, as {reason}: {', '.join(those)}." for reason, those in reasons.items() if those]
    distance = TITLES[at_common_n(methods[kept[0]][0])[0]]
    against = " or ".join(dict.fromkeys(of[0] for of in black)) or "the first row"
    titles = Titles("network evaluations a sample", distance, f"minus {against}\nat as many evaluations")
    plot = partial(draw, lines, titles, black=[names[of] for of in black], logarithmic=True)
    return Curve(plot, " ".join(said))


def draw(
    lines: Mapping[str, Sequence[Point]],
    titles: Titles,
    *,
    joined: bool = True,
    black: Collection[str] = (),
    logarithmic: bool = False,
) -> "Figure":
    """Distances over x, a line a name, and beside them paired differences, where there are any.

    joined: draw lines between points. black: names that are drawn in black, dashed. logarithmic: x; its ticks are then
    the x that there are, and points stand a little beside each other, so that their bars can be told apart.
    """
    from matplotlib.figure import Figure

    paired = any(point.difference for points in lines.values() for point in points)
    figure = Figure(figsize=(9 if paired else 5.5, 3.6), layout="constrained")
    left, *right = figure.subplots(1, 1 + paired, squeeze=False)[0]
    colours = iter(f"C{number}" for number in range(len(lines)))
    for number, (name, points) in enumerate(lines.items()):
        aside = 1.02 ** (number - (len(lines) - 1) / 2) if logarithmic else 1.0
        style = {"color": "black", "linestyle": "--"} if name in black else {"color": next(colours), "linestyle": "-"}
        style |= {"marker": MARKERS[number % len(MARKERS)], "label": name} | ({} if joined else {"linestyle": "none"})
        _with_bars(left, [(point.x * aside, point.distance) for point in points], style)
        for axes in right:
            known = [(point.x * aside, point.difference) for point in points if point.difference]
            _with_bars(axes, known, style)
    left.set_ylabel(titles.distance)
    for axes in right:
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        axes.set_ylabel(titles.difference)
    for axes in (left, *right):
        axes.set_xlabel(titles.x)
        axes.grid(alpha=0.3)
        if logarithmic:
            ticks = sorted({round(point.x) for points in lines.values() for point in points})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_xticks([], minor=True)
    if len(lines) > 1:
        handles, names = left.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _with_bars(axes: "Axes", points: Sequence[tuple[float, Measured]], style: Mapping[str, Any]) -> None:
    """Values over x with their errors; one that is not known has no bar."""
    values, errors = (np.array([found[key] for _, found in points], dtype=float) for key in ("value", "error"))
    axes.errorbar([x for x, _ in points], values, yerr=errors, capsize=3, markersize=5, **style)
