"""Self-attention of the UNet, the score it gives each token, the recorder of that score, and the replacer."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from threading import get_ident
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..diffusion.denoiser import hooks_seen, may_be_compiled
from .layers import without_autocast

ENTRIES_AT_A_TIME = 2**20
"""Of attention maps that exist at once on a CPU: 4 MB, which its cache holds."""

ENTRIES_ON_DEVICES = 2**26
"""And elsewhere, where each part costs a launch of every kernel: 256 MB."""

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
    return _map(q.float() * q.shape[-1] ** -0.5, k.float())


def _map(scaled_q: Tensor, k: Tensor) -> Tensor:
    with without_autocast(k.device):
        return (scaled_q @ k.transpose(-1, -2)).softmax(dim=-1)


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
    n, heads, tokens, d = q.shape
    entries = ENTRIES_AT_A_TIME if q.device.type == "cpu" else ENTRIES_ON_DEVICES
    queries = max(1, entries // (n * tokens))
    score = torch.zeros(n, tokens, device=q.device)
    for head in range(heads):
        of_head, keys = q[:, head].float() * d**-0.5, k[:, head].float()
        score += _sum(_map(part, keys).sum(dim=1) for part in of_head.split(queries, dim=1))
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


OTHER_ROWS = (
    "{} of {} rows was heard in a pass of {}: the denoiser calls its network for more or other rows (guided already? "
    "give all guidances to one GuidedDenoiser)"
)


class Scores(dict[Attends, Tensor]):
    """Attention scores [rows, h, w] by block; a ValueError says that a block was not heard.

    skipped: so many rows at the beginning of a pass are not scored. heard: the rows of a pass so far, by block.
    """

    def __init__(self, skipped: int = 0):
        super().__init__()
        self.skipped = skipped
        self.heard: Counter[Attends] = Counter()

    def __missing__(self, block: Attends) -> Tensor:
        raise ValueError(UNHEARD.format("attention that was to be recorded"))

    def hear(self, block: Attends, q: Tensor, k: Tensor, grid: tuple[int, int]) -> None:
        """Add the rows of a call."""
        first = max(0, self.skipped - self.heard[block])
        self.heard[block] += len(q)
        if first < len(q):
            score = attention_score(q[first:], k[first:]).unflatten(1, grid)
            self[block] = torch.cat([self[block], score]) if block in self else score

    def check(self, of: int) -> None:
        """Raise a ValueError if another number of rows was heard than a pass has."""
        for rows in self.heard.values():
            if rows != of:
                raise ValueError(OTHER_ROWS.format("attention", rows, of))


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
        return torch.no_grad()(partial(scores.hear, block))

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
