"""What makes samples what they are: the identity of a run, its folder, and what made them: device, dtype, versions."""

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..settings.guidance import GuidanceConfig, OtherGuidanceConfig
from ..settings.methods import METHODS
from ..settings.model import ClassifierConfig
from ..settings.options import later_defaults
from ..settings.runs import SamplingConfig
from ..settings.stable_diffusion import LatentGuidanceConfig, StableDiffusionConfig
from ..settings.transformer import TransformerConfig
from ..storage.fetch import local_path
from ..storage.files import join, sha256
from ..storage.hashes import known_sha256
from ..storage.images import list_image_files
from .pipeline import Pipeline
from .shards import settings_hash

OF_THE_RUN = {
    "out_dir", "num_samples", "num_images", "compare", "overwrite", "png", "grace", "patience", "log_json", "json",
}  # fmt: skip
"""Settings that do not change any sample."""


INPUT_FILES = (
    "model_path",
    "vae_path",
    "classifier_path",
    "weak_model_path",
    "base_samples",
    "init_image",
    "sag_mask",
    "model",
    "model_config",
    "prompts",
    "image",
    "image_mask",
)
"""Settings that name a file or a model's folder, or may: its contents count, not its name."""

PICTURES = ("base_samples", "init_image")
"""Those of them that may be a folder of pictures."""


IN_MODELS = (".json", ".txt", ".safetensors")
"""The files of a model's folder that count."""


LATER = later_defaults(
    SamplingConfig,
    GuidanceConfig,
    OtherGuidanceConfig,
    *METHODS,
    ClassifierConfig,
    TransformerConfig,
    StableDiffusionConfig,
    LatentGuidanceConfig,
)
"""Settings that do not count at their defaults, so that folders older than the flag stay what they are."""


def _contents_hash(key: str, path: str) -> str:
    """The hash of what the setting `key` names: a file, a model's folder, or a folder of pictures."""
    if not os.path.isdir(path):
        return known_sha256(local_path(path))
    if key in PICTURES:
        return settings_hash({"pictures": [sha256(file) for file in list_image_files(path)]})
    # A model's parts are one folder each, and an autoencoder is one part; what else lies in its folder is not read.
    files = sorted(file for file in Path(path).glob("*" if key == "vae_path" else "*/*") if file.suffix in IN_MODELS)
    return settings_hash({str(file.relative_to(path)): known_sha256(file) for file in files})


def identity(settings: dict[str, Any], samples_version: int = 1) -> dict[str, Any]:
    """What makes sample i what it is, and the cut into shards: settings, and the contents of the files they name.

    samples_version: of the code that makes them (`Pipeline.samples_version`); the first does not count.
    """
    kept = {
        key: value
        for key, value in settings.items()
        if key not in OF_THE_RUN and not (key in LATER and value == LATER[key])
    }
    files = [key for key in INPUT_FILES if kept.get(key) and (key != "sag_mask" or kept[key].endswith(".npz"))]
    version = {} if samples_version == 1 else {"samples_version": samples_version}
    hashes = {key: _contents_hash(key, kept[key]) for key in files}
    return kept | hashes | version


def output_folder(pipeline: Pipeline, made_of: dict[str, Any]) -> str:
    """Where a run writes: --out_dir, else $OPENAI_LOGDIR, else runs/MODEL-HASH."""
    name = f"{pipeline.name}-{settings_hash(made_of)[:8]}"
    return pipeline.config.out_dir or os.environ.get("OPENAI_LOGDIR") or join("runs", name)


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    return {
        "guided_diffusion": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    } | {name: sys.modules[name].__version__ for name in ("diffusers", "transformers") if sys.modules.get(name)}


def device_name(device: torch.device) -> str:
    """cpu, or the model of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def made_by(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What results are made by here: they are equal to others' only up to rounding where it is not the same."""
    by = {"device": device_name(device), "dtype": str(dtype).removeprefix("torch."), "versions": versions()}
    return by | ({"tf32": torch.backends.cudnn.allow_tf32} if device.type == "cuda" else {})


def distinct(makers: Iterable[tuple[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Each different `made_by` once, with `samples`, the number of samples that it made; makers: (samples, made_by)."""
    found: list[dict[str, Any]] = []
    for samples, maker in makers:
        known = next((one for one in found if {**one, "samples": 0} == {**maker, "samples": 0}), None)
        if known is None:
            found.append({**maker, "samples": samples})
        else:
            known["samples"] += samples
    return found


def what_differs(makers: list[dict[str, Any]]) -> str:
    """A sentence where samples of different makers (`distinct`) stand beside each other, else nothing."""
    flat = [{**maker, **of} if isinstance(of := maker.get("versions"), dict) else maker for maker in makers]
    keys = dict.fromkeys(key for maker in flat for key in maker if key not in ("versions", "samples"))
    parts = []
    for key in keys:
        counts: dict[str, int] = {}
        for maker in flat:
            value = str(maker.get(key, "not known"))
            counts[value] = counts.get(value, 0) + maker["samples"]
        if len(counts) > 1:
            parts.append(f"{key} {', '.join(f'{value} ({count})' for value, count in counts.items())}")
    if not parts:
        return ""
    return f"Not all samples were made alike, so they are those of one maker up to rounding only: {'; '.join(parts)}."
