"""Plans: files that name runs row by row, what is published for each, and what they are measured against."""

import fnmatch
import re
import shlex
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..settings.options import quoted
from ..settings.shipped import parse_yaml, read_yaml, shipped, shipped_yaml
from ..storage.files import is_address

TABLES = shipped("tables")

WEIGHTS = ("model_path", "classifier_path", "weak_model_path")
"""Settings that name a checkpoint."""

METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "frechet_distance")
COSTS = ("memory_mb", "seconds", "relative_time")
"""Published costs (the paper's Table 7): shown beside what was measured, not metrics of samples."""


@dataclass(frozen=True)
class Row:
    """One run of a plan.

    config: what --config takes, names or paths, the later one winning. settings: flags over them. published: metrics by
    name; None where the paper has the row but the number is not known. group: rows of one group stand together, and
    where they have an `x` (the parameter that varies) they make a curve. same_as: the row whose run this one is, too.
    missing: why the row cannot be run here.
    """

    name: str
    label: str
    group: str
    config: tuple[str, ...]
    settings: Mapping[str, Any]
    published: Mapping[str, float | None]
    reference: str
    x: float | None = None
    note: str = ""
    missing: str = ""
    same_as: str = ""

    @cached_property
    def all_settings(self) -> dict[str, Any]:
        """What its files and its flags say, the later one winning."""
        return {key: value for values in (*map(read_yaml, self.config), self.settings) for key, value in values.items()}

    @property
    def run(self) -> str:
        """The row whose run this one is."""
        return self.same_as or self.name

    @property
    def script(self) -> str:
        """The sampling script of the row: classifier_sample where a classifier is named, else image_sample."""
        return "classifier_sample" if "classifier_path" in self.all_settings else "image_sample"

    @property
    def addresses(self) -> list[str]:
        """The remote files that it needs: checkpoints, and what it is measured against."""
        settings = self.all_settings
        paths = [*(str(settings.get(key, "")) for key in WEIGHTS), self.reference]
        return [path for path in paths if is_address(path)]

    def arguments(self) -> list[str]:
        """The flags of the script."""
        files = [part for path in self.config for part in ("--config", path)]
        return files + [part for key, value in self.settings.items() for part in (f"--{key}", str(value))]

    @property
    def command(self) -> str:
        """What a user would type in the project's folder."""
        return f"python scripts/{self.script}.py {shlex.join(self.arguments())}"

    def with_settings(self, settings: Mapping[str, Any]) -> "Row":
        """The row with other flags."""
        return replace(self, settings={**self.settings, **settings})


@dataclass(frozen=True)
class Plan:
    """A file of rows. features, pr_dtype: the evaluator's. paper: what the published numbers are from.

    common_n: rows of more samples are judged by their first so many as well, so that all compare; 0: no such number.
    groups: titles of the rows' groups.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    paper: str = ""
    note: str = ""
    features: str = "inception"
    pr_dtype: str = "fp16"
    common_n: int = 0
    groups: Mapping[str, str] = field(default_factory=dict)

    def chosen(self, patterns: str) -> list[Row]:
        """The rows that patterns like `unguided,sag_*` ask for by name; a ValueError if one asks for none."""
        names = [row.name for row in self.rows]
        for pattern in patterns.split(","):
            if not fnmatch.filter(names, pattern):
                raise ValueError(f"--rows: no row is called {pattern!r}; there are {', '.join(names)}")
        return [row for row in self.rows if any(fnmatch.fnmatch(row.name, wanted) for wanted in patterns.split(","))]

    def first(self, row: Row) -> Row | None:
        """What a row is compared with, the first one of its group; None if it is that one's run itself."""
        first = next(other for other in self.rows if other.group == row.group)
        return None if first.run == row.run else first

    def compared(self, run: str, later: Set[str] = frozenset()) -> list[tuple[Row, Row]]:
        """Rows that a new run may be compared in, each with its group's first. later: runs that ask for themselves."""
        pairs = [(row, self.first(row)) for row in self.rows]
        return [
            (row, first)
            for row, first in pairs
            if first and (row.run == run or (first.run == run and row.run not in later))
        ]


def _of_type(where: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: wanted {wanted}, got {quoted(value)}")
    return value


def _texts(where: str, values: Mapping[str, Any], *keys: str) -> dict[str, str]:
    return {key: _of_type(f"{where}: {key}", values[key], str, "a text") for key in keys if key in values}


def _known(where: str, values: Mapping[str, Any], keys: set[str], needed: set[str]) -> None:
    for key in values:
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}; wanted some of {', '.join(sorted(keys))}")
    for key in sorted(needed - set(values)):
        raise ValueError(f"{where}: wanted a {key}, got none")


