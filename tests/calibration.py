"""How far claimed standard errors are from the true ones: metrics of many draws whose distribution is known.

  python tests/calibration.py --draws 400 --out docs/calibration.json     (about an hour on one thread)

A case has n samples and m reference images with D features, and two ways to make samples of the same noise. Per metric:
its true spread over draws, the mean error claimed, and both of the difference between the two ways, beside the error
that it would have if the two were independent.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evaluations.evaluation import Side, difference, evaluate, metric_names
from evaluations.features import ImageFeatures
from evaluations.sources import Images, Part, Source


@dataclass(frozen=True)
class Case:
    """n samples, m reference images, D features. scale, shift: of the samples; other: the second ones' amplitude."""

    n: int
    m: int
    d: int
    scale: float = 0.8
    shift: float = 0.2
    other: float = 0.9


CASES = (Case(256, 400, 8), Case(256, 742, 16, 0.9, 0.1), Case(256, 400, 12, other=0.97), Case(300, 1500, 8, 1.0, 0.3))
LARGE = (*CASES, Case(1000, 742, 16), Case(1000, 3000, 8), Case(256, 742, 320), Case(500, 742, 320), Case(48, 742, 64))
CLASSES = 10


class TensorRows(torch.Tensor):
    """Features in memory, read as those of the cache are."""

    def blocks(self):
        return iter(self.split(512))


def side(x):
    """One side of a comparison, with features [N, D] and logits that are a fixed map of them."""
    x = torch.from_numpy(x.astype(np.float32))
    generator = torch.Generator().manual_seed(0)
    logits = 2 * x @ torch.randn(x.shape[1], CLASSES, generator=generator)
    rows = {name: value.as_subclass(TensorRows) for name, value in (("pool", x), ("spatial", x), ("logits", logits))}
    images = Images([Part("drawn", 0, len(x))], (1, 1))
    return Side(Source("drawn", images), ImageFeatures(rows, ""))


def draw(case, number):
    """Two sets of samples [n, D] of the same noise."""
    rng = np.random.default_rng(number)
    falls = np.exp(-np.linspace(0, 1.5, case.d))
    noise, own = rng.standard_normal((2, case.n, case.d)) * falls
    first = noise * case.scale + case.shift * falls
    return first, case.other * first + 0.05 * own


def names(case):
    """Metrics that the case allows."""
    every = metric_names("fid", extended=True)
    return [name for name in every if name != "fid_infinity" or case.n > 4 * case.d]


def calibrate(case, draws):
    """By metric: value, spread, claimed / spread; of the difference the same, and unpaired / spread."""
    falls = np.exp(-np.linspace(0, 1.5, case.d))
    reference = side(np.random.default_rng(10**6).standard_normal((case.m, case.d)) * falls)
    found, differences = [], []
    for number in range(draws):
        one, other = (evaluate(reference, side(x), names(case), False, torch.device("cpu")) for x in draw(case, number))
        found.append((one.metrics, other.metrics))
        differences.append(difference(one, other))
    table = {}
    for name in names(case):
        values = np.array([[metrics[name].value for metrics in both] for both in found])
        errors = np.array([[metrics[name].error for metrics in both] for both in found])
        away = np.array([[each[name].value, each[name].error] for each in differences])
        spread = values[:, 0].std(ddof=1), away[:, 0].std(ddof=1)
        table[name] = {
            "value": values[:, 0].mean(),
            "spread": spread[0],
            "claimed_over_true": errors[:, 0].mean() / spread[0],
            "difference": away[:, 0].mean(),
            "difference_spread": spread[1],
            "difference_claimed_over_true": away[:, 1].mean() / spread[1],
            "difference_unpaired_over_true": np.sqrt((errors**2).sum(axis=1)).mean() / spread[1],
        }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = []
    for case in LARGE:
        table = calibrate(case, args.draws)
        results.append({"case": vars(case), "draws": args.draws, "metrics": table})
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(case)
        for name, row in table.items():
            print(f"  {name:<26}", "  ".join(f"{key} {value:.3f}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
