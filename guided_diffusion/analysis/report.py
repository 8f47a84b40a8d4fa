"""The attention report for people: tables beside the paper's numbers, curves, and what is recommended."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.files import plain
from ..tables.page import Curve, Section, as_markdown, measured, templates

TEMPLATES = Path(__file__).with_name("templates")

Results = Mapping[str, Any]

TABLE_9 = {
    (8, "1"): (0.16, 0.23), (16, "1"): (0.18, 0.25), (32, "1"): (0.18, 0.26),
    (8, "1.3"): (0.09, 0.14), (16, "1.3"): (0.05, 0.11), (32, "1.3"): (0.04, 0.10),
}  # fmt: skip
"""The paper's IoU of random and of self-attention masks, by side of the map and ψ (Hong et al., Table 9)."""

NO_EVIDENCE = (
    "A small model trained on few pictures, such as the embedded one, shows that the software works; its numbers are "
    "no evidence about the paper's models."
)


shown = partial(measured, digits=3)
"""A value with its standard error."""


def agreement(number: Mapping[str, Any]) -> str:
    """Whether a difference that the paper found positive is so here, and by more than two standard errors."""
    value, error = number["value"], number["error"]
    if value is None or error is None:
        return "not known"
    if abs(value) <= 2 * error:
        return "not decided (within 2 standard errors of 0)"
    return "yes" if value > 0 else "no"


def _by_size(study: Results) -> Iterator[tuple[str, Results, str, Results]]:
    for size in study["sizes"]:
        for threshold in study["thresholds"]:
            yield "×".join(map(str, size["map"])), size, threshold, size["over_steps"][threshold]


def frequency(study: Results) -> Section:
    """Masked cells against whole images (Fig. 11)."""
    rows = []
    for name, _, threshold, found in _by_size(study):
        more = found.get("more_excess")
        rows.append(
            [
                name, threshold, shown(found["share"]), shown(found["excess"]), agreement(found["excess"]),
                shown(more) if more else "–", agreement(more) if more else "–", str(found["excess"]["n"]),
            ]
        )  # fmt: skip
    first = study["thresholds"][0]
    return Section(
        "Frequencies",
        f"Log-magnitude spectrum, ln(1 + |F|) of {study['patch']}×{study['patch']} pixels around each cell of the map, "
        "of the noise-free image: cells in the mask less all cells of the same image, mean over frequencies. In the "
        "paper (Fig. 11, curves without numbers) masked patches lie above whole images at every map size, and "
        "ψ = 1.3 above ψ = 1.0. The definition of a patch is ours: the paper gives none.",
        ["map", "ψ", "share", "masked − all", "above, as in the paper?", f"more than at ψ = {first}",
         "above, as in the paper?", "N"],
        rows,
        curves=[Curve(partial(curves, study))],
    )  # fmt: skip


def semantics(study: Results) -> Section:
    """Overlap with objects (Table 9)."""
    rows = []
    for name, size, threshold, found in _by_size(study):
        paper = TABLE_9.get((size["map"][0], threshold)) if size["map"][0] == size["map"][1] else None
        rows.append(
            [
                name, threshold, shown(found["iou_random"]), shown(found["iou"]), shown(found["iou_gain"]),
                f"{paper[0]:.2f} → {paper[1]:.2f}" if paper else "–", agreement(found["iou_gain"]),
                shown(found["iou_centre"]), str(found["iou_gain"]["n"]),
            ]
        )  # fmt: skip
    return Section(
        "Objects",
        "IoU of the mask with the object mask of the image; random: as many cells of the same map, chosen at random; "
        "middle: as many cells nearest to the image's middle, a baseline that the paper does not have, and hard to "
        "beat where all objects stand in the middle.",
        ["map", "ψ", "random", "attention", "attention − random", "paper: random → attention",
         "above, as in the paper?", "middle", "N"],
        rows,
    )  # fmt: skip


