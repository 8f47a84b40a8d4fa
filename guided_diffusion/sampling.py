"""What the sampling scripts share: their settings, the conditions of samples, and the objects built from them."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion import samplers, solvers
from guided_diffusion.checkpoints import load_into
from guided_diffusion.config import is_path, option
from guided_diffusion.files import is_address, read_arrays
from guided_diffusion.guidance.base import Guidance, GuidedDenoiser
from guided_diffusion.guidance.classifier import with_classifier
from guided_diffusion.inspection import wrong_flags
from guided_diffusion.noise import SampleNoise, Samples, check_seed, sample_labels
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.samplers import State
from guided_diffusion.script_util import build_guidance, build_other_guidances
from guided_diffusion.settings import GuidanceConfig, NetworkConfig, OtherGuidanceConfig
from guided_diffusion.unet import EncoderUNetModel, UNetModel

ConditionOf = Callable[[Sequence[int]], dict[str, Tensor]]
"""The condition of samples by their indices, rows first, on the CPU."""

SAMPLERS: dict[str, Callable[..., Iterator[State]]] = {
    "ddpm": samplers.ddpm,
    "ddim": samplers.ddim,
    "dpm++2m": solvers.dpm_solver_2m,
    "dpm++2m-sde": partial(solvers.dpm_solver_2m, stochastic=True),
    "unipc": solvers.unipc,
}
"""The names of samplers, for the flag --sampler."""


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run of any kind of model, for groups of flags to extend."""

    batch_size: int | None = option(
        16,
        "images at a time; auto: what is fastest and fits, found before the first shard and kept when resumed",
        words={"auto": None},
    )
    shard_size: int = option(
        0, "images per file of the run, the unit of resuming and of the ranks' work; 0: batch_size"
    )
    seed: int = option(0, "sample i depends on the seed and on i alone, not on batch size")
    out_dir: str = option("", "folder to write to; empty: $OPENAI_LOGDIR, else runs/ and a name made of the settings")
    overwrite: bool = option(False, "delete what an earlier run left in the folder")
    grace: float = option(0.0, "seconds that SIGTERM and Ctrl-C leave for finishing the shard in hand")
    log_json: bool = option(False, "progress as JSON lines on stderr, for schedulers")

    def __post_init__(self):
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: wanted 1 or more, got {self.batch_size}")
        if self.shard_size < 0 or not self.grace >= 0:
            raise ValueError(f"shard_size, grace: wanted 0 or more, got {self.shard_size}, {self.grace}")
        check_seed(self.seed)


