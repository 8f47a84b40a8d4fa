"""Guidance by what a network predicts with another attention in some of its blocks."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..networks.attention import Replaceable, replace_attention
from .base import Guidance, Step


@dataclass(frozen=True, eq=False, kw_only=True)
class ReplacedAttention(Guidance):
    """Δ = ε(x_t, c) − ε'(x_t, c), ε' with another attention in `blocks`.

    With classifier-free guidance it still starts from the conditional prediction, as the methods' authors have it.
    """

    uses_base: ClassVar[bool] = False

    blocks: tuple[Replaceable, ...]

    def __post_init__(self):
        super().__post_init__()
        if not self.blocks:
            raise ValueError("blocks: wanted one attention block or more, got none")

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: Sequence[int]) -> Tensor:
        """What stands in for attention: q, k, v [N, heads, T, d] to [N, heads, T, d], of an image of size (H, W)."""

    def difference(self, step: Step) -> Tensor:
        x_t, t, condition = step.conditional.x_t, step.conditional.t, step.conditional.condition
        with replace_attention(*self.blocks, fn=partial(self.attend, size=x_t.shape[2:])):
            return step.conditional.eps - step.denoise(x_t, t, condition).eps
