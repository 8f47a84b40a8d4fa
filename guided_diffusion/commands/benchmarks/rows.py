"""What every section of the benchmark gives, and the plain path that some are measured by."""

from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch

from ...networks.attention import TokenLinear
from ...networks.unet import AttentionBlock


@dataclass(frozen=True)
class Row:
    """One result: a ratio or an amount, and what it is."""

    section: str
    what: str
    value: float
    unit: str = "×"
    goal: str = ""


def plain(network: torch.nn.Module) -> None:
    """Turn a network into the plain path: whole attention maps, tokens and pixels in NCHW order."""

    def attend(block: AttentionBlock, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = block.split(qkv)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(dim=-1)
        return (weights.to(v.dtype) @ v).transpose(-1, -2).flatten(1, 2)

    network.to(memory_format=torch.contiguous_format)
    for module in network.modules():
        if isinstance(module, AttentionBlock):
            module.attention.forward = partial(attend, module)
        elif isinstance(module, TokenLinear):
            module.forward = MethodType(torch.nn.Conv1d.forward, module)
