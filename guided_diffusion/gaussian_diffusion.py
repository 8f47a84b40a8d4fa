"""guided-diffusion's GaussianDiffusion: its methods, arguments and returns, and `guidance=`.

Every method does its work by the formulas of the rooms, and calls the others through `self`: a subclass that overrides
one, or an instance with one patched, takes effect in every loop.
"""

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._authors import guidances_of
from ._patchable import Patchable
from .diffusion import losses, samplers
from .diffusion.denoiser import Denoiser, ModelMeanType, ModelVarType, NetworkDenoiser, Prediction
from .diffusion.diffusion import Diffusion
from .diffusion.losses import LossType, discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .diffusion.process import ForwardProcess, betas_for_alpha_bar, get_named_beta_schedule
from .diffusion.times import every_row
from .guidance.base import Guidance, GuidedDenoiser
from .guidance.classifier import gradient_of

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "discretized_gaussian_log_likelihood",
    "get_named_beta_schedule",
    "mean_flat",
    "normal_kl",
]

Guidances = Guidance | Sequence[Guidance] | GuidedDenoiser | None
Result = dict[str, Tensor]

TABLES = (
    "betas", "num_timesteps", "rescale_timesteps", "timestep_map", "original_num_steps",
    "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1",
    "posterior_mean_coef2",
)  # fmt: skip
"""What of the process is read and set as an attribute of the diffusion: float64 arrays [T], and numbers."""


def _extract_into_tensor(arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]) -> Tensor:
    """Values of an array [T] at timesteps [N], float32, expanded to a shape of N rows."""
    values = torch.from_numpy(arr).float().to(timesteps.device)[timesteps]
    return values.reshape(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)


class _OwnProcess:
    """The process with the formulas of a diffusion's own methods, so that overriding one changes all that use it."""

    def __init__(self, diffusion: "GaussianDiffusion"):
        self._diffusion = diffusion

    def __getattr__(self, name: str) -> Any:
        return getattr(self._diffusion.process, name)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self._diffusion.q_sample(x0, t, noise=noise)

    def q_posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self._diffusion.q_posterior_mean_variance(x_start=x0, x_t=x_t, t=t)[0]

    def x0_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor, otherwise: Tensor | float = math.nan) -> Tensor:
        x0 = self._diffusion._predict_xstart_from_eps(x_t=x_t, t=t, eps=eps)
        return torch.where(self.has_signal(t, x_t), x0, otherwise)

    def x0_from_previous(self, x_t: Tensor, t: Tensor, previous: Tensor) -> Tensor:
        return self._diffusion._predict_xstart_from_xprev(x_t=x_t, t=t, xprev=previous)

    def eps_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        return self._diffusion._predict_eps_from_xstart(x_t, t, x0)


class _MeanVariance(dict):
    """What `p_mean_variance` returns, and the belief that it is of."""

    def __init__(self, belief: Prediction):
        super().__init__(
            mean=belief.mean, variance=belief.variance, log_variance=belief.log_variance, pred_xstart=belief.x0
        )
        self._belief, self._values = belief, {name: (value, _version(value)) for name, value in self.items()}

    def belief(self) -> Prediction | None:
        """The belief, if the values are still its own: neither replaced nor changed in place."""
        same = all(
            self.get(name) is value and _version(value) == version for name, (value, version) in self._values.items()
        )
        return self._belief if same else None


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


