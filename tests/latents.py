"""Small Stable Diffusion models: the golden one, and random ones of other kinds made from it."""

import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guided_diffusion.diffusion.denoiser import NetworkDenoiser
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
    """Random weights, small enough that a run does not magnify rounding."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.data = 0.6 * torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
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


RESNETS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
VAE = {
    "down_blocks": "down", "up_blocks": "up", "resnets": "block", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "group_norm": "norm",
    "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def _original_unet_name(name):
    """The golden UNet's parameter names (one layer a level) as the original format has them."""
    for new, old in ENDS.items():
        if name.startswith(new + "."):
            return old + name.removeprefix(new)
    part, *rest = name.split(".")
    if part == "mid_block":
        kind, number, *rest = rest
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    else:
        level, kind, number, *rest = rest
        level, number = int(level), int(number)
        if part == "down_blocks":
            place = f"input_blocks.{2 * level + 1 + (kind == 'downsamplers')}"
        else:
            place = f"output_blocks.{2 * level + (1 if kind == 'upsamplers' else number)}"
        place += {"resnets": ".0", "attentions": ".1", "downsamplers": ".0"}.get(kind) or f".{1 + (level > 0)}"
        if kind == "downsamplers":
            rest[0] = "op"
    if kind == "resnets":
        rest[0] = RESNETS[rest[0]]
    return ".".join([place, *rest])


def single_file(path):
    """The golden model as one file of the original format."""
    tensors = {}
    model = golden_model()
    last = len(model.vae.config.block_out_channels) - 1
    for name, value in model.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_original_unet_name(name)}"] = value
    for name, value in model.vae.state_dict().items():
        for new, old in VAE.items():
            name = name.replace(new, old)
        name = re.sub(r"up\.(\d)", lambda match: f"up.{last - int(match[1])}", name)
        tensors[f"first_stage_model.{name}"] = value
    for name, value in load_file(DATA / "model" / "text_encoder" / "model.safetensors").items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return path
