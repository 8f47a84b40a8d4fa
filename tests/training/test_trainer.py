"""The training loop: what it learns, draws, stops at and goes on from."""

import math
import os
import signal

import pytest
import torch
from torch.utils import checkpoint as torch_checkpoint

from guided_diffusion.diffusion.denoiser import ModelMeanType
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.training import TrainingConfig
from guided_diffusion.storage.checkpoints import load_state_dict
from guided_diffusion.training.loop import TrainLoop
from guided_diffusion.training.run import run
from guided_diffusion.training.schedule_sampler import LossSecondMomentSampler, UniformSampler
from trainings import IMAGES, assert_same, cut, gradients, log_of, loop_of, step_of


def test_eight_images_are_learned_by_heart(tmp_path):
    """The loss falls to a tenth, and x̂_0 under noise is that image of the eight which was noised."""
    row = torch.linspace(-1, 1, 16)
    angles = torch.arange(8)[:, None, None] * math.tau / 8
    planes = angles.cos() * row + angles.sin() * row[:, None]
    images = 0.7 * torch.stack([planes, -planes, planes.flip(1)], dim=1)
    torch.manual_seed(0)
    sizes = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1"}
    sizes["attention_resolutions"] = "8"
    network, diffusion = create_model_and_diffusion(**sizes, timestep_respacing="10", noise_schedule="cosine")
    config = TrainingConfig(
        out_dir=str(tmp_path), batch_size=8, lr=3e-3, lr_anneal_steps=200, ema_rate="0.97", log_interval=10
    )
    loop = TrainLoop(network, diffusion, lambda step: iter(lambda: (images, {}), None), config)
    loop.run()
    losses = [float(line["loss"]) for line in log_of(tmp_path)]
    assert losses[-1] < 0.1 * losses[0]
    t = torch.full((8,), 3)
    x_t = diffusion.q_sample(images, t, torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))
    x0 = diffusion.denoiser(loop.emas[0.97])(x_t, t, {}).x0.detach()
    errors = (x0[:, None] - images).square().mean(dim=(2, 3, 4)).sqrt()
    apart = (images[:, None] - images).square().mean(dim=(2, 3, 4)).sqrt()
    assert errors.argmin(dim=1).tolist() == list(range(8))
    assert errors.diagonal().max() < 0.5 * apart[apart > 0].min()


def test_a_resumed_run_is_the_undisturbed_run(tmp_path):
    settings = {"lr_anneal_steps": 8, "label_dropout": 0.3, "schedule_sampler": "loss-second-moment"}
    settings |= {"network": {"dropout": 0.2}, "log_interval": 1}
    whole = loop_of(tmp_path / "whole", **settings)
    whole.run()

    class Killed(BaseException):
        pass

    def until_killed(step):
        for number, batch in enumerate(cut(IMAGES)(step)):
            if number == 5:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        loop_of(tmp_path / "parts", data=until_killed, **settings).run()
    torch.rand(5)  # nothing depends on what else was drawn
    second = loop_of(tmp_path / "parts", **settings)
    assert second.step == 3
    second.run()
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert_same(second.network.parameters(), whole.network.parameters())
    assert_same(second.schedule_sampler.state_dict().values(), whole.schedule_sampler.state_dict().values())
    for rate in (0.9, 0.5):
        assert_same(second.emas[rate].parameters(), whole.emas[rate].parameters())
    assert load_state_dict(str(tmp_path / "parts" / "ema_0.9_000008.pt")).keys() == whole.network.state_dict().keys()


