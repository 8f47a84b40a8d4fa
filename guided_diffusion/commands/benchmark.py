"""Measure speed and memory as ratios within one run: medians of interleaved repetitions, on this machine.

  python scripts/benchmark.py                            # everything, some minutes
  python scripts/benchmark.py --only steps,network --json benchmark.json

steps: sampling steps of the embedded model with each guidance, by the unguided step. network: one call of an ADM
network against a plain path, which is kept here alone: whole attention maps, NCHW layout, the allocator as it is,
float32 (on a GPU: float16). memory: the peak with guidance, by the unguided one. half: images of half precision against
those of float32. merge: the samples of a run into one file.
frechet: the Fréchet distance of 2048-dimensional features against scipy's matrix square root. neighbours: precision and
recall of 10,000 against 10,000 features against the matrix products they need. inception: layouts of the feature
network, and what moments cost beside it. training: steps of the embedded network, by the plain path's in float32.
"""

import argparse
import os
import platform
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import evaluations  # noqa: F401 (before torch: it sets how its threads wait)

import torch  # isort: skip

from ..runs.ranks import command
from ..settings.options import Parser, whole
from ..storage.files import json_text, write_atomically
from .benchmarks import evaluating, sampling
from .benchmarks.training import training

SECTIONS = {
    "steps": sampling.steps,
    "network": sampling.network,
    "memory": sampling.memory,
    "half": sampling.half,
    "merge": sampling.merge,
    "frechet": evaluating.frechet,
    "neighbours": evaluating.precision_recall,
    "inception": evaluating.inception,
    "training": training,
}


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


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated (default %(default)s)")
    parser.add_argument("--repeats", type=whole(1), default=5, help="repetitions of each (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows and the machine to this file")
    args = parser.parse_args()
    names = args.only.split(",")
    for name in names:
        if name not in SECTIONS:
            parser.error(f"--only: wanted some of {', '.join(SECTIONS)}, got {name!r}")
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items() if value is not None))
    rows = []
    for name in names:
        # A process of its own, or the memory of one section would hide that of the next. It may have children itself.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            for row in pool.submit(SECTIONS[name], args.repeats).result():
                goal = f"   (goal {row.goal})" if row.goal else ""
                print(f"{row.section:<11} {row.what:<64} {row.value:8.3f} {row.unit}{goal}", flush=True)
                rows.append(row)
    if args.json:
        text = json_text({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1)
        write_atomically(args.json, lambda file: file.write(text.encode()))
