"""Which attention block, and how strong a blur: a recommendation from measures of a user's own model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .measures import Mean
from .study import measured
from .watch import Look

ENOUGH = 0.5
"""The part of the change of the mean-pixel blur that a recommended σ reaches."""

FEW = 16
"""Pictures: of fewer, neither ranks nor σ tell one block from another."""

RULE = (
    "Blocks are ranked by each measure (largest first); the recommended one has the smallest mean rank, of equal "
    f"ones the larger change. The recommended σ is the smallest that was tried with at least {ENOUGH:.0%} of the "
    "change that blurring to the mean pixel makes at that block. These rules are ours: neither is the paper's, and "
    "neither was tested against image quality. Try the first few by the quality of samples."
)


class Changes:
    """Streaming sums of ‖Δ‖ / ‖ε‖ by block and σ: of each sample its mean over the steps that were looked at."""

    def __init__(self, blocks: Sequence[str], blur_sigmas: Sequence[float]):
        self._blocks, self._sigmas = list(blocks), list(blur_sigmas)
        self._mean = Mean()

    def add(self, looks: Sequence[Look]) -> None:
        """One batch at all its steps."""
        self._mean.add(
            torch.stack(
                [
                    torch.stack([look.blocks[block].change[sigma] for look in looks]).mean(dim=0)
                    for block in self._blocks
                    for sigma in self._sigmas
                ],
                dim=1,
            )
        )

    def results(self) -> dict[str, dict[str, Any]]:
        """By block and σ (as text)."""
        numbers = [measured(*row) for row in zip(self._mean.value, self._mean.error, self._mean.n, strict=True)]
        width = len(self._sigmas)
        return {
            block: dict(zip([f"{sigma:g}" for sigma in self._sigmas], numbers[row * width :], strict=False))
            for row, block in enumerate(self._blocks)
        }


def ranking(study: Mapping[str, Any], change: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Blocks from the best mean rank down, each with the measures that it was ranked by.

    study: `AttentionStudy.results`, of which the first threshold counts. change: `Changes.results`, of which the first
    σ counts.
    """
    first_threshold = study["thresholds"][0]
    rows = []
    for name, block in study["blocks"].items():
        found = block["over_steps"][first_threshold]
        measures = {measure: found[measure] for measure in ("iou_gain", "excess") if measure in found}
        measures["change"] = next(iter(change[name].values()))
        rows.append({"block": name, "map": block["map"], "measures": measures})
    for measure in rows[0]["measures"]:

        def value(row: Mapping[str, Any], measure: str = measure) -> float:
            found = row["measures"][measure]["value"]
            return -math.inf if found is None else found

        for row in rows:
            row.setdefault("ranks", {})[measure] = 1 + sum(value(other) > value(row) for other in rows)
    for row in rows:
        row["mean_rank"] = round(sum(row["ranks"].values()) / len(row["ranks"]), 3)
    return sorted(rows, key=lambda row: (row["mean_rank"], -(row["measures"]["change"]["value"] or 0)))


def recommended_sigma(change: Mapping[str, Mapping[str, Any]]) -> str:
    """The σ of one block by `RULE`, as text; change: by σ, with the mean-pixel blur `inf`.

    Where that changed nothing that could be measured, as of a network that puts out zeros, it is the smallest.
    """
    most = change["inf"]["value"] or 0
    finite = sorted((text for text in change if math.isfinite(float(text))), key=float)
    if not finite:
        return "inf"
    return next((text for text in finite if (change[text]["value"] or 0) >= ENOUGH * most), finite[-1])


def recommendation(rows: Sequence[Mapping[str, Any]], change: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The flags to try first: `sag_block` and `blur_sigma`."""
    best = rows[0]["block"]
    return {"sag_block": best, "blur_sigma": recommended_sigma(change[best])}


def doubts(rows: Sequence[Mapping[str, Any]], images: int, samples: int) -> list[str]:
    """Why the recommendation from ranked rows, of so many images and samples, is no evidence; empty if it may be."""
    found = [
        f"{count} {word} are too few to tell blocks apart (wanted {FEW} or more)"
        for count, word in ((images, "images"), (samples, "samples"))
        if count < FEW
    ]
    first = [row["block"] for row in rows if row["mean_rank"] == rows[0]["mean_rank"]]
    if len(first) > 1:
        found.append(f"{', '.join(first)} share the first place")
    return found
