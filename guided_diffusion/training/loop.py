"""Training of diffusion models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.config import option, parse_value
from guided_diffusion.denoiser import ModelMeanType
from guided_diffusion.parallel import Job
from guided_diffusion.training.draws import Rows
from guided_diffusion.training.trainer import Batches, Trainer, TrainerConfig

Sample = Callable[[nn.Module, Path], None]
"""Draws samples of a network and writes them to a file."""


@dataclass(frozen=True)
class TrainingConfig(TrainerConfig):
    """training"""

    lr_warmup_steps: int = option(0, "steps over which the learning rate rises from 0")
    lr_anneal_steps: int = option(0, "train so many steps, the learning rate falling to 0; 0: no end, no fall")
    ema_rate: str = option("0.9999", "rate of the moving average of the weights; several: 0.999,0.9999")
    snr_gamma: float = option(
        0.0,
        "weigh the squared error of x̂_0 by min(SNR, γ) (Hang et al. 2023), and by at least 1 where the network "
        "predicts x_0 (Salimans & Ho 2022); 0: by SNR for ε, by 1 for x_0",
    )
    noise_jitter: float = option(
        0.0,
        "in half of the images multiply the noise by exp(U(−J, J)) at the same timestep, so that the network learns to "
        "read the noise from the picture; 0: never",
    )
    label_dropout: float = option(0.0, "share of images trained without their label (needs null_label)")
    sample_interval: int = option(
        0, "steps between samples_STEP.png: 16 images of the first moving average, always of the same noise; 0: never"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sample_interval < 0:
            raise ValueError(f"sample_interval: wanted 0 or more, got {self.sample_interval}")
        if not 0 <= self.noise_jitter <= 1:
            raise ValueError(f"noise_jitter: wanted 0 to 1, got {self.noise_jitter}")
        if self.snr_gamma and not self.snr_gamma >= 1:
            raise ValueError(f"snr_gamma: wanted 1 or more, or 0 for none, got {self.snr_gamma}")
        for name, share in [("label_dropout", self.label_dropout), *(("ema_rate", rate) for rate in self.ema_rates)]:
            if not 0 <= share < 1:
                raise ValueError(f"{name}: wanted at least 0 and below 1, got {share}")

    @property
    def steps(self) -> int | None:
        return self.lr_anneal_steps or None

    @property
    def ema_rates(self) -> list[float]:
        return [parse_value(rate, float, "ema_rate") for rate in self.ema_rate.split(",")]

    def learning_rate(self, step: int) -> float:
        rate = self.lr
        if self.lr_warmup_steps:
            rate *= min(1.0, (step + 1) / self.lr_warmup_steps)
        if self.lr_anneal_steps:
            rate *= 1 - step / self.lr_anneal_steps
        return rate


class TrainLoop(Trainer):
    """Train by `diffusion.training_losses`; leaves modelSTEP.pt and the averages ema_RATE_STEP.pt, upstream's names.

    null_label: what a dropped label becomes. sample: writes samples of a network every `sample_interval` steps.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: Any,
        data: Batches,
        config: TrainingConfig,
        null_label: int | None = None,
        use_fp16: bool = False,
        job: Job | None = None,
        settings: Mapping[str, Any] | None = None,
        sample: Sample | None = None,
    ):
        if config.label_dropout and null_label is None:
            raise ValueError("label_dropout: needs class_cond and null_label")
        self.diffusion = diffusion
        self.null_label = null_label
        self.sample = sample
        super().__init__(network, data, config, diffusion.num_timesteps, use_fp16, job, settings)

    def _losses(self, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        condition = rows.condition
        if self.config.label_dropout:
            dropped = rows.for_label < self.config.label_dropout
            condition = {**condition, "y": condition["y"].masked_fill(dropped, self.null_label)}
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            losses = self.diffusion.training_losses(self.shared_network, rows.x0, rows.t, condition, self._noise(rows))
        if not self.config.snr_gamma:
            return losses, losses["loss"]
        return losses, losses["mse"] * self._snr_weights(rows.t) + losses.get("vb", 0)

    def _noise(self, rows: Rows) -> Tensor:
        """ε [n, C, H, W], in half of the rows stronger or weaker than the timestep says."""
        if not self.config.noise_jitter:
            return rows.noise
        spread = (4 * rows.for_noise - 3).where(rows.for_noise >= 0.5, 0)
        factor = (self.config.noise_jitter * spread).exp().to(rows.noise)
        return rows.noise * factor[:, None, None, None]

    def _follow_up(self) -> None:
        super()._follow_up()
        if self.sample and self.config.sample_interval and self.step % self.config.sample_interval == 0:
            first = self.emas[self.config.ema_rates[0]]
            self.sample(first, self.out_dir / f"samples_{self.step:06d}.png")

    def _snr_weights(self, t: Tensor) -> Tensor:
        alpha_bar = self.diffusion.process.at("alphas_cumprod", t, t)
        snr = alpha_bar / (1 - alpha_bar)
        if self.diffusion.model_mean_type is ModelMeanType.START_X:
            return snr.clamp(1, self.config.snr_gamma)
        return snr.clamp(max=self.config.snr_gamma) / snr
