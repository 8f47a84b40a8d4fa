"""What a training run reads and leaves: its random numbers, progress.csv, weights, checkpoints and upstream's files."""

import csv
import sys
import types

import pytest
import torch

from guided_diffusion.storage.checkpoints import save_atomically
from guided_diffusion.training.draws import Draws
from guided_diffusion.training.log import ProgressFile, TrainingLog
from guided_diffusion.training.resume import prune
from guided_diffusion.training.run import write_description
from trainings import assert_same, log_of, loop_of, step_of


def test_what_is_drawn_belongs_to_seed_step_and_row():
    whole, second_half = Draws(7), Draws(7, first=4)
    for step in (0, 1, 5):  # in order, begun ahead, and out of order
        (uniform, noise), (part, part_noise) = whole(step, (8, 3, 4, 4)), second_half(step, (4, 3, 4, 4))
        assert_same((uniform[:, 4:], noise[4:]), (part, part_noise))
    assert not torch.equal(whole(0, (8, 3, 4, 4))[1], noise)
    assert not torch.equal(Draws(8)(5, (8, 3, 4, 4))[1], noise)
    assert not torch.equal(noise[0], noise[1])
    uniform, noise = Draws(0)(0, (1000, 1, 8, 8))
    assert uniform.mean(dim=1).tolist() == pytest.approx([0.5, 0.5, 0.5], abs=0.03)
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.01)
    assert (torch.corrcoef(uniform) - torch.eye(3)).abs().max() < 0.1


def test_columns_of_progress_may_come_later_and_lines_of_a_cut_off_run_go(tmp_path):
    path = tmp_path / "progress.csv"
    file = ProgressFile(path, 0)
    file.add({"step": 1, "loss": 0.5})
    file.add({"step": 2, "loss": 0.25, "val_loss": 1.0})
    file.add({"step": 3, "loss": 1 / 3})
    with open(path, "a") as broken:
        broken.write("2")  # a run was killed while it wrote line 20
    ProgressFile(path, 2).add({"step": 3, "loss": 9.0, "val_loss": 8.0})
    assert path.read_text() == "step,loss,val_loss\n1,0.5,\n2,0.25,1\n3,9,8\n"
    assert [row["val_loss"] for row in csv.DictReader(path.open())] == ["", "1", "8"]


def test_losses_are_means_by_quarter_of_the_timesteps(tmp_path, capsys):
    progress = TrainingLog(tmp_path, 0, None)
    t = torch.tensor([0, 24, 25, 60, 99, 99])
    progress.add_losses({"loss": torch.tensor([1.0, 3.0, 5.0, 7.0, 1.0, 2.0])}, t, 100)
    progress.add_losses({"loss": torch.tensor([5.0])}, torch.tensor([0]), 100)
    progress.add("grad_norm", torch.tensor([2.0]))
    progress.add("grad_norm", torch.tensor([float("inf")]))
    progress.advance(7)
    progress.write(1, 7)
    progress.write(2, 14)
    progress.close()
    first, second = log_of(tmp_path)
    assert first == {
        "step": "1", "images": "7", "grad_norm": "2", "loss": "3.42857143", "loss_q0": "3", "loss_q1": "5",
        "loss_q2": "7", "loss_q3": "1.5",
    }  # fmt: skip
    assert second == dict.fromkeys(first, "") | {"step": "2", "images": "14"}
    assert capsys.readouterr().out.startswith("step 1 images 7 grad_norm 2 loss 3.42857 images_per_s")


