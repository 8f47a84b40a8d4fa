"""Look inside a model: what its attention maps select, what is blurred there, and which block to guide with.

Makes --num_samples images and looks at every attention block on the way; then shows the network noised images of known
content (--data_dir) and measures which frequencies and, with --object_masks, which objects the masks select. Writes to
--out_dir (default runs/attention): report.html (one page to look through steps, blocks and ψ), report.md,
attention.json, and for each sample strips/NUMBER.png and animations/NUMBER.webp. The embedded model:

  python scripts/attention_report.py --config emoji --data_dir configs/models/emoji32_train.npz \\
      --object_masks configs/models/emoji32_masks.npz --known_images 371

A model of yours, to choose --sag_block and --blur_sigma by:

  python scripts/attention_report.py --config adm_imagenet128_cond --num_samples 8 --data_dir PICTURES

Without --data_dir the known images are the samples of the run. Stable Diffusion, whose flags --help then lists:

  python scripts/attention_report.py --model models/sd-1.5 --prompt "a cat" --num_images 4
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..analysis import report as attention_page
from ..analysis import watch
from ..analysis.known_images import KnownImages
from ..analysis.ranking import RULE, Changes, ranking, recommendation
from ..analysis.scrubber import HOW, sample_looks, scrubber
from ..analysis.study import AttentionStudy, step_at
from ..analysis.subjects import image_subject, latent_subject
from ..guidance.blur import check_blur
from ..networks.attention import Attends
from ..runs.identity import versions
from ..runs.pipeline import ImagePipeline
from ..runs.prepare import IMAGE_GROUPS
from ..runs.ranks import command, start
from ..settings.options import exit_on_bad_input, option, parse_args, parse_value
from ..settings.scripts import SCRIPTS
from ..stable_diffusion.sampling import LatentPipeline
from ..storage import pictures
from ..storage.files import write_atomically

IN_THE_PAGE = 4


@dataclass(frozen=True)
class ReportConfig:
    """attention report"""

    blocks: str = option("all", "attention blocks to look at: all, or names like middle_block.1,output_blocks.2.1")
    shown_steps: int = option(10, "steps of the run to look at, evenly spread")
    thresholds: str = option("1.0,1.3", "values of ψ; differences and the ranking are for the first")
    blur_sigmas: str = option(
        "", "values of σ in pixels to compare; inf is always among them; empty: 1, ¼, ½ and 2 times blur_sigma"
    )
    animation: str = option("webp", "what is written over the steps: webp or gif")
    data_dir: str = option(
        "",
        "known images: a folder, or an npz with arr_0 (uint8 [N, side, side, 3]); a network with classes sees image i "
        "under the class of sample i (labels)",
        path=True,
    )
    object_masks: str = option(
        "",
        "where their objects are, 255 inside: a folder of pictures of the same names, or an npz with arr_0 (uint8 "
        "[N, side, side])",
        path=True,
    )
    known_images: int = option(0, "known images to use, the first so many; 0: all")
    noise_levels: str = option(
        "0.1,0.3,0.5,0.7,0.9", "where known images are noised to: t/T from 0 (image) to 1 (noise)"
    )

    def __post_init__(self):
        if self.shown_steps < 1 or self.known_images < 0:
            raise ValueError(
                f"shown_steps, known_images: wanted 1 and 0 or more, got {self.shown_steps}, {self.known_images}"
            )
        if self.animation not in ("webp", "gif"):
            raise ValueError(f"animation: wanted webp or gif, got {self.animation!r}")
        if self.object_masks and not self.data_dir:
            raise ValueError("object_masks: the masks of which images? give data_dir")
        if not all(0 <= level <= 1 for level in self.levels):
            raise ValueError(f"noise_levels: wanted numbers from 0 to 1, got {self.noise_levels}")
        if not all(math.isfinite(threshold) for threshold in self.psi):
            raise ValueError(f"thresholds: wanted finite numbers, got {self.thresholds}")

    @cached_property
    def levels(self) -> list[float]:
        return _numbers("noise_levels", self.noise_levels)

    @cached_property
    def psi(self) -> list[float]:
        return _numbers("thresholds", self.thresholds)

    def sigmas(self, of_the_run: float) -> list[float]:
        """The values of σ, that of the guidance or the first given one first."""
        given = _numbers("blur_sigmas", self.blur_sigmas) if self.blur_sigmas else [1, 0.25, 0.5, 2]
        scale = 1 if self.blur_sigmas else of_the_run
        sigmas = list(dict.fromkeys([*(scale * sigma for sigma in given), math.inf]))
        for sigma in sigmas:
            check_blur(sigma, None)
        return sigmas


def _numbers(key: str, text: str) -> list[float]:
    return list(dict.fromkeys(parse_value(part, float, key) for part in text.split(",")))


class Gallery:
    """Writes what was seen of each batch, and keeps what the page shows of the first samples."""

    def __init__(self, folder: Path, config: ReportConfig, blocks: Mapping[str, Any], sigma: float, of: int):
        self._folder, self._config, self._sigma, self._of = folder, config, sigma, of
        self._heads = watch.columns(config.psi)
        self._names = list(blocks)
        self.in_the_page: list[dict[str, Any]] = []

    def add(self, looks: list[watch.Look]) -> None:
        """One batch, at all steps that were looked at, from noise to image."""
        room = max(0, IN_THE_PAGE - len(self.in_the_page))
        self.in_the_page += sample_looks(looks, range(min(room, len(looks[0].indices))), self._sigma)
        cells = np.stack([watch.cells(look) for look in looks], axis=1)
        covered = np.stack([watch.shares(look) for look in looks], axis=1)
        steps = [look.step for look in looks]
        for index, own, shares in zip(looks[0].indices, cells, covered, strict=True):
            name = f"{index:06d}"
            title = f"sample {index}, degraded with psi {self._config.psi[0]:g}, sigma {self._sigma:g}"
            picture = watch.strip(own, shares, self._names, self._heads, steps, title)
            pictures.save_png(picture, self._folder / "strips" / f"{name}.png")
            frames = [
                watch.frame(at, share, self._names, self._heads, f"{title}, t = {step} of {self._of}; covered: by psi")
                for step, at, share in zip(steps, own, shares, strict=True)
            ]
            pictures.save_animation(frames, self._folder / "animations" / f"{name}.{self._config.animation}")


def chosen_blocks(all_blocks: Mapping[str, Attends], names: str) -> dict[str, Attends]:
    """The blocks of --blocks."""
    chosen = list(all_blocks) if names == "all" else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in all_blocks:
            raise ValueError(f"blocks: no attention block {name!r}; there are: {', '.join(all_blocks) or 'none'}")
    if not chosen:
        raise ValueError("blocks: this network has no attention block")
    return {name: all_blocks[name] for name in chosen}


def sampled(pipeline: ImagePipeline | LatentPipeline) -> Iterator[tuple[range, Tensor]]:
    """The last states of the run, batch by batch."""
    total, size = pipeline.num_samples, pipeline.config.batch_size
    for first in tqdm(range(0, total, size), desc="samples", unit="batch", disable=None):
        indices = range(first, min(first + size, total))
        for state, _ in pipeline.trajectory(indices):
            pass
        yield indices, state.x


def known(config: ReportConfig, images: KnownImages, size: int) -> Iterator[tuple[range, Tensor, Tensor | None]]:
    """Images and objects batch by batch."""
    total = min(config.known_images or len(images), len(images))
    for first in tqdm(range(0, total, size), desc="known images", unit="batch", disable=None):
        indices = range(first, min(first + size, total))
        yield indices, *images.read(indices)


@command
def main() -> None:
    latent = any(argument.partition("=")[0] == "--model" for argument in sys.argv[1:])
    groups = SCRIPTS["stable_diffusion_sample"].groups if latent else IMAGE_GROUPS
    config, *run_configs = parse_args(__doc__, (ReportConfig, *groups))
    job = start()
    with exit_on_bad_input():
        subject = latent_subject(*run_configs, job.device) if latent else image_subject(run_configs, job.device)
        pipeline, count = subject.pipeline, subject.pipeline.num_steps
        if pipeline.config.batch_size is None:
            raise ValueError("batch_size: wanted a number here, got auto")
        blocks = chosen_blocks(subject.blocks, config.blocks)
        height, width, _ = pipeline.shape
        if config.data_dir and height != width:
            raise ValueError(f"data_dir: known images are squares, the model makes {height}×{width}")
        images = KnownImages(config.data_dir, config.object_masks, height) if config.data_dir else None
        sigmas = config.sigmas(subject.blur_sigma)
    folder = Path(pipeline.config.out_dir or "runs/attention")
    shown = np.linspace(count - 1, 0, min(config.shown_steps, count)).round()
    seen: list[watch.Look] = []
    watching = watch.Watch(
        blocks=blocks,
        steps=frozenset(map(int, shown)),
        thresholds=config.psi,
        blur_sigmas=sigmas,
        seen=seen.append,
        images=pipeline.images,
    )
    steps = sorted({step_at(level, count) for level in config.levels})
    study = AttentionStudy(
        subject.denoiser, subject.process, blocks, steps, config.psi, pipeline.config.seed, subject.encode
    )
    changes = Changes(list(blocks), sigmas)
    gallery = Gallery(folder, config, blocks, sigmas[0], count)

    for indices, x in sampled(subject.watched(watching)):
        changes.add(seen)
        gallery.add(seen)
        seen.clear()
        if images is None:
            levels = ((pipeline.images(x) + 1) * 127.5).clamp(0, 255)
            study.add(indices, levels, None, subject.condition(indices))
    if images is not None:
        with exit_on_bad_input():
            for indices, levels, objects in known(config, images, pipeline.config.batch_size):
                objects = None if objects is None else objects.to(job.device)
                study.add(indices, levels.to(job.device), objects, subject.condition(indices))

    found, change = study.results(), changes.results()
    ranked = ranking(found, change)
    advice = recommendation(ranked, change)
    results = {
        "title": f"What {pipeline.name} attends to",
        "model": pipeline.name,
        "images": f"{Path(config.data_dir).name} at --data_dir" if images else "samples of the run itself",
        "objects": images is not None and images.has_objects,
        "guidance_of_the_run": subject.guidance_line,
        "seed": pipeline.config.seed,
        "recommendation": advice,
        "rule": RULE,
        "ranking": ranked,
        "change": {
            "samples": pipeline.num_samples,
            "steps": sorted(watching.steps),
            "threshold": config.psi[0],
            "blocks": change,
        },
        "study": found,
        "notes": [HOW],
        "versions": versions(),
    }
    grids = {name: study.grids[name] for name in blocks}
    looks = scrubber(
        gallery.in_the_page, grids, sorted(watching.steps, reverse=True), count,
        config.psi[0], sigmas[0], advice["sag_block"],
    )  # fmt: skip
    texts = {
        "attention.json": json.dumps(results, ensure_ascii=False) + "\n",
        "report.md": attention_page.markdown(results),
        "report.html": attention_page.html(results, looks),
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    print(texts["report.md"])
    print(f"look at {folder / 'report.html'}")
