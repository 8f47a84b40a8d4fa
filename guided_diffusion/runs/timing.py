"""How long things take, and how much memory."""

import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch


def seconds(work: Callable[[], object]) -> float:
    """The time of one call; waits for a GPU."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
    """The highest memory of this process so far: the GPU's where there is one, else what is resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple) -> None:
    work = make(*arguments)
    while pipe.recv():
        pipe.send((seconds(work), peak_bytes()))


def in_turns(works: dict[str, tuple | list[tuple]], repeats: int) -> dict[str, tuple[float, int]]:
    """The median time and the peak memory of each (maker, arguments), each in a process of its own, by turns.

    A list of them works together: its time is that of the slowest, its memory that of all. A RuntimeError names what
    ended early.
    """
    context = get_context("spawn")
    pipes, processes, found = {name: [] for name in works}, [], {name: [] for name in works}
    for name, parts in works.items():
        for make, *arguments in parts if isinstance(parts, list) else [parts]:
            ours, theirs = context.Pipe()
            pipes[name].append(ours)
            processes.append(context.Process(target=_serve, args=(theirs, make, tuple(arguments)), daemon=True))
            processes[-1].start()
            theirs.close()
    for turn in range(repeats + 2):
        for name, together in pipes.items():
            try:
                for pipe in together:
                    pipe.send(True)
                times, peaks = zip(*[pipe.recv() for pipe in together], strict=True)
            except (EOFError, OSError):
                raise RuntimeError(f"{name}: its process ended early; what it said is above") from None
            if turn >= 2:
                found[name].append((max(times), sum(peaks)))
    for pipe in itertools.chain.from_iterable(pipes.values()):
        pipe.send(False)
    for process in processes:
        process.join()
    return {
        name: (statistics.median(time for time, _ in seen), max(peak for _, peak in seen))
        for name, seen in found.items()
    }
