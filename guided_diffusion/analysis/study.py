"""What attention masks select on noised images of known content: frequencies (Fig. 11) and objects (Table 9)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..diffusion.denoiser import Condition, Denoiser
from ..diffusion.noise import SampleNoise, Samples
from ..diffusion.process import NoiseLevels
from ..guidance.masks import attention_mask, upsampled
from ..networks.attention import Attends, record_attention
from .measures import Mean, as_many, from_centre, intersection_over_union, log_spectra, patch_side, selected_mean


def step_at(fraction: float, num_timesteps: int) -> int:
    """The respaced step that lies at this part of the process, 0 the image, 1 noise."""
    return min(num_timesteps - 1, math.floor(fraction * num_timesteps))


class AttentionStudy:
    """Streaming sums of what the masks of attention blocks select, for images that are shown batch after batch.

    An image x_0 is noised once with its own ε and seen at every step as x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε; one network pass
    a step gives the scores of all blocks. Standard errors are those over images; where steps or blocks are averaged,
    each image's own mean comes first. Memory does not depend on the number of images.

    share: part of the image in the mask. excess: log-magnitude spectrum (`log_spectra`) of the cells in the mask less
    that of all cells of the same image, the mean over frequencies; curve: the same by frequency; more_excess: excess
    less that of the first threshold. iou, iou_random: of the object with the mask, and with a random choice of as many
    cells of the same map; iou_gain: their difference; iou_centre: with as many cells nearest to the image's middle.

    encode: what x_0 is of images in [−1, 1], for networks of latents.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        process: NoiseLevels,
        blocks: Mapping[str, Attends],
        steps: Sequence[int],
        thresholds: Sequence[float],
        seed: int = 0,
        encode: Callable[[Tensor], Tensor] = lambda images: images,
    ):
        self._denoiser, self._process, self._seed, self._encode = denoiser, process, seed, encode
        self.blocks, self.steps, self.thresholds = dict(blocks), list(steps), list(thresholds)
        self.grids: dict[str, tuple[int, int]] = {}
        self.patch = 0
        self.images = 0
        self.by_step: dict[str, Mean] = {}  # [blocks, steps, ψ, …]
        self.by_block: dict[str, Mean] = {}  # [blocks, ψ, …]
        self.by_size: dict[str, Mean] = {}  # [sizes, ψ, …]
        self.by_size_and_step: dict[str, Mean] = {}  # [sizes, steps, ψ, …]
        self.whole: dict[tuple[int, int], Mean] = {}  # the spectrum of all cells

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and columns of the maps, the coarsest first."""
        return sorted(set(self.grids.values()))

    @torch.no_grad()
    def add(self, indices: Sequence[int], levels: Tensor, objects: Tensor | None, condition: Condition) -> None:
        """One batch: images [N, 3, H, W] in levels 0 … 255, their objects, bool [N, 1, H, W], and their condition."""
        x0 = self._encode(levels / 127.5 - 1)
        noise = SampleNoise(self._seed, indices, x0.shape[1:], x0.device).x_T()
        found: dict[str, list[list[Tensor]]] = {}
        spectra: dict[tuple[int, int], Tensor] = {}
        for step in self.steps:
            t = torch.full((len(x0),), step, device=x0.device)
            x_t = self._process.q_sample(x0, t, noise)
            with record_attention(*self.blocks.values()) as scores:
                self._denoiser(x_t, t, condition)
            if not self.grids:
                self.grids = {name: tuple(scores[block].shape[1:]) for name, block in self.blocks.items()}
                self.patch = patch_side(min(levels.shape[2:]), self.sizes)
            if not spectra:
                spectra = {grid: log_spectra(levels, grid, self.patch) for grid in self.sizes}
            cells = max(height * width for height, width in self.sizes)
            uniform = Samples(self._seed, indices).uniform([step] * len(x0), cells)
            of_blocks: dict[str, list[Tensor]] = {}
            for name, block in self.blocks.items():
                of_mask: dict[str, list[Tensor]] = {}
                for threshold in self.thresholds:
                    mask = attention_mask(scores[block], self.grids[name], threshold)
                    for measure, value in self._measures(mask, spectra[self.grids[name]], objects, uniform).items():
                        of_mask.setdefault(measure, []).append(value)
                for measure, values in of_mask.items():
                    of_blocks.setdefault(measure, []).append(torch.stack(values, dim=1))
            for measure, values in of_blocks.items():
                found.setdefault(measure, []).append(torch.stack(values, dim=1))
        stacked = {measure: torch.stack(values, dim=2) for measure, values in found.items()}
        stacked["more_excess"] = stacked["excess"] - stacked["excess"][..., :1]
        self._sum(stacked)
        for grid, spectrum in spectra.items():
            self.whole.setdefault(grid, Mean()).add(spectrum.mean(dim=1))
        self.images += len(x0)

    def _measures(self, mask: Tensor, spectra: Tensor, objects: Tensor | None, uniform: Tensor) -> dict[str, Tensor]:
        curve = selected_mean(spectra, mask) - spectra.mean(dim=1)
        found = {"share": mask.flatten(1).float().mean(dim=1), "curve": curve, "excess": curve.mean(dim=1)}
        if objects is not None:
            size = objects.shape[2:]
            others = {"iou_random": as_many(mask, uniform), "iou_centre": as_many(mask, from_centre(mask.shape[2:]))}
            for name, cells in ({"iou": mask} | others).items():
                found[name] = intersection_over_union(upsampled(cells, size), objects)
            found["iou_gain"] = found["iou"] - found["iou_random"]
        return found

    def _sum(self, values: Mapping[str, Tensor]) -> None:
        """values: by measure, [N, blocks, steps, ψ, …]."""
        grids = list(self.grids.values())
        places = [[i for i, grid in enumerate(grids) if grid == size] for size in self.sizes]
        for measure, value in values.items():
            of_size = torch.stack([value[:, rows].nanmean(dim=1) for rows in places], dim=1)
            for sums, batch in (
                (self.by_step, value),
                (self.by_block, value.nanmean(dim=2)),
                (self.by_size_and_step, of_size),
                (self.by_size, of_size.nanmean(dim=2)),
            ):
                sums.setdefault(measure, Mean()).add(batch)

    def results(self) -> dict[str, Any]:
        """Everything as plain numbers: by map size, by block, by step; each with standard error and N."""
        labels = [f"{threshold:g}" for threshold in self.thresholds]

        def numbers(sums: Mapping[str, Mean], *place: int) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for column, label in enumerate(labels):
                cell = (*place, column)
                found[label] = {
                    name: measured(mean.value[cell], mean.error[cell], mean.n[cell])
                    for name, mean in sums.items()
                    if not (name == "more_excess" and column == 0)
                }
            return found

        sizes = [
            {
                "map": list(grid),
                "blocks": [name for name, own in self.grids.items() if own == grid],
                "whole": measured(self.whole[grid].value, self.whole[grid].error, self.whole[grid].n),
                "over_steps": numbers(self.by_size, row),
                "by_step": [numbers(self.by_size_and_step, row, column) for column in range(len(self.steps))],
            }
            for row, grid in enumerate(self.sizes)
        ]
        blocks = {
            name: {
                "map": list(self.grids[name]),
                "over_steps": numbers(self.by_block, row),
                "by_step": [numbers(self.by_step, row, column) for column in range(len(self.steps))],
            }
            for row, name in enumerate(self.blocks)
        }
        return {
            "images": self.images,
            "steps": self.steps,
            "of_steps": self._process.num_timesteps,
            "thresholds": labels,
            "patch": self.patch,
            "cycles_per_pixel": [k / self.patch for k in range(1, self.patch // 2 + 1)],
            "sizes": sizes,
            "blocks": blocks,
        }


def measured(value: Any, error: Any, n: Any) -> dict[str, Any]:
    """A number, or a list of them, with standard error and N, as JSON wants them: None for what is not known."""

    def plain(number: Any) -> Any:
        if getattr(number, "ndim", 0):
            return [plain(item) for item in number]
        return None if math.isnan(number) else round(float(number), 6)

    return {"value": plain(value), "error": plain(error), "n": int(min(n.flat)) if getattr(n, "ndim", 0) else int(n)}
