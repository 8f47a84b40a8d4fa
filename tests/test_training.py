"""Losses, data and the training loop."""

import json
from dataclasses import replace

import pytest
import torch

from conftest import SMALL
from guided_diffusion.checkpoints import load_state_dict
from guided_diffusion.denoiser import ModelMeanType
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.training.loop import TrainingConfig, TrainLoop
from guided_diffusion.training.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.training.schedule_sampler import LossSecondMomentSampler, UniformSampler


def test_kl_of_gaussians():
    parameters = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    one, two = [torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in (parameters[:2], parameters[2:])]
    torch.testing.assert_close(normal_kl(*parameters), torch.distributions.kl_divergence(one, two))


def test_likelihood_of_all_pixel_values_is_one():
    values = torch.arange(256.0) / 127.5 - 1
    for mean, scale in [(0.1, 0.02), (-0.99, 0.1), (0.7, 0.3)]:
        log_probs = discretized_gaussian_log_likelihood(
            values, torch.full_like(values, mean), torch.full_like(values, scale).log()
        )
        assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-3)
        inside = log_probs[1:-1]  # the ends hold the tails
        assert inside.argmax() == (values[1:-1] - mean).abs().argmin()


def loop_of(tmp_path, images, **settings):
    """A loop over one fixed sequence of batches that, like a loader, goes on where the loop is."""
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion(**SMALL, class_cond=True, num_classes=2, null_label=True)
    defaults = TrainingConfig(
        out_dir=str(tmp_path), batch_size=4, lr=1e-3, ema_rate="0.9,0.5", save_interval=3, log_interval=2
    )

    def batches():
        while True:
            start = 4 * (loop.step % 2)
            yield images[start : start + 4], {"y": torch.tensor([0, 1, 0, 1])}

    loop = TrainLoop(network, diffusion, batches(), replace(defaults, **settings), null_label=2)
    return loop


IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_training_learns(tmp_path):
    loop_of(tmp_path, IMAGES, lr_anneal_steps=120, lr=3e-3, label_dropout=0.2, snr_gamma=5.0).run()
    losses = [line["mse"] for line in log_of(tmp_path)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_a_resumed_run_is_the_undisturbed_run(tmp_path):
    settings = {"lr_anneal_steps": 8, "label_dropout": 0.3, "schedule_sampler": "loss-second-moment"}
    whole = loop_of(tmp_path / "whole", IMAGES, **settings)
    whole.run()

    class Killed(BaseException):
        pass

    first = loop_of(tmp_path / "parts", IMAGES, **settings)
    train_step = first._train_step

    def die(*batch):
        if first.step == 5:
            raise Killed
        return train_step(*batch)

    first._train_step = die
    with pytest.raises(Killed):
        first.run()
    second = loop_of(tmp_path / "parts", IMAGES, **settings)
    assert second.step == 3
    second.run()
    for ours, expected in zip(second.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, expected)
    for rate in (0.9, 0.5):
        for ours, expected in zip(second.emas[rate].parameters(), whole.emas[rate].parameters(), strict=True):
            assert torch.equal(ours, expected)
    assert load_state_dict(str(tmp_path / "parts" / "ema_0.9_000008.pt")).keys() == whole.network.state_dict().keys()


def test_microbatches_have_the_gradient_of_the_batch(tmp_path):
    ends = []
    for microbatch in (-1, 2):
        loop = loop_of(tmp_path / str(microbatch), IMAGES, microbatch=microbatch)
        draws = torch.Generator().manual_seed(1)
        steps, noise = torch.tensor([1, 3, 5, 7]), torch.randn(4, 3, 16, 16, generator=draws)
        taken = 0

        def losses(x0, condition, loop=loop, steps=steps, noise=noise):
            nonlocal taken
            part = slice(taken, taken + len(x0))
            taken += len(x0)
            loss = loop.diffusion.training_losses(loop.network, x0, steps[part], condition, noise[part])
            return {**loss, "weighted": loss["loss"]}

        loop._losses = losses
        for group in loop.optimizer.param_groups:
            group["eps"] = 1e-3  # so that the update is not just the gradient's sign
        means = loop._train_step(IMAGES[:4], {"y": torch.tensor([0, 1, 0, 1])})
        ends.append((means["loss"], [p.detach() for p in loop.network.parameters()]))
    (loss, whole), (loss_of_parts, parts) = ends
    assert loss == pytest.approx(loss_of_parts, rel=1e-5)
    for ours, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_snr_weights(tmp_path):
    """One weighting of x̂_0, whatever the network predicts; ε's own loss already is SNR times that of x̂_0."""
    loop = loop_of(tmp_path, IMAGES, snr_gamma=5.0)
    alpha_bar = torch.from_numpy(loop.diffusion.alphas_cumprod).float()
    snr = alpha_bar / (1 - alpha_bar)
    t = torch.arange(8)
    assert (snr > 5).any()
    assert (snr < 1).any()
    torch.testing.assert_close(loop._snr_weights(t) * snr, snr.clamp(max=5))
    loop.diffusion.model_mean_type = ModelMeanType.START_X
    torch.testing.assert_close(loop._snr_weights(t), snr.clamp(1, 5))


def test_label_dropout_reaches_the_null_label(tmp_path):
    loop = loop_of(tmp_path, IMAGES, label_dropout=0.5)
    seen = []
    training_losses = loop.diffusion.training_losses

    def spy(network, x0, t, condition):
        seen.extend(condition["y"].tolist())
        return training_losses(network, x0, t, condition)

    loop.diffusion.training_losses = spy
    for _ in range(10):
        loop._train_step(*next(loop.data))
    assert set(seen) == {0, 1, 2}
    assert 8 < seen.count(2) < 32


def test_label_dropout_needs_a_null_label(tmp_path):
    network, diffusion = create_model_and_diffusion(**SMALL)
    with pytest.raises(ValueError, match="null_label"):
        TrainLoop(network, diffusion, iter([]), TrainingConfig(out_dir=str(tmp_path), label_dropout=0.1))


def test_an_exploding_loss_stops_the_run_and_spoils_nothing(tmp_path):
    loop_of(tmp_path, IMAGES, lr_anneal_steps=4).run()
    loop = loop_of(tmp_path, IMAGES * float("nan"), lr_anneal_steps=8)
    with pytest.raises(FloatingPointError, match="step 4"):
        loop.run()
    again = loop_of(tmp_path, IMAGES, lr_anneal_steps=8)
    assert again.step == 4
    assert all(parameter.isfinite().all() for parameter in again.network.parameters())


def test_an_interrupted_run_is_saved(tmp_path):
    loop = loop_of(tmp_path, IMAGES)

    def interrupt():
        raise KeyboardInterrupt

    batches = loop.data
    loop.data = (next(batches) if i < 2 else interrupt() for i in range(3))
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop_of(tmp_path, IMAGES).step == 2


def test_loss_second_moment_sampler_prefers_large_losses_without_bias():
    sampler = LossSecondMomentSampler(4)
    uniform, weights = UniformSampler(4).sample(8, torch.device("cpu"))
    assert uniform.max() < 4
    assert (weights == 1).all()
    assert sampler.probabilities().tolist() == [0.25] * 4
    losses = torch.tensor([1.0, 1.0, 1.0, 5.0])
    for _ in range(LossSecondMomentSampler.HISTORY):
        sampler.update(torch.arange(4), losses)
    p = sampler.probabilities()
    assert p[3].item() == pytest.approx(5 / 8, abs=1e-3)
    torch.manual_seed(0)
    t, weights = sampler.sample(20000, torch.device("cpu"))
    assert (weights * losses[t]).mean().item() == pytest.approx(losses.mean().item(), rel=0.02)


def test_ema_is_the_moving_average(tmp_path):
    loop = loop_of(tmp_path, IMAGES)
    weight = loop.network.out[2].weight
    expected = weight.detach().clone()
    for _ in range(3):
        loop._train_step(*next(loop.data))
        expected = 0.9 * expected + 0.1 * weight.detach()
    torch.testing.assert_close(loop.emas[0.9].out[2].weight, expected)


def test_half_precision_on_a_cpu_goes_on_without_and_says_so(tmp_path, caplog):
    network, diffusion = create_model_and_diffusion(**SMALL)
    loop = TrainLoop(network, diffusion, iter([]), TrainingConfig(out_dir=str(tmp_path)), use_fp16=True)
    assert "use_fp16" in caplog.text
    assert loop.autocast_dtype is None
