"""Watching a run: what attention selects at its steps, what is degraded there, and what guidance makes of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..guidance.base import Guidance, Step
from ..guidance.masks import attention_mask
from ..guidance.self_attention import SelfAttentionGuidance
from ..networks.attention import Attends, record_attention
from ..storage import pictures

LARGEST = 128
"""Pixels along a side of what is shown: larger images are reduced."""

BRIGHTEST = 2.5
"""The score that is drawn brightest."""


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

    def record(self) -> AbstractContextManager[dict[Attends, Tensor]]:
        return record_attention(*self.blocks.values())

    def difference(self, step: Step) -> Tensor:
        if (at := int(step.base.t[0])) in self.steps:
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


def magnitude(delta: Tensor) -> Tensor:
    """|Δ| of every pixel over its channels: [N, C, H, W] to [N, H, W]."""
    return delta.square().mean(dim=1).sqrt()


def shown_as(images: Tensor) -> NDArray[np.uint8]:
    """[N, 3, H, W] in [−1, 1] as pictures [N, h, w, 3] of at most LARGEST pixels."""
    return pictures.to_uint8(_reduced(images))


def heat_map(values: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """[N, h, w] in [0, 1] as pictures of an image of `size`, every cell a rectangle."""
    full = F.interpolate(values[:, None].float(), size, mode="nearest")
    return pictures.heat(_reduced(full)[:, 0].clamp(0, 1).cpu().numpy())


def _reduced(images: Tensor) -> Tensor:
    times = -(-max(images.shape[2:]) // LARGEST)
    return F.avg_pool2d(images, times) if times > 1 else images


def columns(thresholds: Sequence[float]) -> list[str]:
    """What each picture of a row of `cells` is."""
    # In letters that Pillow's own font has.
    return ["x0", "score", *(f"mask psi {threshold:g}" for threshold in thresholds), "degraded", "|difference|"]


def shares(look: Look) -> NDArray[np.float64]:
    """The part of the image that each mask covers, [N, blocks, ψ]."""
    parts = [[mask.flatten(1).double().mean(dim=1) for mask in block.masks.values()] for block in look.blocks.values()]
    return torch.stack([torch.stack(of_block, dim=1) for of_block in parts], dim=1).cpu().numpy()


def cells(look: Look) -> NDArray[np.uint8]:
    """A look as pictures, [N, blocks, columns, h, w, 3]; |Δ| is brightest at the sample's largest of all blocks."""
    size = look.x0.shape[2:]
    x0 = shown_as(look.x0)
    largest = torch.stack([magnitude(block.delta).flatten(1).amax(dim=1) for block in look.blocks.values()]).amax(dim=0)
    rows = []
    for block in look.blocks.values():
        masks = [heat_map(mask[:, 0], size) for mask in block.masks.values()]
        delta = magnitude(block.delta) / largest.clamp_min(1e-12)[:, None, None]
        score = heat_map(block.score / BRIGHTEST, size)
        rows.append(np.stack([x0, score, *masks, shown_as(block.degraded), heat_map(delta, size)], axis=1))
    return np.stack(rows, axis=1)


def frame(own: NDArray[np.uint8], covered: NDArray, blocks: Sequence[str], heads: Sequence[str], title: str) -> NDArray:
    """One sample at one step, a row for each block. own: [blocks, columns, h, w, 3]; covered: its `shares`."""
    rows = [f"{block}: {_percent(parts)}" for block, parts in zip(blocks, covered, strict=True)]
    return pictures.labelled_grid(own.reshape(-1, *own.shape[2:]), rows, heads, title)


def strip(
    own: NDArray[np.uint8],
    covered: NDArray,
    blocks: Sequence[str],
    heads: Sequence[str],
    steps: Sequence[int],
    title: str,
) -> NDArray[np.uint8]:
    """One sample, a step a column: x̂_0, then rows for each block. own: [steps, blocks, columns, h, w, 3].

    covered: its `shares` at each step.
    """
    first = own[:, 0, :1].swapaxes(0, 1)
    rest = own[:, :, 1:].transpose(1, 2, 0, 3, 4, 5).reshape(-1, len(steps), *own.shape[3:])
    names = [heads[0]]
    for block, parts in zip(blocks, covered.mean(axis=0), strict=True):
        names += [f"{block} {heads[1]}"]
        names += [f"{block} {head}: {_percent([part])}" for head, part in zip(heads[2:], parts, strict=False)]
        names += [f"{block} {head}" for head in heads[2 + len(parts) :]]
    images = np.concatenate([first, rest]).reshape(-1, *own.shape[3:])
    return pictures.labelled_grid(images, names, [f"t = {step}" for step in steps], title)


def _percent(parts: Sequence[float]) -> str:
    return ", ".join(f"{100 * part:.0f} %" for part in parts)
