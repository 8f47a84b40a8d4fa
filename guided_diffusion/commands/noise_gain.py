"""Measure how a model takes more noise than it is told of: c = 0, it sees the noise; c = 1, it does as it is told.

With c near 1, deterministic samplers (DDIM, DPM-Solver++, UniPC) leave grain, or squares of noise, where the first
noise was a little strong; then take `ddpm` or `dpm++2m-sde`, or train on with --noise_jitter 0.25 (docs/noise_gain.md).

  python scripts/noise_gain.py --config emoji --data_dir configs/models/emoji32_train.npz
  python scripts/noise_gain.py --config adm_imagenet128_cond --num_samples 16 --use_fp16 True

Without --data_dir the pictures are --num_samples samples of the model's own.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor
from tqdm import tqdm

from ..analysis.known_images import KnownImages
from ..analysis.noise_gain import NoiseGain, shown
from ..analysis.study import step_at
from ..analysis.subjects import Subject, image_subject
from ..runs.prepare import Configs
from ..runs.ranks import command, start
from ..settings.analysis import NoiseGainConfig
from ..settings.options import exit_on_bad_input, parse_args
from ..settings.scripts import SCRIPTS
from ..storage.files import json_text, write_atomically


def pictures(config: NoiseGainConfig, subject: Subject) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Given pictures or the model's own samples in [−1, 1], batch by batch."""
    pipeline = subject.pipeline
    size = pipeline.config.batch_size
    if config.data_dir:
        images = KnownImages(config.data_dir, "", pipeline.shape[0])
        total = min(config.known_images or len(images), len(images))
        for first in range(0, total, size):
            indices = range(first, min(first + size, total))
            yield indices, images.read(indices)[0].to(pipeline.device) / 127.5 - 1
        return
    for first in range(0, pipeline.num_samples, size):
        indices = range(first, min(first + size, pipeline.num_samples))
        for state, _ in pipeline.trajectory(indices):
            pass
        yield indices, pipeline.images(state.x)


@command
def main() -> None:
    config, *run_configs = parse_args(__doc__, SCRIPTS["noise_gain"].groups)
    device = start().device
    with exit_on_bad_input():
        subject = image_subject(Configs.of(run_configs), device)
        if subject.pipeline.config.batch_size is None:
            raise ValueError("batch_size: wanted a number here, got auto")
        steps = sorted({step_at(level, subject.process.num_timesteps) for level in config.levels})
        gain = NoiseGain(subject.denoiser, subject.process, steps, config.excess, subject.pipeline.config.seed)
        for indices, x0 in tqdm(pictures(config, subject), unit="batch", disable=None):
            gain.add(indices, subject.encode(x0), subject.condition(indices))
    rows = gain.results()
    print(shown(rows))
    if config.json:
        with exit_on_bad_input("json"):
            text = json_text({"excess": config.excess, "gain": rows}, indent=1) + "\n"
            write_atomically(config.json, lambda file: file.write(text.encode()))
