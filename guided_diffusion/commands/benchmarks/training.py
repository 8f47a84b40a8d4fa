"""Training steps: the ways to make them, by the plain path's."""

import os
import shlex
import socket
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...diffusion.diffusion import build_diffusion
from ...networks.building import build_network
from ...runs.ranks import start
from ...runs.timing import in_turns
from ...settings.options import parse_args
from ...settings.scripts import SCRIPTS
from ...training.loop import TrainLoop
from .rows import Row, plain

EMBEDDED = shlex.split(
    "--image_size 32 --num_channels 64 --num_res_blocks 1 --channel_mult 1,1,2 --attention_resolutions 16,8 "
    "--num_head_channels 32 --learn_sigma True --noise_schedule cosine --batch_size 16"
)
BATCH = 16
STEPS = 2


def stepping(argv: list[str], path: str = "ours", threads: int = 1) -> Callable[[], object]:
    """What trains `STEPS` more steps on random images. path: `ours`, or `plain`, which is the plain path."""
    if torch.cuda.is_available():
        argv = [flag.replace("bf16", "use_fp16") for flag in argv]
    torch.set_num_threads(threads)
    training, network_config, diffusion_config = parse_args("", SCRIPTS["image_train"].groups, [*EMBEDDED, *argv])
    job = start()
    rows = training.batch_size // job.size
    images = torch.rand(rows, 3, network_config.image_size, network_config.image_size) * 2 - 1

    def batches(_step: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        while True:
            yield images, {}

    network = build_network(network_config, diffusion_config.learn_sigma).to(job.device)
    diffusion = build_diffusion(diffusion_config)
    loop = TrainLoop(network, diffusion, batches, training, use_fp16=network_config.use_fp16, job=job)
    if path == "plain":
        plain(network)
    return lambda: [loop.train_step(*next(loop.batches)) for _ in range(STEPS)]


def as_rank(rank: int, port: int, argv: list[str]) -> Callable[[], object]:
    """What trains as one of two ranks, which meet at a port."""
    meeting = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in meeting.items()})
    return stepping(argv)


def training(repeats: int) -> list[Row]:
    """The embedded model's network on batches of 16: time by the plain path's in float32, as upstream trains.

    The path differs alone: both are driven by this project's loop.
    """
    half, checkpointing = ["--bf16", "True"], ["--use_checkpoint", "True"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    works = {
        "plain path, float32, one thread": (stepping, [], "plain"),
        "float32": (stepping, []),
        "float32, gradient checkpointing": (stepping, checkpointing),
        "bfloat16": (stepping, half),
        "bfloat16, gradient checkpointing": (stepping, [*half, *checkpointing]),
        "bfloat16, two threads": (stepping, half, "ours", 2),
        "bfloat16, two ranks of one thread": [(as_rank, rank, port, half) for rank in range(2)],
    }
    found = in_turns(works, repeats)
    reference, (plain_time, plain_peak) = next(iter(found.items()))
    del found[reference]
    rows = [
        Row("training", f"{reference}: images per second", STEPS * BATCH / plain_time, "1/s"),
        Row("training", f"{reference}: peak", plain_peak / 1e6, "MB"),
    ]
    for name, (time, peak) in found.items():
        rows.append(Row("training", f"{name} / plain path", time / plain_time))
        rows.append(Row("training", f"{name}: peak / plain path", peak / plain_peak))
    return rows