def by_step(study: Results) -> Section:
    """The same at each level of noise, at the first ψ."""
    first = study["thresholds"][0]
    rows = [
        [
            "×".join(map(str, size["map"])), f"{step} of {study['of_steps']}", shown(found["share"]),
            shown(found["excess"]), shown(found.get("iou_random")), shown(found.get("iou")),
        ]
        for size in study["sizes"]
        for step, numbers in zip(study["steps"], size["by_step"], strict=True)
        for found in [numbers[first]]
    ]  # fmt: skip
    return Section(
        "By noise",
        f"At ψ = {first}; step 0 is the image, the last one noise.",
        ["map", "step t", "share", "masked − all", "IoU random", "IoU attention"],
        rows,
    )


def blocks(results: Results) -> Section:
    """The ranking, with what each block was ranked by."""
    rows, change = results["ranking"], results["change"]
    titles = {"iou_gain": "IoU − random", "excess": "masked − all", "change": "‖Δ‖/‖ε‖"}
    measures = list(rows[0]["measures"])
    sigmas = list(next(iter(change["blocks"].values())))
    study = results["study"]["blocks"]
    first = results["study"]["thresholds"][0]
    cells = [
        [
            row["block"], "×".join(map(str, row["map"])), f"{row['mean_rank']:.2f}",
            shown(study[row["block"]]["over_steps"][first]["share"]),
            *(f"{shown(row['measures'][measure])} ({row['ranks'][measure]})" for measure in measures),
            *(shown(change["blocks"][row["block"]][sigma]) for sigma in sigmas[1:]),
        ]
        for row in rows
    ]  # fmt: skip
    heads = [titles[measure] for measure in measures[:-1]] + [f"{titles['change']} at σ = {sigmas[0]}"]
    return Section(
        "Which block",
        f"At ψ = {first}; in brackets the rank. The change is that of {change['samples']} samples of the run, mean "
        f"over {len(change['steps'])} steps. {results['rule']}",
        ["block", "map", "mean rank", "share", *heads, *(f"at σ = {sigma}" for sigma in sigmas[1:])],
        cells,
    )


def sections(results: Results) -> list[Section]:
    """All tables of the report."""
    study = results["study"]
    objects = [semantics(study)] if results["objects"] else []
    return [frequency(study), *objects, by_step(study), blocks(results)]


def introduction(results: Results) -> list[str]:
    """What was looked at, and what is recommended."""
    study = results["study"]
    flags = " ".join(f"--{name} {value}" for name, value in results["recommendation"].items())
    first = f"To try first: {flags}"
    if results["doubts"]:
        first = f"No recommendation: {'; '.join(results['doubts'])}. First in this order, which is no evidence: {flags}"
    return [
        first,
        f"{results['model']}: {study['images']} images ({results['images']}), noised to steps "
        f"{', '.join(map(str, study['steps']))} of {study['of_steps']}; one network pass a step records every block. "
        "± is the standard error over images; where steps or blocks are averaged, each image's own mean comes first.",
        NO_EVIDENCE,
    ]


def markdown(results: Results) -> str:
    """The report as text."""
    return as_markdown(results["title"], introduction(results), sections(results))


def html(results: Results, looks: Results) -> str:
    """The report as a page. looks: the samples to look through (`scrubber`).

    Curves need matplotlib (the extra `report`); without it the page says so.
    """
    return (
        templates(TEMPLATES)
        .get_template("attention.html.j2")
        .render(
            title=results["title"],
            introduction=introduction(results),
            looks=plain(looks),
            notes=results["notes"],
            sections=sections(results),
        )
    )


def curves(study: Results) -> Any:
    """The spectra of whole images and of masked cells, a picture for each map size, as a figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(study["sizes"]), 3.4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(study["sizes"]), squeeze=False)[0], study["sizes"], strict=True):
        whole = np.array(size["whole"]["value"])
        axes.plot(study["cycles_per_pixel"], whole, color="black", label="all cells")
        for threshold in study["thresholds"]:
            more = size["over_steps"][threshold]["curve"]
            values, errors = (np.array(more[key], dtype=float) for key in ("value", "error"))  # NaN where not known
            style = {"marker": ".", "capsize": 2, "label": f"mask, ψ = {threshold}"}
            axes.errorbar(study["cycles_per_pixel"], whole + values, yerr=errors, **style)
        axes.set(title=f"{size['map'][0]}×{size['map'][1]} maps", xlabel="cycles a pixel", ylabel="ln(1 + |F|)")
        axes.legend()
        axes.grid(alpha=0.3)
    return figure
