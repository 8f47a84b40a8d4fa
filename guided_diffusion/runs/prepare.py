"""From settings to what makes samples: the networks, guidances and conditions of the two sampling scripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..diffusion.diffusion import build_diffusion
from ..guidance.building import describe_guidance, guidances_of
from ..guidance.classifier import classifier_gradient
from ..networks.building import build_classifier, build_network, fill, fill_at_random, make_ready, unfilled
from ..networks.inspection import wrong_flags
from ..settings.guidance import ClassifierGuidanceConfig
from ..settings.model import ClassifierConfig, NetworkConfig
from ..settings.options import resolved
from ..settings.scripts import SCRIPTS
from ..storage.checkpoints import load_into
from .conditions import class_condition, unconditional
from .pipeline import ImagePipeline

IMAGE_GROUPS = SCRIPTS["image_sample"].groups
CLASSIFIER_GROUPS = SCRIPTS["classifier_sample"].groups


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
        condition_of = class_condition(sampling, network_config, network_config.null_label)
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
    return classifier_gradient(classifier, guidance.classifier_scale)


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
        condition_of = class_condition(sampling, network_config, has_null)
    if weights:
        fill(network, sampling.model_path, network_config, diffusion_config.learn_sigma, device)
    else:
        fill_at_random(network, device)
    make_ready(network, network_config.use_fp16, sampling.compile)
    # The classifier needs labels also where the network takes none.
    network_fn = network if network_config.class_cond else lambda x, t, y=None: network(x, t)
    pipeline = ImagePipeline(
        sampling, network_config.image_size, network_fn, diffusion, device, condition_of, guidances, cond_fn
    )
    line = describe_guidance(guidance, others, guidances, diffusion.num_timesteps)
    line += f"\nclassifier guidance: {f'scale {by_classifier.classifier_scale:g}' if cond_fn else 'off'}"
    return Prepared(pipeline, resolved(*configs), line)
