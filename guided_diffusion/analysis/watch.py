"""Watching a run: what attention selects at its steps, what is degraded there, and what guidance makes of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.times import on_host
from ..guidance.base import Guidance, Step
from ..guidance.masks import attention_mask
from ..guidance.self_attention import SelfAttentionGuidance
from ..networks.attention import Attends, Scores, record_attention


@dataclass(frozen=True, eq=False)
class BlockLook:
    """One attention block at one step: score map [N, h, w] and masks by ψ, [N, 1, H, W] bool.

    degraded, delta: x̂_t as an image, and Δ = ε(x_t) − ε(x̂_t), at the first ψ and σ, [N, C, H, W].
    change: ‖Δ‖ / ‖ε‖ of each row, [N], by σ at the first ψ.
    """

    score: Tensor
    masks: dict[float, Tensor]
    degraded: Tensor
    delta: Tensor
    change: dict[float, Tensor]


@dataclass(frozen=True, eq=False)
class Look:
    """One step of a batch. x0, blurred: x̂_0 and x̃_0 at the first σ as images, [N, 3, H, W]."""

    indices: Sequence[int]
    step: int
    x0: Tensor
    blurred: Tensor
    blocks: dict[str, BlockLook]


@dataclass(frozen=True, eq=False, kw_only=True)
class Watch(Guidance):
    """A guidance of Δ = 0 that shows what self-attention guidance would do at each block (Algorithm 1).

    The run stays what it is; where nothing else guides, up to the rounding of x̂_0 → ε → x̂_0.

    blocks: by name. steps: the respaced steps that are looked at. thresholds: ψ, blur_sigmas: σ; the first of each is
    the one that differences are shown for. seen: is given every look. images: what is seen of x, for networks of
    latents. Costs a network pass for each block and σ.
    """

    blocks: Mapping[str, Attends]
    steps: frozenset[int]
    thresholds: Sequence[float]
    blur_sigmas: Sequence[float]
    seen: Callable[[Look], None]
    images: Callable[[Tensor], Tensor] = lambda latents: latents
    scale: float = 1.0

    def record(self) -> AbstractContextManager[Scores]:
        return record_attention(*self.blocks.values())

    def difference(self, step: Step) -> Tensor:
        if (at := on_host(step.base.t)[0]) in self.steps:
            looks = {name: self._look(step, block) for name, block in self.blocks.items()}
            blurred = self._guidance(next(iter(self.blocks.values())), self.blur_sigmas[0]).blurred(step.base)
            self.seen(Look(step.indices, at, self.images(step.base.x0), self.images(blurred), looks))
        return torch.zeros_like(step.base.eps)

    def _guidance(self, block: Attends, sigma: float) -> SelfAttentionGuidance:
        return SelfAttentionGuidance(scale=1.0, block=block, threshold=self.thresholds[0], blur_sigma=sigma)

    def _look(self, step: Step, block: Attends) -> BlockLook:
        base, score, size = step.base, step.recorded[self][block], step.base.x_t.shape[2:]
        masks = {threshold: attention_mask(score, size, threshold) for threshold in self.thresholds}
        inputs = [self._guidance(block, sigma).degrade(base, masks[self.thresholds[0]]) for sigma in self.blur_sigmas]
        deltas = [base.eps - step.denoise(degraded, base.t, base.condition).eps for degraded in inputs]
        norm = base.eps.flatten(1).norm(dim=1)
        change = {
            sigma: delta.flatten(1).norm(dim=1) / norm for sigma, delta in zip(self.blur_sigmas, deltas, strict=True)
        }
        return BlockLook(score, masks, self.images(inputs[0]), deltas[0], change)
