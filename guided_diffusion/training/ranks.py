"""The ranks of a training: one network on all, each with its rows of the batch."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..runs.ranks import Job, new_key, start_process_group


class Ranks:
    """What ranks do together, each on its device; a process alone needs no process group for it."""

    def __init__(self, job: Job, device: torch.device):
        self._job, self._device = job, device
        self._key = new_key("training")
        if self._job.size > 1:
            start_process_group(job, device, self._key)

    def share(self, network: nn.Module) -> nn.Module:
        """The network with rank 0's weights whose gradients are means over all ranks."""
        if self._job.size == 1:
            return network
        devices = [self._device] if self._device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices)

    def exchange(self, shared: nn.Module, of_gradients: bool) -> AbstractContextManager:
        """Whether a backward pass inside takes the means over the ranks: for the last part of a batch only."""
        return nullcontext() if of_gradients or self._job.size == 1 else shared.no_sync()

    def gather(self, columns: Tensor) -> Tensor:
        """[k, n] of every rank as [k, size · n] on the CPU of all, in the order of ranks."""
        if self._job.size == 1:
            return columns.cpu()
        found = [torch.empty_like(columns) for _ in range(self._job.size)]
        dist.all_gather(found, columns)
        return torch.cat(found, dim=1).cpu()

    def leave(self) -> None:
        """Wait for all, rank 0's files included, and end the process group."""
        self._job.leave_together(f"{self._key}/end")
        if self._job.size > 1:
            dist.destroy_process_group()


@contextmanager
def signals_kept() -> Iterator[list[int]]:
    """The numbers of SIGTERM and SIGINT that came meanwhile, instead of what they do; a second one does it."""
    came: list[int] = []

    def keep(number: int, _frame: Any) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, keep) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
