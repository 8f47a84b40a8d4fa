"""Perturbed-Attention Guidance (Ahn et al., ECCV 2024, arXiv 2403.17377)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .replaced_attention import ReplacedAttention


@dataclass(frozen=True, eq=False, kw_only=True)
class PerturbedAttentionGuidance(ReplacedAttention):
    """ε' attends by the identity: every token of `blocks` gets its own value (PAG)."""

    def attend(self, _q: Tensor, _k: Tensor, v: Tensor, size: Sequence[int]) -> Tensor:  # noqa: ARG002
        return v
