"""From settings to what makes samples: the networks, guidances and conditions of the two sampling scripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import blobfile as bf
import torch
from torch import Tensor, nn

from ..diffusion.diffusion import Diffusion, build_diffusion, check_first_step
from ..guidance.building import describe_guidance, guidances_of
from ..guidance.classifier import ClassifierGradient
from ..guidance.methods.building import Guided, WeakNetwork
from ..networks.building import (
    Denoising,
    build_classifier,
    build_network,
    build_transformer,
    fill,
    fill_at_random,
    make_ready,
    sized,
    unfilled,
)
from ..networks.inspection import wrong_flags
from ..settings.guidance import ClassifierGuidanceConfig, GuidanceConfig, OtherGuidanceConfig
from ..settings.methods import METHODS, AutoguidanceConfig, Method, TransformConfig
from ..settings.model import ClassifierConfig, DiffusionConfig, NetworkConfig
from ..settings.options import configure, resolved
from ..settings.runs import NUM_SAMPLES, SamplingConfig
from ..settings.scripts import SCRIPTS
from ..settings.shipped import shipped
from ..settings.transformer import TransformerConfig
from ..stable_diffusion.autoencoder import Autoencoder, load_autoencoder
from ..storage.checkpoints import load_into
from ..storage.files import join
from ..storage.given_images import GivenImages
from .conditions import Classes, unconditional
from .pipeline import ImagePipeline, called
from .ranks import Job

IMAGE_GROUPS = SCRIPTS["image_sample"].groups
CLASSIFIER_GROUPS = SCRIPTS["classifier_sample"].groups


def load(*configs: str | Path, device: torch.device | str | None = None, **settings: Any) -> ImagePipeline:
    """A model that is ready to sample: `guided_diffusion.load("emoji").sample(16)`.

    configs: as --config, names of those that come with the package or YAML files, also folders of runs; a later one
    wins, a classifier's is one of its own. settings: flags of classifier_sample.py over them. device: by default the
    GPU, where there is one. Published weights are fetched on first use. A ValueError says what is wrong.
    """
    read = configure(CLASSIFIER_GROUPS, [_file(str(config)) for config in configs], ("load", settings))
    return image_run(Configs.of(read), Job().device if device is None else torch.device(device)).pipeline


def _file(config: str) -> str:
    """The configuration file of what `load` is given."""
    named = shipped(f"{config}.yaml")
    if named.is_file():
        return str(named)
    return join(config, "config.yaml") if bf.isdir(config) else config


@dataclass(frozen=True, kw_only=True)
class Configs:
    """The settings of image_sample.py by what they are of, or of classifier_sample.py, with the classifier's two.

    methods: those of the guidances of `settings/methods.py`; a group that is not there is off.
    """

    sampling: SamplingConfig
    sag: GuidanceConfig
    others: OtherGuidanceConfig
    methods: Sequence[Method | TransformConfig] = ()
    by_classifier: ClassifierGuidanceConfig | None = None
    network: NetworkConfig
    diffusion: DiffusionConfig
    transformer: TransformerConfig
    classifier: ClassifierConfig | None = None

    @classmethod
    def of(cls, configs: Sequence[Any]) -> "Configs":
        """Of configurations of IMAGE_GROUPS or CLASSIFIER_GROUPS, which are told by their types."""
        kinds = {name: kind for name, kind in get_type_hints(cls).items() if name != "methods"}
        found = {name: config for config in configs for name in kinds if isinstance(config, kinds[name])}
        return cls(**found, methods=[config for config in configs if isinstance(config, METHODS)])

    def resolved(self) -> dict[str, Any]:
        """All settings as one flat dict."""
        groups = {name: group for name, group in vars(self).items() if name != "methods"}
        return resolved(*filter(None, groups.values()), *self.methods)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What `run` takes: the pipeline, every setting, and for people how it is guided."""

    pipeline: ImagePipeline
    settings: dict[str, Any]
    guidance_line: str


def counted(sampling: SamplingConfig, images: GivenImages | None) -> SamplingConfig:
    """The settings with a number of samples: where none is given, that of the images that samples are made of."""
    return replace(sampling, num_samples=sampling.num_samples or (len(images) if images else NUM_SAMPLES))


