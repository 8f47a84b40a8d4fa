"""guided-diffusion's names for what the ranks of a job do together, by torch.distributed."""

import socket
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .runs import ranks
from .storage import checkpoints

GPUS_PER_NODE = 8
"""A rank's GPU is its number on its machine modulo this, or modulo the GPUs that there are."""

SETUP_RETRY_COUNT = 3
"""Not used, here as there."""

job = cache(ranks.start)


def setup_dist() -> None:
    """Join the job that this process was started in, and start torch.distributed for it, unless it is started."""
    if not dist.is_initialized():
        if dev().type == "cuda":
            torch.cuda.set_device(dev())
        ranks.start_process_group(job(), dev(), "door")
        ranks.end_with_the_first()


def dev() -> torch.device:
    """The device of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", job().local_rank % min(GPUS_PER_NODE, torch.cuda.device_count()))


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def place() -> tuple[int, int]:
    """(rank, size) in torch.distributed where it is started, else in the job."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return job().rank, job().size


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """What a checkpoint file holds, as it is: an optimizer's state as well as a network's; every rank reads it itself.

    kwargs: map_location as torch.load's (default the CPU). Only tensors and plain values are loaded, whatever
    weights_only says; a ValueError says what is wrong.
    """
    kwargs.pop("weights_only", None)
    return checkpoints.load(path, **kwargs)


@torch.no_grad()
def sync_params(params: Iterable[Tensor]) -> None:
    """Give every rank the tensors of rank 0."""
    setup_dist()
    for parameter in params:
        values = parameter.detach().contiguous()  # of channels-last ones the bytes would be in another order
        dist.broadcast(values, 0)
        parameter.copy_(values)
