"""What the page needs to look through steps, blocks and ψ of samples; it makes masks from scores (scrubber.js)."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..guidance.masks import ROUNDING
from ..storage import pictures
from .gallery import heat_map, magnitude, shown_as
from .watch import Look

QUANTA = 100
"""ψ is chosen in steps of 1/QUANTA, from 0 to LARGEST / QUANTA."""

LARGEST = 254

HOW = (
    "The page holds each score A as one byte, the number of ψ among 0, 0.01, …, 2.54 that it exceeds. For these ψ the "
    "masks made here are therefore exactly those of the program; only how far a score lies above 2.54 is lost. |Δ| and "
    "the change ‖Δ‖/‖ε‖ are for the ψ and σ that are named below, at every place of the ψ slider."
)


def quantised(score: Tensor) -> NDArray[np.uint8]:
    """How many of the ψ = 0, 1/QUANTA, …, LARGEST/QUANTA each score exceeds, by the rule of `attention_mask`: uint8.

    A > n/QUANTA exactly where this is more than n.
    """
    edges = (torch.arange(LARGEST + 1, dtype=torch.float64) / QUANTA + ROUNDING).float()
    return torch.bucketize(score.float().cpu(), edges).numpy().astype(np.uint8)


def sample_looks(looks: Sequence[Look], rows: Sequence[int], sigma: float) -> list[dict[str, Any]]:
    """What `scrubber` shows of rows of a batch: their looks at all steps, the first step first."""
    samples = []
    for row in rows:
        seen = []
        for look in looks:
            size = look.x0.shape[2:]
            deltas = {name: magnitude(block.delta[row : row + 1]) for name, block in look.blocks.items()}
            largest = max(float(delta.max()) for delta in deltas.values()) or 1.0
            blocks = [
                {
                    "score": base64.b64encode(quantised(block.score[row]).tobytes()).decode(),
                    "delta": _url(heat_map(deltas[name] / largest, size)[0]),
                    "change": round(float(block.change[sigma][row]), 6),
                }
                for name, block in look.blocks.items()
            ]
            x0, blurred = (_url(shown_as(images[row : row + 1])[0]) for images in (look.x0, look.blurred))
            seen.append({"x0": x0, "blurred": blurred, "blocks": blocks})
        samples.append({"index": looks[0].indices[row], "looks": seen})
    return samples


def scrubber(
    samples: Sequence[Mapping[str, Any]],
    blocks: Mapping[str, tuple[int, int]],
    steps: Sequence[int],
    of: int,
    threshold: float,
    sigma: float,
    first: str,
) -> dict[str, Any]:
    """What scrubber.js reads. blocks: names, sizes of maps; threshold, sigma: what |Δ| is for; first: shown block.

    It opens in the middle of the run: at its ends there is noise to see, or masks of what is there already.
    """
    return {
        "samples": samples,
        "blocks": [{"name": name, "map": grid} for name, grid in blocks.items()],
        "block": list(blocks).index(first),
        "steps": steps,
        "step": min(range(len(steps)), key=lambda place: abs(2 * steps[place] - of)),
        "of": of,
        "psi": round(threshold * QUANTA),
        "sigma": f"{sigma:g}",
        "quanta": QUANTA,
        "largest": LARGEST,
        "palette": pictures.heat(np.linspace(0, 1, 256)).tolist(),
    }


def _url(picture: NDArray[np.uint8]) -> str:
    """[H, W, 3] as a data URL: PNG, or WebP where that would be large."""
    kind, how = ("png", {}) if max(picture.shape) <= 64 else ("webp", {"quality": 85})
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format=kind, **how)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
