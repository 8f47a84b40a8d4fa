"""What the training scripts share: data of a rank, the folder's files, the run and what it says, samples on the way."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import nn

from ..diffusion.denoiser import Condition
from ..diffusion.diffusion import build_diffusion
from ..diffusion.noise import SampleNoise
from ..diffusion.samplers import ddim
from ..runs.ranks import Job
from ..runs.shards import settings_hash
from ..settings.model import DiffusionConfig, NetworkConfig, TrainedNetworkConfig
from ..settings.options import BadInput, exit_on_bad_input, resolved
from ..settings.training import TrainerConfig, TrainingConfig
from ..storage import pictures
from ..storage.files import alone_in, json_text, write_atomically
from ..storage.images import class_names, found, list_image_files
from .data import load_data
from .loop import TrainLoop
from .resume import NOT_OF_THE_RESULT
from .trainer import Batches, Trainer

AnyTraining = TypeVar("AnyTraining", bound=TrainerConfig)

LENGTHS = {"lr_anneal_steps", "iterations"}
"""Settings that say how long a training is."""

SAMPLES = 16
SAMPLING_STEPS = 25
SAMPLES_WIDTH = 600


def batches_of(training: TrainerConfig, folder: str, image_size: int, class_cond: bool, job: Job) -> Batches:
    """The rows of this rank in every batch of a folder, from any step on."""
    return lambda step: load_data(
        data_dir=folder,
        batch_size=training.batch_size,
        image_size=image_size,
        class_cond=class_cond,
        random_crop=training.random_crop,
        random_flip=training.random_flip,
        num_workers=training.num_workers,
        seed=training.seed,
        rank=job.rank,
        size=job.size,
        start_batch=step,
    )


def look_at(data_dir: str, network: TrainedNetworkConfig, job: Job) -> tuple[TrainedNetworkConfig, list[str]]:
    """The settings of a network for a folder, and its classes where the network takes any; rank 0 says what is there.

    A ValueError if they are more than the network's.
    """
    files = list_image_files(data_dir)
    classes = class_names(files) if network.class_cond else []
    network = network.of(len(classes))
    if job.rank == 0:
        print(found(data_dir, len(files), len(classes), network.num_classes), flush=True)
    return network, classes


def null_label(network: NetworkConfig) -> int | None:
    """What a dropped label becomes, None where the network has no label for it."""
    return network.num_classes if network.class_cond and network.null_label else None


def write_description(out_dir: str, settings: dict[str, Any], classes: Sequence[str]) -> None:
    """Leave what a sampler's --config reads of the network, config.yaml, and its classes' names, classes.json.

    A ValueError where the folder is of a run of samples, whose settings these would overwrite.
    """
    if (Path(out_dir) / "manifest.json").exists():
        raise ValueError(f"out_dir: {out_dir} holds samples of a run and its config.yaml; give training another folder")
    text = yaml.safe_dump(settings, sort_keys=False)
    write_atomically(Path(out_dir) / "config.yaml", lambda file: file.write(text.encode()))
    if classes:
        write_atomically(Path(out_dir) / "classes.json", lambda file: file.write(json_text(classes).encode()))


def in_a_folder(training: AnyTraining, *groups: Any) -> AnyTraining:
    """The settings with a folder: the given one, else $OPENAI_LOGDIR, else one in runs/ for what makes the weights.

    groups: the other settings of the training. Its length does not count, so that it may be made longer.
    """
    if training.out_dir:
        return training
    free = (NOT_OF_THE_RESULT | LENGTHS) - {"resume_checkpoint"}
    made_of = {name: value for name, value in resolved(training, *groups).items() if name not in free}
    named = Path("runs", f"{training.kind}-{settings_hash(made_of)[:8]}")
    return replace(training, out_dir=os.environ.get("OPENAI_LOGDIR") or str(named))


@contextmanager
def folder_of(loop: Trainer) -> Iterator[None]:
    """Keep other runs out of a loop's folder; `BadInput` if one is there."""
    with ExitStack() as stack:
        if loop.is_first:
            with exit_on_bad_input("out_dir"):
                stack.enter_context(alone_in(loop.out_dir))
        yield


def run(loop: Trainer) -> None:
    """Train, and say so on rank 0; a signal or a loss that explodes ends the script with one sentence."""
    if loop.is_first:
        parameters = sum(parameter.numel() for parameter in loop.network.parameters())
        ranks = f" ({loop.job.size} ranks)" if loop.job.size > 1 else ""
        print(f"{parameters:,} parameters on {loop.device}{ranks}; step {loop.step} in {loop.out_dir}", flush=True)
        if loop.config.steps is None:
            print("no end (--lr_anneal_steps 0): it trains until Ctrl-C or SIGTERM, which save", flush=True)
    try:
        stopped = loop.run()
    except FloatingPointError as error:
        raise BadInput(str(error)) from None
    if stopped:
        if loop.is_first:
            sys.stderr.write(f"stopped at step {loop.step}; the same command goes on from there\n")
        raise SystemExit(128 + stopped)


def train_diffusion(
    network: nn.Module,
    batches: Batches,
    configs: tuple[TrainingConfig, NetworkConfig, DiffusionConfig],
    settings: dict[str, Any],
    classes: Sequence[str],
    condition: Condition,
    job: Job,
) -> None:
    """Train a diffusion network, and leave its description beside the weights.

    configs: image_size of the network's is that of its samples. settings: what rebuilds the network and its diffusion.
    condition: of the samples on the way.
    """
    training, network_config, diffusion_config = configs
    training = in_a_folder(training, network_config, diffusion_config)
    with exit_on_bad_input("out_dir"):
        loop = TrainLoop(
            network.to(job.device),
            build_diffusion(diffusion_config),
            batches,
            training,
            null_label=null_label(network_config),
            use_fp16=network_config.use_fp16,
            job=job,
            settings=settings,
            sample=partial(
                sample_grid,
                diffusion=diffusion_config,
                image_size=network_config.image_size,
                condition=condition,
                seed=training.seed,
            ),
        )
    with folder_of(loop):
        if loop.is_first:
            with exit_on_bad_input():
                write_description(training.out_dir, settings, classes)
        run(loop)
    if loop.is_first:
        print(f"trained {loop.step} steps; the moving averages are {training.out_dir}/ema_….pt", flush=True)


def sample_grid(
    network: nn.Module, path: Path, *, diffusion: DiffusionConfig, image_size: int, condition: Condition, seed: int
) -> None:
    """Write a grid of 16 DDIM samples of a network under a condition, always of the same noise."""
    respaced = build_diffusion(
        replace(diffusion, timestep_respacing=str(min(SAMPLING_STEPS, diffusion.diffusion_steps)))
    )
    device = next(network.parameters()).device
    x_T = SampleNoise(seed, range(SAMPLES), (3, image_size, image_size), device).x_T()
    condition = {name: values.to(device) for name, values in condition.items()}
    *_, last = ddim(respaced.denoiser(network), respaced.process, x_T, condition)
    grid = pictures.grid(pictures.to_uint8(last.x), round(SAMPLES**0.5))
    pictures.save_png(pictures.enlarge(grid, SAMPLES_WIDTH), path)
