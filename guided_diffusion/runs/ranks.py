"""Many processes as one job: torchrun's or MPI's ranks, or one process alone."""

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..settings.options import BadInput
from ..settings.shipped import how_to_install
from ..storage.files import UnwrittenError

MPI_VARIABLES = ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
"""What mpiexec sets; without one of them MPI is not even loaded."""

MPI_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")
"""Where it tells a process its rank, before MPI is loaded."""

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets; with some of them alone nobody could be met."""

RESTARTS = {
    "SLURM_JOB_ID": "SLURM_RESTART_COUNT",
    "LSB_JOBID": "LSB_RESTART",
    "TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT",
}
"""Where Slurm, LSF and torchrun tell the name of a job, the same at every start, and whether it was started again."""

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

POLL_S = 0.1
STORE_TIMEOUT = timedelta(days=30)
GROUP_TIMEOUT = timedelta(minutes=30)
"""How long ranks of a process group wait for one that does not come, such as rank 0 that saves and samples."""


REST_S = 0.2
"""What threads get to come to rest at the end, which a network under DDP keeps where the group is destroyed."""


class _OwnStore:
    """The counters and texts of a process alone, with the methods of torch's TCPStore."""

    def __init__(self):
        self._counts: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self._counts[key] = self._counts.get(key, 0) + amount
        return self._counts[key]

    def set(self, key: str, value: str) -> None:
        """Nobody else reads it."""


@dataclass(frozen=True)
class Job:
    """This process among those of its job, and the counters and texts that they share."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = field(default_factory=_OwnStore)

    def add(self, counter: str, amount: int = 1) -> int:
        """Add to a shared counter and return its new value; no rank waits for another."""
        return self.store.add(counter, amount)

    def share(self, key: str, text: str = "") -> str:
        """Give a text to all ranks (rank 0), or get it (the others, who wait for it without using their core)."""
        if self.rank == 0:
            self.store.set(key, text)
            return text
        while not self.store.check([key]):
            time.sleep(POLL_S)
        return self.store.get(key).decode()

    def turns(self, key: str, todo: Sequence[T], wait: Callable[[], None]) -> Iterator[T]:
        """Of what is to do, one thing after the other for whichever rank is free.

        Rank 0 ends when all of it is done, and calls `wait` until then.
        """
        while (turn := self.add(f"{key}/turn") - 1) < len(todo):
            yield todo[turn]
            self.add(f"{key}/done")
        while self.rank == 0 and self.add(f"{key}/done", 0) < len(todo):
            time.sleep(POLL_S)
            wait()

    def leave_together(self, key: str) -> None:
        """Hold the other ranks until rank 0 is here, and rank 0, which keeps the store, until the others have left."""
        self.share(key)
        if self.rank:
            self.add(f"{key}/left")
        else:
            while self.add(f"{key}/left", 0) < self.size - 1:
                time.sleep(POLL_S)

    @property
    def device(self) -> torch.device:
        """The GPU of this local rank among those that CUDA_VISIBLE_DEVICES leaves, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


_mpi: Any = None
_works = itertools.count()


def new_key(work: str) -> str:
    """How the counters and texts of a piece of work begin; every rank starts a job's works in the same order."""
    return f"{work} {next(_works)}"


def launcher() -> str:
    """What started this process: `torchrun`, `mpi`, or nothing."""
    if set(TORCHRUN_VARIABLES) <= os.environ.keys():
        return "torchrun"
    return "mpi" if any(name in os.environ for name in MPI_VARIABLES) else ""


def jobs(started_again: bool = False) -> list[str]:
    """The names of the jobs that this process belongs to; started_again: of those that were started before."""
    agent = f"{socket.gethostname()} {os.getppid()}"  # a torchrun without a name of its own calls itself none
    return [
        f"{name} {agent if os.environ[name] == 'none' else os.environ[name]}"
        for name, restarts in RESTARTS.items()
        if name in os.environ and not (started_again and os.environ.get(restarts, "0") in ("", "0", "N"))
    ]


def rank_told() -> int:
    """The rank that the launcher told this process, 0 if none did."""
    names = {"torchrun": TORCHRUN_VARIABLES[:1], "mpi": MPI_RANKS, "": ()}[launcher()]
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def start() -> Job:
    """Join the job this process was started in: torchrun's variables first, then MPI's, else alone.

    Shares the cores among the ranks of a machine unless OMP_NUM_THREADS says otherwise, and keeps freed memory.
    """
    _keep_freed_memory()
    job = {"torchrun": _start_torchrun, "mpi": _start_mpi, "": Job}[launcher()]()
    if job.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // job.local_size))
    return job


