"""Launchers: the evaluation, which stands alone, makes of their variables what a sampling run does."""

import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from evaluations import ranks as of_evaluations
from guided_diffusion.runs import ranks as of_runs
from guided_diffusion.settings.options import BadInput

TORCHRUN = {
    "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "2"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}

SEVERAL, ALONE = (2, 4, 1), (0, 1, 0)
"""Rank, number of ranks, rank on its machine: of torchrun's variables and of the MPI below, and of a process alone."""

# The variables, who set them, the rank that they tell, and who the process is (or why it cannot be).
LAUNCHERS = {
    "none": ({}, "", 0, ALONE),
    "torchrun": (TORCHRUN, "torchrun", 2, SEVERAL),
    "torchrun of one": (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "torchrun", 0, ALONE),
    "half of torchrun": ({"RANK": "2", "WORLD_SIZE": "4"}, "", 0, ALONE),
    "torchrun without a port": (
        {key: TORCHRUN[key] for key in TORCHRUN if key != "MASTER_PORT"},
        "",
        0,
        "MASTER_PORT is not set",
    ),
    "one process without a port": ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}, "", 0, ALONE),
    "a rank that is no number": (TORCHRUN | {"RANK": "x"}, "torchrun", 0, "RANK: the launcher's variable"),
    "a rank beyond the others": (TORCHRUN | {"RANK": "4"}, "torchrun", 4, "RANK: wanted less than WORLD_SIZE"),
    "a number of ranks that is none": (MPICH | {"PMI_SIZE": "abc"}, "mpi", 2, "PMI_SIZE: the launcher's variable"),
    "torchrun's name alone": ({"TORCHELASTIC_RUN_ID": "none"}, "", 0, ALONE),
    "mpiexec of mpich": (MPICH, "mpi", 2, SEVERAL),
    "mpiexec of Open MPI": (OPEN_MPI, "mpi", 2, SEVERAL),
    "srun with PMIx": (SRUN | {"PMIX_RANK": "2"}, "mpi", 2, SEVERAL),
    "srun with another MPI": (SRUN | {"MPI_LOCALNRANKS": "2"}, "mpi", 2, SEVERAL),
    "srun with PMI 2": (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}, "mpi", 2, SEVERAL),
    "srun without MPI": (SRUN, "", 0, ALONE),
    "torchrun below mpiexec": (MPICH | {"PMI_RANK": "3"} | TORCHRUN, "torchrun", 2, SEVERAL),
    "half of torchrun below mpiexec": (MPICH | {"RANK": "0", "WORLD_SIZE": "1"}, "mpi", 2, SEVERAL),
    "mpiexec of another MPI": (
        MPICH | {"PMI_SIZE": "8"},
        "mpi",
        2,
        "started 8 ranks, but the MPI library",
    ),
}


class World:
    """MPI's ranks as rank 2 of 4 sees them."""

    rank, size = 2, 4

    def Split_type(self, _kind):
        return SimpleNamespace(rank=1, size=2)

    def Barrier(self):
        pass

    def bcast(self, _met):
        return ["127.0.0.1"], 1, "token"


@pytest.fixture
def launched(monkeypatch):
    """Sets a launcher's variables and no other's; MPI and torch's stores are made up."""
    mpi = SimpleNamespace(COMM_WORLD=World(), COMM_TYPE_SHARED=0)
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    monkeypatch.setattr(of_runs, "_mpi", None)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: None)
    monkeypatch.setattr(of_runs, "find_store", lambda *_: (torch.distributed.HashStore(), "host:1"))
    monkeypatch.setattr(of_runs.Job, "join", lambda *_: None)
    monkeypatch.setattr(of_runs.Job, "show_life", lambda _: None)
    for name, variable in (("get_rank", "RANK"), ("get_world_size", "WORLD_SIZE")):
        monkeypatch.setattr(torch.distributed, name, lambda variable=variable: int(os.environ[variable]))

    def launch(variables):
        for name in os.environ:
            if re.match("RANK|WORLD|LOCAL|MASTER|TORCHELASTIC|PMI|OMPI|MPI|SLURM", name):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launch


def decided(ranks):
    """What a module makes of the variables: the launcher, the rank it told, and who the process is or what is wrong."""
    try:
        job = ranks.start()
        who = job.rank, job.size, job.local_rank
    except (BadInput, of_evaluations.BadInputError) as error:
        who = getattr(error, "message", str(error)).partition(";")[0]  # what to do about it, each says its own way
    return ranks.launcher(), ranks.rank_told(), who


@pytest.mark.parametrize("name", LAUNCHERS)
def test_runs_and_evaluations_understand_launchers_alike(launched, name):
    variables, launcher, told, who = LAUNCHERS[name]
    launched(variables)
    found = decided(of_runs)
    assert found[:2] == (launcher, told)
    assert who in found[2] if isinstance(who, str) else found[2] == who
    assert decided(of_evaluations) == found


@pytest.mark.parametrize("name", ["mpiexec of mpich", "mpiexec of Open MPI", "srun with PMIx"])
def test_both_say_alike_that_mpi_cannot_be_loaded(launched, monkeypatch, name):
    launched(LAUNCHERS[name][0])
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    found = decided(of_runs)
    assert re.match("started by an MPI launcher with (4|several) ranks, but MPI cannot be loaded", found[2])
    assert decided(of_evaluations) == found


@pytest.mark.parametrize(("rank", "waited"), [("0", []), ("2", [1])])
def test_a_launcher_without_its_library_is_said_first_by_rank_0(launched, monkeypatch, capsys, rank, waited):
    """Of both modules: the others wait, for where rank 0 ends the job, it has been said."""
    launched({"PMIX_RANK": rank})
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    for end in (lambda: of_evaluations.run(print), of_runs.command(of_runs.start)):
        with pytest.raises(SystemExit) as stop:
            end()
        assert stop.value.code == 2
        assert seconds == waited
        assert capsys.readouterr().err.startswith("error: started by an MPI launcher")
        seconds.clear()
