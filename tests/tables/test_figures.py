"""Figures of a plan's rows: what they show, and what they say that they leave out."""

import runpy

import pytest

from guided_diffusion.tables import figures, report
from running import SCRIPTS


def row_of(name, cost, value, error=1.0, difference=None, **more):
    """A measured row, as results.json has it."""
    found = {"frechet_distance": {"value": value, "error": error}}
    if difference is not None:
        difference = {"metrics": {"frechet_distance": {"value": difference, "error": 0.5}}}
    return {"name": name, "label": name, "group": "a", "x": None, "metrics": found, "common": found, "same_as": "",
            "n": 5, "network_evaluations_per_sample": cost, "difference": difference} | more  # fmt: skip


def drawn_by(curve):
    """What a figure shows, by panel and line: x, values, lengths of the bars there are, whether points are joined."""
    pytest.importorskip("matplotlib")
    panels = []
    for axes in curve.draw().axes:
        shown = {}
        for container in axes.containers:
            line, _, [bars] = container.lines
            ends = [segment[:, 1] for segment in bars.get_segments() if len(segment)]
            lengths = [pytest.approx((high - low) / 2) for low, high in ends]
            shown[container.get_label()] = (
                line.get_xdata().tolist(), line.get_ydata().tolist(), lengths, line.get_linestyle() != "None",
            )  # fmt: skip
        panels.append(shown)
    return panels


def test_curve_of_a_group_has_errors_and_paired_differences():
    rows = [
        row_of("s = 0", 50, 9, x=0), row_of("s = 1", 50, 5, difference=-4, x=1),
        row_of("s = 2", 50, 7, difference=-2, x=2), row_of("s = 3", 50, 7, x=3) | {"metrics": {}, "common": {}},
    ]  # fmt: skip
    [curve] = figures.curves_by_x(rows, "Scale", 5)
    assert curve.caption.endswith("Not measured, so not here: s = 3.")
    distances, differences = drawn_by(curve)
    assert distances == {"Scale": ([0, 1, 2], [9, 5, 7], [1, 1, 1], True)}
    assert differences == {"Scale": ([0, 1, 2], [0, -4, -2], [0.5, 0.5], True)}
    assert [axes.get_xlabel() for axes in curve.draw().axes] == ["Scale", "Scale"]
    assert [axes.get_ylabel() for axes in curve.draw().axes] == ["Fréchet distance", "minus that of s = 0"]


def test_curve_of_few_points_says_what_it_lacks():
    rows = [row_of("s = 0", 50, 9, error=None, x=0), row_of("s = 1", 50, 5, x=1, n=7, common={})]
    [curve] = figures.curves_by_x(rows, "Scale", 5)
    [distances] = drawn_by(curve)
    assert distances == {"Scale": ([0, 1], [9, 5], [1], False)}
    assert "Two points make no line." in curve.caption
    assert "s = 0 N = 5, s = 1 N = 7" in curve.caption
    assert "the error is not known: s = 0." in curve.caption
    [curve] = figures.curves_by_x([rows[0], rows[1] | {"metrics": {}}], "Scale", 5)
    assert curve.draw is None
    assert curve.caption == "No curve: 1 of 2 rows of it measured."
    assert figures.curves_by_x([row_of("a", 50, 1)], "Others", 5) == []


def of_cost(cost, **values):
    """The rows of a group: the first, which others differ from, and more."""
    (first, value), *others = values.items()
    rows = [row_of(name, cost, other, difference=other - value) for name, other in others]
    return [row | {"group": str(cost)} for row in (row_of(first, cost, value), *rows)]


def test_methods_over_network_evaluations():
    rows = [*of_cost(25, none=20, sag=18, once=1), *of_cost(100, none=10, sag=11, both=3), *of_cost(50, both=3)]
    rows += [row_of("both", 50, 4, group="more"), row_of("sag", 100, 2, group="copy", same_as="sag")]
    rows += [row_of("cg", 100, 2, group="more", classifier_gradients_per_sample=100)]
    [curve] = figures.cost_curves({"rows": rows, "common_n": 5})
    distances, differences = drawn_by(curve)
    assert list(distances) == ["none", "sag"]  # "once" has one cost, "both" two rows at one
    assert "Left out, as several of their rows took the same number: both." in curve.caption
    assert "is known in network evaluations: cg." in curve.caption
    x, values, bars, joined = distances["none"]
    assert (x, values, bars, joined) == (pytest.approx([25, 100], rel=0.02), [20, 10], [1, 1], True)
    assert differences["sag"][1:] == ([-2, 1], [0.5, 0.5], True)
    figure = curve.draw()
    first = figure.axes[0].containers[0].lines[0]
    assert (first.get_color(), first.get_linestyle()) == ("black", "--")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["none", "sag"]


def test_methods_are_compared_where_they_can_be():
    """Against one reference, at one N, and with all that they cost."""
    rows = [*of_cost(25, none=20, sag=18), *of_cost(100, none=10, sag=11)]
    other = [row | {"reference": "other.npz", "group": f"other {row['group']}"} for row in rows]
    assert len(figures.cost_curves({"rows": rows + other, "common_n": 5})) == 2
    assert figures.cost_curves({"rows": rows[:2] + other[2:], "common_n": 5}) == []
    fewer = [row | ({"n": 3, "common": {}} if row["label"] == "sag" else {}) for row in rows]
    [curve] = figures.cost_curves({"rows": fewer, "common_n": 5})
    assert list(drawn_by(curve)[0]) == ["none, N = 5", "sag, N = 3"]
    names = [f"m{number:02}" for number in range(12)]
    many = [row for cost in (25, 100) for row in of_cost(cost, none=20, **dict.fromkeys(names, 5))]
    [curve] = figures.cost_curves({"rows": many, "common_n": 5})
    assert list(drawn_by(curve)[0]) == ["none", *names[:9]]
    assert "a figure shows 10 at most: m09, m10, m11." in curve.caption


def test_equal_cost_leaves_out_what_does_not_compare():
    rows = [
        row_of("a", 100, 3), row_of("b", 100, 2), row_of("c", 50, 1),
        row_of("d", 100, 1, classifier_gradients_per_sample=50), row_of("e", 100, 1, reference="other.npz"),
    ]  # fmt: skip
    [(cost, tied)] = report.equal_cost({"rows": rows})
    assert cost == 100
    assert [found["name"] for found in tied] == ["b", "a"]


def test_cost_counts_all_passes():
    weak = {"weak_network_evaluations_per_sample": 40}
    assert figures.cost(row_of("a", 40, 1, weak_network_pass=0.25, **weak)) == 50
    assert figures.cost(row_of("a", 40, 1, **weak)) is None
    assert figures.cost(row_of("a", 40, 1, classifier_gradients_per_sample=40)) is None
    assert figures.cost(row_of("a", 40, 1)) == 40


def test_figure_of_a_page_is_the_same_for_the_same_results(tmp_path):
    """docs/figures.py"""
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(SCRIPTS.parent / "docs" / "figures.py"))
    costs = {"rows": [*of_cost(25, none=20, sag=18), *of_cost(100, none=10, sag=11)], "common_n": 5}
    texts = []
    for _ in range(2):
        script["draw_costs"](costs, tmp_path / "cost.svg")
        texts.append((tmp_path / "cost.svg").read_text())
    assert texts[0] == texts[1]
    with pytest.raises(SystemExit, match="got 0"):
        script["draw_costs"](costs | {"rows": costs["rows"][:2]}, tmp_path / "cost.svg")