def test_microbatches_have_the_gradient_of_the_batch(tmp_path):
    whole, parts = (loop_of(tmp_path / str(size), microbatch=size) for size in (-1, 2))
    for loop in (whole, parts):
        step_of(loop)
    assert parts.first_loss == pytest.approx(whole.first_loss, rel=1e-5)
    torch.testing.assert_close(gradients(parts), gradients(whole), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("microbatch", [-1, 3])
def test_each_row_is_learned_from_by_the_weight_of_its_step(tmp_path, microbatch):
    def gradients_of(*weights):
        loop = loop_of(tmp_path / str(weights), microbatch=microbatch)
        sample = loop.schedule_sampler.sample
        loop.schedule_sampler.sample = lambda uniform: (sample(uniform)[0], torch.tensor(weights))
        step_of(loop)
        return torch.cat([gradient.flatten() for gradient in gradients(loop)])

    first, last, both = gradients_of(2.0, 0, 0, 0), gradients_of(0, 0, 0, 0.5), gradients_of(1.0, 0, 0, 1.0)
    assert first.norm() > 0.1
    torch.testing.assert_close(0.5 * first + 2 * last, both, atol=1e-6, rtol=1e-4)


def test_the_learning_rate_rises_and_falls_step_by_step(tmp_path):
    """Half of the rise at the first of two steps; of the fall over five, the last step has a fifth."""
    loop, rates = loop_of(tmp_path, lr=1.0, lr_warmup_steps=2, lr_anneal_steps=5, batch_size=1), []
    loop.network.requires_grad_(False)
    loop.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    weight = torch.ones((), requires_grad=True)
    loop._losses = lambda rows: ({"loss": weight.expand(len(rows)).detach()}, weight.expand(len(rows)))
    loop.run()
    assert rates == pytest.approx([0.5, 0.8, 0.6, 0.4, 0.2])
    assert [TrainingConfig(lr=3.0, lr_warmup_steps=3).learning_rate(step) for step in (0, 1, 2, 3, 99)] == [
        1,
        2,
        3,
        3,
        3,
    ]


def test_snr_weights(tmp_path):
    """One weighting of x̂_0, whatever the network predicts; ε's own loss already is SNR times that of x̂_0."""
    loop = loop_of(tmp_path, snr_gamma=5.0)
    alpha_bar = torch.from_numpy(loop.diffusion.alphas_cumprod).float()
    snr = alpha_bar / (1 - alpha_bar)
    t = torch.arange(8)
    assert (snr > 5).any()
    assert (snr < 1).any()
    torch.testing.assert_close(loop._snr_weights(t) * snr, snr.clamp(max=5))
    loop.diffusion.model_mean_type = ModelMeanType.START_X
    torch.testing.assert_close(loop._snr_weights(t), snr.clamp(1, 5))


def test_label_dropout_reaches_the_null_label(tmp_path):
    loop = loop_of(tmp_path, label_dropout=0.5)
    seen = []
    training_losses = loop.diffusion.training_losses

    def spy(network, x0, t, condition, noise):
        seen.extend(condition["y"].tolist())
        return training_losses(network, x0, t, condition, noise)

    loop.diffusion.training_losses = spy
    for _ in range(10):
        step_of(loop)
    assert set(seen) == {0, 1, 2}
    assert 8 < seen.count(2) < 32


def test_noise_jitter_scales_the_noise_of_half_of_the_rows(tmp_path):
    loop = loop_of(tmp_path, noise_jitter=0.25)
    factors = []
    for step in range(400):
        rows = loop.rows(IMAGES, {}, loop.draws, step)
        factors.append(loop._noise(rows).flatten(1).norm(dim=1) / rows.noise.flatten(1).norm(dim=1))
    logs = torch.cat(factors).log()
    scaled = logs[logs.abs() > 1e-6]
    assert len(scaled) / len(logs) == pytest.approx(0.5, abs=0.04)
    assert 0.24 < scaled.max() < 0.2501
    assert -0.2501 < scaled.min() < -0.24
    assert float(scaled.std()) == pytest.approx(0.25 / 3**0.5, abs=0.01)


def test_label_dropout_needs_a_null_label(tmp_path):
    network, diffusion = create_model_and_diffusion(image_size=32, num_channels=32, num_res_blocks=1)
    with pytest.raises(ValueError, match="null_label"):
        TrainLoop(network, diffusion, cut(IMAGES), TrainingConfig(out_dir=str(tmp_path), label_dropout=0.1))


def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_nothing(tmp_path):
    images = IMAGES.clone()
    images[6] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^step 1: the loss is nan at rows 2 of the batch; no checkpoint was"):
        loop_of(tmp_path, images, lr_anneal_steps=8).run()
    loop_of(tmp_path, lr_anneal_steps=4).run()
    with pytest.raises(FloatingPointError) as stop:
        loop_of(tmp_path, images, lr_anneal_steps=8).run()
    assert f"step 5: the loss is nan at rows 2 of the batch; {tmp_path}/checkpoint.pt of step 4 is good" in str(
        stop.value
    )
    again = loop_of(tmp_path, lr_anneal_steps=8)
    assert again.step == 4
    assert all(parameter.isfinite().all() for parameter in again.network.parameters())


def test_a_spoiled_checkpoint_gives_way_to_the_one_before(tmp_path):
    """The weights of a checkpoint are judged by the first loss after it: until then the one before is kept."""
    loop_of(tmp_path, lr_anneal_steps=4, save_interval=2).run()
    assert (tmp_path / "checkpoint_before.pt").is_file()
    second = loop_of(tmp_path, lr_anneal_steps=8, save_interval=1)
    training_losses = second.diffusion.training_losses

    def exploding(network, x0, t, condition, noise):
        losses = training_losses(network, x0, t, condition, noise)
        return {name: values * (1e6 if second.step == 6 else 1) for name, values in losses.items()}

    second.diffusion.training_losses = exploding
    with pytest.raises(FloatingPointError) as stop:
        second.run()
    assert f"checkpoint_spoiled.pt now, and {tmp_path}/checkpoint.pt is the one before it again" in str(stop.value)
    third = loop_of(tmp_path, lr_anneal_steps=8)
    assert third.step == 5
    third.run()
    assert third.step == 8


def test_the_first_loss_after_a_checkpoint_without_one_before(tmp_path):
    loop_of(tmp_path, lr_anneal_steps=1).run()
    again = loop_of(tmp_path, lr_anneal_steps=4)
    weight = next(again.network.parameters())
    again.diffusion.training_losses = lambda network, x0, *_: {"loss": (weight.sum() * float("nan")).expand(len(x0))}
    with pytest.raises(FloatingPointError, match=r"checkpoint.pt holds the weights of this loss; begin with older"):
        again.run()
    assert loop_of(tmp_path, lr_anneal_steps=4).step == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    loop = loop_of(tmp_path, lr_anneal_steps=4)
    step_of(loop)
    next(loop.network.parameters()).data[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"weights are not finite .*; they are not saved"):
        loop.save()
    assert not list(tmp_path.glob("*.pt"))


def test_a_loss_that_explodes_stops_the_run_before_it_is_learned_from(tmp_path):
    loop = loop_of(tmp_path)
    step_of(loop)
    before = [parameter.detach().clone() for parameter in loop.network.parameters()]
    training_losses = loop.diffusion.training_losses
    loop.diffusion.training_losses = lambda *batch: {"loss": 3e4 * training_losses(*batch)["loss"]}
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is .*, most at row \d of the batch; it began at"):
        step_of(loop)
    assert_same(loop.network.parameters(), before)
    with pytest.raises(FloatingPointError, match="the loss is"):
        loop_of(tmp_path, lr=1e6, lr_anneal_steps=5).run()


def test_the_loss_scale_is_taken_out_of_every_gradient(tmp_path):
    settings = {"log_interval": 1, "lr_anneal_steps": 2}
    plain, scaled = (loop_of(tmp_path / name, **settings) for name in ("plain", "scaled"))
    scaled.scaler = torch.amp.GradScaler("cpu", 2.0**20, growth_interval=10**6)
    for loop in (plain, scaled):
        loop.run()
    assert_same(gradients(scaled), gradients(plain))
    assert_same(scaled.network.parameters(), plain.network.parameters())
    columns = [[float(line["grad_norm"]) for line in log_of(tmp_path / name)] for name in ("plain", "scaled")]
    assert columns[0] == columns[1]
    assert [line["lg_loss_scale"] for line in log_of(tmp_path / "scaled")] == ["20", "20"]


def test_a_scaled_gradient_that_overflows_is_skipped_unless_no_scale_helps(tmp_path):
    loop = loop_of(tmp_path)
    loop.scaler = torch.amp.GradScaler("cpu", 2.0**127)
    before = [parameter.detach().clone() for parameter in loop.network.parameters()]
    step_of(loop)
    assert_same(loop.network.parameters(), before)
    assert loop.scaler.get_scale() == 2.0**126
    loop.scaler = torch.amp.GradScaler("cpu", 1.0)
    loop.network.out[2].bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="step 1: the gradient's norm is"):
        step_of(loop)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_saves(tmp_path, number):
    def data(step):
        for i, batch in enumerate(cut(IMAGES)(step)):
            if i == 1:
                os.kill(os.getpid(), number)
            yield batch

    handler = signal.getsignal(number)
    assert loop_of(tmp_path, data=data).run() == number
    assert signal.getsignal(number) is handler
    assert loop_of(tmp_path).step == 2


