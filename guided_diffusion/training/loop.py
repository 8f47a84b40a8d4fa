"""Training of diffusion models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import ModelMeanType
from ..runs.ranks import Job
from ..settings.training import TrainingConfig
from .draws import Rows
from .trainer import Batches, Trainer

Sample = Callable[[nn.Module, Path], None]
"""Draws samples of a network and writes them to a file."""


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
