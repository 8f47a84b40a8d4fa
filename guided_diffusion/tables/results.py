"""What is known of a plan's rows: a folder with results.json and the reports, which several processes may add to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..runs.identity import device_name, versions
from ..storage.files import json_text, write_atomically
from . import comparison, report
from .plans import Plan, Row


def _of_plan(row: Row) -> dict[str, Any]:
    """What the plan says of a row, for people."""
    return {
        "name": row.name,
        "label": row.label,
        "group": row.group,
        "x": row.x,
        "note": row.note,
        "same_as": row.same_as,
        "reference": Path(row.reference).name,
        "published": dict(row.published),
    }


def unmeasured(row: Row, reason: str) -> dict[str, Any]:
    """The result of a row of the plan that was not run."""
    return _of_plan(row) | {"command": row.command, "reason": reason, "n": None, "metrics": {}, "common": {}}


def known(folder: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """What the folder has of rows, by name, where the plan still asks for the same."""
    try:
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
        found = {row["name"]: row for row in rows}
        return {
            row.name: found[row.name]
            for row in plan.rows
            if not row.missing and row.name in found and found[row.name]["command"] == row.command
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _table(plan: Plan, found: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A result for every row of the plan."""
    rows = []
    for row in plan.rows:
        of = next(other for other in plan.rows if other.name == row.run)
        result = (found.get(of.name) or unmeasured(of, row.missing or "not yet")) | _of_plan(row)
        rows.append(result | {"difference": _difference(plan, row, found)})
    report.add_relative_times(rows)
    return rows


def _difference(plan: Plan, row: Row, found: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """How a measured row differs from its group's first, or why that is not known; a reason begins with a short one."""
    first = plan.first(row)
    if not (first and compares(found.get(row.run))):
        return None
    if not compares(found.get(first.run)):
        return {"against": first.name, "reason": f"no first row: {first.run} is not measured here"}
    known = found.get(row.name, {}).get("difference") or {}
    if known.get("against") != first.name:
        return {"against": first.name, "reason": "not yet: the same command again makes it"}
    return known


def compares(result: Mapping[str, Any] | None) -> bool:
    """Whether a row has been measured against its reference."""
    return any(name in (result or {}).get("metrics", {}) for name in report.DISTANCES)


def write(
    folder: Path,
    plan: Plan,
    done: Mapping[str, dict[str, Any]],
    device: torch.device,
    differences: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Put what this process found, by row, among what is there: results.json and both reports, written anew.

    differences: to the groups' first rows, by row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        found = known(folder, plan) | done
        for name, difference in (differences or {}).items():
            found[name] = found.get(name, {}) | {"difference": difference}
        rows = _table(plan, found)
        results = {
            "plan": plan.name,
            "title": plan.title,
            "paper": plan.paper,
            "note": plan.note,
            "features": plan.features,
            "pr_dtype": plan.pr_dtype,
            "common_n": plan.common_n,
            "groups": dict(plan.groups),
            "device": device_name(device),
            "versions": versions(),
            "rows": rows,
        }
        strips = {
            row["name"]: comparison.strips(folder / (row["same_as"] or row["name"])) for row in rows if row["metrics"]
        }
        texts = {
            "results.json": json_text(results, indent=1) + "\n",
            "report.md": report.markdown(results),
            "report.html": report.html(results, {name: found for name, found in strips.items() if found}),
        }
        for name, text in texts.items():
            write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
