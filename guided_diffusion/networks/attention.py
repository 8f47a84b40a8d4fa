"""Self-attention of the UNet, the score it gives each token, the recorder of that score, and the replacer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..diffusion.denoiser import hooks_seen, may_be_compiled
from .layers import without_autocast

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
        """Have `listener` told at every call of the layer, until the handles are removed.

        A layer that several threads may call tells it of the calls of this thread alone (`of_this_thread`).
        """


@runtime_checkable
class Replaceable(Attends, Protocol):
    """A self-attention layer that lets another attention take the place of its own."""

    def replace(self, fn: Attend) -> RemovableHandle:
        """Have `fn` do the attention of the layer, until the handle is removed; in this thread, as `listen`."""


@cache
def _untraced_ident() -> Callable[[], int]:
    return torch.compiler.disable(get_ident)


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A module's hook that acts in calls made by the thread that makes it, and does nothing in those of others."""
    thread = get_ident()
    ident = _untraced_ident() if may_be_compiled() else get_ident

    def own(*args: Any) -> Any:
        return hook(*args) if ident() == thread else None

    return own


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
    with without_autocast(q.device):
        logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    return logits.softmax(dim=-1)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, added in pairs, pairs of pairs and so on: rounding grows with log₂ of their number."""
    sums: list[Tensor] = []  # of 2^k parts each, as the digits of a binary number
    for number, part in enumerate(parts, start=1):
        while number % 2 == 0:
            part = sums.pop() + part
            number //= 2
        sums.append(part)
    return sum(reversed(sums))


def attention_score(q: Tensor, k: Tensor) -> Tensor:
    """The attention each token receives: sum over queries, mean over heads (Hong et al., Eq. 11 and Alg. 1).

    q, k: [N, heads, T, d]. Returns [N, T] float32, at least 0; its mean over tokens is 1.
    Only a part of one head's map exists at a time.
    """
    n, heads, tokens, _ = q.shape
    queries = max(1, ENTRIES_AT_A_TIME // (n * tokens))
    score = torch.zeros(n, tokens, device=q.device)
    for head in range(heads):
        parts = q[:, head].split(queries, dim=1)
        score += _sum(attention_map(part, k[:, head]).sum(dim=1) for part in parts)
    return score / heads


class TokenLinear(nn.Conv1d):
    """A linear layer over the channels of tokens, [N, C, T] to [N, out_channels, T], with a Conv1d's tensors.

    It leaves the channels of each token side by side in memory, as fused attention wants them.
    """

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.transpose(1, 2), self.weight[:, :, 0], self.bias).transpose(1, 2)


def attention_blocks(network: nn.Module) -> dict[str, Replaceable]:
    """Every attention block of `network` by its module name (`input_blocks.8.1`, `middle_block.1`, …)."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Replaceable)}


def find_block(network: nn.Module, name: str) -> Replaceable:
    """The attention block called `name`; a ValueError lists the right names if there is none."""
    blocks = attention_blocks(network)
    if name not in blocks:
        raise ValueError(f"no attention block {name!r} in this network; it has: {', '.join(blocks) or 'none'}")
    return blocks[name]


UNHEARD = (
    "{} was not heard in the pass: the blocks are of another network than was called (a deep copy?), or its hooks do "
    "not run (a wrapper? torch.compile, and called before guidance was there? torch.compiler.reset() forgets that call)"
)


class Scores(dict[Attends, Tensor]):
    """Attention scores [rows, h, w] by block; a ValueError says that a block was not heard."""

    def __missing__(self, block: Attends) -> Tensor:
        raise ValueError(UNHEARD.format("attention that was to be recorded"))


def last_rows(scores: Mapping[Attends, Tensor], rows: int, of: int) -> Scores:
    """The scores of the last `rows` rows of a pass of so many; a ValueError if another number was heard."""
    for score in scores.values():
        if len(score) != of:
            raise ValueError(
                f"attention of {len(score)} rows was heard in a pass of {of}: the denoiser calls its network for more "
                "or other rows (guided already? give all guidances to one GuidedDenoiser)"
            )
    return Scores({block: score[-rows:] for block, score in scores.items()})


@contextmanager
def record_attention(*blocks: Attends, split: Split | None = None) -> Iterator[Scores]:
    """Record the attention score of `blocks` during the network calls that this thread makes inside the `with`.

    Yields a dict to which each call of a block adds its rows: [N, h, w] float32, mean 1 (`attention_score`).
    The network's output is not changed, and fused attention stays in use. The hooks are removed on leaving,
    also by an exception. `split` is for blocks of this UNet (`AttentionBlock.listen`).
    """
    scores = Scores()
    how = {} if split is None else {"split": split}

    def listener_of(block: Attends) -> Listener:
        @torch.no_grad()
        def listener(q: Tensor, k: Tensor, grid: tuple[int, int]) -> None:
            score = attention_score(q, k).unflatten(1, grid)
            scores[block] = torch.cat([scores[block], score]) if block in scores else score

        return listener

    with ExitStack() as stack:
        for block in blocks:
            for handle in block.listen(listener_of(block), **how):
                stack.enter_context(handle)
        stack.enter_context(hooks_seen())
        yield scores


@contextmanager
def replace_attention(*blocks: Replaceable, fn: Attend) -> Iterator[None]:
    """Let `fn(q, k, v)` do the attention of `blocks` during the network calls that this thread makes inside the `with`.

    q, k, v are read in the block's own order of heads. The state dict is not touched; the hooks are removed on leaving,
    also by an exception. A ValueError on leaving says that a block was never called, so that nothing was replaced.
    """
    called: set[int] = set()

    def counted(number: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            called.add(number)
            return fn(q, k, v)

        return attend

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            stack.enter_context(block.replace(counted(number)))
        stack.enter_context(hooks_seen())
        yield
    if len(called) < len(blocks):
        raise ValueError(UNHEARD.format("attention that was to be replaced"))
