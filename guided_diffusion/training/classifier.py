"""Training of noisy-image classifiers (Dhariwal & Nichol 2021), and how often they are right by noise level."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.config import option
from guided_diffusion.noise import VALIDATION
from guided_diffusion.parallel import Job
from guided_diffusion.process import ForwardProcess
from guided_diffusion.training.draws import Draws, Rows
from guided_diffusion.training.trainer import Batches, Trainer, TrainerConfig


@dataclass(frozen=True)
class ClassifierTrainingConfig(TrainerConfig):
    """training"""

    out_dir: str = option("runs/classifier", "folder for checkpoints and the log; the same command goes on from there")
    val_data_dir: str = option("", "folder of other images to validate on; empty: none")
    noised: bool = option(True, "train on noised images, as guidance needs")
    iterations: int = option(150000, "steps to train")
    lr: float = option(3e-4, "learning rate of AdamW")
    anneal_lr: bool = option(False, "let the learning rate fall to 0")
    batch_size: int = option(4, "images per step, of all ranks together")
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

    val_data: batches, by the number of the validation, to validate on every `eval_interval` steps, on the first rank.
    The log has `loss`, `acc@1` and `val_…`.
    """

    def __init__(
        self,
        network: nn.Module,
        diffusion: Any,
        data: Batches,
        config: ClassifierTrainingConfig,
        val_data: Batches | None = None,
        use_fp16: bool = False,
        job: Job | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.process = diffusion.process
        self.val_draws = Draws(config.seed, purpose=VALIDATION)
        # Clean images are those of the first timestep alone.
        num_timesteps = self.process.num_timesteps if config.noised else 1
        super().__init__(network, data, config, num_timesteps, use_fp16, job, settings)
        self.val_data = val_data(self.step // config.eval_interval) if val_data and self.is_first else None

    def _follow_up(self) -> None:
        if self.val_data and self.step % self.config.eval_interval == 0:
            self._validate(self.step // self.config.eval_interval)
        super()._follow_up()

    def _validate(self, number: int) -> None:
        rows = self.rows(*next(self.val_data), self.val_draws, number)
        self.network.eval()
        with torch.no_grad():
            losses = self._measure(self.network, rows)
        self.network.train()
        losses = {f"val_{name}": values.cpu() for name, values in losses.items()}
        self.progress.add_losses(losses, rows.t.cpu(), self.num_timesteps)

    def _losses(self, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        losses = self._measure(self.shared_network, rows)
        return losses, losses["loss"]

    def _measure(self, network: nn.Module, rows: Rows) -> dict[str, Tensor]:
        """Loss and accuracy, [n] each."""
        x = self.process.q_sample(rows.x0, rows.t, rows.noise) if self.config.noised else rows.x0
        with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            logits = network(x, self.process.network_timesteps(rows.t)).float()
        loss = F.cross_entropy(logits, rows.condition["y"], reduction="none")
        return {"loss": loss, "acc@1": (logits.argmax(dim=1) == rows.condition["y"]).float()}


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
