"""From settings to what makes samples: the networks, guidances and conditions of the two sampling scripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.checkpoints import load_into
from guided_diffusion.config import option
from guided_diffusion.guidance.classifier import classifier_gradient
from guided_diffusion.inspection import wrong_flags
from guided_diffusion.sampling import (
    Sampler,
    SamplingConfig,
    class_condition,
    describe_guidance,
    fill,
    guidances_of,
    make_ready,
    resolved,
    unconditional,
    unfilled,
)
from guided_diffusion.script_util import build_classifier, build_diffusion, build_network
from guided_diffusion.settings import (
    ClassifierConfig,
    DiffusionConfig,
    GuidanceConfig,
    NetworkConfig,
    OtherGuidanceConfig,
)


@dataclass(frozen=True)
class ClassifierGuidanceConfig:
    """classifier guidance: scale · ∇ log p(y | x_t) moves every step"""

    classifier_path: str = option("", "weights of the classifier: .pt or .safetensors", path=True)
    classifier_scale: float = option(1.0, "strength of the classifier's gradient")
    classifier_guidance: bool | None = option(None, "on or off; default: on with a classifier_path and a scale not 0")

    @property
    def on(self) -> bool:
        if self.classifier_guidance is None:
            return bool(self.classifier_path) and self.classifier_scale != 0
        if self.classifier_guidance and not self.classifier_path:
            raise ValueError("classifier_path: classifier_guidance needs the weights of a classifier")
        return self.classifier_guidance


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


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `run` takes: the sampler, every setting, and for people how it is guided."""

    sampler: Sampler
    settings: dict[str, Any]
    guidance_line: str


def fill_at_random(network: nn.Module, device: torch.device) -> None:
    """Numbers of no meaning for a network built on the meta device: to measure its speed without its weights."""
    network.to_empty(device=device)
    for tensor in network.state_dict().values():
        tensor.normal_(std=0.02)


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
    sampler = Sampler(sampling, network_config.image_size, network, diffusion, device, condition_of, guidances)
    line = describe_guidance(guidance, others, guidances, diffusion.num_timesteps)
    return Prepared(sampler, resolved(*configs), line)


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
    sampler = Sampler(
        sampling, network_config.image_size, network_fn, diffusion, device, condition_of, guidances, cond_fn
    )
    line = describe_guidance(guidance, others, guidances, diffusion.num_timesteps)
    line += f"\nclassifier guidance: {f'scale {by_classifier.classifier_scale:g}' if cond_fn else 'off'}"
    return Prepared(sampler, resolved(*configs), line)
