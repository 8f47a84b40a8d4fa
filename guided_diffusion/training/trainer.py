"""What every training has: gradients over all ranks, moving averages, atomic checkpoints, resume, progress."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..networks.layers import update_ema
from ..runs.batch_size import memory_said
from ..runs.ranks import Job
from ..settings.training import TrainerConfig
from ..storage.checkpoints import load_state_dict, misfit, read_pt, save_atomically
from ..storage.files import writing
from . import resume
from .draws import Draws, Rows, seed_dropout
from .log import TrainingLog
from .ranks import Ranks, signals_kept
from .schedule_sampler import create_named_schedule_sampler

log = logging.getLogger(__name__)

Batches = Callable[[int], Iterator[tuple[Tensor, dict[str, Tensor]]]]
"""From a step on, the endless batches (images, condition) of this rank: its rows of the global batch."""

EXPLODED = 1e4
"""A loss of so many times the run's first one, or 1 if that was less, ends the run."""


class Trainer(ABC):
    """Train `network` on batches of (images, condition), each rank of `job` on its rows.

    Everything needed to go on is in out_dir/checkpoint.pt, written atomically; `run` starts from it if it is there.
    What is drawn depends on the seed, the step and the row of the global batch alone, so the step is all there is to
    know of data and random numbers, and any number of ranks trains the same up to rounding. Only dropout inside the
    network also depends on the rank.

    num_timesteps: of the process, for the choice of timesteps. use_fp16: float16 autocast with a scaled loss, on a
    GPU; on a CPU training goes on without and says so. settings: of network and diffusion, kept in the checkpoint and
    compared on resuming. A ValueError says what cannot be gone on from.
    """

    def __init__(
        self,
        network: nn.Module,
        data: Batches,
        config: TrainerConfig,
        num_timesteps: int,
        use_fp16: bool = False,
        job: Job | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        self.job = job or Job()
        self.network = network.to(memory_format=torch.channels_last)
        self.config, self.num_timesteps = config, num_timesteps
        self.settings = dict(settings or {}) | asdict(config)
        self.device = next(network.parameters()).device
        if use_fp16 and self.device.type == "cpu":
            self._say("use_fp16: half precision needs a GPU; going on without (bf16 works on a CPU)")
            use_fp16 = False
        self.autocast_dtype = torch.float16 if use_fp16 else torch.bfloat16 if config.bf16 else None
        self.scaler = torch.amp.GradScaler(
            self.device.type, 2.0**20, 2.0**config.fp16_scale_growth, growth_interval=1, enabled=use_fp16
        )
        self.out_dir = Path(config.out_dir)
        self.emas = {rate: copy.deepcopy(network).requires_grad_(False).eval() for rate in config.ema_rates}
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.schedule_sampler = create_named_schedule_sampler(config.schedule_sampler, num_timesteps)
        self.draws = Draws(config.seed, self.job.rank * (config.batch_size // self.job.size))
        self.step = 0
        self.saved: int | None = None
        self.first_loss: float | None = None
        self.has_previous = (self.out_dir / resume.PREVIOUS).is_file()
        """Whether the checkpoint before the newest is there, as no loss of the newest one's weights is known yet."""
        if self.checkpoint_path.is_file():
            if config.resume == "never":
                raise ValueError(f"resume: never, but {config.out_dir} holds a run; give another --out_dir")
            self._restore(read_pt(self.checkpoint_path))
        elif config.resume_checkpoint:
            self._begin_with(config.resume_checkpoint)
        self.batches = data(self.step)
        self.progress: TrainingLog | None = None
        self.ranks = Ranks(self.job, self.device)
        steps = self.ranks.gather(torch.full((1, 1), self.step, device=self.device)).unique().tolist()
        if len(steps) > 1:
            raise ValueError(f"out_dir: ranks found different steps ({steps}); it must be one folder for all of them")
        self.shared_network = self.ranks.share(network)

    @property
    def checkpoint_path(self) -> Path:
        return self.out_dir / resume.CHECKPOINT

    @property
    def is_first(self) -> bool:
        """Whether this rank saves, logs, validates and samples."""
        return self.job.rank == 0

    def _say(self, text: str) -> None:
        if self.is_first:
            log.warning(text)

    def run(self) -> int:
        """Train all steps, or until SIGTERM or SIGINT; a checkpoint is left in both cases.

        Returns the signal's number, 0 if none came. A FloatingPointError on all ranks says where the loss exploded.
        """
        end = self.config.steps
        if self.is_first:
            with writing(self.out_dir):
                self.out_dir.mkdir(parents=True, exist_ok=True)
            resume.sweep(self.out_dir)
            self.progress = TrainingLog(self.out_dir, self.step, end)
        self.network.train()
        stopped = 0
        with signals_kept() as came:
            try:
                while not stopped and (end is None or self.step < end):
                    with memory_said(self.config.batch_size, "a smaller --microbatch"):
                        stopped = self.train_step(*next(self.batches), signal=came[0] if came else 0)
                    self.step += 1
                    if self.is_first:
                        self._follow_up()
                    if stopped or self.step == end or self.step % self.config.save_interval == 0:
                        self.save()
            finally:
                if self.progress:
                    self.progress.close()
            self.ranks.leave()
        return stopped

    def _follow_up(self) -> None:
        """What the first rank does after a step, beside saving."""
        self.progress.advance(self.config.batch_size)
        if self.step % self.config.log_interval == 0:
            self.progress.write(self.step, self.step * self.config.batch_size)

    def rows(self, images: Tensor, condition: dict[str, Tensor], draws: Draws, step: int) -> Rows:
        """A batch with what is drawn for it at a step."""
        (for_step, for_label, for_noise), noise = draws(step, images.shape)
        drawn = (*self.schedule_sampler.sample(for_step), noise, for_label, for_noise)
        x0, *drawn = (values.to(self.device) for values in (images, *drawn))
        condition = {name: values.to(self.device) for name, values in condition.items()}
        return Rows(x0, condition, *drawn)

    def train_step(self, images: Tensor, condition: dict[str, Tensor], signal: int = 0) -> int:
        """One step; returns the number of a signal that came to any rank."""
        seed_dropout(self.config.seed, self.step, self.job.rank)
        rows = self.rows(images, condition, self.draws, self.step)
        size = self.config.microbatch if self.config.microbatch > 0 else len(rows)
        parts = [rows.part(start, size) for start in range(0, len(rows), size)]
        of_parts = []
        for part in parts:
            with self.ranks.exchange(self.shared_network, of_gradients=part is parts[-1]):
                losses, trained = self._losses(part)
                self.scaler.scale((trained * part.weights).sum() / len(rows)).backward()
            of_parts.append({name: values.detach() for name, values in losses.items()})
        losses = {name: torch.cat([losses[name] for losses in of_parts]) for name in of_parts[0]}
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        # One exchange a step: all ranks see the same losses, so they stop together and choose timesteps alike.
        columns = [rows.t, torch.full_like(rows.t, signal), *losses.values()]
        t, signals, *values = self.ranks.gather(torch.stack([column.float() for column in columns]))
        losses = dict(zip(losses, values, strict=True))
        self._check(losses["loss"], norm)
        if self.has_previous and self.saved == self.step:
            self.has_previous = False
            if self.is_first:
                resume.drop_previous(self.out_dir)
        self.schedule_sampler.update(t.long(), losses["loss"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for rate, ema in self.emas.items():
            update_ema(list(ema.parameters()), list(self.network.parameters()), rate)
        if self.progress:
            self.progress.add_losses(losses, t.long(), self.num_timesteps)
            self.progress.add("grad_norm", norm.reshape(1).cpu())
            if self.scaler.is_enabled():
                self.progress.add("lg_loss_scale", torch.tensor([self.scaler.get_scale()]).log2())
        return int(signals.max())

    def _check(self, losses: Tensor, norm: Tensor) -> None:
        """Raise a FloatingPointError before an update with a loss or a gradient that would spoil the weights.

        losses: [N] of the global batch. A gradient that overflows only because float16's loss was scaled is skipped by
        the scaler and is no error.
        """
        mean = float(losses.mean())
        if self.first_loss is None:
            self.first_loss = mean
        wrong = (~losses.isfinite()).nonzero().flatten().tolist()
        if wrong:
            what = f"the loss is {losses[wrong[0]]:g} at rows {', '.join(map(str, wrong[:8]))} of the batch"
            what += f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        elif mean > EXPLODED * max(1.0, self.first_loss):
            what = f"the loss is {mean:.4g}, most at row {int(losses.argmax())} of the batch; it began at "
            what += f"{self.first_loss:.4g}"
        elif not norm.isfinite() and (not self.scaler.is_enabled() or self.scaler.get_scale() <= 1):
            what = f"the gradient's norm is {float(norm):g}, the loss {mean:.4g}"
        else:
            return
        raise FloatingPointError(f"step {self.step}: {what}; {self._to_go_on_from()}")

    def _to_go_on_from(self) -> str:
        """What is said of the checkpoint after a loss that would spoil the weights; a spoiled one is put aside."""
        if self.saved is None:
            return "no checkpoint was written yet"
        if self.saved < self.step:
            return f"{self.checkpoint_path} of step {self.saved} is good, to go on from with a smaller --lr"
        # The weights that were saved last are those that this loss is of.
        if not self.has_previous:
            return f"{self.checkpoint_path} holds the weights of this loss; begin with older ones (--resume_checkpoint)"
        if self.is_first:
            resume.back_to_previous(self.out_dir)
        return (
            f"the checkpoint of this step is called {resume.SPOILED} now, and {self.checkpoint_path} is the one before "
            "it again, to go on from with a smaller --lr"
        )

    @abstractmethod
    def _losses(self, rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
        """What is logged, [n] each: `loss` and more; and what is trained, [n], whose weighted mean falls."""

    def save(self) -> None:
        """Write this step's weights and then checkpoint.pt, each atomically; older weights go.

        The checkpoint before stays beside it until a loss of the new weights is known to be finite.
        """
        if self.is_first:
            wrong = [name for name, tensor in self.network.state_dict().items() if not tensor.isfinite().all()]
            if wrong:
                raise FloatingPointError(f"step {self.step}: weights are not finite ({wrong[0]}); they are not saved")
            weights = {f"model{self.step:06d}.pt": self.network}
            weights |= {f"ema_{rate}_{self.step:06d}.pt": ema for rate, ema in self.emas.items()}
            for name, network in weights.items():
                save_atomically(network.state_dict(), self.out_dir / name)
            resume.keep_previous(self.out_dir)
            save_atomically(self._state(), self.checkpoint_path)
            resume.prune(self.out_dir, weights, self.config.keep)
        self.has_previous = self.saved is not None
        self.saved = self.step

    def _state(self) -> dict[str, Any]:
        """All that is needed to go on."""
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "emas": {str(rate): ema.state_dict() for rate, ema in self.emas.items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "first_loss": self.first_loss,
            "settings": self.settings,
        }

    def _restore(self, state: Any) -> None:
        if not isinstance(state, dict) or (absent := self._state().keys() - state.keys()):
            what = f" ({', '.join(sorted(absent))} missing)" if isinstance(state, dict) else ""
            raise ValueError(
                f"{self.checkpoint_path}: not the checkpoint of a run that this version can go on from{what}"
            )
        wrong = misfit(self.network, state["network"])
        if wrong:
            raise ValueError(
                f"{self.checkpoint_path}: a run of another network; give another --out_dir; tensors: {wrong}"
            )
        self.network.load_state_dict(state["network"])
        for rate, ema in self.emas.items():
            ema.load_state_dict(state["emas"].get(str(rate), state["network"]))
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.schedule_sampler.load_state_dict(state["schedule_sampler"])
        self.step = self.saved = state["step"]
        self.first_loss = state["first_loss"]
        if differing := resume.changed(state["settings"], self.settings):
            self._say(f"{self.config.out_dir}: going on with other settings: {differing}")

    def _begin_with(self, path: str) -> None:
        """Weights from a file; where upstream's name says its step, also what upstream saved beside it."""
        weights = load_state_dict(path)
        wrong = misfit(self.network, weights)
        if wrong:
            raise ValueError(f"resume_checkpoint: {path}: another network than the flags describe; tensors: {wrong}")
        self.network.load_state_dict(weights)
        self.step = resume.step_of(path)
        if self.config.steps is not None and self.step >= self.config.steps:
            raise ValueError(f"resume_checkpoint: {path} is of step {self.step}, training ends at {self.config.steps}")
        found = []
        for rate, ema in self.emas.items():
            average = resume.beside(path, f"ema_{rate}_{self.step:06d}.pt") if self.step else ""
            ema.load_state_dict(load_state_dict(average) if average else weights)
            found += [Path(average).name] if average else []
        moments = resume.beside(path, f"opt{self.step:06d}.pt") if self.step else ""
        if moments:
            fits = resume.read_optimizer(self.optimizer, moments)
            found += [Path(moments).name + ("" if fits else " (of other parameters, not used)")]
        if self.step:
            self._say(f"{path}: going on at step {self.step} with {', '.join([Path(path).name, *found])}")
