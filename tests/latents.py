"""Small Stable Diffusion models: the golden one, and random ones of other kinds made from it."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from guided_diffusion.denoiser import NetworkDenoiser
from guided_diffusion.guidance.base import GuidedDenoiser
from guided_diffusion.stable_diffusion.model import load
from guided_diffusion.stable_diffusion.network import LatentNetwork
from guided_diffusion.stable_diffusion.schedulers import diffuse, mean_type, noise_levels, start

DATA = Path(__file__).parent / "data" / "sd_tiny"
CASES = json.loads((DATA / "manifest.json").read_text())["cases"]


def diffusers():
    """The library; the test is skipped where the extra is not installed."""
    pytest.importorskip("transformers", reason="the extra `stable-diffusion` is not installed")
    return pytest.importorskip("diffusers", reason="the extra `stable-diffusion` is not installed")


@cache
def golden_model():
    diffusers()
    return load(str(DATA / "model"))


@cache
def golden_scheduler(kind):
    """The scheduler of the cases whose network predicts `eps` or `v`."""
    if kind == "eps":
        return golden_model().scheduler
    return diffusers().DDIMScheduler.from_pretrained(DATA / "scheduler_v_prediction")


def golden_case(name):
    return CASES[name], load_file(DATA / "cases" / f"{name}.safetensors")


class Kept:
    """A denoiser that keeps its predictions and the rows of its calls."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.predictions = []

    def __call__(self, x_t, t, condition):
        self.predictions.append(self.denoiser(x_t, t, condition))
        return self.predictions[-1]


def trajectory(unet, scheduler, x_T, condition, guidances=(), steps=5, controlnet=None):
    """(states, their guided denoiser, its denoiser with all predictions) of a run."""
    started = start(scheduler, steps)
    levels = noise_levels(started)
    network = LatentNetwork(unet, started, controlnet)
    kept = Kept(NetworkDenoiser(network, levels, mean_type(started), None, clip_denoised=False))
    guided = GuidedDenoiser(kept, levels, guidances)
    generators = [torch.Generator().manual_seed(row) for row in range(len(x_T))]
    return diffuse(started, guided, x_T, condition, generators), guided, kept


def final(*arguments, **settings):
    """The latents at the end."""
    states, _, _ = trajectory(*arguments, **settings)
    for state in states:
        pass
    return state.x


def noise(rows, height, width, seed=0):
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(seed))


def randomised(network, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return network.eval().requires_grad_(False)


def variant(folder, kind):
    """A folder of diffusers' format beside the golden one: `sd2`, `xl`, `inpaint` or `no_middle`, random weights."""
    library = diffusers()
    shutil.copytree(DATA / "model", folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    if kind == "sd2":
        config |= {"attention_head_dim": [2, 2, 4], "use_linear_projection": True}
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        scheduler |= {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if kind == "inpaint":
        config |= {"in_channels": 9}
    if kind == "no_middle":
        config |= {"mid_block_type": "UNetMidBlock2D"}
    if kind == "xl":
        import transformers

        encoder = json.loads((folder / "text_encoder" / "config.json").read_text())
        shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
        second = transformers.CLIPTextConfig(**encoder | {"projection_dim": 24})
        randomised(transformers.CLIPTextModelWithProjection(second)).save_pretrained(folder / "text_encoder_2")
        config |= {
            "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8, "transformer_layers_per_block": [1, 2, 1],
            "use_linear_projection": True,
        }  # fmt: skip
    shutil.rmtree(folder / "unet")
    unet = library.UNet2DConditionModel.from_config(config)
    randomised(unet).save_pretrained(folder / "unet")
    return folder
