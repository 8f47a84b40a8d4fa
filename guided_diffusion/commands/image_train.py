"""Train a diffusion model on a folder of images.

The class of an image is the beginning of its file name (label_name.png), where --class_cond is on.
Everything is written to --out_dir; the same command goes on where it stopped, also with another number of ranks.
To sample: image_sample.py --config OUT_DIR/config.yaml --model_path OUT_DIR/ema_….pt
Examples:

  python scripts/image_train.py --data_dir data/emoji32/train --out_dir runs/emoji --image_size 32 --batch_size 64
  mpiexec -n 2 python scripts/image_train.py --data_dir data/emoji32/train --out_dir runs/emoji --image_size 32
  torchrun --nproc_per_node 2 scripts/image_train.py --data_dir data/emoji32/train --out_dir runs/emoji --image_size 32
"""

import torch

from ..networks.building import build_network
from ..runs.ranks import command, start
from ..settings.options import exit_on_bad_input, parse_args, resolved
from ..settings.scripts import SCRIPTS
from ..training.run import SAMPLES, batches_of, look_at, train_diffusion


@command
def main() -> None:
    training, network_config, diffusion_config = parse_args(__doc__, SCRIPTS["image_train"].groups)
    job = start()
    with exit_on_bad_input():
        network_config, classes = look_at(training.data_dir, network_config, job)
        torch.manual_seed(training.seed)
        network = build_network(network_config, diffusion_config.learn_sigma)
        settings = resolved(network_config, diffusion_config)
    image_size, class_cond = network_config.image_size, network_config.class_cond
    batches = batches_of(training, training.data_dir, image_size, class_cond, job)
    condition = {"y": torch.arange(SAMPLES) % len(classes)} if classes else {}
    configs = training, network_config, diffusion_config
    train_diffusion(network, batches, configs, settings, classes, condition, job)
