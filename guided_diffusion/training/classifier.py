"""Training of noisy-image classifiers (Dhariwal & Nichol 2021), and how often they are right by noise level."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.config import option
from guided_diffusion.process import ForwardProcess
from guided_diffusion.training.trainer import Trainer, TrainerConfig

Batches = Iterator[tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class ClassifierTrainingConfig(TrainerConfig):
    """training"""

    out_dir: str = option("runs/classifier", "folder for checkpoints and the log; the same command goes on from there")
    val_data_dir: str = option("", "folder of other images to validate on; empty: none")
    noised: bool = option(True, "train on noised images, as guidance needs")
    iterations: int = option(150000, "steps to train")
    lr: float = option(3e-4, "learning rate of AdamW")
    anneal_lr: bool = option(False, "let the learning rate fall to 0")
    batch_size: int = option(4, "images per step")
    random_crop: bool = option(True, "crop at a random place and scale")
    log_interval: int = option(10, "steps between lines of the log")
    eval_interval: int = option(5, "steps between validations, each on one batch")
    save_interval: int = option(10000, "steps between checkpoints")

    def __post_init__(self):
        super().__post_init__()
        for name in ("iterations", "eval_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")

    @property
    def steps(self) -> int:
        return self.iterations

    def learning_rate(self, step: int) -> float:
        return self.lr * (1 - step / self.iterations) if self.anneal_lr else self.lr


class ClassifierLoop(Trainer):
    """Train by the cross-entropy of the class at noised images; leaves modelSTEP.pt, upstream's name.

    val_data: batches to validate on every `eval_interval` steps. The log has `loss`, `acc@1` and `val_…`.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: Any,
        data: Batches,
        config: ClassifierTrainingConfig,
        val_data: Batches | None = None,
        use_fp16: bool = False,
    ):
        self.process = diffusion.process
        self.val_data = val_data
        super().__init__(network, data, config, self.process.num_timesteps, use_fp16)

    def _train_step(self, images: Tensor, condition: dict[str, Tensor]) -> dict[str, float]:
        means = super()._train_step(images, condition)
        if self.val_data is not None and self.step % self.config.eval_interval == 0:
            images, condition = next(self.val_data)
            self.network.eval()
            with torch.no_grad():
                losses, _, _ = self._measure(images.to(self.device), condition["y"].to(self.device))
            self.network.train()
            means |= {f"val_{name}": float(value.mean()) for name, value in losses.items()}
        return means

    def _losses(self, x0: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        losses, t, weights = self._measure(x0, condition["y"])
        self.schedule_sampler.update(t, losses["loss"].detach())
        return {**losses, "weighted": losses["loss"] * weights}

    def _measure(self, x0: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Loss and accuracy [N] at timesteps that are drawn, those steps [N], and their weights [N]."""
        if self.config.noised:
            t, weights = self.schedule_sampler.sample(len(x0), self.device)
            x = self.process.q_sample(x0, t, torch.randn_like(x0))
        else:
            t, weights, x = torch.zeros_like(y), torch.ones(len(x0), device=self.device), x0
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            logits = self.network(x, self.process.network_timesteps(t)).float()
        loss = F.cross_entropy(logits, y, reduction="none")
        return {"loss": loss, "acc@1": (logits.argmax(dim=1) == y).float()}, t, weights

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return {f"model{self.step:06d}.pt": self.network.state_dict()}


@torch.no_grad()
def accuracy_by_noise(
    network: nn.Module,
    process: ForwardProcess,
    images: Tensor,
    labels: Tensor,
    steps: Sequence[int],
    draws: int = 1,
    seed: int = 0,
) -> list[float]:
    """How often the classifier is right at x_t for each t of `steps`, over all images with `draws` noises each.

    images: [N, 3, S, S] in [−1, 1]; labels: [N].
    """
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for step in steps:
        right = 0.0
        for _ in range(draws):
            t = torch.full((len(images),), step, device=images.device)
            noise = torch.randn(images.shape, generator=generator).to(images.device)
            logits = network(process.q_sample(images, t, noise), process.network_timesteps(t))
            right += float((logits.argmax(dim=1) == labels).float().mean())
        shares.append(right / draws)
    return shares
