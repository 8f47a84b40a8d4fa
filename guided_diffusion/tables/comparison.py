"""Samples from the same noise without and with guidance: pictures, where the guidance looked, and distances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.ranks import BadInputError

from ..diffusion.samplers import State
from ..guidance.base import GuidedDenoiser
from ..guidance.masked_blur import MaskedBlur
from ..runs.pipeline import ImagePipeline
from ..runs.prepare import Prepared
from ..runs.ranks import Job
from ..runs.run import run
from ..settings.guidance import GuidanceConfig
from ..settings.shipped import shipped
from ..storage import pictures
from ..storage.files import write_atomically
from .page import measured
from .report import TITLES

SHOWN = 8
SHOWN_WIDTH = 640
PICTURES = ("unguided", "mask", "guided")
"""What is drawn beside the samples of a row: the first SHOWN of them, SHOWN_WIDTH pixels wide at most."""

MODELS = shipped("models")
REFERENCES = {"train": "training pictures", "held_out": "held-out pictures"}
"""The embedded data set's parts, for the distances of the embedded model's samples."""


class MaskCounter:
    """Watches a run (an observer of `run`) and counts how often each pixel of a sample was in a guidance's mask."""

    def __init__(self, guidance: MaskedBlur, num_samples: int, side: int):
        self._guidance = guidance
        self._selected = np.zeros((num_samples, side, side))
        self._steps = np.zeros(num_samples)

    def __call__(self, indices: Sequence[int], _state: State, guided: GuidedDenoiser) -> None:
        if self._guidance in guided.last_step.recorded:
            self._selected[list(indices)] += self._guidance.mask(guided.last_step)[:, 0].cpu().numpy()
            self._steps[list(indices)] += 1

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of guided steps at which each pixel was in the mask, [N, H, W] in [0, 1]."""
        return self._selected / np.maximum(self._steps, 1)[:, None, None]


@dataclass(frozen=True, eq=False)
class SameNoise:
    """Samples without and with guidance, uint8 [N, H, W, 3], and the share of steps in the mask [N, H, W], if any."""

    unguided: NDArray[np.uint8]
    share: NDArray[np.float64] | None
    guided: NDArray[np.uint8]


def same_noise(pipeline: ImagePipeline, count: int) -> SameNoise:
    """The first samples of a run made twice, without any guidance and with all of it."""
    indices = range(min(count, pipeline.config.num_samples))

    def made(pipeline: ImagePipeline, observe: MaskCounter | None = None) -> NDArray[np.uint8]:
        for state, guided in pipeline.trajectory(indices):
            if observe:
                observe(indices, state, guided)
        return pictures.to_uint8(state.x)

    masked = [guidance for guidance in pipeline.guidances if isinstance(guidance, MaskedBlur) and guidance.scale]
    counter = MaskCounter(masked[0], len(indices), pipeline.side) if masked else None
    unguided = made(replace(pipeline, guidances=(), cond_fn=None))
    guided = made(pipeline, counter)
    return SameNoise(unguided, counter.share if counter else None, guided)


def draw(pipeline: ImagePipeline, folder: Path) -> None:
    """Write the pictures of a run's first samples, unguided, mask and guided, once; none if it is unguided."""
    if not any(guidance.scale for guidance in pipeline.guidances) and not pipeline.cond_fn:
        return
    if (folder / "guided.png").exists():
        return
    seen = same_noise(pipeline, SHOWN)
    share = pictures.heat(seen.share) if seen.share is not None else None
    for name, images in zip(PICTURES, (seen.unguided, share, seen.guided), strict=True):
        if images is not None:
            grid = pictures.grid(images, min(SHOWN // 2, len(images)))
            pictures.save_png(pictures.enlarge(grid, SHOWN_WIDTH), folder / f"{name}.png")


def drawn(folder: Path) -> tuple[bytes, bytes | None, bytes] | None:
    """The PNGs that `draw` left: unguided, mask if there is one, and guided."""
    unguided, mask, guided = (
        path.read_bytes() if (path := folder / f"{name}.png").exists() else None for name in PICTURES
    )
    return (unguided, mask, guided) if unguided and guided else None


def compare(unguided: Prepared, guided: Prepared, guidance: GuidanceConfig, folder: Path, job: Job) -> str:
    """Make both runs, and leave comparison.png and summary.txt in a folder; returns the summary.

    guided: of one guidance with a mask, by its settings.
    """
    pipeline = guided.pipeline
    masks = MaskCounter(pipeline.guidances[0], pipeline.num_samples, pipeline.side)
    store, about_unguided = run(unguided.pipeline, unguided.settings, unguided.guidance_line, job)
    before = store.first(pipeline.num_samples)
    store, about_guided = run(pipeline, guided.settings, guided.guidance_line, job, masks)
    after = store.first(pipeline.num_samples)

    by_attention = guidance.sag_mask == "self-attention"
    mask = "attention" if by_attention else Path(guidance.sag_mask).stem
    chooser = guidance.block_name if by_attention else f"the {mask} mask"
    pictures.save_png(pictures.comparison(before, masks.share, after, mask), folder / "comparison.png")
    change = np.abs(before.astype(float) - after).mean()
    of_runs = [
        f"  {name:<9} {about['network_evaluations_per_sample']:g} network evaluations each, {about['seconds']:.1f} s"
        for name, about in (("unguided:", about_unguided), ("guided:", about_guided))
    ]
    config = pipeline.config
    lines = [
        f"{config.num_samples} samples of {Path(config.model_path).name}, {pipeline.num_steps} steps, "
        f"seed {config.seed}",
        *of_runs,
        f"  {chooser} selects {masks.share.mean():.0%} of the pixels; guidance "
        f"changes a pixel by {change:.1f} of 255 on average",
        f"  look at {folder / 'comparison.png'}",
        *(_distances(unguided.pipeline.config.out_dir, config.out_dir) if pipeline.side == 32 else []),
        "This small model on few pictures checks the software; it is no evidence about self-attention guidance.",
    ]
    text = "\n".join(lines) + "\n"
    write_atomically(folder / "summary.txt", lambda file: file.write(text.encode()))
    return text


def _distances(unguided: str, guided: str) -> list[str]:
    """Lines about how far two runs are from the embedded pictures, and by how much they differ in that."""
    from evaluations.judge import Settings, judge

    lines = []
    with TemporaryDirectory() as cache:
        for reference, title in REFERENCES.items():
            settings = Settings(str(MODELS / f"emoji32_{reference}.npz"), unguided, features="emoji", cache=Path(cache))
            try:
                before = judge(settings)
                after = judge(replace(settings, samples=guided, against=unguided))
            except BadInputError as refusal:
                return [f"No distances: {refusal}"]
            lines += [
                f"Against the {title} (emoji features, N = {after['n']}, value ± standard error):",
                f"  {'unguided':<20}{_metrics(before['metrics'])}",
                f"  {'guided':<20}{_metrics(after['metrics'])}",
                f"  {'guided − unguided':<20}{_metrics(after['difference']['metrics'], '+')}, of paired samples",
            ]
    return lines


def _metrics(found: Mapping[str, Any], sign: str = "") -> str:
    """Metrics in one line."""
    names = ("frechet_distance", "precision", "recall")
    return ", ".join(f"{TITLES[name]} {measured(found.get(name), sign=sign)}" for name in names)
