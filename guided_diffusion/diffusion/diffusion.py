"""A diffusion model but for its network: the process, what the network predicts, and what it is trained by."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..settings.model import MOST_STEPS, DiffusionConfig
from ..settings.options import quoted
from ..settings.runs import FLOW_SAMPLERS
from . import losses
from .denoiser import ModelMeanType, ModelVarType, NetworkDenoiser
from .flow import LinearPath
from .losses import LossType
from .process import ForwardProcess, get_named_beta_schedule, kept_timesteps

NOT_TRAINED = "a linear_path is for sampling alone, its networks are neither trained nor measured here"


class Diffusion:
    """Makes denoisers of networks, and their training losses.

    Networks are called as `model(x, timesteps, **model_kwargs)`; their output is read by mean and variance type, of
    which flow models have none: what else they put out is not read.
    """

    def __init__(
        self,
        process: ForwardProcess | LinearPath,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType | None,
        loss_type: LossType,
    ):
        self.process = process
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type

    @property
    def num_timesteps(self) -> int:
        return self.process.num_timesteps

    def first(self, steps: int) -> "Diffusion":
        """The same on the first so many steps of its process, those nearest to the image."""
        return self._on(self.process.first(steps))

    def called_by(self, sampler: str) -> "Diffusion":
        """The same with a step for every network call of a sampler: all but heun make one a step."""
        return self._on(self.process.for_heun()) if sampler == "heun" else self

    def _on(self, process: ForwardProcess | LinearPath) -> "Diffusion":
        return Diffusion(process, self.model_mean_type, self.model_var_type, self.loss_type)

    def denoiser(
        self,
        model: Callable[..., Tensor],
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> NetworkDenoiser:
        """`model` as a Denoiser of this process. denoised_fn is applied to x̂_0 before the clamp to [−1, 1]."""
        return NetworkDenoiser(
            model, self.process, self.model_mean_type, self.model_var_type, clip_denoised, denoised_fn
        )

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`loss` [N] of a batch [N, C, H, W] in [−1, 1], and its parts `mse` and `vb` where there are two.

        A ValueError for flow models.
        """
        if self.model_var_type is None:
            raise ValueError(f"noise_schedule: {NOT_TRAINED}")
        condition = model_kwargs or {}
        noise = torch.randn_like(x_start) if noise is None else noise

        def bound(network: Callable[..., Tensor], x_t: Tensor) -> Tensor:
            return losses.vb_terms_bpd(self.denoiser(network, clip_denoised=False)(x_t, t, condition), x_start)

        denoiser = self.denoiser(model, clip_denoised=False)
        return losses.training_losses(denoiser, self.loss_type, x_start, t, condition, noise, bound)


def kinds(
    *,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_learned_sigmas: bool = False,
) -> dict[str, Any]:
    """Mean, variance and loss type for upstream's flags, by the arguments' names of a diffusion."""
    var_type = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return {
        "model_mean_type": ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.LEARNED_RANGE if learn_sigma else var_type,
        "loss_type": LossType.RESCALED_KL if use_kl else loss_type,
    }


def check_first_step(diffusion: Diffusion) -> None:
    """Raise a ValueError where sampling would begin with an ε at ᾱ = 0, which says nothing of the image."""
    if diffusion.model_mean_type is ModelMeanType.EPSILON and diffusion.process.alphas_cumprod[-1] == 0:
        raise ValueError(
            "noise_schedule, diffusion_steps: at the first step ᾱ is 0, and there a network of ε says nothing of the "
            "image; leave that step out (timestep_respacing), or take more steps"
        )


def _flow(config: DiffusionConfig) -> Diffusion:
    """The flow model of a configuration: its steps are as wide as each other, and begin at noise alone."""
    for name in ("predict_xstart", "rescale_timesteps"):
        if getattr(config, name):
            raise ValueError(f"{name}: on a linear_path the network predicts the velocity and is told t as it is")
    steps = config.timestep_respacing or str(config.diffusion_steps)
    if not steps.isdecimal() or not 1 <= int(steps) <= MOST_STEPS:
        name = "timestep_respacing" if config.timestep_respacing else "diffusion_steps"
        raise ValueError(f"{name}: a linear_path takes a number of steps from 1 to {MOST_STEPS}, got {quoted(steps)}")
    times = np.arange(1, int(steps) + 1) / int(steps)
    return Diffusion(LinearPath(times), ModelMeanType.VELOCITY, None, LossType.MSE)


def build_diffusion(config: DiffusionConfig, sampler: str | None = None) -> Diffusion:
    """The diffusion of a configuration; a ValueError where it does not go with a sampler.

    sampler: what it is sampled with, of the settings' `SAMPLERS`; None: it is trained or measured.
    """
    straight = config.noise_schedule == "linear_path"
    if straight and sampler is None:
        raise ValueError(f"noise_schedule: {NOT_TRAINED}")
    if straight != (sampler in FLOW_SAMPLERS):
        wanted = "a linear_path is sampled with euler or heun" if straight else "euler and heun sample a linear_path"
        raise ValueError(f"sampler, noise_schedule: {wanted}, got {sampler} and {config.noise_schedule}")
    if straight:
        return _flow(config)
    betas = get_named_beta_schedule(config.noise_schedule, config.diffusion_steps)
    kept = kept_timesteps(betas, config.timestep_respacing or [config.diffusion_steps])
    return Diffusion(
        ForwardProcess(betas, kept, config.rescale_timesteps),
        **kinds(
            learn_sigma=config.learn_sigma,
            use_kl=config.use_kl,
            predict_xstart=config.predict_xstart,
            rescale_learned_sigmas=config.rescale_learned_sigmas,
        ),
    )
