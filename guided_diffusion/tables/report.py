"""A plan's results for people: Markdown, and one self-contained HTML page with curves and pictures to compare."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..runs.identity import distinct, what_differs
from .figures import DISTANCES, TITLES, Result, at_common_n, cost, cost_curves, costed, curves_by_x, samples_of
from .page import Line, Section, as_markdown, measured, templates

if TYPE_CHECKING:
    from .comparison import Strips


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _used(rows: Sequence[Result]) -> list[str]:
    """The metrics that a group's rows have, published or measured, in a fixed order."""
    return [name for name in TITLES if any(name in row["published"] or name in row["metrics"] for row in rows)]


def group_table(rows: Sequence[Result], common_n: int) -> tuple[list[str], list[list[str]]]:
    """Head and cells: published | measured ± error | difference for each metric, then how it was measured."""
    metrics = _used(rows)
    published = {name for name in metrics if any(name in row["published"] for row in rows)}
    larger = any(row["n"] != common_n for row in rows if row["metrics"])
    distance = next((name for name in DISTANCES if larger and any(name in row["common"] for row in rows)), None)
    head = [""]
    for name in metrics:
        if name in published:
            head += [f"{TITLES[name]}, published", "measured", "difference"]
        else:
            head.append(TITLES[name])
    head += [f"{TITLES[distance]} at N = {common_n}"] if distance else []
    compared = any(row["difference"] for row in rows)
    head += ["difference to the first row (standard errors)"] if compared else []
    head += ["N", "network evaluations", "images/s", "fidelity", ""]
    cells = []
    for row in rows:
        line = [row["label"]]
        for name in metrics:
            found = row["metrics"].get(name)
            if name not in published:
                line.append(measured(found))
                continue
            known = name in row["published"]
            there = row["published"].get(name)
            difference = f"{found['value'] - there:+.2f}" if found and there is not None else "–"
            line += [_number(there) if known else "–", measured(found), difference]
        line += [measured(row["common"].get(distance))] if distance else []
        line += [_difference(row, rows[0])] if compared else []
        rate = row.get("images_per_s")
        line += [str(row["n"] or "–"), _evaluations(row), f"{rate:.2f}" if rate else "–"]
        line += [row.get("fidelity") or "–", (row["reason"] and f"not run: {row['reason']}") or row["note"]]
        cells.append(line)
    return head, cells


def _evaluations(row: Result) -> str:
    """What a sample took."""
    if not (found := row.get("network_evaluations_per_sample")):
        return "–"
    more = {"the classifier": row.get("classifier_gradients_per_sample")}
    more |= {"the weak network": row.get("weak_network_evaluations_per_sample")}
    return " + ".join([f"{found:g}", *(f"{count} of {whose}" for whose, count in more.items() if count)])


def _difference(row: Result, first: Result) -> str:
    """The difference of a row's distance to the first row's, or in short why there is none."""
    difference = row["difference"]
    if not difference:
        return "–"
    if "reason" in difference:
        return difference["reason"].split(":")[0]
    found = next(difference["metrics"][name] for name in DISTANCES if name in difference["metrics"])
    errors = "" if found["errors"] is None else f" ({found['errors']:+.1f})"
    n = "" if {row["n"], first["n"]} == {difference["n"]} else f" at N = {difference['n']}"
    return measured(found, sign="+") + errors + n


def _why_no_difference(rows: Sequence[Result]) -> list[str]:
    """The reasons for differences that are not there, each with the rows that it is of."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        if reason := (row["difference"] or {}).get("reason"):
            labels.setdefault(reason, []).append(row["label"])
    return [f"{', '.join(of)}: {reason}." for reason, of in labels.items()]


def equal_cost(results: Mapping[str, Any]) -> list[tuple[int, list[Result]]]:
    """Measured rows by the network evaluations a sample took, where several took the same number: best first.

    Rows compare that are measured against the same reference.
    """
    by_cost: dict[tuple[str, int], list[Result]] = {}
    for row in costed(results):
        by_cost.setdefault((row.get("reference", ""), round(cost(row))), []).append(row)
    return [
        (evaluations, sorted(rows, key=lambda row: at_common_n(row)[1]["value"]))
        for (_, evaluations), rows in sorted(by_cost.items())
        if len(rows) > 1
    ]


def add_relative_times(rows: Sequence[dict[str, Any]]) -> None:
    """The time of each row in units of its group's first row, where times were measured."""
    first: dict[str, float] = {}
    for row in rows:
        if seconds := row["metrics"].get("seconds"):
            unit = first.setdefault(row["group"], seconds["value"])
            row["metrics"]["relative_time"] = {"value": seconds["value"] / unit, "error": None}


