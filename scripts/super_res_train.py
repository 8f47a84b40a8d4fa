"""Train a super-resolution diffusion model on a folder of images.

It learns to make the images of large_size from themselves at small_size. The class of an image is the beginning of its
file name (label_name.png), where --class_cond is on. Everything is written to --out_dir; the same command goes on where
it stopped. Example:

  python scripts/super_res_train.py --data_dir PICTURES --out_dir runs/upsampler --large_size 256 --small_size 64
"""

from dataclasses import asdict
from functools import partial

import torch

from guided_diffusion.config import exit_on_bad_input, parse_args
from guided_diffusion.parallel import launch, start
from guided_diffusion.sampling import resolved
from guided_diffusion.script_util import sr_create_model_and_diffusion
from guided_diffusion.settings import OF_OTHER_SIZES, DiffusionConfig, NetworkConfig, SuperResolutionConfig
from guided_diffusion.training.data import load_data, with_low_res
from guided_diffusion.training.loop import TrainingConfig, TrainLoop
from guided_diffusion.training_run import (
    SAMPLES,
    batches_of,
    classes_of,
    null_label,
    run,
    sample_grid,
    write_description,
)


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


def main() -> None:
    groups = (TrainingConfig, SuperResolutionConfig, NetworkConfig, DiffusionConfig)
    training, sizes, network_config, diffusion_config = parse_args(__doc__, groups, without=OF_OTHER_SIZES)
    job = start()
    with exit_on_bad_input():
        classes = classes_of(training.data_dir, network_config)
        torch.manual_seed(training.seed)
        network, diffusion = sr_create_model_and_diffusion(
            sizes.large_size, sizes.small_size, **asdict(network_config) | asdict(diffusion_config)
        )
        class_cond = network_config.class_cond
        batches = batches_of(training, training.data_dir, sizes.large_size, class_cond, job)
        settings = resolved(sizes, network_config, diffusion_config)
        settings = {key: settings[key] for key in settings if key not in OF_OTHER_SIZES}
        loop = TrainLoop(
            network.to(job.device),
            diffusion,
            lambda step: with_low_res(batches(step), sizes.small_size),
            training,
            null_label=null_label(network_config),
            use_fp16=network_config.use_fp16,
            job=job,
            settings=settings,
            sample=partial(
                sample_grid,
                diffusion=diffusion_config,
                image_size=sizes.large_size,
                condition=first_images(training, sizes, class_cond) if training.sample_interval else {},
                seed=training.seed,
            ),
        )
        if loop.is_first:
            # For super_res_sample.py --config OUT_DIR/config.yaml --model_path OUT_DIR/ema_….pt
            write_description(training.out_dir, settings, classes)
    run(loop)
    if loop.is_first:
        print(f"trained {loop.step} steps; the moving averages are {training.out_dir}/ema_….pt", flush=True)


if __name__ == "__main__":
    launch(main)
