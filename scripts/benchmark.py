"""Measure speed and memory as ratios within one run: medians of interleaved repetitions, on this machine.

  python scripts/benchmark.py                           # everything that is cheap
  python scripts/benchmark.py --only frechet,neighbours --json benchmark.json

frechet: the Fréchet distance of 2048-dimensional features against scipy's matrix square root. neighbours: precision and
recall of 10,000 against 10,000 features against the matrix products they need. inception: layouts of the feature
network, and what moments cost beside it.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import scipy.linalg

from evaluations.inception import ConvNorm, Inception
from evaluations.moments import Moments, frechet_distance
from evaluations.neighbours import BLOCK, Distances, neighbours
from guided_diffusion.timing import seconds

import torch  # isort: skip (after evaluations, which sets how its threads wait)


@dataclass(frozen=True)
class Row:
    """One result: a ratio or an amount, and what it is."""

    section: str
    what: str
    value: float
    unit: str = "×"
    goal: str = ""


def medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median time of each, one after the other in turns, after one call of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            spent = seconds(work)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def frechet(repeats: int) -> list[Row]:
    rng = np.random.default_rng(0)
    d = 2048
    # Variances that fall by a factor of 160,000, as those of image features do.
    scale = np.exp(-np.linspace(0, 6, d))
    turn, _ = np.linalg.qr(rng.standard_normal((d, d)))
    first, second = (Moments.of((rng.standard_normal((2 * d, d)) * scale) @ turn).gaussian() for _ in range(2))
    product = first.covariance @ second.covariance
    times = medians(
        {"ours": lambda: frechet_distance(first, second), "sqrtm": lambda: scipy.linalg.sqrtm(product)}, repeats
    )
    return [
        Row(
            "frechet", "Fréchet distance / scipy.linalg.sqrtm, d = 2048", times["ours"] / times["sqrtm"], goal="≤ 0.125"
        )
    ]


def features(n: int, seed: int, d: int = 2048) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def neighbours_(repeats: int) -> list[Row]:
    n = 10_000
    a, b = features(n, 0), features(n, 1)

    def products():
        """The symmetric products of both sides with themselves, and the one across: two whole ones."""
        for left, right in ((a, b), (b, a)):
            for start in range(0, n, BLOCK):
                left[start : start + BLOCK] @ right.T

    before = peak_bytes()
    neighbours(a, b, Distances(centre=a.mean(dim=0)))
    extra = peak_bytes() - before
    times = medians({"ours": lambda: neighbours(a, b, Distances(centre=a.mean(dim=0))), "products": products}, repeats)
    return [
        Row("neighbours", "precision and recall, 10k × 10k × 2048 / its matrix products",
            times["ours"] / times["products"], goal="≤ 1.6"),
        Row("neighbours", "extra memory", extra / 1e6, "MB", "< 300"),
    ]  # fmt: skip


def inception_(repeats: int) -> list[Row]:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 256, 256), dtype=torch.uint8)

    def network(fused: bool) -> Inception:
        made = Inception().eval().requires_grad_(False)
        for part in [part for part in made.modules() if isinstance(part, ConvNorm)] if fused else []:
            part.fuse()
        return made

    networks = {
        "as it is used": network(fused=True).to(memory_format=torch.channels_last),
        "weights not channels-last": network(fused=True),
        "batch norm not folded": network(fused=False).to(memory_format=torch.channels_last),
    }
    pool = features(len(images), 2).numpy()
    spatial = features(len(images), 3, 2023).numpy()
    with torch.inference_mode():
        works = {name: (lambda made=made: made(images)) for name, made in networks.items()}
        works["moments"] = lambda: (Moments.of(pool), Moments.of(spatial))
        times = medians(works, repeats)
    used, moments = times["as it is used"], times.pop("moments")
    rows = [Row("inception", "time / best layout", used / min(times.values()), goal="≤ 1.10")]
    rows += [
        Row("inception", f"{name} / as it is used", spent / used) for name, spent in times.items() if spent is not used
    ]
    rows.append(Row("inception", "images per second", len(images) / used, "1/s"))
    rows.append(Row("inception", "moments / features", moments / used, goal="< 0.02"))
    return rows


SECTIONS = {"frechet": frechet, "neighbours": neighbours_, "inception": inception_}


def machine() -> dict[str, object]:
    """What the numbers were taken on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of each (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows and the machine to this file")
    args = parser.parse_args()
    names = args.only.split(",")
    for name in names:
        if name not in SECTIONS:
            parser.error(f"--only: wanted some of {', '.join(SECTIONS)}, got {name!r}")
    if args.repeats < 1:
        parser.error(f"--repeats: wanted 1 or more, got {args.repeats}")
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    rows = []
    for name in names:
        # A process of its own, or the memory of one section would hide that of the next.
        with get_context("spawn").Pool(1) as pool:
            for row in pool.apply(SECTIONS[name], (args.repeats,)):
                goal = f"   (goal {row.goal})" if row.goal else ""
                print(f"{row.section:<11} {row.what:<64} {row.value:8.3f} {row.unit}{goal}", flush=True)
                rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
