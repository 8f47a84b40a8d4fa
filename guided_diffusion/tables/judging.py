"""Rows against their reference and against each other: metrics, and differences of paired samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluations.ranks import BadInputError, Ranks

from ..storage.fetch import local_path
from .plans import Plan, Row
from .report import DISTANCES

if TYPE_CHECKING:
    from evaluations.judge import Settings

COMPARED = (*DISTANCES, "precision", "recall")
"""Metrics whose differences between rows are told."""


@dataclass(frozen=True)
class Judge:
    """Evaluates the rows of a plan in a folder, by all ranks together; features are kept there. inception: weights."""

    plan: Plan
    folder: Path
    inception: Path | None
    ranks: Ranks

    def _settings(self, row: Row) -> "Settings":
        from evaluations.judge import Settings

        return Settings(
            self.ranks.first(lambda: str(local_path(row.reference))),
            str(self.folder / row.run),
            features=self.plan.features,
            inception=self.inception,
            pr_dtype=self.plan.pr_dtype,
            cache=self.folder / "features",
        )

    def metrics(self, row: Row, n: int) -> dict[str, Any]:
        """The metrics of a row's n samples, on rank 0: of all, and of the first `common_n`."""
        from evaluations.judge import judge

        settings = self._settings(row)
        result = judge(settings, self.ranks)
        of_common_n = result
        if 0 < self.plan.common_n < n:
            of_common_n = judge(replace(settings, num_samples=self.plan.common_n), self.ranks)
        if self.ranks.rank:
            return {}
        return {
            "metrics": result["metrics"],
            "common": of_common_n["metrics"] if 0 < self.plan.common_n <= n else {},
            "not_comparable": result["comparable"]["because"],
            "weights_sha256": result["provenance"]["weights_sha256"],
        }

    def differences(
        self, pairs: Sequence[tuple[Row, Row]], known: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, dict[str, Any]]:
        """How rows differ from the rows that they are paired with, by name, on rank 0. known: results of all runs."""
        made: dict[tuple[str, str], dict[str, Any]] = {}
        found = {}
        for row, first in pairs:
            runs = row.run, first.run
            if runs not in made:
                made[runs] = self._difference(row, first, *(known[name] for name in runs))
            found[row.name] = {"against": first.name} | made[runs]
        return found

    def _difference(
        self, row: Row, first: Row, of_row: Mapping[str, Any], of_first: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Metrics of a row minus those of another, of the first samples that both have; or the reason for none."""
        from evaluations.judge import judge

        n = min(of_row["n"], of_first["n"])
        names = tuple(name for name in COMPARED if name in of_row["metrics"] and name in of_first["metrics"])
        try:
            if reason := self.ranks.first(partial(self._why_not, row, first, n)):
                return {"reason": f"not paired: {reason}"}
            settings = replace(self._settings(row), against=str(self.folder / first.run), num_samples=n, metrics=names)
            result = judge(settings, self.ranks)
        except BadInputError as refusal:
            return {"reason": f"not judged: {refusal}"}
        if self.ranks.rank:
            return {}
        metrics = result["difference"]["metrics"]
        for number in metrics.values():
            number["errors"] = number["value"] / number["error"] if number["error"] else None
        return {"n": n, "metrics": metrics}

    def _why_not(self, row: Row, first: Row, n: int) -> str:
        """Why two rows cannot be compared sample by sample; empty if they can."""
        from evaluations.pairing import why_not_paired
        from evaluations.sources import open_source

        if row.reference != first.reference:
            return f"{row.run} is measured against another reference than {first.run}"
        sources = (open_source(str(self.folder / each.run)) for each in (row, first))
        named = (
            replace(source, path=each.run, images=source.images.first(n))
            for source, each in zip(sources, (row, first), strict=True)
        )
        return why_not_paired(*named)
