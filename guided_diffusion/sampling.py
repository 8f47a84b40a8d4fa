"""What the sampling scripts share: their settings, the objects built from them, and the run that writes samples."""

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

import guided_diffusion
from guided_diffusion import pictures, samplers
from guided_diffusion.checkpoints import load_into, write_atomically
from guided_diffusion.config import GuidanceConfig, NetworkConfig, option, parse_value
from guided_diffusion.guidance.base import Guidance, GuidedDenoiser
from guided_diffusion.guidance.classifier import with_classifier
from guided_diffusion.guidance.self_attention import SelfAttentionGuidance
from guided_diffusion.inspection import wrong_flags
from guided_diffusion.noise import SampleNoise, check_seed, sample_labels
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.samplers import State
from guided_diffusion.script_util import build_guidance
from guided_diffusion.unet import UNetModel

GRID_SAMPLES = 64

ConditionOf = Callable[[Sequence[int]], dict[str, Tensor]]
"""The condition of samples by their indices, rows first, on the CPU."""


@dataclass(frozen=True)
class SamplingConfig:
    """sampling"""

    model_path: str = option("", "weights of the network: .pt or .safetensors, local or what blobfile opens", path=True)
    num_samples: int = option(10000, "images to make")
    batch_size: int = option(16, "images at a time")
    labels: str = option("random", "classes: random, none (where the network has a null label), or a list like 0,7,7")
    use_ddim: bool = option(False, "DDIM instead of DDPM; goes with a respacing like ddim25")
    ddim_eta: float = option(0.0, "η of DDIM: 0 deterministic, 1 as random as DDPM")
    clip_denoised: bool = option(True, "clamp the predicted x̂_0 to [-1, 1] at every step")
    seed: int = option(0, "sample i depends on the seed and on i alone, not on batch size")
    out_dir: str = option("", "folder to write to; empty: $OPENAI_LOGDIR, else runs/ and a name made of the settings")

    def __post_init__(self):
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")
        if not (math.isfinite(self.ddim_eta) and self.ddim_eta >= 0):
            raise ValueError(f"ddim_eta: wanted 0 or more, got {self.ddim_eta}")
        if not self.model_path:
            raise ValueError("model_path: give the weights of the network, or --config configs/emoji.yaml to try")
        check_seed(self.seed)


def device_of_this_process() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ready(network: UNetModel, path: str, config: NetworkConfig, learn_sigma: bool, device: torch.device) -> None:
    """Fill a network (built on the meta device) from `path` and make it ready to sample on the device.

    A ValueError names the flags that do not fit the file.
    """
    explain = partial(wrong_flags, network=config, image_size=network.image_size, learn_sigma=learn_sigma)
    load_into(network, path, device, explain)
    network.eval().requires_grad_(False)
    if config.use_fp16:
        network.convert_to_fp16()


def choose_labels(labels: str, seed: int, indices: Sequence[int], num_classes: int, null_label: bool) -> Tensor:
    """The class of every sample, [N] int64, for the flag --labels."""
    if labels == "random":
        return sample_labels(seed, indices, num_classes)
    if labels == "none":
        if not null_label:
            raise ValueError("labels: none needs a network with a null label (null_label)")
        return torch.full((len(indices),), num_classes)
    given = [parse_value(part, int, "labels") for part in labels.split(",")]
    for label in given:
        if not 0 <= label < num_classes:
            raise ValueError(f"labels: wanted classes from 0 to {num_classes - 1}, got {label}")
    return torch.tensor([given[index % len(given)] for index in indices])


def class_condition(config: SamplingConfig, network: NetworkConfig, null_label: bool) -> ConditionOf:
    """The classes of samples, `{"y": [N]}`, as --labels asks; a ValueError where that flag is wrong.

    null_label: whether "none" is a possible class.
    """

    def condition_of(indices: Sequence[int]) -> dict[str, Tensor]:
        return {"y": choose_labels(config.labels, config.seed, indices, network.num_classes, null_label)}

    condition_of([0])
    return condition_of


def unconditional(_indices: Sequence[int]) -> dict[str, Tensor]:
    """The condition of samples without one."""
    return {}


@dataclass(frozen=True, eq=False)
class Sampler:
    """Everything that makes sample i, but i itself. side: of the images; condition_of: what sample i is made of."""

    config: SamplingConfig
    side: int
    network: Callable[..., Tensor]
    diffusion: SpacedDiffusion
    device: torch.device
    condition_of: ConditionOf = unconditional
    guidances: Sequence[Guidance] = ()
    cond_fn: Callable[..., Tensor] | None = None

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""
        config, process = self.config, self.diffusion.process
        noise = SampleNoise(config.seed, indices, (3, self.side, self.side), self.device)
        condition = {name: rows.to(self.device) for name, rows in self.condition_of(indices).items()}
        guided = GuidedDenoiser(self.diffusion.denoiser(self.network, config.clip_denoised), process, self.guidances)
        denoiser = with_classifier(guided, self.cond_fn) if self.cond_fn else guided
        if config.use_ddim:
            states = samplers.ddim(denoiser, process, noise.x_T(), condition, noise, config.ddim_eta)
        else:
            states = samplers.ddpm(denoiser, process, noise.x_T(), condition, noise)
        for state in states:
            yield state, guided