def test_a_training_without_an_end_says_so(tmp_path, capsys):
    def data(step):
        os.kill(os.getpid(), signal.SIGINT)
        yield from cut(IMAGES)(step)

    with pytest.raises(SystemExit):
        run(loop_of(tmp_path / "endless", data=data))
    assert "no end (--lr_anneal_steps 0): it trains until Ctrl-C or SIGTERM" in capsys.readouterr().out
    run(loop_of(tmp_path / "ended", lr_anneal_steps=1))
    assert "no end" not in capsys.readouterr().out


def test_loss_second_moment_sampler_prefers_large_losses_without_bias():
    sampler = LossSecondMomentSampler(4)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, weights = UniformSampler(4).sample(uniform)
    assert t.tolist() == (4 * uniform).floor().tolist()
    assert (weights == 1).all()
    assert torch.equal(sampler.sample(uniform)[0], t)
    losses = torch.tensor([1.0, 1.0, 1.0, 5.0])
    for _ in range(LossSecondMomentSampler.HISTORY):
        sampler.update(torch.arange(4), losses)
    p = sampler.probabilities()
    assert p[3].item() == pytest.approx(5 / 8, abs=1e-3)
    t, weights = sampler.sample(uniform)
    assert (t == 3).double().mean().item() == pytest.approx(p[3].item(), abs=0.01)
    assert (weights * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=0.02)


