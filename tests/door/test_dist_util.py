"""torch.distributed by guided-diffusion's names: alone, under mpiexec and under torchrun."""

import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from guided_diffusion import dist_util
from guided_diffusion.runs.ranks import Job
from running import ended, mpiexec, started, torchrun

CLIENT = """
    import torch
    import torch.distributed as dist
    from guided_diffusion import dist_util
    for _ in range(2):
        dist_util.setup_dist()
    rank = dist.get_rank()
    found = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(found, torch.full((1,), float(rank)))
    layers = []
    for outputs in (2, 5):
        torch.manual_seed(10 * outputs + rank)
        layers.append(torch.nn.Linear(3, outputs))
        layers[-1].weight.data = layers[-1].weight.data.t().contiguous().t()  # not contiguous
        dist_util.sync_params(layers[-1].parameters())
    dist.barrier()
    parameters = [p.detach() for layer in layers for p in layer.parameters()]
    sums = [round(float((p * torch.arange(p.numel()).view(p.shape)).sum()), 4) for p in parameters]
    text = " ".join(map(str, [dist.get_world_size(), torch.cat(found).tolist(), sums, *dist_util.place()]))
    with open(f"{FOLDER}/{rank}.txt", "w") as file:
        file.write(text)
"""


def script(folder, text):
    path = folder / "script.py"
    path.write_text(f"FOLDER = {str(folder)!r}\n" + textwrap.dedent(text))
    return str(path)


def sums_of_rank_0():
    found = []
    for outputs in (2, 5):
        torch.manual_seed(10 * outputs)
        for p in torch.nn.Linear(3, outputs).parameters():
            found.append(round(float((p * torch.arange(p.numel()).view(p.shape)).detach().sum()), 4))
    return found


def launched(how, folder):
    launch = {"mpiexec": mpiexec, "torchrun": torchrun}.get(how)
    return launch(2, [script(folder, CLIENT)]) if launch else started(sys.executable, script(folder, CLIENT))


@pytest.mark.parametrize(("how", "size"), [("alone", 1), ("mpiexec", 2), ("torchrun", 2)])
def test_ranks_gather_and_share_two_networks(tmp_path, how, size):
    process = launched(how, tmp_path)
    _, errors = ended(process)
    assert process.returncode == 0, errors
    ranks = [float(rank) for rank in range(size)]
    wanted = [f"{size} {ranks} {sums_of_rank_0()} {rank} {size}" for rank in range(size)]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(size)] == wanted


def test_a_rank_that_fails_ends_the_others(tmp_path):
    code = """
        import torch.distributed as dist
        from guided_diffusion import dist_util
        dist_util.setup_dist()
        if dist.get_rank() == 1:
            raise RuntimeError("boom")
        dist.barrier()
    """
    process = mpiexec(2, [script(tmp_path, code)])
    _, errors = ended(process)
    assert process.returncode == 1
    assert "RuntimeError: boom" in errors


def test_a_group_of_the_clients_own_is_left_alone(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: pytest.fail("started another"))
    dist_util.setup_dist()
    assert dist_util.place() == (3, 4)


def test_a_rank_has_a_gpu_of_its_machine(monkeypatch):
    monkeypatch.setattr(dist_util, "job", lambda: Job(rank=13, size=16, local_rank=5, local_size=8))
    assert dist_util.dev() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert dist_util.dev() == torch.device("cuda", 5)
    monkeypatch.setattr(dist_util, "GPUS_PER_NODE", 4)
    assert dist_util.dev() == torch.device("cuda", 1)


def test_files_are_read_as_they_are(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "opt000001.pt")
    torch.save({"state_dict": {"module.weight": layer.weight}, "step": 3}, tmp_path / "wrapped.pt")
    state = dist_util.load_state_dict(str(tmp_path / "opt000001.pt"), map_location=torch.device("cpu"))
    (tmp_path / "opt000001.pt").write_bytes(b"")  # nothing may still be mapped from it
    other = torch.optim.AdamW(layer.parameters(), lr=0.1)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.5
    for parameter in layer.parameters():
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    wrapped = dist_util.load_state_dict(str(tmp_path / "wrapped.pt"))
    assert wrapped["step"] == 3
    assert torch.equal(wrapped["state_dict"]["module.weight"], layer.weight)
    by_function = dist_util.load_state_dict(
        str(tmp_path / "wrapped.pt"), map_location=lambda storage, place: storage, weights_only=True
    )
    assert torch.equal(by_function["state_dict"]["module.weight"], layer.weight)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_what_could_execute_code_is_refused_whatever_is_asked(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="it holds more than tensors"):
        dist_util.load_state_dict(str(tmp_path / "evil.pt"), weights_only=False)
    assert "executed" not in capsys.readouterr().out


def test_a_device_that_is_not_there_is_no_fault_of_the_file(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match="CUDA"):
        dist_util.load_state_dict(str(tmp_path / "a.pt"), map_location="cuda")
