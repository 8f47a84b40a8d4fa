"""What every training has: gradients, moving averages, atomic checkpoints, resume, progress."""

import copy
import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from guided_diffusion.checkpoints import load_state_dict, misfit, save_atomically
from guided_diffusion.config import option
from guided_diffusion.nn import update_ema
from guided_diffusion.training.schedule_sampler import create_named_schedule_sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerConfig(ABC):
    """what every training is told"""

    data_dir: str = option("", "folder of images (any depth); label_name.png gives the class, where there are classes")
    out_dir: str = option("runs/train", "folder for checkpoints and the log; the same command goes on from there")
    batch_size: int = option(64, "images per step")
    microbatch: int = option(-1, "images per forward pass; -1: the whole batch")
    lr: float = option(1e-4, "learning rate of AdamW")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    schedule_sampler: str = option("uniform", "timesteps to train on: uniform or loss-second-moment")
    random_crop: bool = option(False, "crop at a random place and scale")
    random_flip: bool = option(True, "mirror half of the images")
    num_workers: int = option(0, "threads that read images ahead; no image depends on it")
    bf16: bool = option(False, "bfloat16 autocast (CPU or GPU); the network's fp16 flag: float16, on a GPU only")
    fp16_scale_growth: float = option(1e-3, "with float16: log2 of the loss scale's growth per step")
    log_interval: int = option(50, "steps between lines of the log")
    save_interval: int = option(1000, "steps between checkpoints")
    resume_checkpoint: str = option("", "weights to begin with (.pt or .safetensors)")
    seed: int = option(0, "seed of weights, data order, timesteps and noise")

    def __post_init__(self):
        for name in ("batch_size", "lr", "log_interval", "save_interval"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: wanted more than 0, got {getattr(self, name)}")

    @property
    @abstractmethod
    def steps(self) -> int | None:
        """How many steps to train; None: until interrupted."""

    @property
    def ema_rates(self) -> list[float]:
        """Rates of the moving averages of the weights that are kept."""
        return []

    @abstractmethod
    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""


def seed_torch(seed: int) -> None:
    """Seed torch's generators: weights, data order, timesteps and noise."""
    torch.manual_seed(seed)


class Trainer(ABC):
    """Train `network` on batches of (images, condition).

    Everything needed to go on is in out_dir/checkpoint.pt, written atomically; `run` starts from it if it is there.
    num_timesteps: of the process, for the choice of timesteps. use_fp16: float16 autocast with a scaled loss, on a
    GPU; on a CPU training goes on without and says so.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        config: TrainerConfig,
        num_timesteps: int,
        use_fp16: bool,
    ):
        self.network = network.to(memory_format=torch.channels_last)
        self.data, self.config = data, config
        self.device = next(network.parameters()).device
        if use_fp16 and self.device.type == "cpu":
            log.warning("use_fp16: half precision needs a GPU; going on without (bf16 works on a CPU)")
            use_fp16 = False
        self.autocast_dtype = torch.float16 if use_fp16 else torch.bfloat16 if config.bf16 else None
        self.scaler = torch.amp.GradScaler(
            self.device.type, 2.0**20, 2.0**config.fp16_scale_growth, growth_interval=1, enabled=use_fp16
        )
        self.out_dir = Path(config.out_dir)
        if config.resume_checkpoint:
            network.load_state_dict(load_state_dict(config.resume_checkpoint))
        self.emas = {rate: copy.deepcopy(network).requires_grad_(False) for rate in config.ema_rates}
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.schedule_sampler = create_named_schedule_sampler(config.schedule_sampler, num_timesteps)
        self.step = 0
        if self.checkpoint_path.is_file():
            self._restore(torch.load(self.checkpoint_path, map_location=self.device, weights_only=True))

    @property
    def checkpoint_path(self) -> Path:
        return self.out_dir / "checkpoint.pt"

    def run(self) -> None:
        """Train all steps, or until interrupted (Ctrl-C); a checkpoint is left in both cases."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.network.train()
        end = self.config.steps
        bar = tqdm(total=end, initial=self.step, unit="step", dynamic_ncols=True, disable=None)
        since, started = [], time.perf_counter()
        try:
            while end is None or self.step < end:
                since.append(self._train_step(*next(self.data)))
                self.step += 1
                bar.update()
                if self.step % self.config.log_interval == 0:
                    images_per_s = len(since) * self.config.batch_size / (time.perf_counter() - started)
                    self._log(since, images_per_s, bar)
                    since, started = [], time.perf_counter()
                if self.step % self.config.save_interval == 0 or self.step == end:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            bar.close()

    def _train_step(self, images: Tensor, condition: dict[str, Tensor]) -> dict[str, float]:
        size = self.config.microbatch if self.config.microbatch > 0 else len(images)
        totals: dict[str, Tensor] = {}
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            x0 = images[part].to(self.device)
            losses = self._losses(x0, {name: rows[part].to(self.device) for name, rows in condition.items()})
            share = len(x0) / len(images)
            if not losses["loss"].isfinite().all():
                raise FloatingPointError(f"step {self.step}: the loss is not finite; go on from {self.checkpoint_path}")
            self.scaler.scale(losses.pop("weighted").mean() * share).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, torch.zeros(())) + value.detach().mean().cpu() * share
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for rate, ema in self.emas.items():
            update_ema(list(ema.parameters()), list(self.network.parameters()), rate)
        return {name: float(value) for name, value in totals.items()}

    @abstractmethod
    def _losses(self, x0: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is logged, [N] each: `loss` and more; and `weighted`, whose mean is trained."""

    @abstractmethod
    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights that a checkpoint leaves for use, by file name."""

    def _log(self, since: list[dict[str, float]], images_per_s: float, bar: tqdm) -> None:
        names = dict.fromkeys(name for entry in since for name in entry)
        known = {name: [entry[name] for entry in since if name in entry] for name in names}
        means = {name: sum(values) / len(values) for name, values in known.items()}
        line = {"step": self.step, "images": self.step * self.config.batch_size, **means, "images_per_s": images_per_s}
        with open(self.out_dir / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
        if bar.disable:
            print(" ".join(f"{name} {value:.6g}" for name, value in line.items()), flush=True)

    def save(self) -> None:
        """Write checkpoint.pt and this step's weights, each atomically."""
        save_atomically(
            {
                "step": self.step,
                "network": self.network.state_dict(),
                "emas": {str(rate): ema.state_dict() for rate, ema in self.emas.items()},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
                "random_state": torch.get_rng_state(),
                "config": asdict(self.config),
            },
            self.checkpoint_path,
        )
        for name, state in self._weights().items():
            save_atomically(state, self.out_dir / name)

    def _restore(self, state: dict[str, Any]) -> None:
        wrong = misfit(self.network, state["network"])
        if wrong:
            raise ValueError(
                f"{self.checkpoint_path}: a run of another network; give another --out_dir; tensors: {wrong}"
            )
        self.network.load_state_dict(state["network"])
        for rate, ema in self.emas.items():
            ema.load_state_dict(state["emas"].get(str(rate), state["network"]))
        self.scaler.load_state_dict(state["scaler"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        self.step = state["step"]
        torch.set_rng_state(state["random_state"].cpu())
