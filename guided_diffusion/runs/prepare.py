"""From settings to what makes samples: the networks, guidances and conditions of the two sampling scripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import blobfile as bf
import torch
from torch import Tensor

from ..diffusion.diffusion import build_diffusion
from ..guidance.building import describe_guidance, guidances_of
from ..guidance.classifier import ClassifierGradient
from ..networks.building import build_classifier, build_network, fill, fill_at_random, make_ready, unfilled
from ..networks.inspection import wrong_flags
from ..settings.guidance import ClassifierGuidanceConfig, GuidanceConfig, OtherGuidanceConfig
from ..settings.model import ClassifierConfig, DiffusionConfig, NetworkConfig
from ..settings.options import configure, resolved
from ..settings.sampling import SamplingConfig
from ..settings.shipped import shipped
from ..storage.checkpoints import load_into
from ..storage.files import join
from .conditions import Classes, unconditional
from .pipeline import ImagePipeline
from .ranks import Job

IMAGE_GROUPS = (SamplingConfig, GuidanceConfig, OtherGuidanceConfig, NetworkConfig, DiffusionConfig)
CLASSIFIER_GROUPS = (
    SamplingConfig,
    GuidanceConfig,
    OtherGuidanceConfig,
    ClassifierGuidanceConfig,
    NetworkConfig,
    DiffusionConfig,
    ClassifierConfig,
)


def load(*configs: str | Path, device: torch.device | str | None = None, **settings: Any) -> ImagePipeline:
    """A model that is ready to sample: `guided_diffusion.load("emoji").sample(16)`.

    configs: as --config, names of those that come with the package or YAML files, also folders of runs; a later one
    wins, a classifier's is one of its own. settings: flags of classifier_sample.py over them. device: by default the
    GPU, where there is one. Published weights are fetched on first use. A ValueError says what is wrong.
    """
    read = configure(CLASSIFIER_GROUPS, [_file(str(config)) for config in configs], ("load", settings))
    return classifier_run(read, Job().device if device is None else torch.device(device)).pipeline


def _file(config: str) -> str:
    """The configuration file of what `load` is given."""
    named = shipped(f"{config}.yaml")
    if named.is_file():
        return str(named)
    return join(config, "config.yaml") if bf.isdir(config) else config


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `run` takes: the pipeline, every setting, and for people how it is guided."""

    pipeline: ImagePipeline
    settings: dict[str, Any]
    guidance_line: str


def image_run(configs: Sequence[Any], device: torch.device, weights: bool = True) -> Prepared:
    """From configurations of IMAGE_GROUPS; a ValueError says which of them is wrong.

    weights: read them; if not, the network is filled at random.
    """
    sampling, guidance, others, network_config, diffusion_config = configs
    diffusion = build_diffusion(diffusion_config)
    with unfilled():
        network = build_network(network_config, diffusion_config.learn_sigma)
    guidances = guidances_of(guidance, others, network, network_config, sampling.labels)
    condition_of = unconditional
    if network_config.class_cond:
        condition_of = Classes(network_config.num_classes, network_config.null_label)
    condition_of(sampling, [0])  # what is wrong with labels is said before weights are read
    if weights:
        fill(network, sampling.model_path, network_config, diffusion_config.learn_sigma, device)
    else:
        fill_at_random(network, device)
    make_ready(network, network_config.use_fp16, sampling.compile)
    pipeline = ImagePipeline(sampling, network_config.image_size, network, diffusion, device, condition_of, guidances)
    line = describe_guidance(guidance, others, guidances, diffusion.num_timesteps)
    return Prepared(pipeline, resolved(*configs), line)


def _classifier_gradient(
    config: ClassifierConfig,
    guidance: ClassifierGuidanceConfig,
    network: NetworkConfig,
    device: torch.device,
    weights: bool,
) -> Callable[..., Tensor]:
    with unfilled():
        classifier = build_classifier(network.image_size, config, network.num_classes)
    if weights:
        explain = partial(wrong_flags, network=config, image_size=network.image_size)
        load_into(classifier, guidance.classifier_path, device, explain)
    else:
        fill_at_random(classifier, device)
    make_ready(classifier, config.classifier_use_fp16)
    return ClassifierGradient(classifier, guidance.classifier_scale)


def classifier_run(configs: Sequence[Any], device: torch.device, weights: bool = True) -> Prepared:
    """As `image_run`, from configurations of CLASSIFIER_GROUPS."""
    sampling, guidance, others, by_classifier, network_config, diffusion_config, classifier_config = configs
    diffusion = build_diffusion(diffusion_config)
    with unfilled():
        network = build_network(network_config, diffusion_config.learn_sigma)
    guidances = guidances_of(guidance, others, network, network_config, sampling.labels)
    condition_of, cond_fn = unconditional, None
    if by_classifier.on:
        cond_fn = _classifier_gradient(classifier_config, by_classifier, network_config, device, weights)
    if network_config.class_cond or cond_fn:
        has_null = network_config.class_cond and network_config.null_label and not cond_fn
        condition_of = Classes(network_config.num_classes, has_null)
    condition_of(sampling, [0])
    if weights:
        fill(network, sampling.model_path, network_config, diffusion_config.learn_sigma, device)
    else:
        fill_at_random(network, device)
    make_ready(network, network_config.use_fp16, sampling.compile)
    pipeline = ImagePipeline(
        sampling,
        network_config.image_size,
        network,
        diffusion,
        device,
        condition_of,
        guidances,
        cond_fn,
        conditional=network_config.class_cond,
    )
    line = describe_guidance(guidance, others, guidances, diffusion.num_timesteps)
    line += f"\nclassifier guidance: {f'scale {by_classifier.classifier_scale:g}' if cond_fn else 'off'}"
    return Prepared(pipeline, resolved(*configs), line)