def guidances_of(config: GuidanceConfig, network: UNetModel) -> list[SelfAttentionGuidance]:
    """The guidance that flags ask for; checked also where its scale is 0, unless all flags are at their defaults."""
    return [] if config == GuidanceConfig() else [build_guidance(network, config)]


def describe_guidance(config: GuidanceConfig, guidances: Sequence[SelfAttentionGuidance], num_timesteps: int) -> str:
    """One line for people: what guides, and how many steps."""
    if config.scale == 0:
        return "self-attention guidance: off"
    [guidance] = guidances
    steps = int(guidance.interval.contains(torch.arange(num_timesteps), num_timesteps).sum())
    return (
        f"self-attention guidance: s = {guidance.scale:g}, ψ = {config.sag_threshold:g}, σ = {config.blur_sigma:g} at "
        f"{config.block_name}, {steps} of {num_timesteps} steps, {config.fidelity}"
    )


def provenance() -> dict[str, str]:
    """Versions of what made a result."""
    return {
        "guided_diffusion": guided_diffusion.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def settings_hash(settings: dict[str, Any]) -> str:
    """Eight hexadecimal digits of all settings that make sample i what it is."""
    parts = {key: value for key, value in settings.items() if key not in ("out_dir", "num_samples", "batch_size")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def output_folder(config: SamplingConfig, settings: dict[str, Any]) -> Path:
    """Where a run writes: --out_dir, else $OPENAI_LOGDIR, else runs/MODEL-HASH."""
    chosen = config.out_dir or os.environ.get("OPENAI_LOGDIR")
    return Path(chosen) if chosen else Path("runs", f"{Path(config.model_path).stem}-{settings_hash(settings)}")


def save_samples(folder: Path, images: np.ndarray, labels: np.ndarray | None) -> Path:
    """Write samples_NxHxWx3.npz (arr_0 uint8 NHWC, arr_1 labels) and grid.png; returns the npz's path."""
    path = folder / f"samples_{'x'.join(map(str, images.shape))}.npz"
    arrays = [images] if labels is None else [images, labels]
    write_atomically(path, lambda file: np.savez(file, *arrays))
    shown = images[:GRID_SAMPLES]
    pictures.save_png(pictures.enlarge(pictures.grid(shown, math.ceil(len(shown) ** 0.5)), 600), folder / "grid.png")
    return path


Observer = Callable[[Sequence[int], State, GuidedDenoiser], None]
"""Is shown every step of every batch: the samples' indices, the state, and the denoiser that knows the guidance."""


def run(
    sampler: Sampler, settings: dict[str, Any], guidance_line: str, observe: Observer | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Make all samples and write them with config.yaml (the resolved settings) and manifest.json.

    Returns the samples, uint8 [N, H, W, 3], and the manifest.
    """
    config = sampler.config
    folder = output_folder(config, settings)
    sys.stderr.write(f"{guidance_line}\n")
    started = time.perf_counter()
    images, labels, evaluations = [], [], 0.0
    batches = [
        range(start, min(start + config.batch_size, config.num_samples))
        for start in range(0, config.num_samples, config.batch_size)
    ]
    total = len(batches) * sampler.diffusion.num_timesteps
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as bar:
        for indices in batches:
            for state, guided in sampler.trajectory(indices):
                if observe:
                    observe(indices, state, guided)
                bar.update()
            images.append(pictures.to_uint8(state.x))
            evaluations += guided.evaluations * len(indices) / config.num_samples
            if (y := state.prediction.condition.get("y")) is not None:
                labels.append(y.cpu().numpy())
    seconds = time.perf_counter() - started
    samples = np.concatenate(images)
    path = save_samples(folder, samples, np.concatenate(labels) if labels else None)
    manifest = {
        "samples": config.num_samples,
        "file": path.name,
        "guidance": guidance_line,
        "network_evaluations_per_sample": evaluations,
        "seconds": round(seconds, 3),
        "device": str(sampler.device),
        "versions": provenance(),
        "settings": settings,
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    write_atomically(folder / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))
    print(f"{config.num_samples} samples in {seconds:.1f} s, {evaluations:g} network evaluations each: {path}")
    return samples, manifest


def resolved(*groups: Any) -> dict[str, Any]:
    """All settings of a run as one flat dict: what config.yaml holds."""
    return {key: value for group in groups for key, value in asdict(group).items()}
