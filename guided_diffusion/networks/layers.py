"""Layers and small tensor helpers shared by the networks."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import SiLU as SiLU

from ..diffusion.losses import mean_flat as mean_flat


class GroupNorm32(nn.GroupNorm):
    """Group normalisation, computed in float32 whatever the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


def normalization(channels: int) -> nn.Module:
    """The normalisation of every block: of [N, channels, ...], in 32 groups."""
    return GroupNorm32(32, channels)


def layer_nd(kind: str, dims: int) -> type[nn.Module]:
    """torch's layer of that kind (`Conv`, `AvgPool`, …) for signals of 1, 2 or 3 dimensions."""
    if dims not in (1, 2, 3):
        raise ValueError(f"dims: wanted 1, 2 or 3, got {dims}")
    return getattr(nn, f"{kind}{dims}d")


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution over `dims` dimensions, made with the other arguments."""
    return layer_nd("Conv", dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Averages over `dims` dimensions, made with the other arguments."""
    return layer_nd("AvgPool", dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Module:
    """A linear layer, made with the arguments."""
    return nn.Linear(*args, **kwargs)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it (residual branches start as identities)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter of `module` by `scale` and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def autocasts(device: torch.device) -> bool:
    """Whether layers compute in half precision there, by an outer `torch.autocast`."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which an outer `torch.autocast` changes nothing there."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding, cosines first: [N] timesteps, possibly fractional, to [N, dim] float32."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * steps / half)[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def embedded_labels(table: nn.Embedding, y: Tensor | None, rows: int) -> Tensor:
    """The embeddings of labels; a ValueError where they are none (out of range: on a CPU, a GPU says it itself)."""
    wanted = f"y: wanted classes, int64 from 0 to {table.num_embeddings - 1}, one for {rows} rows or for each"
    if not isinstance(y, Tensor):
        raise ValueError(f"{wanted}; got {type(y).__name__}")
    if y.dtype not in (torch.int64, torch.int32) or y.shape not in ((), (1,), (rows,)):
        raise ValueError(f"{wanted}; got {str(y.dtype).removeprefix('torch.')} {list(y.shape)}")
    try:
        return table(y)
    except IndexError:
        raise ValueError(f"{wanted}; got {y.min()} to {y.max()}") from None


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move targets in place towards sources: target = rate · target + (1 − rate) · source."""
    targets = list(target_params)
    sources = [source.detach().to(target) for target, source in zip(targets, source_params, strict=True)]
    if targets:
        torch._foreach_lerp_(targets, sources, 1 - rate)


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """`func(*inputs)`; with `flag`, what it computes inside is not kept but computed again for the gradient.

    params: what `func` depends on besides its inputs.
    """
    if flag and torch.is_grad_enabled():
        return CheckpointFunction.apply(func, len(inputs), *inputs, *params)
    return func(*inputs)


class CheckpointFunction:
    """How `checkpoint` computes again: `args` are `length` inputs, then parameters, which torch finds by itself."""

    @staticmethod
    def apply(run_function: Callable[..., Any], length: int, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(run_function, *args[:length], use_reentrant=False)
