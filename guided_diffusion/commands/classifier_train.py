"""Train a noisy-image classifier, for classifier guidance, on a folder of images.

The class of an image is the beginning of its file name (label_name.png); class i is the i-th label in sorted order, as
for image_train.py. The diffusion must be that of the model to be guided. Everything is written to --out_dir; the same
command goes on where it stopped. Several ranks: mpiexec or torchrun, as for image_train.py. Example:

  python scripts/classifier_train.py --data_dir data/emoji32/train --val_data_dir data/emoji32/held_out \\
      --image_size 32 --num_classes 3 --noise_schedule cosine --batch_size 64 --iterations 3000
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..diffusion.diffusion import build_diffusion
from ..diffusion.noise import choice
from ..networks.building import build_classifier
from ..runs.ranks import Job, command, start
from ..settings.options import exit_on_bad_input, parse_args, resolved
from ..settings.scripts import SCRIPTS
from ..storage.files import json_text, write_atomically
from ..storage.images import ImageFolder
from ..training.classifier import ClassifierLoop, accuracy_by_noise
from ..training.run import batches_of, folder_of, in_a_folder, look_at, run, write_description

NOISE_LEVELS = 10
DRAWS = 4
MOST_IMAGES = 1000
"""Of each folder: with as many, an accuracy is known to 0.016."""
IMAGES_AT_A_TIME = 50


def accuracies(loop: ClassifierLoop, folders: list[str], image_size: int, seed: int) -> dict[str, Any]:
    """Accuracy by noise level on images of each folder, uncropped and not mirrored: MOST_IMAGES drawn by the seed."""
    loop.network.eval()
    total = loop.process.num_timesteps
    steps = [level * total // NOISE_LEVELS for level in range(NOISE_LEVELS)]
    found = {"t": steps, "images": {}}
    for folder in folders:
        data = ImageFolder(folder, image_size, class_cond=True)
        chosen = choice(seed, len(data))[:MOST_IMAGES]
        totals = np.zeros(len(steps))
        with tqdm(total=len(chosen), desc=f"accuracy on {folder}", unit="image", disable=None) as bar:
            for start_at in range(0, len(chosen), IMAGES_AT_A_TIME):
                rows = [data[i] for i in chosen[start_at : start_at + IMAGES_AT_A_TIME]]
                images = torch.stack([image for image, _ in rows]).to(loop.device)
                labels = torch.tensor([label for _, label in rows], device=loop.device)
                shares = accuracy_by_noise(loop.network, loop.process, images, labels, steps, DRAWS, seed=start_at)
                totals += np.array(shares) * len(rows)
                bar.update(len(rows))
        found["images"][folder] = len(chosen)
        found[folder] = (totals / len(chosen)).round(4).tolist()
    return found


def report(loop: ClassifierLoop, folders: list[str], image_size: int, seed: int) -> None:
    """Say where the trained network is, then say and write how often it is right."""
    print(f"trained {loop.step} steps; the weights are {loop.out_dir}/model{loop.step:06d}.pt", flush=True)
    found = accuracies(loop, folders, image_size, seed)
    print("accuracy at t =", *found["t"])
    for folder, count in found["images"].items():
        print(f"{folder} (N = {count}):", *found[folder], flush=True)
    write_atomically(loop.out_dir / "accuracy.json", lambda file: file.write(json_text(found, indent=1).encode()))


@command
def main() -> None:
    groups, without = SCRIPTS["classifier_train"]
    configs = parse_args(__doc__, groups, without=without)
    training, classifier_config, network_config, diffusion_config = configs
    image_size = network_config.image_size
    training = in_a_folder(training, classifier_config, diffusion_config)
    job = start()
    with exit_on_bad_input("out_dir"):
        network_config, classes = look_at(training.data_dir, replace(network_config, class_cond=True), job)
        folders = [training.data_dir]
        if training.val_data_dir:
            folders.append(training.val_data_dir)
            _, others = look_at(training.val_data_dir, network_config, job)
            if others != classes:
                raise ValueError(f"val_data_dir: wanted the classes {', '.join(classes)}, got {', '.join(others)}")
        num_classes = network_config.num_classes
        torch.manual_seed(training.seed)
        network = build_classifier(image_size, classifier_config, num_classes).to(job.device)
        of_folder = partial(batches_of, image_size=image_size, class_cond=True)
        uncropped = replace(training, random_crop=False)  # as upstream
        val_data = of_folder(uncropped, training.val_data_dir, job=Job()) if training.val_data_dir else None
        settings = resolved(classifier_config) | {"image_size": image_size, "num_classes": num_classes}
        loop = ClassifierLoop(
            network,
            build_diffusion(diffusion_config),
            of_folder(training, training.data_dir, job=job),
            training,
            val_data,
            use_fp16=classifier_config.classifier_use_fp16,
            job=job,
            settings=settings | resolved(diffusion_config),
        )
    with folder_of(loop):
        if loop.is_first:
            with exit_on_bad_input():
                # For classifier_sample.py, after the --config of the model.
                write_description(training.out_dir, settings, classes)
        run(loop)
        if loop.is_first:
            report(loop, folders, image_size, training.seed)
