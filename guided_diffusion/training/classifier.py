"""Training of noisy-image classifiers (Dhariwal & Nichol 2021), and how often they are right by noise level."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.noise import VALIDATION
from ..diffusion.process import ForwardProcess
from ..runs.ranks import Job
from ..settings.training import ClassifierTrainingConfig
from .draws import Draws, Rows
from .trainer import Batches, Trainer


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