class GaussianDiffusion(Diffusion):
    """Diffusion with a network: training losses, single steps and whole loops.

    betas: [T] in (0, 1]. Networks are called as `model(x, timesteps, **model_kwargs)`. Arguments of several methods:
    x [N, C, H, W]; t [N] int64; clip_denoised: clamp x̂_0 to [−1, 1]; denoised_fn: applied to x̂_0 before the clamp;
    `cond_fn(x, timesteps, **model_kwargs)`: ∇ log p(y | x); model_kwargs: {"y": labels} and the like;
    guidance: one Guidance or several, added to every belief that `p_mean_variance` gives; a single step has no memory,
    so `every` acts only in loops. The tables of the process are attributes, float64 [T].
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
        self.guided_block: dict[str, Any] = {}
        """`sel_attn_block` and `sel_attn_depth`, for `guidance_kwargs`."""
        self.guided_network: nn.Module | None = None
        """The network that has this block, where a loop is given a function that calls it."""

    def __getattr__(self, name: str) -> Any:
        if name in TABLES and "process" in self.__dict__:
            return getattr(self.process, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in TABLES and "process" in self.__dict__:
            self.process.replace_table(name, value)
        else:
            super().__setattr__(name, value)

    def denoiser(
        self,
        model: Callable[..., Tensor],
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Denoiser:
        """`model` as a Denoiser of this process: what `p_mean_variance` says of it."""

        def denoise(x_t: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Prediction:
            out = self.p_mean_variance(
                model, x_t, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=dict(condition)
            )
            return self._belief(out, x_t, t, condition, clip_denoised)

        return denoise

    def _network(
        self,
        model: Callable[..., Tensor],
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> NetworkDenoiser:
        """A denoiser of the steps t [N], which tells `model` what `_scale_timesteps` makes of them."""

        def network(x: Tensor, _timesteps: Tensor, **condition: Any) -> Tensor:
            return model(x, self._scale_timesteps(t), **condition)

        process: Any = _OwnProcess(self)
        return NetworkDenoiser(network, process, self.model_mean_type, self.model_var_type, clip_denoised, denoised_fn)

    def _belief(
        self, out: Result, x: Tensor, t: Tensor, condition: Mapping[str, Any] | None, clip_denoised: bool
    ) -> Prediction:
        """The belief that a result of `p_mean_variance` is, or became in somebody's hands."""
        belief = out.belief() if isinstance(out, _MeanVariance) else None
        if belief is not None:
            return belief
        x0, process = out["pred_xstart"], _OwnProcess(self)
        return Prediction(
            process,
            x,
            t,
            condition or {},
            process.eps_from_x0(x, t, x0),
            x0,
            out["variance"],
            out["log_variance"],
            partial(torch.clamp, min=-1, max=1) if clip_denoised else lambda x0: x0,
            network_mean=out["mean"],
        )

    def _guided(self, denoiser: Denoiser, guidance: Guidances) -> GuidedDenoiser:
        """The denoiser of one trajectory."""
        if isinstance(guidance, GuidedDenoiser):
            return guidance
        return GuidedDenoiser(denoiser, _OwnProcess(self), [guidance] if isinstance(guidance, Guidance) else guidance)

    def _step_values(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        model_kwargs: Mapping[str, Any] | None,
        guidance: Guidances,
    ) -> Result:
        """What `p_mean_variance` says, with guidance added."""
        if guidance is None:
            return self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
        guided = self._guided(self.denoiser(model, clip_denoised, denoised_fn), guidance)
        return _MeanVariance(guided(x, t, model_kwargs or {}))

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return self.process.network_timesteps(t)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), all of x_start's shape."""
        return (
            self.process.at("sqrt_alphas_cumprod", t, x_start) * x_start,
            _extract_into_tensor(1 - self.process.alphas_cumprod, t, x_start.shape),
            self.process.at("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start),
        )

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t of x_0 and noise (drawn if not given)."""
        return self.process.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and (clipped) log variance of q(x_{t−1} | x_t, x_0), all of x_t's shape."""
        return (
            self.process.q_posterior_mean(x_start, x_t, t),
            self.process.at("posterior_variance", t, x_t).expand_as(x_t),
            self.process.at("posterior_log_variance_clipped", t, x_t).expand_as(x_t),
        )

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        return self.process.x0_from_eps(x_t, t, eps)

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return self.process.x0_from_previous(x_t, t, xprev)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return self.process.eps_from_x0(x_t, t, pred_xstart)

    def p_mean_variance(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Result:
        """`mean`, `variance`, `log_variance` of p(x_{t−1} | x_t) and `pred_xstart`, all of x's shape."""
        return _MeanVariance(self._network(model, t, clip_denoised, denoised_fn)(x, t, model_kwargs or {}))

    def condition_mean(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: Result,
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The mean that a classifier's gradient has moved."""
        gradient = gradient_of(cond_fn, x, self._scale_timesteps(t), model_kwargs or {})
        return samplers.shifted_mean(p_mean_var["mean"].float(), p_mean_var["variance"], gradient.float())

    def condition_score(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: Result,
        x: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Result:
        """`p_mean_var` with the score moved by a classifier's gradient: its mean and pred_xstart follow."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = gradient_of(cond_fn, x, self._scale_timesteps(t), model_kwargs or {})
        eps = samplers.shifted_eps(self.process, t, eps, gradient)
        x0 = self._predict_xstart_from_eps(x, t, eps)
        mean = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)[0]
        return dict(p_mean_var) | {"pred_xstart": x0, "mean": mean}

    def p_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        guidance: Guidances = None,
        noise: Tensor | None = None,
    ) -> Result:
        """One DDPM step: `sample` x_{t−1}, and the guided `pred_xstart`. noise: the drawn noise, of x's shape."""
        out = self._step_values(model, x, t, clip_denoised, denoised_fn, model_kwargs, guidance)
        noise = torch.randn_like(x) if noise is None else noise
        belief = self._belief(out, x, t, model_kwargs, clip_denoised)
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
            belief = replace(belief, network_mean=mean)
        return {"sample": samplers.ddpm_step(belief, noise), "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        *,
        guidance: Guidances = None,
        noise: Tensor | None = None,
    ) -> Result:
        """One DDIM step, as `p_sample`; `pred_xstart` includes a classifier's shift."""
        out = self._step_values(model, x, t, clip_denoised, denoised_fn, model_kwargs, guidance)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        x0 = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x0)
        noise = torch.randn_like(x) if noise is None else noise
        return {"sample": samplers.ddim_move(self.process, t, x0, eps, noise, eta), "pred_xstart": x0}

    def ddim_reverse_sample(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        *,
        guidance: Guidances = None,
    ) -> Result:
        """One step from image to noise on DDIM's deterministic path: `sample` is x_{t+1}."""
        if eta != 0:
            raise ValueError(f"eta: only the deterministic path (0) can be reversed, got {eta}")
        out = self._step_values(model, x, t, clip_denoised, denoised_fn, model_kwargs, guidance)
        x0 = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, x0)
        return {"sample": samplers.ddim_reverse_move(self.process, t, x0, eps), "pred_xstart": x0}

    def p_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **more: Any,
    ) -> Tensor:
        """The sample x_0 of `p_sample_loop_progressive`, with the same arguments."""
        return _last(
            self.p_sample_loop_progressive(
                model,
                shape,
                noise=noise,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                cond_fn=cond_fn,
                model_kwargs=model_kwargs,
                device=device,
                progress=progress,
                **more,
            )
        )

    def p_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        guidance: Guidances = None,
        step_noise: samplers.Noise | None = None,
        skip_timesteps: int = 0,
        init_image: Tensor | None = None,
        guidance_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Result]:
        """DDPM from x_T = `noise` (drawn if not given): after every step, what `p_sample` returns.

        shape: of x_T. device: default the model's. progress: show a bar. step_noise: the noise of a step, by number.
        skip_timesteps: leave out so many of the first steps, and begin with `init_image` [N, C, H, W] in [−1, 1]
        (default: zeros) under the noise of the first that is made (SDEdit, Meng et al. 2022). guidance_kwargs: instead
        of `guidance`, SAG's authors' guide_start, guide_scale and blur_sigma, or PAG's authors' guidance_strategies.
        """
        if guidance_kwargs is not None:
            guidance = self._authors_guidance(model, guidance_kwargs)
        x = self._start(model, shape, noise, device, skip_timesteps, init_image)
        denoiser = self.denoiser(model, clip_denoised, denoised_fn)
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
        )
        yield from self._loop(step, x, denoiser, guidance, step_noise, skip_timesteps, progress)

    def ddim_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        **more: Any,
    ) -> Tensor:
        """The sample x_0 of `ddim_sample_loop_progressive`, with the same arguments."""
        return _last(
            self.ddim_sample_loop_progressive(
                model,
                shape,
                noise=noise,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                cond_fn=cond_fn,
                model_kwargs=model_kwargs,
                device=device,
                progress=progress,
                eta=eta,
                **more,
            )
        )

    def ddim_sample_loop_progressive(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        guidance: Guidances = None,
        step_noise: samplers.Noise | None = None,
        skip_timesteps: int = 0,
        init_image: Tensor | None = None,
        guidance_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Result]:
        """DDIM, as `p_sample_loop_progressive`: after every step, what `ddim_sample` returns."""
        if guidance_kwargs is not None:
            guidance = self._authors_guidance(model, guidance_kwargs)
        x = self._start(model, shape, noise, device, skip_timesteps, init_image)
        denoiser = self.denoiser(model, clip_denoised, denoised_fn)
        step = partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )
        yield from self._loop(step, x, denoiser, guidance, step_noise, skip_timesteps, progress)

    def ddim_reverse_sample_loop(
        self,
        model: Callable[..., Tensor],
        image: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        guidance: Guidances = None,
        skip_timesteps: int = 0,
    ) -> Tensor:
        """The noise x_T that DDIM's deterministic path leads to from `image`, [N, C, H, W] in [−1, 1].

        device: default the image's. skip_timesteps: leave out so many of the last steps, for a loop that leaves out the
        same of the first.
        """
        step = partial(
            self.ddim_reverse_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        _warn_of_dropout(model)
        steps = range(self.num_timesteps - skip_timesteps)
        denoiser = self.denoiser(model, clip_denoised, denoised_fn)
        return _last(self._steps(step, image.to(device), steps, denoiser, guidance, None, progress))

    def _authors_guidance(self, model: Any, guidance_kwargs: Mapping[str, Any]) -> list[Guidance]:
        is_network = isinstance(model, nn.Module) or self.guided_network is None
        network = model if is_network else self.guided_network
        return guidances_of(guidance_kwargs, network, self.guided_block, self.num_timesteps)

    def _start(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        skip_timesteps: int,
        init_image: Tensor | None,
    ) -> Tensor:
        """The first x_t of a loop."""
        _warn_of_dropout(model)
        if not 0 <= skip_timesteps < self.num_timesteps:
            raise ValueError(f"skip_timesteps: wanted 0 to {self.num_timesteps - 1}, got {skip_timesteps}")
        if noise is None:
            noise = torch.randn(*shape, device=next(model.parameters()).device if device is None else device)
        if tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise: wanted the shape {list(shape)}, got {list(noise.shape)}")
        if init_image is None and not skip_timesteps:
            return noise
        # Contiguous: `randn_like` draws in the order of the memory.
        image = torch.zeros_like(noise) if init_image is None else init_image.to(noise).contiguous()
        first = torch.full((len(noise),), self.num_timesteps - 1 - skip_timesteps, device=noise.device)
        return self.q_sample(image, first, noise=noise)

    def _loop(
        self,
        step: Callable[..., Result],
        x: Tensor,
        denoiser: Denoiser,
        guidance: Guidances,
        step_noise: samplers.Noise | None,
        skip_timesteps: int,
        progress: bool,
    ) -> Iterator[Result]:
        steps = range(self.num_timesteps - 1 - skip_timesteps, -1, -1)
        return self._steps(step, x, steps, denoiser, guidance, step_noise, progress)

    def _steps(
        self,
        step: Callable[..., Result],
        x: Tensor,
        steps: Sequence[int],
        denoiser: Denoiser,
        guidance: Guidances,
        step_noise: samplers.Noise | None,
        progress: bool,
    ) -> Iterator[Result]:
        """`step` after step, with one guided denoiser that remembers what `every` uses again."""
        more: dict[str, Any] = {}
        if guidance is not None:
            _takes(step.func, "guidance")
            more["guidance"] = self._guided(denoiser, guidance)
        if step_noise is not None:
            _takes(step.func, "noise")
        for number in tqdm(steps, disable=not progress):
            t = every_row(number, x)
            if step_noise is not None:
                more["noise"] = step_noise(number)
            with torch.no_grad():
                out = step(x, t, **more)
            yield out
            x = out["sample"]

    def _vb_terms_bpd(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Result:
        """`output`: a term of the variational bound for each row, [N] bits/dim; and `pred_xstart`."""
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        belief = self._belief(out, x_t, t, model_kwargs, clip_denoised)
        return {"output": losses.vb_terms_bpd(belief, x_start), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL of q(x_T | x_0) from the standard normal, [N] bits/dim."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(x_start[:1])
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> Result:
        """`loss` [N] of a batch in [−1, 1], and its parts `mse` and `vb` where there are two."""
        condition = model_kwargs or {}
        noise = torch.randn_like(x_start) if noise is None else noise
        denoiser = self._network(model, t, clip_denoised=False)

        def bound(network: Callable[..., Tensor], x_t: Tensor) -> Tensor:
            own = model if network is denoiser.network else network
            return self._vb_terms_bpd(
                model=own, x_start=x_start, x_t=x_t, t=t, clip_denoised=False, model_kwargs=condition
            )["output"]

        return losses.training_losses(denoiser, self.loss_type, x_start, t, condition, noise, bound)

    def calc_bpd_loop(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        step_noise: samplers.Noise | None = None,
    ) -> Result:
        """The variational bound of x_start in bits/dim: total_bpd, prior_bpd [N]; vb, xstart_mse, mse [N, T].

        T: the last step first. step_noise: the noise of a step, by number (drawn if not given).
        """

        def term(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            out = self._vb_terms_bpd(
                model, x_start=x_start, x_t=x_t, t=t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
            )
            return out["output"], out["pred_xstart"]

        noise_of = step_noise or (lambda step: torch.randn_like(x_start))
        return losses.bpd_loop(_OwnProcess(self), x_start, noise_of, term, self._prior_bpd)


def _last(results: Iterable[Result]) -> Tensor:
    for result in results:
        sample = result["sample"]
    return sample


def _warn_of_dropout(model: Any) -> None:
    """Warn, once, of a network that drops out at random while it samples."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    if rates := [part.p for part in parts if isinstance(part, nn.Dropout) and part.training and part.p]:
        warnings.warn(
            f"the network is in training mode, with dropout {max(rates):g}: samples depend on more than their noise; "
            "call its eval() first",
            stacklevel=4,
        )


def _takes(method: Callable[..., Any], name: str) -> None:
    """Raise a TypeError if a method that was overridden or patched takes no argument of that name."""
    parameters = inspect.signature(method).parameters.values()
    if not any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(f"{getattr(method, '__qualname__', method)} takes no `{name}`: add it, or pass no {name}")


# What this module has from the rooms, like `betas_for_alpha_bar` and `normal_kl`, may be patched here, as upstream.
sys.modules[__name__].__class__ = Patchable