def _introduction(results: Mapping[str, Any]) -> list[str]:
    own = [row for row in results["rows"] if not row["same_as"]]
    done = [row for row in own if row["metrics"]]
    same = len(results["rows"]) - len(own)
    more = f" ({same} more show the numbers of another)" if same else ""
    lines = [
        f"{len(done)} of {len(own)} rows measured{more}. {results['note']}".strip(),
        f"Features: {results['features']}; precision and recall in {results['pr_dtype']}; device: {results['device']}; "
        f"versions: {', '.join(f'{name} {version}' for name, version in results['versions'].items())}.",
        "± is the standard error of the samples' side (distances: delta method). Published numbers are quoted from "
        f"{results['paper']}; the measured ones are this run's."
        if results["paper"]
        else "± is the standard error of the samples' side (distances: delta method). All numbers are this run's.",
    ]
    if any("metrics" in (row["difference"] or {}) for row in results["rows"]):
        lines.append(
            "Differences to the first row of a table are of paired samples, sample i of both from the same noise: ± is "
            "the standard error of the difference itself, and in brackets is how many of these it is."
        )
    makers = distinct((maker["samples"], maker) for row in done for maker in row.get("made_by", []))
    lines += [differs] if (differs := what_differs(makers)) else []
    because = Counter(reason for row in done for reason in row.get("not_comparable", []))
    said = [
        reason if count == len(done) else f"{reason} ({count} of {len(done)} rows)" for reason, count in because.items()
    ]
    return lines + ([f"Not comparable to published numbers: {'; '.join(said)}."] if said else [])


def _of_group(rows: Sequence[Result], title: str, common_n: int, strips: Mapping[str, "Strips"]) -> Section:
    """A group's table, its pictures, and the curve of its rows' distances where they have an x."""
    curves = curves_by_x(rows, title, common_n)
    notes, lines = _why_no_difference(rows), _lines(rows, strips)
    return Section(title, "", *group_table(rows, common_n), notes, curves, lines)


def _lines(rows: Sequence[Result], strips: Mapping[str, "Strips"]) -> list[Line]:
    """Pictures of a group's rows; what is unguided stands once above those that it belongs to."""
    lines, there = [], set()
    for row in rows:
        if (found := strips.get(row["name"])) is None:
            continue
        pictures = []
        if not found.guided:
            pictures.append(("", found.unguided, None))
        elif found.unguided not in there:
            pictures.append(("without guidance", found.unguided, None))
        there.add(found.unguided)
        if found.mask:
            pictures.append(("in the mask (brighter: at more steps)", found.mask, None))
        if found.guided:
            pictures.append(("guided" if pictures else "", found.guided, found.unguided))
        of = at_common_n(row)
        text = f"{TITLES[of[0]]} {measured(of[1])}" if of else ""
        text += f"; {_difference(row, rows[0])} to {rows[0]['label']}" if row["difference"] else ""
        lines.append(Line(row["label"], text, pictures))
    return lines


def _of_equal_cost(results: Mapping[str, Any]) -> list[Section]:
    """A table of the rows that took the same number of network evaluations, and methods over it, if there are any."""
    tied = equal_cost(results)
    several = len({row.get("reference", "") for _, rows in tied for row in rows}) > 1
    cells = []
    for evaluations, rows in tied:
        for row in rows:
            name, found = at_common_n(row)
            line = [
                f"{evaluations:g}",
                row["label"],
                f"{TITLES[name]} {measured(found)}",
                samples_of(row, results["common_n"]),
            ]
            cells.append([str(cell) for cell in line] + ([row["reference"]] if several else []))
    head = ["network evaluations", "row", "distance", "N", *(["against"] if several else [])]
    curves = cost_curves(results)
    title = "At an equal number of network evaluations"
    return [Section(title, "", head if cells else [], cells, curves=curves)] if cells or curves else []


def _sections(results: Mapping[str, Any], strips: Mapping[str, "Strips"]) -> list[Section]:
    groups: dict[str, list[Result]] = {}
    for row in results["rows"]:
        groups.setdefault(row["group"], []).append(row)
    titles, n = results["groups"], results["common_n"]
    of_groups = [_of_group(rows, titles.get(group, group), n, strips) for group, rows in groups.items()]
    return of_groups + _of_equal_cost(results)


def markdown(results: Mapping[str, Any]) -> str:
    """The report as text."""
    return as_markdown(results["title"], _introduction(results), _sections(results, {}))


def html(results: Mapping[str, Any], strips: Mapping[str, "Strips"]) -> str:
    """The report as a page. strips: pictures by row.

    Curves need matplotlib (the extra `report`); without it the page says so.
    """
    said = _introduction(results)
    if strips:
        said.append("Pictures of one column begin from the same noise; a pointer on a guided one shows it unguided.")
    page = templates().get_template("page.html.j2")
    return page.render(title=results["title"], introduction=said, sections=_sections(results, strips))
