"""guided-diffusion's training loop: its files, its methods, which call each other, and the same numbers."""

import copy
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from . import dist_util, logger
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .nn import update_ema
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler
from .storage.checkpoints import save_atomically
from .storage.files import join
from .training.resume import beside

__all__ = ["INITIAL_LOG_LOSS_SCALE", "TrainLoop"]


class TrainLoop:
    """Train a model by `diffusion.training_losses` on the batches (images, condition) of `data`, this rank's own.

    batch_size: of a rank. microbatch: rows of a pass, -1: all; gradients of passes are added. ema_rate: a number, or
    several in a text with commas. resume_checkpoint: a modelSTEP.pt; its averages and optimizer lie beside it.
    lr_anneal_steps: the learning rate falls to 0 in so many steps, then training ends; 0: it does not end.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: Any,
        data: Iterator[tuple[Tensor, dict[str, Tensor]]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
    ):
        dist_util.setup_dist()
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size, self.microbatch = batch_size, microbatch if microbatch > 0 else batch_size
        self.lr, self.weight_decay, self.lr_anneal_steps = lr, weight_decay, lr_anneal_steps
        self.ema_rate = [float(rate) for rate in str(ema_rate).split(",")]
        self.log_interval, self.save_interval = log_interval, save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.step = self.resume_step = 0
        self.global_batch = batch_size * dist.get_world_size()

        self._load_and_sync_parameters()
        self.mp_trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth)
        self.opt = AdamW(self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay)
        if self.resume_step:
            self._load_optimizer_state()
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        else:
            self.ema_params = [copy.deepcopy(self.mp_trainer.master_params) for _ in self.ema_rate]

        self.use_ddp = dist.get_world_size() > 1
        self.ddp_model = self.model
        if self.use_ddp:
            devices = [dist_util.dev()] if dist_util.dev().type == "cuda" else None
            self.ddp_model = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)

    def _load_and_sync_parameters(self) -> None:
        checkpoint = self._resumed()
        if checkpoint:
            self.resume_step = parse_resume_step_from_filename(checkpoint)
            if dist.get_rank() == 0:
                logger.log(f"{checkpoint}: going on at step {self.resume_step}")
                self.model.load_state_dict(dist_util.load_state_dict(checkpoint, map_location=dist_util.dev()))
        dist_util.sync_params(self.model.parameters())

    def _load_ema_parameters(self, rate: float) -> list[Tensor]:
        params = copy.deepcopy(self.mp_trainer.master_params)
        checkpoint = find_ema_checkpoint(self._resumed(), self.resume_step, rate)
        if checkpoint and dist.get_rank() == 0:
            logger.log(f"{checkpoint}: going on with this moving average")
            state = dist_util.load_state_dict(checkpoint, map_location=dist_util.dev())
            params = self.mp_trainer.state_dict_to_master_params(state)
        dist_util.sync_params(params)
        return params

    def _load_optimizer_state(self) -> None:
        checkpoint = beside(self._resumed(), f"opt{self.resume_step:06}.pt")
        if checkpoint:
            logger.log(f"{checkpoint}: going on with this optimizer")
            self.opt.load_state_dict(dist_util.load_state_dict(checkpoint, map_location=dist_util.dev()))

    def _resumed(self) -> str:
        return find_resume_checkpoint() or self.resume_checkpoint

    def run_loop(self) -> None:
        """Train until the learning rate is 0; under $DIFFUSION_TRAINING_TEST until the second checkpoint."""
        while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            if self.step % self.save_interval == 0:
                self.save()
                if self.step and os.environ.get("DIFFUSION_TRAINING_TEST"):
                    return
            self.step += 1
        if (self.step - 1) % self.save_interval:
            self.save()

    def run_step(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """One step on a batch [N, C, H, W] and its condition, [N, …] each."""
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        self._anneal_lr()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: dict[str, Tensor]) -> None:
        """The gradients of a batch."""
        self.mp_trainer.zero_grad()
        for start in range(0, len(batch), self.microbatch):
            rows = slice(start, start + self.microbatch)
            micro = batch[rows].to(dist_util.dev())
            micro_cond = {name: values[rows].to(dist_util.dev()) for name, values in cond.items()}
            t, weights = self.schedule_sampler.sample(len(micro), dist_util.dev())
            last = rows.stop >= len(batch)  # ranks then take the mean of their gradients
            with nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs=micro_cond)
                if isinstance(self.schedule_sampler, LossAwareSampler):
                    self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
                log_loss_dict(self.diffusion, t, {name: values * weights for name, values in losses.items()})
                self.mp_trainer.backward((losses["loss"] * weights).mean())

    def _update_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def _anneal_lr(self) -> None:
        if self.lr_anneal_steps:
            done = (self.step + self.resume_step) / self.lr_anneal_steps
            for group in self.opt.param_groups:
                group["lr"] = self.lr * (1 - done)

    def log_step(self) -> None:
        """Put the step, and the images seen by all ranks, in the next table."""
        step = self.step + self.resume_step
        logger.logkv("step", step)
        logger.logkv("samples", (step + 1) * self.global_batch)

    def save(self) -> None:
        """Write modelSTEP.pt, ema_RATE_STEP.pt and optSTEP.pt, each atomically, on rank 0; all ranks wait for it."""
        if dist.get_rank() == 0:
            step = f"{self.step + self.resume_step:06d}"
            self._write(f"opt{step}.pt", self.opt.state_dict())
            for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
                self._write(f"ema_{rate}_{step}.pt", self.mp_trainer.master_params_to_state_dict(params))
            # Last, so that whoever goes on from it finds the others.
            self._write(f"model{step}.pt", self.mp_trainer.master_params_to_state_dict(self.mp_trainer.master_params))
        dist.barrier()

    def _write(self, name: str, state: Any) -> None:
        logger.log(f"saving {name}")
        save_atomically(state, join(get_blob_logdir(), name))


def parse_resume_step_from_filename(filename: str) -> int:
    """The step N in the name of a file PATH/modelN.pt, 0 where there is none."""
    _, named, rest = filename.rpartition("model")
    step = rest.partition(".")[0]
    return int(step) if named and step.isdecimal() else 0


def get_blob_logdir() -> str:
    """Where checkpoints go."""
    return logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """A checkpoint to go on from whatever the loop's `resume_checkpoint` says; None unless a client knows one."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float) -> str | None:
    """The moving average of a rate beside a modelSTEP.pt, None if there is none."""
    return beside(main_checkpoint, f"ema_{rate}_{step:06d}.pt") or None if main_checkpoint else None


def log_loss_dict(diffusion: Any, ts: Tensor, losses: dict[str, Tensor]) -> None:
    """Put losses [N] at timesteps [N] in the next table: their means, and those of each quarter of the timesteps."""
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for t, value in zip(ts.tolist(), values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{int(4 * t / diffusion.num_timesteps)}", value)
