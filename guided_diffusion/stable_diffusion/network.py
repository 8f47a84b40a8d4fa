"""A diffusers UNet as a network that takes latents of any scheduler's scale."""

from typing import Any

import torch
from torch import Tensor, nn


class LatentNetwork:
    """`network(x_t, timesteps, **condition)` of a diffusers UNet: [N, C, h, w] float32 to the same.

    The UNet is called in its own dtype. The scheduler, which must be the one that steps, scales x_t for every pass.
    condition: the UNet's own arguments by name (`encoder_hidden_states`, `added_cond_kwargs`, `cross_attention_kwargs`,
    …), and `inpaint`, [N, 5, h, w], mask and latents of the masked picture, for UNets of nine channels. With a
    ControlNet, `control` holds the arguments that it alone takes (`controlnet_cond`, `conditioning_scale`); it sees the
    same latents as the UNet.
    """

    def __init__(self, unet: nn.Module, scheduler: Any, controlnet: nn.Module | None = None):
        self.unet = unet
        self.scheduler = scheduler
        self.controlnet = controlnet

    def __call__(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        inpaint: Tensor | None = None,
        control: dict[str, Any] | None = None,
        **condition: Any,
    ) -> Tensor:
        x = self.scheduler.scale_model_input(x_t, timesteps[0]).to(self.unet.dtype)
        if self.controlnet is not None:
            shared = {key: condition[key] for key in ("encoder_hidden_states", "added_cond_kwargs") if key in condition}
            down, middle = self.controlnet(x, timesteps, return_dict=False, **shared, **control)
            condition |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        if inpaint is not None:
            x = torch.cat([x, inpaint.to(x.dtype)], dim=1)
        return self.unet(x, timesteps, return_dict=False, **condition)[0].float()
