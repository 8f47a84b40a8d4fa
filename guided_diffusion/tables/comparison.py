"""Samples from the same noise without and with guidance: pictures, and where the guidance looked."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..diffusion.samplers import State
from ..guidance.base import GuidedDenoiser
from ..guidance.masked_blur import MaskedBlur
from ..guidance.masks import upsampled
from ..runs.pipeline import ImagePipeline, pixels
from ..runs.prepare import Prepared
from ..runs.ranks import Job
from ..runs.run import run
from ..settings.guidance import GuidanceConfig
from ..storage import pictures
from ..storage.files import write_atomically
from .page import templates

SHOWN = 8
LARGEST = 128
"""What is drawn of a row: so many samples, at most so many pixels along a side."""

TO_TRY = (
    ("--sag_scale 0.3", "gentler guidance"),
    ("--sag_threshold 1.3", "a smaller mask: only what is attended to most"),
    ("--blur_sigma 3", "a stronger blur under the mask"),
)
"""Settings that show something, and what they do."""


class MaskCounter:
    """Watches a run (an observer of `run`) and counts how often each pixel of a sample was in a guidance's mask."""

    def __init__(self, guidance: MaskedBlur, num_samples: int, side: int):
        self._guidance = guidance
        self._selected = np.zeros((num_samples, side, side))
        self._steps = np.zeros(num_samples)

    def __call__(self, indices: Sequence[int], _state: State, guided: GuidedDenoiser) -> None:
        if self._guidance in guided.last_step.recorded:
            mask = upsampled(self._guidance.mask(guided.last_step), self._selected.shape[1:])  # of latents, where x is
            self._selected[list(indices)] += mask[:, 0].cpu().numpy()
            self._steps[list(indices)] += 1

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of guided steps at which each pixel was in the mask, [N, H, W] in [0, 1]."""
        return self._selected / np.maximum(self._steps, 1)[:, None, None]


@dataclass(frozen=True, eq=False)
class SameNoise:
    """Samples without and with guidance, uint8 [N, H, W, 3], and the share of steps in the mask [N, H, W], if any.

    guided: None where nothing guides.
    """

    unguided: NDArray[np.uint8]
    share: NDArray[np.float64] | None
    guided: NDArray[np.uint8] | None


def same_noise(pipeline: ImagePipeline, count: int) -> SameNoise:
    """The first samples of a run made twice, without any guidance and with all of it."""
    indices = range(min(count, pipeline.config.num_samples))

    def made(pipeline: ImagePipeline, observe: MaskCounter | None = None) -> NDArray[np.uint8]:
        for state, guided in pipeline.trajectory(indices):
            if observe:
                observe(indices, state, guided)
        return pixels(pipeline, state.x)

    unguided = made(replace(pipeline, guidances=(), cond_fn=None))
    if not pipeline.cond_fn and not any(guidance.scale for guidance in pipeline.guidances):
        return SameNoise(unguided, None, None)
    masked = [guidance for guidance in pipeline.guidances if isinstance(guidance, MaskedBlur) and guidance.scale]
    counter = MaskCounter(masked[0], len(indices), pipeline.side) if masked else None
    guided = made(pipeline, counter)
    return SameNoise(unguided, counter.share if counter else None, guided)


@dataclass(frozen=True)
class Strips:
    """PNGs of a row's first samples side by side: unguided; in the mask, if there is one; guided, if they are."""

    unguided: bytes
    mask: bytes | None = None
    guided: bytes | None = None


def draw(pipeline: ImagePipeline, folder: Path) -> None:
    """Write the `Strips` of a run to its folder, once."""
    if strips(folder):
        return
    seen = same_noise(pipeline, SHOWN)
    mask = None if seen.share is None else pictures.masked(seen.guided, seen.share)
    last = ("unguided", seen.unguided)  # says that all are there
    for name, images in (("guided", seen.guided), ("mask", mask), last):
        if images is not None:
            pictures.save_png(pictures.grid(pictures.reduced(images, LARGEST), SHOWN), _strip(folder, name))


def strips(folder: Path) -> Strips | None:
    """What `draw` left in a run's folder."""
    found = {
        name: path.read_bytes() for name in ("unguided", "mask", "guided") if (path := _strip(folder, name)).exists()
    }
    return Strips(**found) if "unguided" in found else None


def _strip(folder: Path, name: str) -> Path:
    return folder / "same_noise" / f"{name}.png"


def side_by_side(folders: Mapping[str, Path], count: int) -> NDArray[np.uint8]:
    """The first samples of runs that began from the same noise, a run after the other: uint8 [runs · count, H, W, 3].

    folders: by a name for people. A ValueError says which of them are not of the same noise, or hold too few.
    """
    from evaluations.pairing import why_not_paired
    from evaluations.sources import open_source

    first, images = None, []
    for name, folder in folders.items():
        source = open_source(str(folder))
        source = replace(source, path=name, images=source.images and source.images.first(count))
        first = first or source
        if reason := why_not_paired(first, source):
            raise ValueError(f"not of the same noise: {reason}")
        images.append(source.images.read(0, count))
    return np.concatenate(images)


def compare(unguided: Prepared, guided: Prepared, guidance: GuidanceConfig, folder: Path, job: Job) -> str:
    """Make both runs, and leave comparison.png, index.html and summary.txt in a folder; returns the summary.

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
    network = Path(config.model_path.partition("#")[0]).name
    lines = [
        f"{config.num_samples} samples of {network}, {pipeline.num_steps} steps, seed {config.seed}",
        *of_runs,
        f"  {chooser} selects {masks.share.mean():.0%} of the pixels; guidance "
        f"changes a pixel by {change:.1f} of 255 on average",
        "This small model on few pictures checks the software; it is no evidence about self-attention guidance.",
    ]
    _write_page(before, masks.share, after, mask, lines, folder)
    lines.insert(-1, f"  look at {folder / 'index.html'} (or comparison.png)")
    text = "\n".join(lines) + "\n"
    write_atomically(folder / "summary.txt", lambda file: file.write(text.encode()))
    return text


def _write_page(
    before: NDArray[np.uint8],
    share: NDArray[np.float64],
    after: NDArray[np.uint8],
    mask: str,
    lines: Sequence[str],
    folder: Path,
) -> None:
    """index.html: sample by sample unguided, mask and guided, what was run, and what to try next."""
    columns = {"unguided": before, f"{mask} mask": pictures.masked(after, share), "guided": after}
    page = templates().get_template("demo.html.j2").render(
        title="Self-attention guidance, the same noise",
        introduction=[line.strip() for line in lines],
        sections=[],
        columns=list(columns),
        samples=[[_png(images[i]) for images in columns.values()] for i in range(min(len(before), pictures.SHOWN))],
        commands=[(f"python scripts/demo.py {flag} --out_dir {folder.parent / f'try_{number}'}", what)
                  for number, (flag, what) in enumerate(TO_TRY, start=1)],
    )  # fmt: skip
    write_atomically(folder / "index.html", lambda file: file.write(page.encode()))


def _png(image: NDArray[np.uint8]) -> bytes:
    """An image [H, W, 3], enlarged, as the bytes of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(pictures.enlarge(image, 160)).save(stream, format="png")
    return stream.getvalue()
