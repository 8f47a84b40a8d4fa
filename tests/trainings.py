"""Small training runs that several tests make, and what they leave."""

import csv
from dataclasses import replace

import torch

from guided_diffusion.runs.ranks import Job
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.training import TrainingConfig
from guided_diffusion.training.loop import TrainLoop
from small import SMALL

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.tensor([0, 1] * 4)


def cut(images, job=None, batch_size=4):
    """As a loader: batches of the images in turn from any step on, the rows of a rank."""
    job, share = job or Job(), batch_size // (job.size if job else 1)

    def batches(step):
        while True:
            start = batch_size * step % len(images) + job.rank * share
            yield images[start : start + share], {"y": LABELS[start : start + share]}
            step += 1

    return batches


def loop_of(folder, images=IMAGES, job=None, data=None, sample=None, network=None, **settings):
    """A loop with a small network over batches of four images, with moving averages of two rates."""
    torch.manual_seed(0)
    made, diffusion = create_model_and_diffusion(
        **SMALL | (network or {}), class_cond=True, num_classes=2, null_label=True
    )
    defaults = TrainingConfig(
        out_dir=str(folder), batch_size=4, lr=1e-3, ema_rate="0.9,0.5", save_interval=3, log_interval=2
    )
    config = replace(defaults, **settings)
    data = data or cut(images, job, config.batch_size)
    return TrainLoop(made, diffusion, data, config, null_label=2, job=job, sample=sample)


def step_of(loop):
    """One step of a loop, without the rest of a run."""
    loop.network.train()
    loop.train_step(*next(loop.batches))
    loop.step += 1


def gradients(loop):
    """The gradients of a loop's first step, from Adam's first moments."""
    return [loop.optimizer.state[parameter]["exp_avg"] / 0.1 for parameter in loop.network.parameters()]


def log_of(folder, without=("images_per_s",)):
    """progress.csv as a list of {column: text}."""
    with open(folder / "progress.csv", newline="") as file:
        return [{name: row[name] for name in row if name not in without} for row in csv.DictReader(file)]


def assert_same(ours, expected):
    """That two lists of tensors are equal exactly."""
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)