def test_tensorboard_gets_the_same_numbers_where_it_is_installed(tmp_path, monkeypatch):
    """With a stand-in for TensorBoard, which is no dependency."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            told.append((folder, purge_step))

        def add_scalar(self, *scalar):
            told.append(scalar)

        def flush(self):
            pass

        close = flush

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    progress = TrainingLog(tmp_path, 4, None)
    progress.add("loss", torch.tensor([1.0, 2.0]))
    progress.write(5, 20)
    progress.close()
    assert told[:2] == [(str(tmp_path), 5), ("loss", 1.5, 5)]


def test_the_newest_weights_are_kept(tmp_path):
    names = [f"{kind}{step:06d}.pt" for kind in ("model", "ema_0.9_", "ema_0.99_") for step in (2, 4, 6, 8)]
    others = ["checkpoint.pt", "model.pt", "opt000002.pt", "my_model000002.pt", "notes.txt"]
    for name in names + others:
        (tmp_path / name).touch()
    prune(tmp_path, ["model000006.pt", "ema_0.9_000006.pt"], keep=2)
    gone = {"model000002.pt", "ema_0.9_000002.pt"}  # step 8 is of another run, 0.99 was not written
    assert {path.name for path in tmp_path.iterdir()} == set(names + others) - gone
    prune(tmp_path, ["model000008.pt"], keep=0)
    assert {path.name for path in tmp_path.iterdir()} == set(names + others) - gone


def test_a_run_prunes_its_weights_and_sweeps_what_a_killed_one_left(tmp_path):
    (tmp_path / ".checkpoint.pt.k1ll3d").touch()
    loop_of(tmp_path, lr_anneal_steps=5, save_interval=1, keep=2, log_interval=1, ema_rate="0.9").run()
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt", "checkpoint_before.pt", "progress.csv",
        "model000004.pt", "model000005.pt", "ema_0.9_000004.pt", "ema_0.9_000005.pt",
    }  # fmt: skip


def test_going_on_with_other_settings_is_said(tmp_path, caplog):
    loop_of(tmp_path, lr_anneal_steps=2).run()
    loop_of(tmp_path, lr_anneal_steps=2, log_interval=1, keep=1)
    assert not caplog.text
    loop = loop_of(tmp_path, lr_anneal_steps=4, weight_decay=0.1, schedule_sampler="loss-second-moment")
    assert caplog.messages == [
        f"{tmp_path}: going on with other settings: weight_decay 0.1 (was 0.0), schedule_sampler loss-second-moment "
        "(was uniform), lr_anneal_steps 4 (was 2)"
    ]
    assert loop.optimizer.param_groups[0]["weight_decay"] == 0.1
    loop.run()


def test_a_folder_that_cannot_be_gone_on_from_is_one_sentence(tmp_path):
    loop_of(tmp_path, lr_anneal_steps=1).run()
    with pytest.raises(ValueError, match=r"resume: never, but .* holds a run; give another --out_dir"):
        loop_of(tmp_path, resume="never")
    with pytest.raises(ValueError, match=r"a run of another network; give another --out_dir; tensors: "):
        loop_of(tmp_path, network={"num_channels": 64})
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a checkpoint of tensors"):
        loop_of(tmp_path)
    save_atomically({"step": 1, "network": {}}, path)
    with pytest.raises(ValueError, match=r"not the checkpoint of a run .* \(emas, first_loss, optimizer, scaler, sche"):
        loop_of(tmp_path)


def upstream_run(folder, network, step=40):
    """What upstream's TrainLoop saves, of a network that made one step with a known optimizer."""
    folder.mkdir()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    average = {name: 0.5 * tensor for name, tensor in network.state_dict().items()}
    torch.save(network.state_dict(), folder / f"model{step:06d}.pt")
    torch.save(average, folder / f"ema_0.9_{step:06d}.pt")
    torch.save(optimizer.state_dict(), folder / f"opt{step:06d}.pt")
    return folder / f"model{step:06d}.pt", average


def test_a_run_of_upstream_goes_on(tmp_path, caplog):
    network = loop_of(tmp_path / "other").network
    path, average = upstream_run(tmp_path / "upstream", network)
    loop = loop_of(tmp_path / "run", resume_checkpoint=str(path), weight_decay=0.2)
    assert caplog.messages == [f"{path}: going on at step 40 with model000040.pt, ema_0.9_000040.pt, opt000040.pt"]
    assert loop.step == 40
    assert_same(loop.network.state_dict().values(), network.state_dict().values())
    assert_same(loop.emas[0.9].state_dict().values(), average.values())
    assert_same(loop.emas[0.5].state_dict().values(), network.state_dict().values())
    for parameter in loop.network.parameters():
        torch.testing.assert_close(loop.optimizer.state[parameter]["exp_avg"], torch.full_like(parameter, 0.05))
    assert loop.optimizer.param_groups[0]["weight_decay"] == 0.2
    step_of(loop)
    assert {int(state["step"]) for state in loop.optimizer.state.values()} == {2}
    loop.out_dir.mkdir()
    loop.save()
    assert loop_of(tmp_path / "run", resume_checkpoint=str(path)).step == 41


def test_weights_alone_begin_a_run(tmp_path, caplog):
    network = loop_of(tmp_path / "other").network
    path, _ = upstream_run(tmp_path / "upstream", network)
    weights = path.rename(path.with_name("weights.pt"))
    loop = loop_of(tmp_path / "run", resume_checkpoint=str(weights))
    assert (loop.step, caplog.messages) == (0, [])
    for model in (loop.network, *loop.emas.values()):
        assert_same(model.state_dict().values(), network.state_dict().values())


def test_an_optimizer_of_other_parameters_is_not_used_and_said(tmp_path, caplog):
    """As upstream's float16 training leaves: all matrices in one tensor, all vectors in another."""
    path, _ = upstream_run(tmp_path / "upstream", loop_of(tmp_path / "other").network)
    flat = torch.optim.AdamW([torch.zeros(10, requires_grad=True), torch.zeros(1, 20, requires_grad=True)])
    torch.save(flat.state_dict(), path.with_name("opt000040.pt"))
    loop = loop_of(tmp_path / "run", resume_checkpoint=str(path))
    assert "opt000040.pt (of other parameters, not used)" in caplog.text
    assert not loop.optimizer.state


def test_weights_of_another_network_or_of_a_later_step_are_refused(tmp_path):
    path, _ = upstream_run(tmp_path / "upstream", loop_of(tmp_path / "other").network)
    with pytest.raises(ValueError, match=r"model000040\.pt is of step 40, training ends at 40"):
        loop_of(tmp_path / "run", resume_checkpoint=str(path), lr_anneal_steps=40)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model000010.pt")
    with pytest.raises(ValueError, match=r"resume_checkpoint: .*: another network than the flags describe; tensors: "):
        loop_of(tmp_path / "run", resume_checkpoint=str(tmp_path / "model000010.pt"))


def test_the_folder_of_a_run_of_samples_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("seed: 3")
    with pytest.raises(ValueError, match=r"holds samples of a run and its config\.yaml; give training another folder"):
        write_description(str(tmp_path), {"image_size": 16}, ["a"])
    assert (tmp_path / "config.yaml").read_text() == "seed: 3"