def _keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next tensors, unless a MALLOC_… variable says how.

    It gives them back to the system after every layer otherwise, and clearing them again takes a fifth of a CPU's time.
    """
    with contextlib.suppress(OSError, AttributeError):
        if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, 2**30)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _start_torchrun() -> Job:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return Job()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT
    )
    # Each restart of the workers by torchrun counts anew.
    prefix = f"sampling/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(prefix, store)
    return Job(rank, size, local_rank, local_size, store)


def _start_mpi() -> Job:
    global _mpi
    launched = int(os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 0)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BadInput(
            f"started by an MPI launcher with {launched or 'several'} ranks, but MPI cannot be loaded "
            f"({' '.join(str(error).split())}); {how_to_install('mpi')}, or mpi4py built for the cluster's MPI"
        ) from None
    comm = MPI.COMM_WORLD
    if launched and launched != comm.size:
        raise BadInput(
            f"mpiexec started {launched} ranks, but the MPI library that mpi4py loads counts {comm.size}: they are of "
            "different MPIs; use the mpiexec that belongs to the library"
        )
    _mpi = MPI
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    comm.Barrier()
    _unlink_shared_memory()
    comm.Barrier()
    if comm.size == 1:
        return Job()
    hosts = comm.allgather(socket.gethostname())
    store, address = None, None
    if comm.rank == 0:
        host = "127.0.0.1" if len(set(hosts)) == 1 else socket.getfqdn()
        bind = host if len(set(hosts)) == 1 else "0.0.0.0"
        store = dist.TCPStore(
            bind, 0, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False, multi_tenant=False
        )
        address = (host, store.port)
    host, port = comm.bcast(address)
    if store is None:
        store = dist.TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT)
    return Job(comm.rank, comm.size, local.rank, local.size, store)


def start_process_group(job: Job, device: torch.device, name: str) -> None:
    """Start torch.distributed for a job, unless it is started: NCCL where each rank has a GPU of its own, else gloo.

    device: of this rank. name: of the group in the job's store, the same on all ranks.
    """
    if dist.is_initialized():
        return
    # NCCL refuses two ranks on one GPU.
    own_gpu = device.type == "cuda" and job.local_size <= torch.cuda.device_count()
    dist.init_process_group(
        "nccl" if own_gpu else "gloo",
        store=dist.PrefixStore(name, job.store) if job.size > 1 else dist.HashStore(),
        rank=job.rank,
        world_size=job.size,
        timeout=GROUP_TIMEOUT,
    )
    atexit.register(_end_process_group)


def _end_process_group() -> None:
    """End torch.distributed before the interpreter ends, where a thread that lets go of a tensor aborts the process.

    Not after an error, when others may never come to what this rank waits for.
    """
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        if dist.get_world_size() > 1:
            time.sleep(REST_S)
        dist.destroy_process_group()


def _unlink_shared_memory() -> None:
    """Take the names of mpich's shared memory away while it is in use, so that a killed run leaves none behind."""
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for path in {match[0] for line in maps if (match := re.search(r"/dev/shm/mpich_shm_\S+", line))}:
            with contextlib.suppress(OSError):
                os.unlink(path)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make a script's `main` end well.

    Bad input, numbers that are not finite and a file that cannot be written are one line from rank 0 and status 2; a
    failed rank ends the job.
    Under MPI an exception or a non-zero exit of one rank would leave the others waiting for ever.
    """

    @functools.wraps(main)
    def run() -> None:
        _take_any_text()
        try:
            main()
        except (FloatingPointError, UnwrittenError) as error:
            _end(BadInput(str(error)))
        except BaseException as error:
            _end(error)

    return run


def _take_any_text() -> None:
    """Write as escapes what the encoding of the output lacks, where it would be an error after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _end(error: BaseException) -> None:
    code = error.code if isinstance(error, SystemExit) else 130 if isinstance(error, KeyboardInterrupt) else 1
    if isinstance(error, BadInput):
        if rank_told():
            time.sleep(1)  # rank 0 says it for all; where it did, this process is no more
        sys.stderr.write(f"error: {error.message}\n")
    if code in (None, 0) or _mpi is None or _mpi.COMM_WORLD.size == 1:
        if isinstance(error, KeyboardInterrupt):
            sys.stderr.write("interrupted\n")
            raise SystemExit(code) from None
        raise error
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
        code = 1
    if not isinstance(error, SystemExit):
        traceback.print_exc()
    _abort(code)


def _abort(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.2)
    _mpi.COMM_WORLD.Abort(code)


def end_with_the_first() -> None:
    """For scripts without `command`: an exception that a rank does not catch ends the whole MPI job."""
    if _mpi is None or _mpi.COMM_WORLD.size == 1:
        return
    say = sys.excepthook

    def hook(*error: Any) -> None:
        say(*error)
        _abort(1)

    sys.excepthook = hook
