"""Measure speed and memory as ratios within one run: medians of interleaved repetitions, on this machine.

  python scripts/benchmark.py                            # everything, some minutes
  python scripts/benchmark.py --only steps,network --json benchmark.json

steps: sampling steps of the embedded model with each guidance, by the unguided step. network: one call of an ADM
network against a plain path, which is kept here alone: whole attention maps, NCHW layout, the allocator as it is,
float32 (on a GPU: float16). memory: the peak with guidance, by the unguided one. half: images of half precision against
those of float32. merge: the samples of a run into one file.
frechet: the Fréchet distance of 2048-dimensional features against scipy's matrix square root. neighbours: precision and
recall of 10,000 against 10,000 features against the matrix products they need. inception: layouts of the feature
network, and what moments cost beside it.
"""

import argparse
import itertools
import os
import platform
import shlex
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType

import numpy as np
import scipy.linalg

from evaluations.inception import ConvNorm, Inception
from evaluations.moments import Moments, frechet_distance
from evaluations.neighbours import BLOCK, Distances, neighbours

from ..networks.attention import TokenLinear
from ..networks.unet import AttentionBlock
from ..runs.pipeline import ImagePipeline
from ..runs.prepare import CLASSIFIER_GROUPS, IMAGE_GROUPS, Configs, image_run
from ..runs.ranks import command, start
from ..runs.sample_store import SampleStore, Shard
from ..runs.timing import in_turns, medians, peak_bytes, seconds
from ..settings.options import Parser, parse_args, whole
from ..storage import pictures
from ..storage.files import json_text, write_atomically

import torch  # isort: skip (after evaluations, which sets how its threads wait)

EMBEDDED = ["--config", "emoji", "--batch_size", "16", "--timestep_respacing", "100"]
FAST = ["--sampler", "unipc", "--timestep_respacing", "logsnr12"]
CLASSIFIER = ["--config", "emoji_classifier"]
ADM64 = shlex.split(
    "--model_path none --image_size 64 --num_channels 96 --num_res_blocks 2 --attention_resolutions 32,16,8 "
    "--num_head_channels 48 --resblock_updown True --use_new_attention_order True --learn_sigma True --batch_size 4"
)
ADM256 = ["--config", "adm_imagenet256_uncond", "--batch_size", "16"]


@dataclass(frozen=True)
class Row:
    """One result: a ratio or an amount, and what it is."""

    section: str
    what: str
    value: float
    unit: str = "×"
    goal: str = ""


