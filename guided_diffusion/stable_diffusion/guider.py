"""Self-attention guidance for diffusers' own modular pipelines. Needs the extra `stable-diffusion` to be imported."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from ..diffusion.denoiser import Prediction
from ..diffusion.process import NoiseLevels
from ..diffusion.times import every_row
from ..guidance.base import Observation
from ..networks.attention import record_attention
from ..settings.stable_diffusion import MIDDLE
from .sampling import latent_guidance
from .schedulers import mean_type, noise_levels


class SelfAttentionGuider(BaseGuidance):
    """Classifier-free and self-attention guidance as the guider of a modular pipeline (`update_components(guider=…)`).

    scheduler: the one of the pipeline. guidance_scale: 1 + s_c. sag_scale: s. preset, block: as `latent_guidance`.
    start, stop: the part of the steps that is guided, 0 the first. The pipeline calls the UNet once for each of
    conditional, unconditional and degraded input.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_degraded"]  # noqa: RUF012
    ignore_for_config = ["scheduler"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        *,
        scheduler: Any = None,
        guidance_scale: float = 7.5,
        sag_scale: float = 0.75,
        preset: str = "paper",
        block: str = MIDDLE,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        self.scheduler = scheduler
        self.guidance_scale = guidance_scale
        self.sag_scale = sag_scale
        self.preset = preset
        self.block = block
        self._hooks = ExitStack()
        self._seen = SimpleNamespace(timesteps=None)

    def _names(self) -> list[str]:
        # Some schedulers call the network more often than there are steps. Before the first, prompts are encoded.
        done = 0 if self._step is None else self._step / len(self.scheduler.timesteps)
        if not self._enabled or (self._step is not None and not self._start <= done < self._stop):
            return self._input_predictions[:1]
        wanted = [True, self.guidance_scale != 1, self.sag_scale != 0]
        return [name for name, is_wanted in zip(self._input_predictions, wanted, strict=True) if is_wanted]

    @property
    def num_conditions(self) -> int:
        return len(self._names())

    @property
    def is_conditional(self) -> bool:
        return self._names()[self._count_prepared - 1] == "pred_cond"

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        # An exception in the UNet keeps the pipeline from calling cleanup_models.
        self._hooks.close()
        if self.scheduler is None:
            raise ValueError("scheduler: a guider that was loaded does not know it; guider.scheduler = pipe.scheduler")
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        names = self._names()
        # The degraded input has the condition of the pass that it is made from.
        places = {"pred_cond": 0, "pred_uncond": 1, "pred_degraded": int("pred_uncond" in names)}
        return [self._prepare_batch(data, places[name], name) for name in names]

    def prepare_models(self, denoiser: nn.Module) -> None:
        self._count_prepared += 1
        names = self._names()
        if "pred_degraded" not in names:
            return
        if names[self._count_prepared - 1] == "pred_degraded":

            def degrade(_unet: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                # Not one call longer, so that nothing is left that changes what a UNet is given.
                handle.remove()
                return self._degraded(args[0]), *args[1:]

            handle = denoiser.register_forward_pre_hook(degrade)
        elif names[self._count_prepared] == "pred_degraded":
            sag = self._seen.sag = latent_guidance(denoiser, self.sag_scale, self.preset, block=self.block)
            self._seen.scores = self._hooks.enter_context(record_attention(sag.block))
            self._hooks.enter_context(denoiser.register_forward_hook(self._see))

    def cleanup_models(self, denoiser: nn.Module) -> None:  # noqa: ARG002
        self._hooks.close()

    def _see(self, _unet: nn.Module, _args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        self._seen.output = output[0]

    def _time(self, x: Tensor) -> tuple[NoiseLevels, Tensor]:
        """The noise levels of the scheduler's calls, and t of this one; the device is read at the first one alone."""
        scheduler, seen = self.scheduler, self._seen
        index = getattr(scheduler, "step_index", None)
        if seen.timesteps is not scheduler.timesteps:  # a sampling begins with new ones
            levels = noise_levels(scheduler)
            seen.unit = NoiseLevels(levels.alphas / levels.norms, levels.sigmas / levels.norms, levels.timesteps)
            first = (scheduler.timesteps == self._timestep).nonzero()[0].item() if index is None else index
            seen.timesteps, seen.before_the_first = scheduler.timesteps, first - self._step
        if index is None:
            index = seen.before_the_first + self._step
        return seen.unit, every_row(seen.unit.num_timesteps - 1 - index, x)

    def _degraded(self, given: Tensor) -> Tensor:
        """The UNet's input with its latents degraded; the channels that inpainting adds are left."""
        seen = self._seen
        x = given[:, : seen.output.shape[1]].float()
        unit, t = self._time(x)
        # What x_t is, before it is known what the network makes of it.
        blank = Prediction(unit, x, t, {}, x, x, predicts=mean_type(self.scheduler))
        seen.base = blank.with_output(seen.output.float())
        seen.scores.check(len(x))
        mask = seen.sag.mask(Observation(seen.base, {seen.sag: seen.scores}))
        x_hat = seen.sag.degrade(seen.base, mask)
        seen.degraded = Prediction(unit, x_hat, t, {}, x_hat, x_hat, predicts=blank.predicts)
        return torch.cat([x_hat.to(given.dtype), given[:, x.shape[1] :]], dim=1)

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_degraded: Tensor | None = None
    ) -> GuiderOutput:
        """The sum of both guidances, as the network's output that the scheduler expects."""
        pred = pred_cond if pred_uncond is None else pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_degraded is not None:
            base, other = self._seen.base, self._seen.degraded.with_output(pred_degraded.float())
            if self._seen.sag.space == "model":
                other = base.with_output(other.output)
            guided = base.with_output(pred.float())
            pred = guided.with_eps(guided.eps + self.sag_scale * (base.eps - other.eps)).output.to(pred.dtype)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
