"""What makes networks faster: a torso in half precision, between float32 input and output, and compiled layers."""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor, nn

from .layers import autocasts

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 1024
"""Blocks times batch sizes that may be compiled before torch goes on uncompiled; its own limit is 8."""


def compile_each(layers: Iterable[nn.Module]) -> None:
    """Compile these layers, once for each shape."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for layer in layers:
        layer.compile(dynamic=False)


@cache
def _say(remark: str) -> None:
    log.warning(remark)


def _half_precision(device: torch.device) -> torch.dtype:
    """What use_fp16 means on a device; said once where that is not float16, which CPUs compute 200 times slower."""
    if device.type != "cpu":
        return torch.float16
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        _say("use_fp16: on this CPU half precision is bfloat16, not float16")
        return torch.bfloat16
    _say("use_fp16: this CPU has no fast half precision; going on in float32")
    return torch.float32


Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""The layers that may compute in half precision."""


class WithTorso(nn.Module):
    """A network with a torso that may compute in another dtype than the rest."""

    _dtype: torch.dtype | None = None

    @abstractmethod
    def torso(self) -> Iterator[Weighted]:
        """The layers that compute in half precision, those with weights, the first one first."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the torso is given: the one that was set, else that of its weights."""
        return self._dtype or next(self.torso()).weight.dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def convert_to(self, dtype: torch.dtype) -> None:
        """Compute the torso in float16 (GPU only) or bfloat16; embeddings, normalisation and output stay in float32."""
        for module in self.torso():
            module.to(dtype)
        self._dtype = None

    def convert_to_fp16(self) -> None:
        """Compute the torso in the half precision of the device: float16, or bfloat16 on a CPU that has it."""
        self.convert_to(_half_precision(next(self.parameters()).device))

    def convert_to_fp32(self) -> None:
        """Compute all in float32 again."""
        self.convert_to(torch.float32)

    @staticmethod
    def check_dtypes(x: Tensor, embedding: Tensor, embed: nn.Module, out: nn.Module) -> None:
        """Raise a ValueError where precisions do not go together: of x, the timesteps' embedding and what is outside.

        embed: takes the embedding. out: the last layers, whose dtype x must have.
        """
        if autocasts(x.device):
            return
        for name, wanted, got in (
            ("weights", embedding, next(embed.parameters(), embedding)),
            ("x", next(out.parameters(), x), x),
        ):
            if got.dtype is not wanted.dtype:
                kinds = [str(part.dtype).removeprefix("torch.") for part in (wanted, got)]
                raise ValueError(
                    f"{name}: wanted {kinds[0]}, got {kinds[1]}; half precision is "
                    "network.convert_to(torch.bfloat16), which leaves input, embeddings and output in float32"
                )
