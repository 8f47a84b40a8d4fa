"""Train a diffusion model on a folder of images.

The class of an image is the beginning of its file name (label_name.png), where --class_cond is on.
Everything is written to --out_dir; the same command goes on where it stopped. Example:

  python scripts/image_train.py --data_dir data/emoji32/train --out_dir runs/emoji --image_size 32 --batch_size 64
"""

import json
import sys
from pathlib import Path

import yaml

from guided_diffusion.config import exit_on_bad_input, parse_args
from guided_diffusion.files import write_atomically
from guided_diffusion.parallel import launch, start
from guided_diffusion.sampling import resolved
from guided_diffusion.script_util import build_diffusion, build_network
from guided_diffusion.settings import DiffusionConfig, NetworkConfig
from guided_diffusion.training.data import class_names, list_image_files, load_data
from guided_diffusion.training.loop import TrainingConfig, TrainLoop
from guided_diffusion.training.trainer import seed_torch


def main() -> None:
    training, network_config, diffusion_config = parse_args(__doc__, (TrainingConfig, NetworkConfig, DiffusionConfig))
    device = start().device
    with exit_on_bad_input():
        seed_torch(training.seed)
        classes = class_names(list_image_files(training.data_dir)) if network_config.class_cond else []
        if len(classes) > network_config.num_classes:
            raise ValueError(f"num_classes: {network_config.num_classes}, but data_dir has {len(classes)} classes")
        network = build_network(network_config, diffusion_config.learn_sigma).to(device)
        data = load_data(
            data_dir=training.data_dir,
            batch_size=training.batch_size,
            image_size=network_config.image_size,
            class_cond=network_config.class_cond,
            random_crop=training.random_crop,
            random_flip=training.random_flip,
            num_workers=training.num_workers,
            seed=training.seed,
        )
        has_null = network_config.class_cond and network_config.null_label
        loop = TrainLoop(
            network,
            build_diffusion(diffusion_config),
            data,
            training,
            null_label=network_config.num_classes if has_null else None,
            use_fp16=network_config.use_fp16,
        )
        out_dir = Path(training.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        # What image_sample.py needs to know of the network: --config OUT_DIR/config.yaml --model_path OUT_DIR/ema_….pt
        text = yaml.safe_dump(resolved(network_config, diffusion_config), sort_keys=False)
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