def _config(name: str, where: str) -> str:
    try:
        shipped_yaml(name)
    except ValueError as error:
        raise ValueError(f"{where}: config: {error}") from None
    return name


def _reference(name: str) -> str:
    """An address as it is, a path below configs/ as that of its file."""
    return name if not name or "://" in name or Path(name).is_absolute() else str(shipped(name))


ROW_KEYS = {"name", "label", "group", "config", "set", "published", "reference", "x", "note", "missing", "same_as"}
PLAN_KEYS = {
    "title", "paper", "note", "features", "pr_dtype", "common_n", "groups", "config", "set", "reference", "rows",
}  # fmt: skip


def _row(values: Any, defaults: Mapping[str, Any], where: str) -> Row:
    _of_type(where, values, dict, "a row")
    name = _of_type(f"{where}: name", values.get("name"), str, "a text")
    if not re.fullmatch(r"\w[\w.+=-]{0,99}", name):
        raise ValueError(f"{where}: name: wanted letters, digits and _.+=-, as it is also a folder's, got {name!r}")
    where = f"{where}: row {name}"
    _known(where, values, ROW_KEYS, {"name", "label"})
    config = values.get("config", defaults.get("config", []))
    config = [config] if isinstance(config, str) else _of_type(f"{where}: config", config, list, "a list of names")
    for item in config:
        _of_type(f"{where}: config", item, str, "a list of names")
    texts = _texts(where, {"group": "", "reference": "", **defaults, **values}, "label", "group", "reference")
    texts |= _texts(where, values, "note", "missing", "same_as")
    settings = _of_type(f"{where}: set", values.get("set", {}), dict, "flags")
    published = _of_type(f"{where}: published", values.get("published", {}), dict, "metrics")
    for key, value in published.items():
        if key not in METRICS + COSTS:
            raise ValueError(f"{where}: published: wanted some of {', '.join(METRICS + COSTS)}, got {key!r}")
        if value is not None:
            _of_type(f"{where}: published: {key}", value, (int, float), "a number, or null for unknown")
    if not config and not texts.get("missing") and not texts.get("same_as"):
        raise ValueError(f"{where}: wanted a config, or missing: why there is none; got neither")
    return Row(
        name=name,
        config=tuple(_config(item, where) for item in config),
        settings={**defaults.get("set", {}), **settings},
        published=published,
        x=None if values.get("x") is None else float(_of_type(f"{where}: x", values["x"], (int, float), "a number")),
        **texts | {"reference": _reference(texts["reference"])},
    )


def _as(run: Row, row: Row) -> Row:
    """A row with the run of another one."""
    return replace(row, config=run.config, settings=run.settings, reference=run.reference)


def read_plan(path: str | Path) -> Plan:
    """The plan in a YAML file, or that of a name in configs/tables; a ValueError says what is wrong with it."""
    path = Path(shipped_yaml(str(path), "tables", "plan"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__})") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    where = str(path)
    _known(where, _of_type(where, values, dict, "keys and values"), PLAN_KEYS, {"title", "rows"})
    _of_type(f"{where}: set", values.get("set", {}), dict, "flags")
    rows = tuple(_row(row, values, where) for row in _of_type(f"{where}: rows", values["rows"], list, "a list"))
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: two rows are called {name!r}")
    runs = {row.name: row for row in rows if not row.same_as}
    for row in rows:
        if row.same_as and row.same_as not in runs:
            raise ValueError(f"{where}: row {row.name}: same_as: wanted another row's name, got {row.same_as!r}")
    rows = tuple(_as(runs[row.same_as], row) if row.same_as else row for row in rows)
    common_n = _of_type(f"{where}: common_n", values.get("common_n", 0), int, "a number of samples")
    texts = _texts(where, values, "title", "paper", "note", "features", "pr_dtype")
    for key, known in (("features", ("inception", "emoji")), ("pr_dtype", ("fp32", "fp16"))):
        if texts.get(key, known[0]) not in known:
            raise ValueError(f"{where}: {key}: wanted {' or '.join(known)}, got {texts[key]!r}")
    groups = _of_type(f"{where}: groups", values.get("groups", {}), dict, "titles by group")
    groups = {str(key): str(value) for key, value in groups.items()}
    return Plan(name=path.stem, rows=rows, groups=groups, common_n=common_n, **texts)
