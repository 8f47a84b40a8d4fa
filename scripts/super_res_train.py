"""Train a super-resolution diffusion model on a folder of images.

It learns to make the images of large_size from themselves at small_size. The class of an image is the beginning of its
file name (label_name.png), where --class_cond is on. Everything is written to --out_dir; the same command goes on where
it stopped. Example:

  python scripts/super_res_train.py --data_dir PICTURES --out_dir runs/upsampler --large_size 256 --small_size 64
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from guided_diffusion.config import exit_on_bad_input, parse_args
from guided_diffusion.files import write_atomically
from guided_diffusion.parallel import launch, start
from guided_diffusion.sampling import resolved
from guided_diffusion.script_util import sr_create_model_and_diffusion
from guided_diffusion.settings import OF_OTHER_SIZES, DiffusionConfig, NetworkConfig, SuperResolutionConfig
from guided_diffusion.training.data import class_names, list_image_files, load_data, with_low_res
from guided_diffusion.training.loop import TrainingConfig, TrainLoop
from guided_diffusion.training.trainer import seed_torch


def main() -> None:
    groups = (TrainingConfig, SuperResolutionConfig, NetworkConfig, DiffusionConfig)
    training, sizes, network_config, diffusion_config = parse_args(__doc__, groups, without=OF_OTHER_SIZES)
    device = start().device
    with exit_on_bad_input():
        seed_torch(training.seed)
        classes = class_names(list_image_files(training.data_dir)) if network_config.class_cond else []
        if len(classes) > network_config.num_classes:
            raise ValueError(f"num_classes: {network_config.num_classes}, but data_dir has {len(classes)} classes")
        network, diffusion = sr_create_model_and_diffusion(
            sizes.large_size, sizes.small_size, **asdict(network_config) | asdict(diffusion_config)
        )
        data = load_data(
            data_dir=training.data_dir,
            batch_size=training.batch_size,
            image_size=sizes.large_size,
            class_cond=network_config.class_cond,
            random_crop=training.random_crop,
            random_flip=training.random_flip,
            num_workers=training.num_workers,
            seed=training.seed,
        )
        has_null = network_config.class_cond and network_config.null_label
        loop = TrainLoop(
            network.to(device),
            diffusion,
            with_low_res(data, sizes.small_size),
            training,
            null_label=network_config.num_classes if has_null else None,
            use_fp16=network_config.use_fp16,
        )
        out_dir = Path(training.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        # What super_res_sample.py needs to know of the network.
        settings = resolved(sizes, network_config, diffusion_config)
        text = yaml.safe_dump({key: settings[key] for key in settings if key not in OF_OTHER_SIZES}, sort_keys=False)
        write_atomically(out_dir / "config.yaml", lambda file: file.write(text.encode()))
        if network_config.class_cond:
            write_atomically(out_dir / "classes.json", lambda file: file.write(json.dumps(classes).encode()))
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{parameters:,} parameters on {device}; step {loop.step} in {training.out_dir}", flush=True)
    try:
        loop.run()
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted at step {loop.step}; the same command goes on from there\n")
        raise SystemExit(130) from None
    print(f"trained {loop.step} steps; the moving averages are {training.out_dir}/ema_….pt", flush=True)


if __name__ == "__main__":
    launch(main)
