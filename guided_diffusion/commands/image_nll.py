"""Measure the likelihood of images under a diffusion model, in bits per dimension.

The variational bound (Ho et al. 2020; Nichol & Dhariwal 2021) of the network as it is, without guidance, with one noise
for each image and step. --timestep_respacing bounds by a process of fewer steps: quicker and looser. Of a folder that
holds more than --num_samples images, so many are drawn by the seed; nll.json knows them by the hash of their contents.
Images are not mirrored, and squares are cut from their middle; their classes, where --class_cond is on, are the
beginnings of the file names (label_name.png) in sorted order, as in training. Writes nll.json and terms.npz. Examples:

  python scripts/image_nll.py --config runs/emoji/config.yaml --model_path runs/emoji/ema_0.9999_001000.pt \\
      --data_dir data/emoji32/held_out --batch_size 16
  mpiexec -n 8 python scripts/image_nll.py --config iddpm_cifar10 --timestep_respacing "" \\
      --data_dir PICTURES --batch_size 64
"""

from functools import partial
from typing import Any

from ..diffusion.diffusion import build_diffusion
from ..networks.building import build_network, fill, make_ready, unfilled
from ..runs.likelihood import measure
from ..runs.ranks import command, start
from ..settings.model import NetworkConfig
from ..settings.options import exit_on_bad_input, parse_args, resolved
from ..settings.runs import LikelihoodConfig
from ..settings.scripts import SCRIPTS
from ..storage.files import json_text
from ..storage.images import ImageFolder, found


def show(likelihood: LikelihoodConfig, network: NetworkConfig, result: dict[str, Any]) -> None:
    """Print what nll.json will hold, or what people want to know of it."""
    if likelihood.json:
        print(json_text(result), flush=True)
        return
    total, prior = result["total_bpd"], result["prior_bpd"]
    error = "" if total["error"] is None else f" ± {total['error']:.4f}"
    images, n = result["images"], result["n"]
    there = found(likelihood.data_dir, images["of"], images["classes"], network.num_classes)
    how = f"drawn by seed {likelihood.seed}" if images["drawn"] else "the first by name"
    bits = f"{total['value']:.4f}{error} bits per dimension, of which prior {prior['value']:.2g}"
    print(f"{bits}; N = {n} of {there}{f', {how}' if n < images['of'] else ''}", flush=True)


@command
def main() -> None:
    configs = parse_args(__doc__, SCRIPTS["image_nll"].groups, unread=SCRIPTS["image_sample"].groups)
    likelihood, network_config, diffusion_config = configs
    job = start()
    with exit_on_bad_input():
        diffusion = build_diffusion(diffusion_config)
        images = ImageFolder(likelihood.data_dir, network_config.image_size, network_config.class_cond)
        if len(images.class_names) > network_config.num_classes:
            raise ValueError(
                f"num_classes: {network_config.num_classes}, but data_dir has {len(images.class_names)} classes"
            )
        with unfilled():
            network = build_network(network_config, diffusion_config.learn_sigma)
        fill(network, likelihood.model_path, network_config, diffusion_config.learn_sigma, job.device)
        make_ready(network, network_config.use_fp16)
    measure(images, network, diffusion, likelihood, resolved(*configs), job, partial(show, likelihood, network_config))
