"""Upstream's GaussianDiffusion: the same methods, arguments and returns, and `guidance=`; all work is done below."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .diffusion import losses, samplers
from .diffusion.denoiser import Denoiser, ModelMeanType, ModelVarType
from .diffusion.diffusion import Diffusion
from .diffusion.losses import LossType
from .diffusion.process import ForwardProcess, get_named_beta_schedule
from .guidance.base import Guidance, GuidedDenoiser
from .guidance.classifier import with_classifier

__all__ = ["GaussianDiffusion", "LossType", "ModelMeanType", "ModelVarType", "get_named_beta_schedule"]

Guidances = Guidance | Sequence[Guidance] | None
Result = dict[str, Tensor]


def _last_sample(progressive: Callable[..., Iterator[Result]]) -> Callable[..., Tensor]:
    """The method that runs a progressive loop to its end and returns x_0."""

    @functools.wraps(progressive)
    def loop(*args: Any, **settings: Any) -> Tensor:
        for result in progressive(*args, **settings):
            sample = result["sample"]
        return sample

    loop.__name__ = progressive.__name__.removesuffix("_progressive")
    loop.__doc__ = f"The sample x_0 of `{progressive.__name__}`, with the same arguments."
    return loop


class GaussianDiffusion(Diffusion):
    """Diffusion with a network: training losses, single steps and whole loops.

    betas: [T] in (0, 1]. Networks are called as model(x, timesteps, **model_kwargs). Arguments that the methods share:
    x [N, C, H, W]; t [N] int64; clip_denoised: clamp x̂_0 to [−1, 1]; denoised_fn: applied to x̂_0 before the clamp;
    cond_fn(x, timesteps, **model_kwargs): ∇ log p(y | x); model_kwargs: {"y": labels} and the like;
    guidance: one Guidance or several; a single step has no memory, so `every` acts only in loops.
    """

    def __init__(
        self,
        *,
        betas: np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ):
        process = ForwardProcess(betas, rescale_timesteps=rescale_timesteps)
        super().__init__(process, model_mean_type, model_var_type, loss_type)

    @property
    def betas(self) -> np.ndarray:
        return self.process.betas

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return self.process.alphas_cumprod

    @property
    def timestep_map(self) -> list[int]:
        """The original step of every respaced step."""
        return self.process.timestep_map

    def guided(
        self, denoiser: Denoiser, guidance: Guidances = None, cond_fn: Callable[..., Tensor] | None = None
    ) -> Denoiser:
        """The denoiser of one trajectory with guidances and a classifier's gradient."""
        guidances = [guidance] if isinstance(guidance, Guidance) else guidance or []
        guided: Denoiser = GuidedDenoiser(denoiser, self.process, guidances)
        return with_classifier(guided, cond_fn) if cond_fn else guided

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t of x_0 and noise (drawn if not given)."""
        return self.process.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def p_mean_variance(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Result:
        """`mean`, `variance`, `log_variance` of p(x_{t−1} | x_t) and `pred_xstart`, all of x's shape."""
        prediction = self.denoiser(model, clip_denoised, denoised_fn)(x, t, model_kwargs or {})
        return {
            "mean": prediction.mean,
            "variance": prediction.variance,
            "log_variance": prediction.log_variance,
            "pred_xstart": prediction.x0,
        }

    def p_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        guidance: Guidances = None,
        noise: Tensor | None = None,
    ) -> Result:
        """One DDPM step: `sample` x_{t−1}, and the guided `pred_xstart`. noise: the drawn noise, of x's shape."""
        denoiser = self.guided(self.denoiser(model, clip_denoised, denoised_fn), guidance, cond_fn)
        prediction = denoiser(x, t, model_kwargs or {})
        noise = torch.randn_like(x) if noise is None else noise
        return {"sample": samplers.ddpm_step(prediction, noise), "pred_xstart": prediction.x0}

    def ddim_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        eta: float = 0.0,
        guidance: Guidances = None,
        noise: Tensor | None = None,
    ) -> Result:
        """One DDIM step, as `p_sample`; `pred_xstart` includes a classifier's shift."""
        denoiser = self.guided(self.denoiser(model, clip_denoised, denoised_fn), guidance, cond_fn)
        prediction = denoiser(x, t, model_kwargs or {})
        noise = torch.randn_like(x) if noise is None else noise
        x0, _ = samplers.ddim_belief(prediction)
        return {"sample": samplers.ddim_step(prediction, noise, eta), "pred_xstart": x0}

    def ddim_reverse_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        eta: float = 0.0,
    ) -> Result:
        """One step from image to noise on DDIM's deterministic path: `sample` is x_{t+1}."""
        if eta != 0:
            raise ValueError(f"eta: only the deterministic path (0) can be reversed, got {eta}")
        prediction = self.denoiser(model, clip_denoised, denoised_fn)(x, t, model_kwargs or {})
        return {"sample": samplers.ddim_reverse_step(prediction), "pred_xstart": prediction.x0}

    def p_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        guidance: Guidances = None,
        step_noise: samplers.Noise | None = None,
    ) -> Iterator[Result]:
        """DDPM from x_T = `noise` (drawn if not given): after every step, what `p_sample` returns.

        shape: of x_T. device: default the model's. progress: show a bar. step_noise: the noise of a step, by number.
        """
        x_T, step_noise = self._start(model, shape, noise, device, step_noise)
        denoiser = self.guided(self.denoiser(model, clip_denoised, denoised_fn), guidance, cond_fn)
        states = samplers.ddpm(denoiser, self.process, x_T, model_kwargs or {}, step_noise)
        for state in tqdm(states, total=self.num_timesteps, disable=not progress):
            yield {"sample": state.x, "pred_xstart": state.prediction.x0}

    def ddim_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        guidance: Guidances = None,
        step_noise: samplers.Noise | None = None,
    ) -> Iterator[Result]:
        """DDIM from x_T = `noise`: after every step, what `ddim_sample` returns."""
        x_T, step_noise = self._start(model, shape, noise, device, step_noise)
        denoiser = self.guided(self.denoiser(model, clip_denoised, denoised_fn), guidance, cond_fn)
        states = samplers.ddim(denoiser, self.process, x_T, model_kwargs or {}, step_noise, eta)
        for state in tqdm(states, total=self.num_timesteps, disable=not progress):
            yield {"sample": state.x, "pred_xstart": samplers.ddim_belief(state.prediction)[0]}

    p_sample_loop = _last_sample(p_sample_loop_progressive)
    ddim_sample_loop = _last_sample(ddim_sample_loop_progressive)

    @staticmethod
    def _start(
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        step_noise: samplers.Noise | None,
    ) -> tuple[Tensor, samplers.Noise]:
        if noise is None:
            noise = torch.randn(*shape, device=next(model.parameters()).device if device is None else device)
        return noise, step_noise or (lambda step: torch.randn_like(noise))

    def calc_bpd_loop(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Tensor] | None = None,
        step_noise: samplers.Noise | None = None,
    ) -> Result:
        """The variational bound of x_start in bits/dim: total_bpd, prior_bpd [N]; vb, xstart_mse, mse [N, T].

        T: the last step first. step_noise: the noise of a step, by number (drawn if not given).
        """
        noise_of = step_noise or (lambda step: torch.randn_like(x_start))
        denoiser = self.denoiser(model, clip_denoised)
        return losses.bpd_loop(denoiser, self.process, x_start, model_kwargs or {}, noise_of)
