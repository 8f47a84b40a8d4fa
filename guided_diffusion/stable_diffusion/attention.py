"""Self-attention layers of diffusers' UNets, as the recorder of attention wants them."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..networks.attention import Listener, of_this_thread
from ..settings.stable_diffusion import MIDDLE


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@dataclass(frozen=True, eq=False)
class TransformerAttention:
    """A self-attention layer of a diffusers UNet.

    layer: takes tokens [N, T, C], has `heads`, `to_q` and `to_k`. around: the module that it is a part of and that
    still takes [N, C, h, w], so that rows and columns are known.
    """

    layer: nn.Module
    around: nn.Module

    def listen(self, listener: Listener) -> list[RemovableHandle]:
        """As `Attends.listen`: by hooks on the modules' inputs, whatever attention processor is in use."""
        grid: list[int] = []

        def see(_around: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            grid[:] = _input(args, kwargs).shape[2:]

        @torch.no_grad()
        def hear(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = _input(args, kwargs)
            q, k = (
                project(tokens).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for project in (layer.to_q, layer.to_k)
            )
            listener(q, k, tuple(grid))

        return [
            self.around.register_forward_pre_hook(of_this_thread(see), with_kwargs=True),
            self.layer.register_forward_pre_hook(of_this_thread(hear), with_kwargs=True),
        ]


def self_attention_layers(unet: nn.Module) -> dict[str, TransformerAttention]:
    """Every self-attention layer of a diffusers UNet by its module name."""
    found = {}
    for name, module in unet.named_modules():
        around, inside, _ = name.partition(".transformer_blocks.")
        if inside and name.endswith(".attn1") and not module.is_cross_attention:
            found[name] = TransformerAttention(module, unet.get_submodule(around))
    return found


def find_layer(unet: nn.Module, name: str = MIDDLE) -> TransformerAttention:
    """The self-attention layer of that name (`name.0` or `name[0]`); a ValueError lists the right names."""
    layers = self_attention_layers(unet)
    dotted = re.sub(r"\[(\d+)\]", r".\1", name)
    if dotted not in layers:
        raise ValueError(f"sag_block: no self-attention {name!r} in this UNet; it has: {', '.join(layers) or 'none'}")
    return layers[dotted]
