"""From settings to what makes samples: the networks, guidances and conditions of the two sampling scripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..diffusion.diffusion import build_diffusion
from ..guidance.building import describe_guidance, guidances_of
from ..guidance.classifier import classifier_gradient
from ..networks.building import build_classifier, build_network, fill, fill_at_random, make_ready, unfilled
from ..networks.inspection import wrong_flags
from ..settings.guidance import ClassifierGuidanceConfig, GuidanceConfig, OtherGuidanceConfig
from ..settings.model import ClassifierConfig, DiffusionConfig, NetworkConfig
from ..settings.options import resolved
from ..settings.sampling import SamplingConfig
from ..storage.checkpoints import load_into
from .conditions import class_condition, unconditional
from .pipeline import ImagePipeline

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


@dataclass(frozen=True, kw_only=True)
class Configs:
    """The settings of image_sample.py by what they are of, or of classifier_sample.py, with the classifier's two."""

    sampling: SamplingConfig
    sag: GuidanceConfig
    others: OtherGuidanceConfig
    by_classifier: ClassifierGuidanceConfig | None = None
    network: NetworkConfig
    diffusion: DiffusionConfig
    classifier: ClassifierConfig | None = None

    @classmethod
    def of(cls, configs: Sequence[Any]) -> "Configs":
        """Of configurations of IMAGE_GROUPS or CLASSIFIER_GROUPS, which are told by their types."""
        kinds = get_type_hints(cls)
        return cls(**{name: config for config in configs for name in kinds if isinstance(config, kinds[name])})

    def resolved(self) -> dict[str, Any]:
        """All settings as one flat dict."""
        return resolved(*filter(None, vars(self).values()))


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `run` takes: the pipeline, every setting, and for people how it is guided."""

    pipeline: ImagePipeline
    settings: dict[str, Any]
    guidance_line: str


def image_run(configs: Configs, device: torch.device, weights: bool = True) -> Prepared:
    """From settings to a run, with a classifier's gradient where they ask for it; a ValueError says which is wrong.

    weights: read them; if not, the networks are filled at random.
    """
    about, by_classifier = configs.network, configs.by_classifier
    diffusion = build_diffusion(configs.diffusion)
    with unfilled():
        network = build_network(about, configs.diffusion.learn_sigma)
    guidances = guidances_of(configs.sag, configs.others, network, about, configs.sampling.labels)
    line = describe_guidance(configs.sag, configs.others, guidances, diffusion.num_timesteps)
    condition_of, cond_fn = unconditional, None
    if by_classifier:
        line += f"\nclassifier guidance: {f'scale {by_classifier.classifier_scale:g}' if by_classifier.on else 'off'}"
        cond_fn = _classifier_gradient(configs, device, weights) if by_classifier.on else None
    if about.class_cond or cond_fn:
        has_null = about.class_cond and about.null_label and not cond_fn
        condition_of = class_condition(configs.sampling, about, has_null)
    if weights:
        fill(network, configs.sampling.model_path, about, configs.diffusion.learn_sigma, device)
    else:
        fill_at_random(network, device)
    make_ready(network, about.use_fp16, configs.sampling.compile)
    # The classifier needs labels also where the network takes none.
    network_fn = network if about.class_cond or not cond_fn else lambda x, t, y: network(x, t)
    pipeline = ImagePipeline(
        configs.sampling, about.image_size, network_fn, diffusion, device, condition_of, guidances, cond_fn
    )
    return Prepared(pipeline, configs.resolved(), line)


def _classifier_gradient(configs: Configs, device: torch.device, weights: bool) -> Callable[..., Tensor]:
    network, config = configs.network, configs.classifier
    with unfilled():
        classifier = build_classifier(network.image_size, config, network.num_classes)
    if weights:
        explain = partial(wrong_flags, network=config, image_size=network.image_size)
        load_into(classifier, configs.by_classifier.classifier_path, device, explain)
    else:
        fill_at_random(classifier, device)
    make_ready(classifier, config.classifier_use_fp16)
    return classifier_gradient(classifier, configs.by_classifier.classifier_scale)
