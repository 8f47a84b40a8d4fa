"""Which settings each script takes: its groups of flags, and the fields of theirs that are no flags of it."""

from collections.abc import Container
from dataclasses import fields
from typing import NamedTuple

from .analysis import NoiseGainConfig, ReportConfig
from .guidance import ClassifierGuidanceConfig, GuidanceConfig, OtherGuidanceConfig
from .methods import METHODS
from .model import (
    OF_OTHER_SIZES,
    ClassifierConfig,
    DiffusionConfig,
    NetworkConfig,
    SuperResolutionConfig,
    TrainedNetworkConfig,
)
from .runs import LikelihoodConfig, SamplingConfig, UpsamplingConfig
from .stable_diffusion import LatentGuidanceConfig, StableDiffusionConfig
from .training import ClassifierTrainingConfig, TrainingConfig
from .transformer import TransformerConfig


class Script(NamedTuple):
    """The groups of flags of a script, and the fields of theirs that are no flags of it."""

    groups: tuple[type, ...]
    without: Container[str] = ()


MODEL = (NetworkConfig, DiffusionConfig)
SAMPLED = (*MODEL, TransformerConfig)
TRAINED = (TrainedNetworkConfig, DiffusionConfig)
GUIDANCE = (GuidanceConfig, OtherGuidanceConfig, *METHODS)
OF_OTHER_NETWORKS = {field.name for field in fields(NetworkConfig)} - {"image_size", "num_classes"}
"""Settings of networks that are none of a classifier's."""

SCRIPTS = {
    "image_sample": Script((SamplingConfig, *GUIDANCE, *SAMPLED)),
    "classifier_sample": Script((SamplingConfig, *GUIDANCE, ClassifierGuidanceConfig, *SAMPLED, ClassifierConfig)),
    "super_res_sample": Script(
        (SamplingConfig, UpsamplingConfig, *MODEL),
        (*OF_OTHER_SIZES, "labels", "balanced_labels", "init_image", "strength"),
    ),
    "stable_diffusion_sample": Script((StableDiffusionConfig, LatentGuidanceConfig)),
    "image_train": Script((TrainingConfig, *TRAINED)),
    "classifier_train": Script((ClassifierTrainingConfig, ClassifierConfig, *TRAINED), OF_OTHER_NETWORKS),
    "super_res_train": Script((TrainingConfig, SuperResolutionConfig, *TRAINED), OF_OTHER_SIZES),
    "image_nll": Script((LikelihoodConfig, *MODEL)),
    "noise_gain": Script((NoiseGainConfig, SamplingConfig, *GUIDANCE, *SAMPLED)),
    "attention_report": Script((ReportConfig, SamplingConfig, *GUIDANCE, *SAMPLED)),
}


def whose(key: str) -> str:
    """What a setting is of, and the scripts that take it; empty where there is none."""
    found: dict[str, list[str]] = {}
    for name, script in SCRIPTS.items():
        for group in script.groups if key not in script.without else ():
            if key in {field.name for field in fields(group)}:
                title = str(group.__doc__).partition(":")[0].partition(" (")[0]
                found.setdefault(title, []).append(f"{name}.py")
    return "; ".join(f"{title}: {', '.join(names)}" for title, names in found.items())