def plain(network: torch.nn.Module) -> None:
    """Turn a network into the plain path: whole attention maps, tokens and pixels in NCHW order."""

    def attend(block: AttentionBlock, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = block.split(qkv)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(dim=-1)
        return (weights.to(v.dtype) @ v).transpose(-1, -2).flatten(1, 2)

    network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            module.attention.forward = partial(attend, module)
        elif isinstance(module, TokenLinear):
            module.forward = MethodType(torch.nn.Conv1d.forward, module)


def pipeline_of(argv: list[str], path: str, weights: bool) -> ImagePipeline:
    """A pipeline of the flags. path: `ours`, or `plain`, which is the plain path."""
    if path == "ours":
        device = start().device
    else:  # without start, which tunes the allocator
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups = CLASSIFIER_GROUPS if CLASSIFIER[1] in argv else IMAGE_GROUPS
    pipeline = image_run(Configs.of(parse_args("", groups, argv)), device, weights).pipeline
    if path == "plain":
        plain(pipeline.network)
    return pipeline


def stepping(argv: list[str], path: str, count: int) -> Callable[[], object]:
    """What takes `count` more sampling steps of a batch."""
    pipeline = pipeline_of(argv, path, weights=argv[1].endswith("emoji.yaml"))
    states = itertools.chain.from_iterable(pipeline.trajectory(range(pipeline.config.batch_size)) for _ in iter(int, 1))
    return lambda: [next(states) for _ in range(count)]


def calling(argv: list[str], path: str) -> Callable[[], object]:
    """What calls the network once."""
    pipeline = pipeline_of(argv, path, weights=False)
    x = torch.randn(pipeline.config.batch_size, *pipeline.x_shape, device=pipeline.device)
    t = torch.zeros(len(x), dtype=torch.int64, device=pipeline.device)
    return torch.no_grad()(lambda: pipeline.network(x, t))


def steps(repeats: int) -> list[Row]:
    """Four steps at a time, so that each turn of `--guide_every 4` holds one that computes and three that do not.

    The last row is a whole run of few steps by the paper's number of steps of the plain path.
    """
    off = ["--sag_scale", "0"]
    classes = ["--labels", "random"]
    variants = {
        "unguided": [*EMBEDDED, *off],
        "SAG": EMBEDDED,
        "SAG every 2": [*EMBEDDED, "--guide_every", "2"],
        "SAG every 4": [*EMBEDDED, "--guide_every", "4"],
        "CFG": [*EMBEDDED, *off, *classes, "--cfg_scale", "1"],
        "SAG + CFG": [*EMBEDDED, *classes, "--cfg_scale", "1"],
        "CG": [*EMBEDDED, *CLASSIFIER, *off],
    }
    works = {name: (stepping, argv, "ours", 4) for name, argv in variants.items()}
    works |= {f"plain path, {name}": (stepping, variants[name], "plain", 4) for name in ("unguided", "SAG")}
    works["fast"] = (stepping, [*EMBEDDED, *FAST], "ours", 12)
    found = in_turns(works, max(20, repeats))
    goals = {"SAG": "≤ 2.05", "SAG every 4": "≤ 1.30"}
    (unguided, _), (fast, _) = found.pop("unguided"), found.pop("fast")
    slow = found["plain path, SAG"][0] / 4 * 250
    rows = [Row("steps", "unguided, images × steps per second", 4 * 16 / unguided, "1/s")]
    return (
        rows
        + [
            Row("steps", f"{name} / unguided", time / unguided, goal=goals.get(name, ""))
            for name, (time, _) in found.items()
        ]
        + [Row("steps", "SAG: 12 steps of UniPC / 250 DDPM steps of the plain path", fast / slow, goal="≤ 0.05")]
    )


def network(repeats: int) -> list[Row]:
    """Random weights: an ADM of 57 M parameters by 4; on a GPU ImageNet's 256² by 16, the plain path in float16."""
    gpu = torch.cuda.is_available()
    argv, what = (ADM256, "ADM 256², batch 16") if gpu else (ADM64, "ADM 64², 57 M parameters, batch 4")
    half = [*argv, "--use_fp16", "True"]
    works = {
        "plain path": (calling, half if gpu else argv, "plain"),
        "float32": (calling, [*argv, "--use_fp16", "False"], "ours"),
        "half precision": (calling, half, "ours"),
        "compiled float32": (calling, [*argv, "--use_fp16", "False", "--compile", "True"], "ours"),
        "compiled half precision": (calling, [*half, "--compile", "True"], "ours"),
    }
    found = in_turns(works, repeats)
    goals = {} if gpu else {"float32": "≤ 0.95", "compiled float32": "≤ 0.70", "compiled half precision": "≤ 0.45"}
    reference, _ = found.pop("plain path")
    rows = [Row("network", f"{what}: plain path, seconds a call", reference, "s")]
    return rows + [
        Row("network", f"{name} / plain path", time / reference, goal=goals.get(name, ""))
        for name, (time, _) in found.items()
    ]


def memory(repeats: int) -> list[Row]:
    argv = ADM256 if torch.cuda.is_available() else ADM64
    guided = [*argv, "--sag_scale", "1", "--sag_block", "output_blocks.2.1", "--guide_start", "1000"]
    variants = {"unguided": [*argv, "--sag_scale", "0"], "SAG": guided}
    found = in_turns({name: (stepping, flags, "ours", 1) for name, flags in variants.items()}, repeats)
    (_, before), (_, peak) = found["unguided"], found["SAG"]
    return [
        Row("memory", "unguided: peak", before / 1e6, "MB"),
        Row("memory", "SAG / unguided", peak / before, goal="≤ 1.02"),
    ]


def half(repeats: int) -> list[Row]:  # noqa: ARG001 (the images are the same every time)
    """How far the images of half precision are from those of float32, in the 256 levels of a pixel."""

    def images(*flags: str) -> np.ndarray:
        pipeline = pipeline_of([*EMBEDDED, "--timestep_respacing", "50", *flags], "ours", weights=True)
        *_, (state, _) = pipeline.trajectory(range(16))
        return pictures.to_uint8(state.x).astype(int)

    rows = []
    for name, flags in {"unguided": ["--sag_scale", "0"], "SAG": []}.items():
        difference = abs(images(*flags, "--use_fp16", "True") - images(*flags))
        within = 100 * float((difference <= 2).mean())
        rows.append(Row("half", f"16 images, {name}, 50 steps: values within 2 levels", within, "%", "≥ 99"))
    return rows


def merge(repeats: int) -> list[Row]:
    count, size = 10_000, 500
    images = np.random.default_rng(0).integers(0, 256, (size, 64, 64, 3), dtype=np.uint8)
    with TemporaryDirectory() as folder:
        store = SampleStore(folder, {}, count, size, images.shape[1:], labelled=False)
        for number in store.shards:
            store.write(number, Shard(images, None, 1.0))
        before = peak_bytes()
        times = [seconds(store.merge) for _ in range(repeats)]
    return [
        Row("merge", "10,000 samples of 64 × 64, images per second", count / statistics.median(times), "1/s"),
        Row("merge", "extra memory", (peak_bytes() - before) / 1e6, "MB", "no more than some shards of 6 MB"),
    ]


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
            for first in range(0, n, BLOCK):
                left[first : first + BLOCK] @ right.T

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


SECTIONS = {
    "steps": steps,
    "network": network,
    "memory": memory,
    "half": half,
    "merge": merge,
    "frechet": frechet,
    "neighbours": neighbours_,
    "inception": inception_,
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