def image_run(configs: Configs, device: torch.device, weights: bool = True) -> Prepared:
    """From settings to a run, with a classifier's gradient where they ask for it; a ValueError says which is wrong.

    weights: read them; if not, the networks are filled at random.
    """
    about, by_classifier, given = configs.network, configs.by_classifier, configs.sampling.init_image
    transformer = configs.transformer
    images = GivenImages(given, about.image_size, about.image_size, "init_image") if given else None
    configs = replace(configs, sampling=counted(configs.sampling, images))
    sampler = configs.sampling.sampler_name
    diffusion = build_diffusion(configs.diffusion, sampler)
    steps = diffusion.num_timesteps
    diffusion = diffusion.first(configs.sampling.steps_made(steps))
    check_first_step(diffusion)
    made, diffusion = diffusion.num_timesteps, diffusion.called_by(sampler)
    network = _unfilled(configs)
    weak = _weak_network(configs, diffusion, network, device, weights)
    guided = Guided(network, about, configs.sampling.labels, weak)
    guidances = guidances_of(configs.sag, configs.others, configs.methods, guided)
    line = describe_guidance(configs.sag, configs.others, configs.methods, guidances, diffusion.process)
    if images:
        line += f"\nfrom {len(images)} given images: the last {made} of {steps} steps"
    if diffusion.num_timesteps > made:
        line += f"\n{sampler}: {made} steps of two network calls each, the last one of one, all counted as steps here"
    condition_of, cond_fn = unconditional, None
    if by_classifier:
        missing = by_classifier.classifier_guidance is None and not by_classifier.classifier_path
        off = "off, no classifier_path is given" if missing else "off"
        line += f"\nclassifier guidance: {f'scale {by_classifier.classifier_scale:g}' if by_classifier.on else off}"
        if by_classifier.on and transformer.latent_factor:
            raise ValueError("classifier_path: a classifier of images does not see the latents of latent_factor")
        cond_fn = _classifier_gradient(configs, device, weights) if by_classifier.on else None
    if about.class_cond or cond_fn:
        has_null = about.class_cond and about.null_label and not cond_fn
        condition_of = Classes(about.num_classes, has_null)
    condition_of(configs.sampling, [0])  # what is wrong with labels is said before weights are read
    autoencoder = _autoencoder(transformer, device) if weights and transformer.latent_factor else None
    if weights:
        fill(network, configs.sampling.model_path, about, configs.diffusion.learn_sigma, device, transformer)
    else:
        fill_at_random(network, device)
    make_ready(network, about.use_fp16, configs.sampling.compile)
    pipeline = ImagePipeline(
        configs.sampling,
        about.image_size,
        network,
        diffusion,
        device,
        condition_of,
        guidances,
        cond_fn,
        conditional=about.class_cond,
        init_images=images,
        latent_shape=(network.in_channels, *[network.input_size] * 2) if transformer.latent_factor else None,
        autoencoder=autoencoder,
        others_kept_off=configs.others.on and configs.sag.guide_start < diffusion.num_timesteps,
    )
    return Prepared(pipeline, configs.resolved(), line)


def _weak_network(
    configs: Configs, diffusion: Diffusion, network: nn.Module, device: torch.device, weights: bool
) -> WeakNetwork | None:
    """The weak network of autoguidance, where that is on; without weights the network itself, which takes longer."""
    [path] = [
        method.weak_model_path for method in configs.methods if isinstance(method, AutoguidanceConfig) and method.scale
    ] or [""]
    if not path:
        return None
    about = configs.network
    if weights:
        try:
            about, kind = sized(path, about, configs.transformer)
            network = _unfilled(replace(configs, network=about, transformer=kind))
            fill(network, path, about, configs.diffusion.learn_sigma, device, kind)
        except ValueError as error:
            raise ValueError(f"weak_model_path: {error}") from None
        make_ready(network, about.use_fp16, configs.sampling.compile)
    denoiser = diffusion.denoiser(called(network, about.class_cond), configs.sampling.clip_denoised)
    return WeakNetwork(denoiser, network)


def _unfilled(configs: Configs) -> Denoising:
    """The network that the settings describe, without memory."""
    with unfilled():
        if configs.transformer.network:
            return build_transformer(configs.transformer, configs.network, configs.diffusion.learn_sigma)
        return build_network(configs.network, configs.diffusion.learn_sigma)


def _autoencoder(transformer: TransformerConfig, device: torch.device) -> Autoencoder:
    if not transformer.vae_path:
        raise ValueError(
            "vae_path: give a local folder with the autoencoder of the latents (docs/dit.md says how to get one)"
        )
    return load_autoencoder(transformer.vae_path, transformer.in_channels, transformer.latent_factor, device)


def _classifier_gradient(configs: Configs, device: torch.device, weights: bool) -> Callable[..., Tensor]:
    if configs.diffusion.noise_schedule == "linear_path":
        raise ValueError("classifier_scale, noise_schedule: no noisy-image classifier knows the noise of a linear_path")
    network, config = configs.network, configs.classifier
    with unfilled():
        classifier = build_classifier(network.image_size, config, network.num_classes)
    if weights:
        explain = partial(wrong_flags, network=config, image_size=network.image_size)
        load_into(classifier, configs.by_classifier.classifier_path, device, explain)
    else:
        fill_at_random(classifier, device)
    make_ready(classifier, config.classifier_use_fp16)
    return ClassifierGradient(classifier, configs.by_classifier.classifier_scale)
