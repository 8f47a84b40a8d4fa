"""Settings as frozen dataclasses: one field = one key of a YAML file = one flag of a script."""

import argparse
import dataclasses
import difflib
import logging
import math
import os
import types
import typing
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import blobfile as bf
import yaml

NUM_CLASSES = 1000

log = logging.getLogger(__name__)


class BadInput(SystemExit):
    """What the user gave is wrong: one sentence, exit status 2."""

    def __init__(self, message: str):
        super().__init__(2)
        self.message = message


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise BadInput(f"{message} (--help lists the flags)")


def option(default: Any, help: str, path: bool | str = False, later: bool = False) -> Any:
    """A dataclass field with the help text of its flag.

    path: a file to read, in a YAML file relative to that file; a suffix: so are values that end with it. later: newer
    than results that it does not change at its default (`later_defaults`).
    """
    return dataclasses.field(default=default, metadata={"help": help, "path": path, "later": later})


def is_path(field: dataclasses.Field, value: Any) -> bool:
    """Whether the value of a setting names a file to read."""
    path = field.metadata["path"]
    return bool(value) and (path is True or (bool(path) and str(value).endswith(path)))


def later_defaults(*groups: type) -> dict[str, Any]:
    """The flags that came later: at these values, a result is the same as from before there was the flag."""
    return {
        field.name: field.default for group in groups for field in dataclasses.fields(group) if field.metadata["later"]
    }


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """network (as the checkpoint was trained)"""

    image_size: int = option(64, "side of the images in pixels")
    num_channels: int = option(128, "channels of the first level")
    num_res_blocks: int = option(2, "residual blocks per level")
    num_heads: int = option(4, "attention heads, where num_head_channels is -1")
    num_heads_upsample: int = option(-1, "attention heads of the upward path; -1: as num_heads")
    num_head_channels: int = option(-1, "channels per attention head; -1: use num_heads")
    attention_resolutions: str = option("16,8", "sides of the feature maps that get attention")
    channel_mult: str = option("", "widths of the levels in units of num_channels, like 1,2,2; empty: by image_size")
    dropout: float = option(0.0, "dropout of the residual blocks")
    class_cond: bool = option(False, "the network takes class labels")
    num_classes: int = option(NUM_CLASSES, "number of classes, where class_cond")
    null_label: bool = option(False, "the network has one more label, which stands for no class")
    use_checkpoint: bool = option(False, "recompute activations in training to save memory")
    use_scale_shift_norm: bool = option(True, "the timestep scales and shifts the normalised features")
    resblock_updown: bool = option(False, "residual blocks resample, not plain convolutions")
    use_fp16: bool = option(False, "half precision on a GPU")
    use_new_attention_order: bool = option(False, "q, k, v are stored one after the other (no shape shows it)")

    def __post_init__(self):
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted 1 or more, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """diffusion (as the checkpoint was trained, but for the respacing)"""

    learn_sigma: bool = option(False, "the network also predicts the variance Σ")
    diffusion_steps: int = option(1000, "steps T of the training process")
    noise_schedule: str = option("linear", "linear or cosine")
    timestep_respacing: str = option("", "steps to sample with: 250, 10,15,20 (by thirds), or ddim25; empty: all")
    use_kl: bool = option(False, "train the variational bound")
    predict_xstart: bool = option(False, "the network predicts x_0, not ε")
    rescale_timesteps: bool = option(False, "the network sees timesteps scaled to [0, 1000)")
    rescale_learned_sigmas: bool = option(False, "train the bound scaled by T/1000 beside the MSE")


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """noisy-image classifier (as its checkpoint was trained)"""

    classifier_use_fp16: bool = option(False, "half precision on a GPU")
    classifier_width: int = option(128, "channels of the first level")
    classifier_depth: int = option(2, "residual blocks per level")
    classifier_channel_mult: str = option(
        "", "widths of the levels in units of classifier_width, like 1,2,2; empty: by image_size", later=True
    )
    classifier_attention_resolutions: str = option("32,16,8", "sides of the feature maps that get attention")
    classifier_use_scale_shift_norm: bool = option(True, "the timestep scales and shifts the normalised features")
    classifier_resblock_updown: bool = option(True, "residual blocks resample, not plain convolutions")
    classifier_pool: str = option("attention", "head: adaptive, attention, spatial or spatial_v2")


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
    """self-attention guidance: ε̃ = ε(x_t) + s (ε(x_t) − ε(x̂_t)), x̂_t = x_t blurred where the network attends"""

    guide_scale: float = option(1.0, "1 + s: the strength as the authors' code counts it; 1 = off")
    sag_scale: float | None = option(None, "s: the strength as the paper counts it, instead of guide_scale; 0 = off")
    sag_block: str = option("", "block whose attention makes the mask, like output_blocks.8.1 (the paper's Out.8)")
    sag_mask: str = option(
        "self-attention",
        "what is blurred: self-attention, or for comparison global, high-frequency, random, square, or a FILE.npz with "
        "an array `maps` [M, h, w] for samples 0 … M − 1, round and round: float32 (the highest) or bool (as it is)",
        path=".npz",
        later=True,
    )
    sag_mask_share: float = option(
        0.4, "share of the image that the masks high-frequency, random, square and float32 maps cover", later=True
    )
    sel_attn_block: str = option("output", "the authors' way to name the block: input, middle or output")
    sel_attn_depth: int = option(8, "and its number, where sag_block is not given")
    sag_threshold: float = option(1.0, "ψ: blurred is what gets more attention than ψ times the mean")
    blur_sigma: float = option(3.0, "σ of the Gaussian blur in pixels; 0 = none, inf = the mean pixel")
    blur_kernel: int | None = option(None, "odd width of the blur's window in pixels; default ⌈3σ⌉ to each side")
    guide_start: int = option(
        250, "guide, in all ways but a classifier's, at the last so many of the respaced steps only; 0 = never"
    )
    guide_interval: str = option("0,1", "and while lo ≤ t/T < hi, as lo,hi; 1 is noise, 0 the image")
    guide_every: int = option(1, "compute each of these guidances every so many guided steps only, and use it again")
    fidelity: str = option("corrected", "corrected: as the paper; reference: as the authors' code computes")

    def __post_init__(self):
        if self.sag_scale is not None and self.guide_scale != 1:
            raise ValueError("sag_scale, guide_scale: two names of one strength (guide_scale = 1 + s); give one")
        for name in ("guide_scale", "sag_threshold"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: wanted a finite number, got {getattr(self, name)}")
        if self.sel_attn_block not in ("input", "middle", "output"):
            raise ValueError(f"sel_attn_block: wanted input, middle or output, got {self.sel_attn_block!r}")
        if self.fidelity not in ("corrected", "reference"):
            raise ValueError(f"fidelity: wanted corrected or reference, got {self.fidelity!r}")

    @property
    def scale(self) -> float:
        """The paper's s."""
        return self.guide_scale - 1 if self.sag_scale is None else self.sag_scale

    @property
    def block_name(self) -> str:
        """The chosen attention block as a module name."""
        if self.sag_block:
            return self.sag_block
        return (
            "middle_block.1"
            if self.sel_attn_block == "middle"
            else (f"{self.sel_attn_block}_blocks.{self.sel_attn_depth}.1")
        )


@dataclasses.dataclass(frozen=True)
class OtherGuidanceConfig:
    """other guidances: each adds scale · Δ to ε, alone or with self-attention guidance; 0 = off"""

    cfg_scale: float = option(
        0.0,
        "classifier-free guidance, Δ = ε(x, c) − ε(x, ∅): the paper's s_c (guidance_scale of other tools is 1 + s_c); "
        "needs classes and null_label; self-attention guidance then degrades ε(x, ∅) (the paper's Eq. 25)",
        later=True,
    )
    pag_scale: float = option(0.0, "perturbed-attention guidance: identity attention in pag_blocks", later=True)
    pag_blocks: str = option("middle_block.1", "attention blocks, like middle_block.1,output_blocks.2.1", later=True)
    seg_scale: float = option(0.0, "smoothed energy guidance: blurred queries in seg_blocks", later=True)
    seg_blocks: str = option("middle_block.1", "attention blocks, as pag_blocks", later=True)
    seg_sigma: float = option(math.inf, "σ of the queries' blur in tokens; inf = the mean query", later=True)

    def __post_init__(self):
        for name in ("cfg_scale", "pag_scale", "seg_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: wanted a finite number, got {getattr(self, name)}")


def parse_value(text: Any, kind: Any, key: str) -> Any:
    """The value of one setting from a flag's text or a YAML scalar, as the field's type `kind` wants it."""
    optional = isinstance(kind, types.UnionType)
    if optional:
        if text is None or text == "":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        word = str(text).lower()
        if word in words:
            return words[word]
        raise ValueError(f"{key}: wanted True or False, got {text!r}")
    if isinstance(text, (list, dict)) or text is None or (isinstance(text, bool) and kind is not str):
        raise ValueError(f"{key}: wanted {kind.__name__}, got {text!r}")
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}: wanted {kind.__name__}, got {text!r}") from None


