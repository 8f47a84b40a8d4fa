"""The ranks of an evaluation: MPI's or torchrun's, or one process; a few messages, no tensors."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")

MPI_VARIABLES = ("PMI_SIZE", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
"""What mpiexec sets; without one of them MPI is not even loaded."""

MPI_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
"""Where it tells a process its rank, before MPI is loaded."""

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, Kubernetes and batch scripts set; with some of them alone nobody could be met."""


class BadInputError(Exception):
    """What the user gave is wrong: one sentence."""


class Ranks:
    """One process; the others below it speak over MPI or torch.distributed."""

    rank, size, local_rank = 0, 1, 0

    def gather(self, item: Any) -> list[Any]:
        """The items of all ranks, on all ranks."""
        return [item]

    def agree(self, make: Callable[[], T]) -> T:
        """What this rank makes of the user's input; a ValueError or OSError of any rank is `BadInputError` on all."""
        made, error = None, None
        try:
            made = make()
        except (ValueError, OSError) as problem:
            error = str(problem)
        for theirs in self.gather(error):
            if theirs is not None:
                raise BadInputError(theirs)
        return made

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes of the user's input, on all ranks."""
        return self.gather(self.agree(make if self.rank == 0 else lambda: None))[0]

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def abort(self, code: int) -> None:
        """End all ranks."""
        raise SystemExit(code)


class MpiRanks(Ranks):
    def __init__(self):
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        self.local_rank = self._comm.Split_type(MPI.COMM_TYPE_SHARED).rank

    def gather(self, item: Any) -> list[Any]:
        return self._comm.allgather(item)

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0.2)  # or the last lines are lost
        self._comm.Abort(code)


class TorchRanks(Ranks):
    def __init__(self):
        torch.distributed.init_process_group("gloo")
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))

    def gather(self, item: Any) -> list[Any]:
        gathered = [None] * self.size
        torch.distributed.all_gather_object(gathered, item)
        return gathered


def launcher() -> str:
    """What started this process: `torchrun`, `mpi`, or nothing."""
    if set(TORCHRUN_VARIABLES) <= os.environ.keys():
        return "torchrun"
    return "mpi" if any(name in os.environ for name in MPI_VARIABLES) else ""


def rank_told() -> int:
    """The rank that the launcher told this process, 0 if none did."""
    names = {"torchrun": TORCHRUN_VARIABLES[:1], "mpi": MPI_RANKS, "": ()}[launcher()]
    told = next((os.environ[name] for name in names if name in os.environ), "0")
    return int(told) if told.isdecimal() else 0  # what else it is, `start` says


def _number(name: str) -> int:
    """The value of a launcher's variable, 0 if it is not set; `BadInputError` if it is no number."""
    text = os.environ.get(name) or "0"
    if not text.isdecimal():
        raise BadInputError(f"{name}: the launcher's variable; wanted a number, got {text!r}")
    return int(text)


def start() -> Ranks:
    """The ranks this process was started among: torchrun's variables first, then MPI's, else alone."""
    return {"torchrun": _start_torchrun, "mpi": _start_mpi, "": _start_alone}[launcher()]()


def _start_alone() -> Ranks:
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if len(missing) == 1 and missing[0].startswith("MASTER") and _number("WORLD_SIZE") > 1:
        raise BadInputError(
            f"{missing[0]} is not set, but RANK, WORLD_SIZE and the other are: set all four, or none for one process"
        )
    return Ranks()


def _start_torchrun() -> Ranks:
    rank, size, _ = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    if rank >= size:
        raise BadInputError(f"RANK: wanted less than WORLD_SIZE, which is {size}, got {rank}")
    return Ranks() if size == 1 else TorchRanks()


def _start_mpi() -> Ranks:
    launched = _number("PMI_SIZE") or _number("OMPI_COMM_WORLD_SIZE")
    try:
        ranks = MpiRanks()
    except (ImportError, RuntimeError) as error:
        raise BadInputError(
            f"started by an MPI launcher with {launched or 'several'} ranks, but MPI cannot be loaded "
            f"({' '.join(str(error).split())}); pip install mpi4py mpich, or mpi4py built for the cluster's MPI"
        ) from None
    if launched and launched != ranks.size:
        raise BadInputError(
            f"mpiexec started {launched} ranks, but the MPI library that mpi4py loads counts {ranks.size}: they are of "
            "different MPIs; use the mpiexec that belongs to the library"
        )
    return ranks


def run(main: Callable[[Ranks], None]) -> None:
    """Run a program on the ranks: bad input is one line from rank 0 and status 2, a failed rank ends them all."""
    ranks = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what its encoding lacks is no error after all the work
    try:
        ranks = start()
        if ranks.size > 1 and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            local = len([host for host in ranks.gather(os.uname().nodename) if host == os.uname().nodename])
            torch.set_num_threads(max(1, cores // local))
        main(ranks)
    except BadInputError as error:
        if ranks is None and rank_told():
            time.sleep(1)  # rank 0 says it for all; where it did, this process may be no more
        if ranks is None or ranks.rank == 0:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    except Exception:
        if ranks is None or ranks.size == 1:
            raise
        traceback.print_exc()
        ranks.abort(1)
