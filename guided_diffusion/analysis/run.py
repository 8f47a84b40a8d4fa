"""The attention report of a model: its samples watched, known images studied, blocks ranked, all of it written down."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..guidance.blur import check_blur
from ..networks.attention import Attends
from ..runs.identity import versions
from ..runs.pipeline import ImagePipeline
from ..settings.analysis import ReportConfig
from ..settings.options import exit_on_bad_input
from ..stable_diffusion.sampling import LatentPipeline
from ..storage.files import json_text, write_atomically
from . import report
from .gallery import write_pictures
from .known_images import KnownImages
from .ranking import RULE, Changes, doubts, ranking, recommendation
from .scrubber import HOW, sample_looks, scrubber
from .study import AttentionStudy, step_at
from .subjects import Subject
from .watch import Look, Watch

IN_THE_PAGE = 4
"""Samples to look through in the page, the first so many."""


def _chosen_blocks(all_blocks: Mapping[str, Attends], names: str) -> dict[str, Attends]:
    """The blocks of --blocks."""
    chosen = list(all_blocks) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in all_blocks:
            raise ValueError(f"blocks: no attention block {name!r}; there are: {', '.join(all_blocks) or 'none'}")
    if not chosen:
        raise ValueError("blocks: this network has no attention block")
    return {name: all_blocks[name] for name in chosen}


def _sampled(pipeline: ImagePipeline | LatentPipeline) -> Iterator[tuple[range, Tensor]]:
    """The last states of the run, batch by batch."""
    total, size = pipeline.num_samples, pipeline.config.batch_size
    for first in tqdm(range(0, total, size), desc="samples", unit="batch", disable=None):
        indices = range(first, min(first + size, total))
        for state, _ in pipeline.trajectory(indices):
            pass
        yield indices, state.x


def _known(config: ReportConfig, images: KnownImages, size: int) -> Iterator[tuple[range, Tensor, Tensor | None]]:
    """Images and objects batch by batch."""
    total = min(config.known_images or len(images), len(images))
    for first in tqdm(range(0, total, size), desc="known images", unit="batch", disable=None):
        indices = range(first, min(first + size, total))
        yield indices, *images.read(indices)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What is looked into and how. blocks: by name; sigmas: σ, the first one for differences; images: known ones."""

    config: ReportConfig
    subject: Subject
    blocks: dict[str, Attends]
    sigmas: list[float]
    images: KnownImages | None


def build(config: ReportConfig, subject: Subject) -> Analysis:
    """From settings and a model; a ValueError where they do not go together."""
    pipeline = subject.pipeline
    if pipeline.config.batch_size is None:
        raise ValueError("batch_size: wanted a number here, got auto")
    blocks = _chosen_blocks(subject.blocks, config.blocks)
    height, width, _ = pipeline.shape
    if config.data_dir and height != width:
        raise ValueError(f"data_dir: known images are squares, the model makes {height}×{width}")
    images = KnownImages(config.data_dir, config.object_masks, height) if config.data_dir else None
    sigmas = config.sigmas(subject.blur_sigma)
    for sigma in sigmas:
        check_blur(sigma, None)
    return Analysis(config, subject, blocks, sigmas, images)


def run(analysis: Analysis, folder: Path, show: Callable[[str], None]) -> None:
    """Make the samples, show the report as Markdown, and leave it and the pictures in a folder."""
    config, subject, sigmas = analysis.config, analysis.subject, analysis.sigmas
    pipeline, of = subject.pipeline, subject.pipeline.num_steps
    shown = sorted({int(step) for step in np.linspace(of - 1, 0, min(config.shown_steps, of)).round()}, reverse=True)
    seen: list[Look] = []
    watching = Watch(
        blocks=analysis.blocks,
        steps=frozenset(shown),
        thresholds=config.psi,
        blur_sigmas=sigmas,
        seen=seen.append,
        images=pipeline.images,
    )
    steps = sorted({step_at(level, of) for level in config.levels})
    study = AttentionStudy(
        subject.denoiser, subject.process, analysis.blocks, steps, config.psi, pipeline.config.seed, subject.encode
    )
    changes = Changes(list(analysis.blocks), sigmas)
    in_the_page: list[dict[str, Any]] = []
    for indices, x in _sampled(subject.watched(watching)):
        changes.add(seen)
        in_the_page += sample_looks(seen, range(min(IN_THE_PAGE - len(in_the_page), len(indices))), sigmas[0])
        write_pictures(seen, of, folder, config.animation)
        seen.clear()
        if analysis.images is None:
            levels = ((pipeline.images(x) + 1) * 127.5).clamp(0, 255)
            study.add(indices, levels, None, subject.condition(indices))
    if analysis.images is not None:
        with exit_on_bad_input():
            for indices, levels, objects in _known(config, analysis.images, pipeline.config.batch_size):
                objects = None if objects is None else objects.to(pipeline.device)
                study.add(indices, levels.to(pipeline.device), objects, subject.condition(indices))

    results = _results(analysis, study.results(), changes.results(), sorted(shown))
    grids = {name: study.grids[name] for name in analysis.blocks}
    first = results["recommendation"]["sag_block"]
    looks = scrubber(in_the_page, grids, shown, of, config.psi[0], sigmas[0], first)
    texts = {
        "attention.json": json_text(results) + "\n",
        "report.md": report.markdown(results),
        "report.html": report.html(results, looks),
    }
    show(texts["report.md"])
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))


def _results(
    analysis: Analysis, study: Mapping[str, Any], change: Mapping[str, Any], shown: list[int]
) -> dict[str, Any]:
    """What attention.json holds. study, change: what was found; shown: the steps of the run that were looked at."""
    config, subject, images = analysis.config, analysis.subject, analysis.images
    pipeline = subject.pipeline
    ranked = ranking(study, change)
    return {
        "title": f"What {pipeline.name} attends to",
        "model": pipeline.name,
        "images": f"{Path(config.data_dir).name} at --data_dir" if images else "samples of the run itself",
        "objects": images is not None and images.has_objects,
        "guidance_of_the_run": subject.guidance_line,
        "seed": pipeline.config.seed,
        "recommendation": recommendation(ranked, change),
        "doubts": doubts(ranked, study["images"], pipeline.num_samples),
        "rule": RULE,
        "ranking": ranked,
        "change": {
            "samples": pipeline.num_samples,
            "steps": shown,
            "threshold": config.psi[0],
            "blocks": change,
        },
        "study": study,
        "notes": [HOW],
        "versions": versions(),
    }