@dataclass(frozen=True)
class SamplingConfig(RunConfig):
    """sampling"""

    model_path: str = option("", "weights of the network: .pt or .safetensors, local or what blobfile opens", path=True)
    num_samples: int = option(10000, "images to make")
    labels: str = option("random", "classes: random, none (where the network has a null label), or a list like 0,7,7")
    balanced_labels: bool = option(False, "equal numbers of every class: sample i has class i modulo num_classes")
    sampler: str = option(
        "",
        f"{', '.join(SAMPLERS)}; empty: ddpm, or ddim with use_ddim. dpm++2m and unipc (no noise) and dpm++2m-sde want "
        "10 to 25 steps with --timestep_respacing logsnr20 and the like",
        later=True,
    )
    use_ddim: bool = option(False, "--sampler ddim; goes with a respacing like ddim25")
    ddim_eta: float = option(0.0, "η of DDIM: 0 deterministic, 1 as random as DDPM")
    clip_denoised: bool = option(True, "clamp the predicted x̂_0 to [-1, 1] at every step")
    compile: bool = option(
        False, "compile the residual blocks: minutes at the start; meant for GPUs, no faster on a CPU", later=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 1:
            raise ValueError(f"num_samples: wanted 1 or more, got {self.num_samples}")
        if self.balanced_labels and self.labels != "random":
            raise ValueError("balanced_labels, labels: two ways to choose the classes; give one")
        if self.sampler and self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: wanted {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise ValueError(f"sampler, use_ddim: {self.sampler} is not ddim; give one of the two")
        if not 0 <= self.ddim_eta <= 1:
            raise ValueError(f"ddim_eta: wanted 0 to 1, got {self.ddim_eta}")
        if not self.model_path:
            raise ValueError("model_path: give the weights of the network, or --config configs/emoji.yaml to try")

    @property
    def sampler_name(self) -> str:
        """The chosen sampler, of `SAMPLERS`."""
        return self.sampler or ("ddim" if self.use_ddim else "ddpm")


def unfilled() -> torch.device:
    """A context in which networks are built without memory; `fill` gives it to them."""
    return torch.device("meta")


def fill(network: UNetModel, path: str, config: NetworkConfig, learn_sigma: bool, device: torch.device) -> None:
    """Fill a network (built on the meta device) from `path`; a ValueError names the flags that do not fit the file."""
    explain = partial(wrong_flags, network=config, image_size=network.image_size, learn_sigma=learn_sigma)
    load_into(network, path, device, explain)


def make_ready(network: UNetModel | EncoderUNetModel, use_fp16: bool, compiled: bool = False) -> None:
    """Make a filled network ready to be called: without gradients, in the dtype and memory layout it runs best in."""
    network.eval().requires_grad_(False)
    if use_fp16:
        network.convert_to_fp16()
    if next(network.parameters()).device.type == "cpu":
        # Not on a GPU, whose group norm copies everything back.
        network.to(memory_format=torch.channels_last)
    if compiled:
        network.compile_blocks()


def choose_labels(labels: str, seed: int, indices: Sequence[int], num_classes: int, null_label: bool) -> Tensor:
    """The class of every sample, [N] int64, for the flag --labels."""
    if labels == "random":
        return sample_labels(seed, indices, num_classes)
    if labels == "none":
        if not null_label:
            raise ValueError("labels: none needs a network with a null label (null_label)")
        return torch.full((len(indices),), num_classes)
    if not re.fullmatch(r"-?\d+(,-?\d+)*", labels):
        raise ValueError(f"labels: wanted random, none, or classes like 3 or 0,7,7, got {labels!r}")
    given = [int(part) for part in labels.split(",")]
    for label in given:
        if not 0 <= label < num_classes:
            raise ValueError(f"labels: wanted classes from 0 to {num_classes - 1}, got {label}")
    return torch.tensor([given[index % len(given)] for index in indices])


def class_condition(config: SamplingConfig, network: NetworkConfig, null_label: bool) -> ConditionOf:
    """The classes of samples, `{"y": [N]}`, as --labels asks; a ValueError where that flag is wrong.

    null_label: whether "none" is a possible class.
    """

    def condition_of(indices: Sequence[int]) -> dict[str, Tensor]:
        if config.balanced_labels:
            return {"y": torch.tensor(indices) % network.num_classes}
        return {"y": choose_labels(config.labels, config.seed, indices, network.num_classes, null_label)}

    condition_of([0])
    return condition_of


def base_condition(path: str, small_size: int, num_classes: int | None) -> ConditionOf:
    """low_res in [−1, 1], and y where the network has classes, of the images in an npz; a ValueError if wrong.

    Sample i is made of image i, round and round.
    """
    wanted: dict[str, tuple[np.dtype, tuple[int | None, ...]]] = {
        "arr_0": (np.dtype(np.uint8), (None, small_size, small_size, 3))
    }
    if num_classes is not None:
        wanted["arr_1"] = (np.dtype(np.int64), (None,))
    try:
        with open(path, "rb") as file:
            arrays = read_arrays(file, wanted)
    except FileNotFoundError:
        raise ValueError(f"base_samples: no such file {path!r}") from None
    except ValueError as error:
        raise ValueError(f"base_samples: {path}: {error}") from None
    images, labels = arrays["arr_0"], arrays.get("arr_1")
    if not len(images):
        raise ValueError(f"base_samples: {path}: holds no image")
    if labels is not None and not (len(labels) == len(images) and 0 <= labels.min() <= labels.max() < num_classes):
        raise ValueError(f"base_samples: {path}: arr_1: wanted one label from 0 to {num_classes - 1} for each image")

    def condition_of(indices: Sequence[int]) -> dict[str, Tensor]:
        rows = np.asarray(indices) % len(images)
        low_res = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return {"low_res": low_res} | ({} if labels is None else {"y": torch.from_numpy(labels[rows])})

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

    @property
    def name(self) -> str:
        return Path(self.config.model_path).stem

    @property
    def num_samples(self) -> int:
        return self.config.num_samples

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, 3

    @property
    def labelled(self) -> bool:
        return "y" in self.condition_of([0])

    @property
    def num_steps(self) -> int:
        return self.diffusion.num_timesteps

    def images(self, x: Tensor) -> Tensor:
        """Samples are images already."""
        return x

    def trajectory(self, indices: Sequence[int]) -> Iterator[tuple[State, GuidedDenoiser]]:
        """The states of samples `indices` as one batch, each with the denoiser that knows its step's guidance."""
        config, process = self.config, self.diffusion.process
        noise = SampleNoise(config.seed, indices, (3, self.side, self.side), self.device)
        condition = {name: rows.to(self.device) for name, rows in self.condition_of(indices).items()}
        denoiser = self.diffusion.denoiser(self.network, config.clip_denoised)
        guided = GuidedDenoiser(denoiser, process, self.guidances, Samples(config.seed, indices))
        denoiser = with_classifier(guided, self.cond_fn) if self.cond_fn else guided
        of_ddim = {"eta": config.ddim_eta} if config.sampler_name == "ddim" else {}
        sample = SAMPLERS[config.sampler_name]
        for state in sample(denoiser, process, noise.x_T(), condition, noise, **of_ddim):
            yield state, guided


def guidances_of(
    config: GuidanceConfig, others: OtherGuidanceConfig, network: UNetModel, about: NetworkConfig, labels: str
) -> list[Guidance]:
    """The guidances that flags ask for, self-attention guidance first.

    That one is checked also where its scale is 0, unless its flags are at their defaults. about: the network's
    configuration. labels: the flag, to refuse classifier-free guidance where no sample has a class.
    """
    if others.cfg_scale and labels == "none":
        raise ValueError("cfg_scale: with labels none there is no class to guide to; give --labels random or classes")
    null_label = about.num_classes if about.class_cond and about.null_label else None
    guidances = build_other_guidances(network, others, config, null_label)
    off = GuidanceConfig(
        guide_start=config.guide_start, guide_interval=config.guide_interval, guide_every=config.guide_every
    )
    return guidances if config == off else [build_guidance(network, config), *guidances]


def describe_guidance(
    config: GuidanceConfig, others: OtherGuidanceConfig, guidances: Sequence[Guidance], num_timesteps: int
) -> str:
    """For people: a line for each guidance, and how many steps it acts at."""
    acting = [guidance for guidance in guidances if guidance.scale]
    if not acting:
        return "self-attention guidance: off"
    steps = int(acting[0].interval.contains(torch.arange(num_timesteps), num_timesteps).sum())
    at = f"{steps} of {num_timesteps} steps" + (f", every {config.guide_every}" if config.guide_every > 1 else "")
    lines = []
    if config.scale:
        mask = f"ψ = {config.sag_threshold:g}, σ = {config.blur_sigma:g} at {config.block_name}"
        if config.sag_mask != "self-attention":
            share = "" if config.sag_mask == "global" else f" ({config.sag_mask_share:g})"
            mask = f"{config.sag_mask} mask{share}, σ = {config.blur_sigma:g}"
        lines.append(f"self-attention guidance: s = {config.scale:g}, {mask}, {at}, {config.fidelity}")
    if others.cfg_scale:
        lines.append(f"classifier-free guidance: s_c = {others.cfg_scale:g}, {at}")
    if others.pag_scale:
        lines.append(f"perturbed-attention guidance: s = {others.pag_scale:g} at {others.pag_blocks}, {at}")
    if others.seg_scale:
        blur = f"σ = {others.seg_sigma:g} at {others.seg_blocks}"
        lines.append(f"smoothed energy guidance: s = {others.seg_scale:g}, {blur}, {at}")
    return "\n".join(lines)


def resolved(*groups: Any) -> dict[str, Any]:
    """All settings of a run as one flat dict, local paths made absolute: what config.yaml holds."""
    settings = {}
    for group in groups:
        for field in fields(group):
            value = getattr(group, field.name)
            is_local = is_path(field, value) and not is_address(value)
            settings[field.name] = os.path.abspath(value) if is_local else value
    return settings
