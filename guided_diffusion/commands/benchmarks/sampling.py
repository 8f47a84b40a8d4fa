"""Steps, network, memory and half precision of sampling, and the merge of samples."""

import itertools
import shlex
import statistics
from collections.abc import Callable
from tempfile import TemporaryDirectory

import numpy as np
import torch

from ...runs.pipeline import ImagePipeline
from ...runs.prepare import CLASSIFIER_GROUPS, IMAGE_GROUPS, Configs, image_run
from ...runs.ranks import start
from ...runs.sample_store import SampleStore, Shard
from ...runs.timing import in_turns, peak_bytes, seconds
from ...settings.options import parse_args
from ...storage import pictures
from .rows import Row, plain

EMBEDDED = ["--config", "emoji", "--batch_size", "16", "--timestep_respacing", "100"]
FAST = ["--sampler", "unipc", "--timestep_respacing", "logsnr12"]
CLASSIFIER = ["--config", "emoji_classifier"]
ADM64 = shlex.split(
    "--model_path none --image_size 64 --num_channels 96 --num_res_blocks 2 --attention_resolutions 32,16,8 "
    "--num_head_channels 48 --resblock_updown True --use_new_attention_order True --learn_sigma True --batch_size 4"
)
ADM256 = ["--config", "adm_imagenet256_uncond", "--batch_size", "16"]


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
