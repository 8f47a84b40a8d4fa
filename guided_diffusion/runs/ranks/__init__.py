"""Many processes as one job: torchrun's or MPI's ranks, or one process alone."""

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from ...settings.options import BadInput
from ...settings.shipped import how_to_install
from ...storage.files import UnwrittenError
from .job import Job, Lost
from .meeting import CONNECT_S, GROUP_TIMEOUT, START_S, addresses, find_store, keep_store

MPI_VARIABLES = ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
"""What mpiexec sets; without one of them MPI is not even loaded."""

MPI_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
"""Where it tells a process its rank, before MPI is loaded."""

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, Kubernetes and batch scripts set; with some of them alone nobody could be met."""

ABORT_S = 5
"""Seconds for MPI to end this process."""

KILLED = "error: a rank was killed or failed, so the launcher ended the job; the same command goes on"

RESTARTS = {
    "SLURM_JOB_ID": "SLURM_RESTART_COUNT",
    "LSB_JOBID": "LSB_RESTART",
    "TORCHELASTIC_RUN_ID": "TORCHELASTIC_RESTART_COUNT",
}
"""Where Slurm, LSF and torchrun tell the name of a job, the same at every start, and whether it was started again."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

REST_S = 0.2
"""What threads get to come to rest at the end, which a network under DDP keeps where the group is destroyed."""


_mpi: Any = None
_job = Job()
_guarding: subprocess.Popen | None = None
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
    found = {name: restarts for name, restarts in RESTARTS.items() if name in os.environ}
    if started_again:
        # torchrun's count is that of rank 0's machine alone; the store knows of all restarts.
        by_store = {"TORCHELASTIC_RUN_ID"} if _job.started_again else set()
        again = {name for name in found if os.environ.get(found[name], "0") not in ("", "0", "N")} | by_store
        found = {name: found[name] for name in found if name in again}
    return [f"{name} {agent if os.environ[name] == 'none' else os.environ[name]}" for name in found]


def rank_told() -> int:
    """The rank that the launcher told this process, 0 if none did."""
    names = {"torchrun": TORCHRUN_VARIABLES[:1], "mpi": MPI_RANKS, "": ()}[launcher()]
    told = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(told) if told.isdecimal() else 0  # what else it is, `start` says


def _number(name: str) -> int:
    """The value of a launcher's variable, 0 if it is not set; `BadInput` if it is no number."""
    text = os.environ.get(name) or "0"
    if not text.isdecimal():
        raise BadInput(f"{name}: the launcher's variable; wanted a number, got {text!r}")
    return int(text)


def start() -> Job:
    """Join the job this process was started in: torchrun's variables first, then MPI's, else alone.

    Shares the cores among the ranks of a machine unless OMP_NUM_THREADS says otherwise, and keeps freed memory.
    """
    global _job
    _keep_freed_memory()
    _job = {"torchrun": _start_torchrun, "mpi": _start_mpi, "": _start_alone}[launcher()]()
    if _job.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // _job.local_size))
    if _job.device.type == "cuda":
        torch.cuda.set_device(_job.device)  # or times, memory and unnamed tensors would be those of the first GPU
    return _job


def _start_alone() -> Job:
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if len(missing) == 1 and missing[0].startswith("MASTER") and _number("WORLD_SIZE") > 1:
        raise BadInput(
            f"{missing[0]} is not set, but RANK, WORLD_SIZE and the other are: set all four, or none for one process"
        )
    return Job()


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
    rank, size, port = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    if rank >= size:
        raise BadInput(f"RANK: wanted less than WORLD_SIZE, which is {size}, got {rank}")
    if size == 1:
        return Job()
    store, where = None, f"{os.environ['MASTER_ADDR']}:{port}"
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        with contextlib.suppress(RuntimeError):  # the port is taken: by who keeps the store, or `find_store` says so
            store = keep_store(port)
    if store is None:
        store, where = find_store([os.environ["MASTER_ADDR"]], port, START_S if rank else CONNECT_S)
    local_rank, local_size = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE") or 1
    job = Job(rank, size, local_rank, local_size, dist.PrefixStore("sampling", store), where)
    job.join(START_S)
    job.show_life()
    return job


def _start_mpi() -> Job:
    global _mpi
    launched = _number("PMI_SIZE") or _number("OMPI_COMM_WORLD_SIZE")
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
    store, where, met = None, "", None
    if comm.rank == 0:
        _guard()
        store = keep_store(0)
        token = secrets.token_hex(8)
        store.set("token", token)
        met = ["127.0.0.1"] if local.size == comm.size else addresses(), store.port, token
    hosts, port, token = comm.bcast(met)
    if store is None:
        store, where = find_store(hosts, port, CONNECT_S, token)
    job = Job(comm.rank, comm.size, local.rank, local.size, store, where)
    job.show_life()
    return job


def _guard() -> None:
    """Leave a shell behind that says so if this process is killed: MPI's launcher does that if one rank is lost."""
    global _guarding
    with contextlib.suppress(OSError), _stderr_of_launcher() as said_to:  # no shell here
        _guarding = subprocess.Popen(
            ["sh", "-c", f"read -r told || {{ sleep 0.3; echo '{KILLED}' >&2; }}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said_to,
            start_new_session=True,  # out of the launcher's reach
        )
        atexit.register(_tell_guard)


def _stderr_of_launcher() -> BinaryIO:
    """Where the launcher itself writes to, as it does not pass on any more what a killed rank says; else our own."""
    try:
        launcher = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]
        # Without waiting for who reads it, if nobody does any more.
        return os.fdopen(os.open(f"/proc/{launcher}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK), "ab")
    except (OSError, IndexError, AttributeError):  # AttributeError: Windows
        return os.fdopen(os.dup(2), "ab")


def _tell_guard() -> None:
    global _guarding
    if _guarding:
        _guarding.communicate(b"told\n")
        _guarding = None


def start_process_group(job: Job, device: torch.device, name: str) -> None:
    """Start torch.distributed for a job, unless it is started: NCCL where each rank has a GPU of its own, else gloo.

    device: of this rank. name: of the group in the job's store, the same on all ranks.
    """
    if dist.is_initialized():
        return
    # While gloo makes a group, no other thread runs.
    job.meet(name, START_S)
    # NCCL refuses two ranks on one GPU.
    own_gpu = device.type == "cuda" and job.local_size <= torch.cuda.device_count()
    dist.init_process_group(
        "nccl" if own_gpu else "gloo",
        store=dist.PrefixStore(name, job.store),
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
            if _job.lost and _mpi is not None:
                _abort(0)  # MPI's own end would wait for them
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
    if isinstance(error, Lost):
        sys.stderr.write(f"error: {error.message}\n")
        sys.stderr.flush()
        if _mpi is None:
            os._exit(code)  # a thread may still wait for the store
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
    _tell_guard()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.2)
    if hasattr(signal, "alarm"):  # or MPI waits for a launcher that is lost
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ABORT_S)
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
