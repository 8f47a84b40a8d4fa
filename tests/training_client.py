"""What code written for guided-diffusion does to train, by its names alone: tests compare the numbers with its own.

`python training_client.py FILE.npz` writes the numbers of whichever package is on the path.
"""

import copy
import json
import random
import sys
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from golden import fill, normal
from guided_diffusion import dist_util, fp16_util, image_datasets, logger, resample, script_util, train_util

FLAGS = {
    "image_size": 16, "num_channels": 64, "num_res_blocks": 1, "channel_mult": "1,1", "attention_resolutions": "8",
    "num_heads": 2, "learn_sigma": True, "diffusion_steps": 100, "timestep_respacing": "10",
}  # fmt: skip
COLUMNS = ("step", "samples", "loss", "mse", "vb", "grad_norm", "param_norm")


def seed(number):
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.manual_seed(number)


def batches(first=0):
    """Endless batches of four images."""
    while True:
        yield torch.from_numpy(np.random.RandomState(first).uniform(-1, 1, (4, 3, 16, 16)).astype(np.float32)), {}
        first += 1


def summary(network, state):
    """Of parameters that `fill` began with: their norm, and the product of their change with numbers of their names."""
    # A key's bias has no gradient but rounding, which Adam makes as large as any.
    start = fill(copy.deepcopy(network)).state_dict()
    named = {name: state[name].detach().double() for name, _ in network.named_parameters() if "qkv.bias" not in name}
    norm = sum(float(value.square().sum()) for value in named.values()) ** 0.5
    numbers = {name: normal(zlib.crc32(name.encode()) ^ 1, *value.shape) for name, value in named.items()}
    return [norm, sum(float(((value - start[name]) * numbers[name]).sum()) for name, value in named.items())]


def train(folder, steps, data=None, resume_checkpoint="", loop_class=None, **settings):
    """What a training of a network says and leaves: {name: numbers}."""
    seed(1)
    flags = script_util.model_and_diffusion_defaults()
    flags.update(FLAGS)
    network, diffusion = script_util.create_model_and_diffusion(**flags)
    fill(network).train().requires_grad_(True)
    dist_util.setup_dist()
    logger.configure(dir=str(folder), format_strs=["json"])
    sampler = resample.create_named_schedule_sampler("uniform", diffusion)
    drawn, sample = [], sampler.sample

    def recorded(batch_size, device):
        t, weights = sample(batch_size, device)
        drawn.append(t.tolist())
        return t, weights

    sampler.sample = recorded
    arguments = {
        "model": network, "diffusion": diffusion, "data": data or batches(), "batch_size": 4, "microbatch": 2,
        "lr": 1e-3, "ema_rate": "0.5,0.9", "log_interval": 1, "save_interval": 2, "schedule_sampler": sampler,
        "resume_checkpoint": resume_checkpoint, "weight_decay": 0.05, "lr_anneal_steps": steps,
    }  # fmt: skip
    arguments.update(settings)
    loop = (loop_class or train_util.TrainLoop)(**arguments)
    loop.run_loop()
    found = {"t": np.array(drawn), "log": np.zeros((0, len(COLUMNS)))}
    for path in Path(logger.get_dir()).glob("progress*.json"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found["log"] = np.array([[line[name] for name in COLUMNS] for line in lines])
    states = map(loop.mp_trainer.master_params_to_state_dict, [loop.mp_trainer.master_params, *loop.ema_params])
    found["parameters"] = np.array([summary(network, state) for state in states])
    return found


def second_moment():
    """What a loss-aware sampler draws while it learns: {name: numbers}."""
    seed(3)
    sampler = resample.LossSecondMomentResampler(
        SimpleNamespace(num_timesteps=5), history_per_term=3, uniform_prob=0.01
    )
    drawn = []
    for _ in range(30):
        t, weights = sampler.sample(4, "cpu")
        sampler.update_with_all_losses(t.tolist(), [(1 + step) ** 2 * random.random() for step in t.tolist()])
        drawn.append([t.numpy(), weights.numpy()])
    return {"drawn": np.array(drawn), "weights": sampler.weights()}


class Two(nn.Module):
    """A network of two layers, one of which computes in half precision if asked."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 1)

    def convert_to_fp16(self):
        self.conv.apply(fp16_util.convert_module_to_f16)

    def forward(self, x):
        return self.linear(self.conv(x.type(self.conv.weight.dtype)).float().relu().mean(dim=(2, 3)))


def mixed_precision(use_fp16):
    """Six steps of a small network, the third of which overflows in half precision: {name: numbers}."""
    network = fill(Two()).requires_grad_(True)
    logger.configure(dir=tempfile.mkdtemp(), format_strs=[])
    trainer = fp16_util.MixedPrecisionTrainer(
        model=network, use_fp16=use_fp16, fp16_scale_growth=0.5, initial_lg_loss_scale=4.0
    )
    optimizer = torch.optim.SGD(trainer.master_params, lr=0.1)
    lines = []
    for step in range(6):
        trainer.zero_grad()
        trainer.backward(network(normal(step, 2, 3, 8, 8)).square().mean() * (1e6 if use_fp16 and step == 2 else 1))
        took = trainer.optimize(optimizer)
        said = logger.dumpkvs()
        lines.append([float(took), trainer.lg_loss_scale, said.get("grad_norm", 0), said.get("param_norm", 0)])
    state = trainer.master_params_to_state_dict(trainer.master_params)
    back = trainer.state_dict_to_master_params(state)
    return {
        "lines": np.array(lines, dtype=np.float64),
        "state": np.concatenate([state[name].detach().float().numpy().ravel() for name in sorted(state)]),
        "masters": np.concatenate([values.detach().numpy().ravel() for values in back]),
    }


def pictures(folder):
    """Eight pictures of two classes and several sizes below a folder."""
    for i in range(8):
        pixels = np.random.RandomState(i).randint(0, 256, (5, 4, 3)).astype(np.uint8)
        path = Path(folder, "below" if i % 3 else "", f"{'cat' if i % 2 else 'dog'}_{i}.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((20 + 9 * i, 60 - 3 * i), Image.BILINEAR).save(path)
    return str(folder)


def images(folder, **settings):
    """Four batches of a folder of pictures: {name: numbers}."""
    seed(5)
    data = image_datasets.load_data(data_dir=folder, batch_size=3, image_size=8, class_cond=True, **settings)
    found = [next(data) for _ in range(4)]
    return {
        "images": np.stack([batch.numpy() for batch, _ in found]),
        "labels": np.stack([condition["y"].numpy() for _, condition in found]),
    }


def cases(folder):
    """Every case by name, in folders of their own below `folder`."""
    folder = Path(folder)
    found = {"train": train(folder / "train", 3)}
    found["resumed"] = train(
        folder / "resumed", 5, batches(3), resume_checkpoint=str(folder / "train" / "model000002.pt"), microbatch=-1
    )
    found["second_moment"] = second_moment()
    found["mixed_precision_off"], found["mixed_precision_on"] = mixed_precision(False), mixed_precision(True)
    (folder / "pictures").mkdir()
    data = pictures(folder / "pictures")
    found["images"] = images(data, random_crop=True)
    found["images_in_order"] = images(data, deterministic=True, random_flip=False)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    vars(np)["int"] = int  # which guided-diffusion needs, and numpy has no more
    with tempfile.TemporaryDirectory() as temporary:
        numbers = cases(temporary)
    np.savez_compressed(
        sys.argv[1], **{f"{case}/{name}": v for case, found in numbers.items() for name, v in found.items()}
    )