def read_yaml(path: str) -> dict[str, Any]:
    """The keys and values of a configuration file; a ValueError says what is wrong with it."""
    try:
        with bf.BlobFile(path, "r") as file:
            values = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, bf.Error) as error:
        raise ValueError(f"--config {path}: cannot be read ({type(error).__name__})") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"--config {path}: not YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {path}: wanted lines of key: value")
    return {key: value for key, value in values.items() if key not in NOTES}


OTHER_NAMES = {
    "guide_scale": {"sag_scale"},
    "sag_scale": {"guide_scale"},
    "sel_attn_block": {"sag_block"},
    "sel_attn_depth": {"sag_block"},
}
"""Flags that say the same in another way: a later layer's one replaces an earlier layer's other."""

NOTES = {"paper", "published"}
"""Keys of a configuration file that are for people and tables, not flags."""


def _fields(groups: tuple[type, ...], without: Container[str] = ()) -> dict[str, tuple[dataclasses.Field, Any]]:
    found = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name not in without:
                found[field.name] = (field, hints[field.name])
    return found


def merge(groups: tuple[type, ...], *layers: tuple[str, Mapping[str, Any]], without: Container[str] = ()) -> list[Any]:
    """An instance of every dataclass in `groups` from layers (source, {key: value}), the later one winning.

    without: fields that are no keys here. A ValueError names the source and the key that is unknown, and the nearest
    right one.
    """
    fields = _fields(groups, without)
    values = {}
    for source, layer in layers:
        for key in layer:
            for other in OTHER_NAMES.get(key, set()) - set(layer):
                values.pop(other, None)
        for key, value in layer.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                raise ValueError(f"{source}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            values[key] = parse_value(value, fields[key][1], f"{source}: {key}")
    return [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in groups
    ]


def parse_args(
    description: str,
    groups: tuple[type, ...],
    argv: list[str] | None = None,
    default_config: str | None = None,
    without: Container[str] = (),
) -> list[Any]:
    """Command line to one instance of every dataclass in `groups`: defaults < `--config` files < flags.

    without: fields of the groups that are no flags here.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file of settings, one `flag: value` a line; a later file wins, and flags win over files"
        + (f" (default: {default_config})" if default_config else ""),
    )
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        hints = typing.get_type_hints(group)
        # A group's own flags come before those it shares with others.
        for field in sorted(dataclasses.fields(group), key=lambda field: field.name not in group.__annotations__):
            if field.name in without:
                continue
            is_bool = bool in (hints[field.name], *typing.get_args(hints[field.name]))
            shown = "" if field.default in ("", None) else f" (default: {field.default})"
            section.add_argument(
                f"--{field.name}",
                default=argparse.SUPPRESS,
                metavar="BOOL" if is_bool else field.name.rpartition("_")[2].upper(),
                help=field.metadata["help"].replace("%", "%%") + shown,
                **({"nargs": "?", "const": "True"} if is_bool else {}),
            )
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(name, _fields(groups, without), n=1)
        parser.error(f"unknown flag {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else ""))
    flags = vars(known)
    files = flags.pop("config", None) or ([default_config] if default_config else [])
    with exit_on_bad_input():
        layers = [(f"--config {file}", _from_folder(bf.dirname(file), read_yaml(file), groups)) for file in files]
        configs = merge(groups, *layers, ("command line", flags), without=without)
        _warn(set(flags).union(*(layer for _, layer in layers)), configs)
        return configs


def _warn(given: set[str], configs: list[Any]) -> None:
    for config in configs:
        if isinstance(config, DiffusionConfig) and config.diffusion_steps > 1000 and "rescale_timesteps" not in given:
            log.warning(
                "rescale_timesteps is False as in guided-diffusion; a model of improved-diffusion trained with that "
                "repository's default needs --rescale_timesteps True, or it samples noise"
            )


def _from_folder(folder: str, values: dict[str, Any], groups: tuple[type, ...]) -> dict[str, Any]:
    """The values of a configuration file with its relative paths taken from the file's folder."""
    fields = _fields(groups)
    return {
        key: bf.join(os.path.abspath(folder) if "://" not in folder else folder, value)
        if key in fields and is_path(fields[key][0], value) and "://" not in str(value)
        else value
        for key, value in values.items()
    }


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Turn a ValueError or OSError inside into `BadInput`: for what the user gave."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise BadInput(" ".join(str(error).split())) from None