def test_ema_is_the_moving_average(tmp_path):
    loop = loop_of(tmp_path)
    weight = loop.network.out[2].weight
    expected = weight.detach().clone()
    for _ in range(3):
        step_of(loop)
        expected = 0.9 * expected + 0.1 * weight.detach()
    torch.testing.assert_close(loop.emas[0.9].out[2].weight, expected)


def test_half_precision_on_a_cpu_goes_on_without_and_says_so(tmp_path, caplog):
    network, diffusion = create_model_and_diffusion(image_size=32, num_channels=32, num_res_blocks=1)
    loop = TrainLoop(network, diffusion, cut(IMAGES), TrainingConfig(out_dir=str(tmp_path)), use_fp16=True)
    assert "use_fp16" in caplog.text
    assert loop.autocast_dtype is None


def test_samples_are_of_the_first_average_at_their_interval(tmp_path):
    shown = []
    loop = loop_of(tmp_path, sample=lambda *what: shown.append(what), sample_interval=2, lr_anneal_steps=5)
    loop.run()
    assert shown == [(loop.emas[0.9], tmp_path / f"samples_{step:06d}.png") for step in (2, 4)]
    assert not loop.emas[0.9].training


@pytest.mark.parametrize("use_checkpoint", [True, False])
def test_activations_are_recomputed_where_the_flag_says_so(tmp_path, monkeypatch, use_checkpoint):
    recomputed, checkpoint = [], torch_checkpoint.checkpoint

    def counted(*arguments, **settings):
        recomputed.append(arguments)
        return checkpoint(*arguments, **settings)

    monkeypatch.setattr(torch_checkpoint, "checkpoint", counted)
    loop = loop_of(tmp_path, network={"use_checkpoint": use_checkpoint})
    passes = []
    loop.network.middle_block[0].in_layers[0].register_forward_hook(lambda *_: passes.append(1))
    step_of(loop)
    assert bool(recomputed) == use_checkpoint
    assert len(passes) == (2 if use_checkpoint else 1)
    expected = loop_of(tmp_path)
    step_of(expected)
    torch.testing.assert_close(gradients(loop), gradients(expected), atol=1e-7, rtol=1e-5)
