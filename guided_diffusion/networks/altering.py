"""Layers whose input or output is another one while a pass is made."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..diffusion.denoiser import hooks_seen
from .attention import UNHEARD, of_this_thread

Before = Callable[[int, Tensor], Tensor]
"""Makes the input of layer number i of the one that it would have."""

After = Callable[[int, Tensor, Tensor], Tensor]
"""Makes the output of layer number i of its input and the output that it would have."""


@contextmanager
def altered(*layers: nn.Module, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Give `layers` another input, or have them give another output, in the calls that this thread makes inside.

    The input is a layer's first argument. The state dict is not touched; the hooks are removed on leaving, also by an
    exception. A ValueError on leaving says that a layer was never called, so that nothing was altered.
    """
    called: set[int] = set()

    def pre_hook(before: Before, number: int, _layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        called.add(number)
        return (before(number, inputs[0]), *inputs[1:])

    def hook(after: After, number: int, _layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        called.add(number)
        return after(number, inputs[0], output)

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            if before:
                stack.enter_context(layer.register_forward_pre_hook(of_this_thread(partial(pre_hook, before, number))))
            if after:
                stack.enter_context(layer.register_forward_hook(of_this_thread(partial(hook, after, number))))
        stack.enter_context(hooks_seen())
        yield
    if len(called) < len(layers):
        raise ValueError(UNHEARD.format("a layer that was to be altered"))
