"""A diffusion model but for its network: the process, what the network predicts, and what it is trained by."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..settings.model import DiffusionConfig
from . import losses
from .denoiser import ModelMeanType, ModelVarType, NetworkDenoiser
from .losses import LossType
from .process import ForwardProcess, get_named_beta_schedule, kept_timesteps


class Diffusion:
    """Makes denoisers of networks, and their training losses.

    Networks are called as model(x, timesteps, **model_kwargs); their output is read by mean and variance type.
    """

    def __init__(
        self,
        process: ForwardProcess,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
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
        return Diffusion(self.process.first(steps), self.model_mean_type, self.model_var_type, self.loss_type)

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
        """`loss` [N] of a batch [N, C, H, W] in [−1, 1], and its parts `mse` and `vb` where there are two."""
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


def build_diffusion(config: DiffusionConfig) -> Diffusion:
    """The diffusion of a configuration."""
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
