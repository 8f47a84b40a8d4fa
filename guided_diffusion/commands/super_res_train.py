"""Train a super-resolution diffusion model on a folder of images.

It learns to make the images of large_size from themselves at small_size. The class of an image is the beginning of its
file name (label_name.png), where --class_cond is on. Everything is written to --out_dir; the same command goes on where
it stopped. To sample: super_res_sample.py --config OUT_DIR/config.yaml --model_path OUT_DIR/ema_….pt. Example:

  python scripts/super_res_train.py --data_dir PICTURES --out_dir runs/upsampler --large_size 256 --small_size 64
"""

from dataclasses import replace

import torch

from ..networks.building import build_upsampler
from ..runs.ranks import command, start
from ..settings.model import SuperResolutionConfig
from ..settings.options import exit_on_bad_input, parse_args, resolved
from ..settings.scripts import SCRIPTS
from ..settings.training import TrainingConfig
from ..training.data import load_data, with_low_res
from ..training.run import SAMPLES, batches_of, look_at, train_diffusion


def first_images(training: TrainingConfig, sizes: SuperResolutionConfig, class_cond: bool) -> dict[str, torch.Tensor]:
    """The condition of the samples on the way: the folder's first images, made small."""
    data = load_data(
        data_dir=training.data_dir,
        batch_size=SAMPLES,
        image_size=sizes.large_size,
        class_cond=class_cond,
        deterministic=True,
        random_flip=False,
    )
    return next(with_low_res(data, sizes.small_size))[1]


@command
def main() -> None:
    groups, without = SCRIPTS["super_res_train"]
    training, sizes, network_config, diffusion_config = parse_args(__doc__, groups, without=without)
    class_cond = network_config.class_cond
    job = start()
    with exit_on_bad_input():
        network_config, classes = look_at(training.data_dir, network_config, job)
        torch.manual_seed(training.seed)
        network = build_upsampler(sizes, network_config, diffusion_config.learn_sigma)
        settings = resolved(sizes, network_config, diffusion_config)
        condition = first_images(training, sizes, class_cond) if training.sample_interval else {}
    batches = batches_of(training, training.data_dir, sizes.large_size, class_cond, job)
    train_diffusion(
        network,
        lambda step: with_low_res(batches(step), sizes.small_size),
        (training, replace(network_config, image_size=sizes.large_size), diffusion_config),
        {key: settings[key] for key in settings if key not in without},
        classes,
        condition,
        job,
    )
