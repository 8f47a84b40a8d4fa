"""What was seen of samples as pictures: a strip of all steps, and an animation over them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..storage import pictures
from .watch import Look

LARGEST = 128
"""Pixels along a side of what is shown: larger images are reduced."""

BRIGHTEST = 2.5
"""The score that is drawn brightest."""


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


def _columns(thresholds: Sequence[float]) -> list[str]:
    """What each picture of a row of `_cells` is."""
    # In letters that Pillow's own font has.
    return ["x0", "score", *(f"mask psi {threshold:g}" for threshold in thresholds), "degraded", "|difference|"]


def _shares(look: Look) -> NDArray[np.float64]:
    """The part of the image that each mask covers, [N, blocks, ψ]."""
    parts = [[mask.flatten(1).double().mean(dim=1) for mask in block.masks.values()] for block in look.blocks.values()]
    return torch.stack([torch.stack(of_block, dim=1) for of_block in parts], dim=1).cpu().numpy()


def _cells(look: Look) -> NDArray[np.uint8]:
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


def _frame(
    own: NDArray[np.uint8], covered: NDArray, blocks: Sequence[str], heads: Sequence[str], title: str
) -> NDArray:
    """One sample at one step, a row for each block. own: [blocks, columns, h, w, 3]; covered: its `_shares`."""
    rows = [f"{block}: {_percent(parts)}" for block, parts in zip(blocks, covered, strict=True)]
    return pictures.labelled_grid(own.reshape(-1, *own.shape[2:]), rows, heads, title)


def _strip(
    own: NDArray[np.uint8],
    covered: NDArray,
    blocks: Sequence[str],
    heads: Sequence[str],
    steps: Sequence[int],
    title: str,
) -> NDArray[np.uint8]:
    """One sample, a step a column: x̂_0, then rows for each block. own: [steps, blocks, columns, h, w, 3].

    covered: its `_shares` at each step.
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


def write_pictures(looks: Sequence[Look], of: int, folder: Path, animation: str) -> None:
    """Leave strips/NUMBER.png and animations/NUMBER.… of each sample of a batch that was looked at at several steps.

    of: the steps of the run. animation: webp or gif.
    """
    names, steps = list(looks[0].blocks), [look.step for look in looks]
    first = looks[0].blocks[names[0]]
    heads = _columns(list(first.masks))
    what = f"degraded with psi {next(iter(first.masks)):g}, sigma {next(iter(first.change)):g}"
    pictures_of = np.stack([_cells(look) for look in looks], axis=1)
    covered = np.stack([_shares(look) for look in looks], axis=1)
    for index, own, shares in zip(looks[0].indices, pictures_of, covered, strict=True):
        name, title = f"{index:06d}", f"sample {index}, {what}"
        pictures.save_png(_strip(own, shares, names, heads, steps, title), folder / "strips" / f"{name}.png")
        frames = [
            _frame(at, share, names, heads, f"{title}, t = {step} of {of}; covered: by psi")
            for step, at, share in zip(steps, own, shares, strict=True)
        ]
        pictures.save_animation(frames, folder / "animations" / f"{name}.{animation}")
