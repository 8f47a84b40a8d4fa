"""Self-attention of the UNet, the score it gives each token, the recorder of that score, and the replacer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from .layers import GroupNorm32, zero_module

ENTRIES_AT_A_TIME = 2**20
"""Of attention maps that exist at once: 4 MB."""

Split = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k, v, each [N, heads, T, d], to [N, heads, T, d]."""

Listener = Callable[[Tensor, Tensor, tuple[int, int]], None]
"""Is told queries and keys, [N, heads, T, d] each, and the rows and columns that the T tokens are."""


class Attends(Protocol):
    """A self-attention layer over the pixels of a feature map, of this UNet or of another library's."""

    def listen(self, listener: Listener) -> Sequence[RemovableHandle]:
        """Have `listener` told at every call of the layer, until the handles are removed."""


def split_legacy(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [N, 3·C, T] that is ordered head by head (IDDPM, most of ADM) into q, k, v of [N, heads, T, C/heads]."""
    n, width, tokens = qkv.shape
    return qkv.reshape(n, num_heads, 3, width // (3 * num_heads), tokens).transpose(-1, -2).unbind(2)


def split_new(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split [N, 3·C, T] that holds all q, then all k, then all v (ADM 64²) into q, k, v of [N, heads, T, C/heads]."""
    n, width, tokens = qkv.shape
    return qkv.reshape(n, 3, num_heads, width // (3 * num_heads), tokens).transpose(-1, -2).unbind(1)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) over keys, in float32: [..., Q, d] and [..., T, d] to [..., Q queries, T keys]."""
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    return logits.softmax(dim=-1)


def attention_score(q: Tensor, k: Tensor) -> Tensor:
    """The attention each token receives: sum over queries, mean over heads (Hong et al., Eq. 11 and Alg. 1).

    q, k: [N, heads, T, d]. Returns [N, T] float32, at least 0; its mean over tokens is 1.
    Only a part of one head's map exists at a time.
    """
    n, heads, tokens, _ = q.shape
    score = torch.zeros(n, tokens, device=q.device)
    queries = max(1, ENTRIES_AT_A_TIME // (n * tokens))
    for head in range(heads):
        for part in q[:, head].split(queries, dim=1):
            score += attention_map(part, k[:, head]).sum(dim=1)
    return score / heads


class TokenLinear(nn.Conv1d):
    """A linear layer over the channels of tokens, [N, C, T] to [N, out_channels, T], with a Conv1d's tensors.

    It leaves the channels of each token side by side in memory, as fused attention wants them.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.transpose(1, 2), self.weight[:, :, 0], self.bias).transpose(1, 2)


class QKVAttention(nn.Module):
    """Attention over tokens: [N, 3·C, T] to [N, C, T]. Holds no parameters; knows how its qkv is ordered."""

    def __init__(self, num_heads: int, new_order: bool):
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (split_new if self.new_order else split_legacy)(qkv, self.num_heads)

    def forward(self, qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.split(qkv)).transpose(-1, -2).flatten(1, 2)


class AttentionBlock(nn.Module):
    """Residual self-attention over the pixels of a feature map: [N, C, H, W] to the same shape."""

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        use_new_attention_order: bool = False,
    ):
        super().__init__()
        if num_head_channels != -1:
            if channels % num_head_channels:
                raise ValueError(f"num_head_channels: {num_head_channels} does not divide {channels} channels")
            num_heads = channels // num_head_channels
        elif channels % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide {channels} channels")
        self.use_checkpoint = use_checkpoint
        self.norm = GroupNorm32(channels)
        self.qkv = TokenLinear(channels, 3 * channels)
        self.attention = QKVAttention(num_heads, new_order=use_new_attention_order)
        self.proj_out = zero_module(TokenLinear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2)
        return x + self.proj_out(self.attention(self.qkv(tokens))).reshape(x.shape)

    def listen(self, listener: Listener, split: Split | None = None) -> list[RemovableHandle]:
        """As `Attends.listen`; `split` reads q, k, v from [N, 3·C, T] in another way than the block itself does."""
        grid: list[int] = []

        def see(_block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            grid[:] = inputs[0].shape[2:]

        def hear(attention: QKVAttention, inputs: tuple[Tensor], _output: Tensor) -> None:
            q, k, _ = (split or attention.split)(inputs[0])
            listener(q, k, tuple(grid))

        return [self.register_forward_pre_hook(see), self.attention.register_forward_hook(hear)]


class AttentionPool2d(nn.Module):
    """CLIP's pooling: a mean token attends to all pixels; [N, C, S, S] to [N, out]."""

    def __init__(self, side: int, channels: int, num_head_channels: int, out_channels: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, side**2 + 1) / channels**0.5)
        self.qkv_proj = TokenLinear(channels, 3 * channels)
        self.c_proj = TokenLinear(channels, out_channels)
        self.attention = QKVAttention(channels // num_head_channels, new_order=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        return self.c_proj(self.attention(self.qkv_proj(tokens)))[:, :, 0]


def attention_blocks(network: nn.Module) -> dict[str, AttentionBlock]:
    """Every attention block of `network` by its module name (`input_blocks.8.1`, `middle_block.1`, …)."""
    return {name: module for name, module in network.named_modules() if isinstance(module, AttentionBlock)}


def find_block(network: nn.Module, name: str) -> AttentionBlock:
    """The attention block called `name`; a ValueError lists the right names if there is none."""
    blocks = attention_blocks(network)
    if name not in blocks:
        raise ValueError(f"no attention block {name!r} in this network; it has: {', '.join(blocks) or 'none'}")
    return blocks[name]


@contextmanager
def record_attention(*blocks: Attends, split: Split | None = None) -> Iterator[dict[Attends, Tensor]]:
    """Record the attention score of `blocks` during the network calls made inside the `with`.

    Yields a dict that each call of a block fills with its score: [N, h, w] float32, mean 1 (`attention_score`).
    The network's output is not changed, and fused attention stays in use. The hooks are removed on leaving,
    also by an exception. `split` is for blocks of this UNet (`AttentionBlock.listen`).
    """
    scores: dict[Attends, Tensor] = {}
    how = {} if split is None else {"split": split}

    def listener_of(block: Attends) -> Listener:
        @torch.no_grad()
        def listener(q: Tensor, k: Tensor, grid: tuple[int, int]) -> None:
            scores[block] = attention_score(q, k).unflatten(1, grid)

        return listener

    with ExitStack() as stack:
        for block in blocks:
            for handle in block.listen(listener_of(block), **how):
                stack.enter_context(handle)
        yield scores


@contextmanager
def replace_attention(*blocks: AttentionBlock, fn: Attend) -> Iterator[None]:
    """Let `fn(q, k, v)` do the attention of `blocks` during the network calls made inside the `with`.

    q, k, v are read in the block's own order of heads. The state dict is not touched; the hooks are removed on leaving,
    also by an exception.
    """

    def hook(attention: QKVAttention, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return fn(*attention.split(inputs[0])).transpose(-1, -2).flatten(1, 2).to(output.dtype)

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.attention.register_forward_hook(hook))
        yield
