"""Layers whose input or output is another one while a pass is made."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..diffusion.denoiser import hooks_seen
from .attention import OTHER_ROWS, UNHEARD, of_this_thread

Before = Callable[[int, slice, Tensor], Tensor]
"""Makes the input of layer number i, for these rows of the pass, of the one that it would have."""

After = Callable[[int, slice, Tensor, Tensor], Tensor]
"""Makes the output of layer number i, for these rows of the pass, of its input and the output that it would have."""


@contextmanager
def altered(*layers: nn.Module, rows: int, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Give `layers` another input, or have them give another output, in the one pass that this thread makes inside.

    rows: those of the pass; a layer may be called for parts of them, in their order. The input is a layer's first
    argument. The state dict is not touched; the hooks are removed on leaving, also by an exception. A ValueError says
    that a layer was called for another number of rows, or on leaving that it never was, so that nothing was altered.
    """
    heard: Counter[int] = Counter()

    def next_rows(number: int, x: Tensor) -> slice:
        first = heard[number]
        heard[number] += len(x)
        if heard[number] > rows:
            raise ValueError(OTHER_ROWS.format("a layer's input", heard[number], rows))
        return slice(first, heard[number])

    def pre_hook(number: int, _layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (before(number, next_rows(number, inputs[0]), inputs[0]), *inputs[1:])

    def hook(number: int, _layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return after(number, next_rows(number, inputs[0]), inputs[0], output)

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            if before:
                stack.enter_context(layer.register_forward_pre_hook(of_this_thread(partial(pre_hook, number))))
            if after:
                stack.enter_context(layer.register_forward_hook(of_this_thread(partial(hook, number))))
        stack.enter_context(hooks_seen())
        yield
    least = min(heard[number] for number in range(len(layers)))
    if not least:
        raise ValueError(UNHEARD.format("a layer that was to be altered"))
    if least < rows:
        raise ValueError(OTHER_ROWS.format("a layer's input", least, rows))
