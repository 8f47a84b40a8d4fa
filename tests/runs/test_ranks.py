"""The traps of MPI: exceptions, mixed libraries, threads, and what upstream's dist_util promises."""

import io
import os
import re
import socket
import sys
import textwrap
import types

import pytest
import torch

from guided_diffusion import dist_util
from guided_diffusion.runs import ranks
from guided_diffusion.runs.ranks import meeting
from guided_diffusion.settings.options import BadInput
from running import ended, free_port, mpiexec, started


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return [str(path)]


@pytest.mark.parametrize(
    ("fails", "status", "said"),
    [
        ("raise RuntimeError('boom')", 1, "RuntimeError: boom"),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('sorry')", 1, "sorry"),
        ("raise BadInput('wrong flag')", 2, "error: wrong flag"),
    ],
)
def test_a_rank_that_fails_ends_the_others(tmp_path, fails, status, said):
    code = f"""
        import time
        from guided_diffusion.settings.options import BadInput
        from guided_diffusion.runs.ranks import command, start
        def main():
            job = start()
            if job.rank == 1:
                {fails}
            time.sleep(600)
        command(main)()
    """
    process = mpiexec(2, script(tmp_path, code))
    _, errors = ended(process)
    assert process.returncode == status
    assert said in errors


def test_an_output_without_the_characters_is_no_error(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    ranks.command(lambda: print("3.1 ± 0.2"))()
    sys.stdout.flush()
    assert written.getvalue() == b"3.1 \\xb1 0.2\n"


def test_ranks_share_the_cores_and_count_without_waiting(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = """
        import os
        os.environ.pop("OMP_NUM_THREADS", None)
        from guided_diffusion.runs.ranks import start
        import torch
        job = start()
        turns = [job.add("turn") for _ in range(100)]
        text = job.share("text", "hello" if job.rank == 0 else "")
        threads = torch.get_num_threads()
        job.leave_together("end")
        found = (job.rank, job.size, job.local_rank, job.local_size, threads, text, sum(turns))
        os.write(1, (" ".join(map(str, found)) + "\\n").encode())
    """
    process = mpiexec(2, script(tmp_path, code))
    said, errors = ended(process)
    assert process.returncode == 0, errors
    rows = sorted(line.split() for line in said.splitlines())
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [row[:6] for row in rows] == [[str(rank), "2", str(rank), "2", threads, "hello"] for rank in (0, 1)]
    assert sum(int(row[6]) for row in rows) == sum(range(1, 201))


def test_parameters_are_those_of_rank_0(tmp_path):
    code = """
        import os
        import torch
        from guided_diffusion import dist_util
        dist_util.setup_dist()
        job = dist_util.job()
        torch.manual_seed(job.rank)
        layer = torch.nn.Linear(3, 2)
        dist_util.sync_params(layer.parameters())
        os.write(1, f"{layer.weight.tolist()} {dist_util.dev()}\\n".encode())  # whole, or the ranks' lines merge
        job.leave_together("end")
    """
    process = mpiexec(2, script(tmp_path, code))
    said, errors = ended(process)
    assert process.returncode == 0, errors
    torch.manual_seed(0)
    assert said.splitlines() == [f"{torch.nn.Linear(3, 2).weight.tolist()} {dist_util.dev()}"] * 2


def test_alone_everything_is_there_at_once(tmp_path):
    job = ranks.start()
    assert (job.rank, job.size) == (0, 1)
    assert [job.add("a"), job.add("a", 2), job.add("b", 0)] == [1, 3, 0]
    assert job.share("text", "hello") == "hello"
    job.leave_together("end")
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    dist_util.sync_params(layer.parameters())
    assert torch.equal(layer.weight, before)
    torch.save(layer.state_dict(), tmp_path / "w.pt")
    assert torch.equal(dist_util.load_state_dict(str(tmp_path / "w.pt"))["weight"], before)


def fake_mpi(size):
    comm = types.SimpleNamespace(size=size, rank=0)
    return types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=comm))


def test_an_mpiexec_of_another_mpi_is_noticed(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setitem(sys.modules, "mpi4py", fake_mpi(1))
    with pytest.raises(BadInput) as stop:
        ranks.start()
    assert "started 4 ranks, but the MPI library that mpi4py loads counts 1" in stop.value.message


def test_the_gpu_is_chosen_by_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks.Job(rank=6, size=8, local_rank=2, local_size=4).device == torch.device("cuda", 2)
    assert ranks.Job(rank=5, size=8, local_rank=5, local_size=8).device == torch.device("cuda", 1)


def test_the_gpu_of_a_rank_is_the_current_one(monkeypatch):
    """What names no device, like a timer's synchronize, would else mean the first."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(ranks, "_start_alone", lambda: ranks.Job(rank=5, size=8, local_rank=1, local_size=4))
    monkeypatch.setattr(ranks, "_job", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks.start()
    assert current == [torch.device("cuda", 1)]


def test_the_store_is_where_it_answers_for_this_job():
    store = meeting.keep_store(0)
    store.set("token", "ours")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        closed = taken.getsockname()[1]
        with pytest.raises(BadInput) as stop:
            meeting.find_store(["127.0.0.1"], closed, 0)
        assert re.search(rf"cannot be reached at 127.0.0.1:{closed} \(.*refused", stop.value.message)
    found, where = meeting.find_store(["127.0.0.2", "127.0.0.1"], store.port, 0, "ours")
    assert found.get("token") == b"ours"
    assert where.endswith(f":{store.port}")
    with pytest.raises(BadInput, match="2") as stop:
        meeting.find_store(["127.0.0.1"], store.port, 0, "theirs")
    assert f"127.0.0.1:{store.port} (another job answers)" in stop.value.message


def test_ranks_without_a_launcher_meet_at_rank_0(tmp_path):
    code = """
        from guided_diffusion.runs.ranks import command, start
        def main():
            job = start()
            print(job.rank, job.share("text", "hello"), sorted(job.turns("key", range(5), int)) != [])
            job.leave_together("end")
        command(main)()
    """
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    ranks = [started(sys.executable, *script(tmp_path, code), RANK=rank, **told) for rank in ("1", "0")]
    for rank, process in zip("10", ranks, strict=True):
        said, errors = ended(process)
        assert process.returncode == 0, errors
        assert said.startswith(f"{rank} hello")


def test_a_killed_rank_ends_the_others_with_a_sentence(tmp_path):
    code = """
        import os, time
        from guided_diffusion.runs.ranks import start
        job = start()
        if job.rank == 1:
            os.kill(os.getpid(), 9)
        time.sleep(600)
    """
    process = mpiexec(2, script(tmp_path, code))
    _, errors = ended(process)
    assert process.returncode == 9
    assert errors.count(ranks.KILLED) == 1
