"""Training of diffusion models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.config import option, parse_value
from guided_diffusion.denoiser import ModelMeanType
from guided_diffusion.training.trainer import Trainer, TrainerConfig


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
    label_dropout: float = option(0.0, "share of images trained without their label (needs null_label)")

    def __post_init__(self):
        super().__post_init__()
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
    """Train by `diffusion.training_losses`; leaves the EMA as ema_RATE_STEP.pt, upstream's name.

    null_label: what a dropped label becomes.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: Any,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        config: TrainingConfig,
        null_label: int | None = None,
        use_fp16: bool = False,
    ):
        if config.label_dropout and null_label is None:
            raise ValueError("label_dropout: needs class_cond and null_label")
        self.diffusion = diffusion
        self.null_label = null_label
        super().__init__(network, data, config, diffusion.num_timesteps, use_fp16)

    def _losses(self, x0: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.config.label_dropout:
            dropped = torch.rand(len(x0), device=self.device) < self.config.label_dropout
            condition = {**condition, "y": condition["y"].masked_fill(dropped, self.null_label)}
        t, weights = self.schedule_sampler.sample(len(x0), self.device)
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            losses = self.diffusion.training_losses(self.network, x0, t, condition)
        self.schedule_sampler.update(t, losses["loss"].detach())
        weighted = losses["loss"]
        if self.config.snr_gamma:
            weighted = losses["mse"] * self._snr_weights(t) + losses.get("vb", 0)
        return {**losses, "weighted": weighted * weights}

    def _snr_weights(self, t: Tensor) -> Tensor:
        alpha_bar = self.diffusion.process.at("alphas_cumprod", t, t)
        snr = alpha_bar / (1 - alpha_bar)
        if self.diffusion.model_mean_type is ModelMeanType.START_X:
            return snr.clamp(1, self.config.snr_gamma)
        return snr.clamp(max=self.config.snr_gamma) / snr

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return {f"ema_{rate}_{self.step:06d}.pt": ema.state_dict() for rate, ema in self.emas.items()}
