"""From the settings of `settings/methods.py` to guidances, and to what their differences go through."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ...diffusion.denoiser import Denoiser
from ...networks.attention import Replaceable, attention_blocks, find_block
from ...networks.building import Denoising
from ...networks.dit import DiT
from ...networks.unet import ResBlock
from ...settings.methods import (
    AutoguidanceConfig,
    IndependentConditionConfig,
    Method,
    MomentumConfig,
    SkippedLayersConfig,
    TimeStepConfig,
    TokenPerturbationConfig,
    TransformConfig,
)
from ...settings.model import NetworkConfig
from ..base import Guidance, Transform
from ..classifier_free import ClassifierFreeGuidance
from ..masked_blur import MaskedBlur
from ..perturbed_attention import PerturbedAttentionGuidance
from ..schedule import Schedule, changed
from ..smoothed_energy import SmoothedEnergyGuidance
from .autoguidance import Autoguidance
from .independent_condition import IndependentConditionGuidance
from .momentum import MomentumGuidance
from .skipped_layers import SkippedLayersGuidance
from .time_step import TimeStepGuidance
from .token_perturbation import TokenPerturbationGuidance
from .transforms import FrequencyScale, ProjectedGuidance, optimised

NAMES: Mapping[str, type] = {
    "sag": MaskedBlur,
    "cfg": ClassifierFreeGuidance,
    "pag": PerturbedAttentionGuidance,
    "seg": SmoothedEnergyGuidance,
    "autoguidance": Autoguidance,
    "icg": IndependentConditionGuidance,
    "tsg": TimeStepGuidance,
    "tpg": TokenPerturbationGuidance,
    "skip": SkippedLayersGuidance,
    "momentum": MomentumGuidance,
}
"""What flags call the guidances."""


@dataclass(frozen=True)
class WeakNetwork:
    """A weaker network of the same kind: as a denoiser, and its module."""

    denoiser: Denoiser
    network: nn.Module


@dataclass(frozen=True)
class Guided:
    """What is guided: a network, its settings, the flag --labels, and a weak network of the kind, if there is one."""

    network: Denoising
    about: NetworkConfig
    labels: str
    weak: WeakNetwork | None = None


def layers_that_keep_shape(network: nn.Module) -> dict[str, nn.Module]:
    """The layers that may be left out, by module name: attention blocks, and residual blocks that keep the shape."""
    attention = {name: network.get_submodule(name) for name in attention_blocks(network)}
    residual = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, ResBlock)
        and layer.channels == layer.out_channels
        and isinstance(layer.resample, nn.Identity)
    }
    return attention | residual


def _layers_named(network: nn.Module, key: str, names: str) -> tuple[nn.Module, ...]:
    layers = layers_that_keep_shape(network)
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in layers:
            raise ValueError(f"{key}: no layer {name!r} that keeps its shape; there are: {', '.join(layers)}")
    return tuple(layers[name] for name in chosen)


def blocks_named(network: nn.Module, key: str, names: str) -> tuple[Replaceable, ...]:
    """The attention blocks of these names, like middle_block.1,output_blocks.2.1; a ValueError names the flag `key`."""
    try:
        return tuple(find_block(network, name.strip()) for name in names.split(","))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def build_method(config: Method, guided: Guided, when: Schedule) -> Guidance:
    """The guidance of a configuration. when: the schedule that it has where its own flag does not say otherwise."""
    network = guided.network
    scale, schedule = config.scale, changed(when, *config.schedule)
    match config:
        case AutoguidanceConfig():
            weak = guided.weak
            assert weak is not None, "its settings have no scale without weak_model_path"
            return Autoguidance(weak=weak.denoiser, network=weak.network, scale=scale, schedule=schedule)
        case IndependentConditionConfig():
            if not guided.about.class_cond:
                raise ValueError("icg_scale: needs a network with classes (class_cond)")
            if guided.labels == "none":
                raise ValueError("icg_scale: with labels none there is no class; give --labels random or classes")
            num_classes = guided.about.num_classes
            return IndependentConditionGuidance(num_classes=num_classes, scale=scale, schedule=schedule)
        case TimeStepConfig():
            embedder = network.t_embedder["mlp"] if isinstance(network, DiT) else network.time_embed
            noise, power = config.tsg_noise, config.tsg_power
            return TimeStepGuidance(embedder=embedder, noise=noise, power=power, scale=scale, schedule=schedule)
        case TokenPerturbationConfig():
            blocks_named(network, "tpg_blocks", config.tpg_blocks)  # says which name is none
            blocks = _layers_named(network, "tpg_blocks", config.tpg_blocks)
            return TokenPerturbationGuidance(blocks=blocks, scale=scale, schedule=schedule)
        case SkippedLayersConfig():
            layers = _layers_named(network, "skip_layers", config.skip_layers)
            return SkippedLayersGuidance(layers=layers, drawn=config.skip_drawn, scale=scale, schedule=schedule)
        case MomentumConfig():
            return MomentumGuidance(decay=config.momentum_decay, scale=scale, schedule=schedule)
    raise TypeError(f"{type(config).__name__}: settings of no guidance that is known here")


def _transforms(config: TransformConfig) -> list[Transform]:
    found: list[Transform] = []
    if config.cfg_zero:
        found.append(optimised)
    if config.projects:
        found.append(ProjectedGuidance(config.apg_eta, config.apg_cap, config.apg_momentum))
    if config.low_frequencies != 1:
        found.append(FrequencyScale(config.low_frequencies))
    return found


def with_transforms(guidances: Sequence[Guidance], config: TransformConfig) -> list[Guidance]:
    """The same guidances, of which those that the configuration names have their Δ transformed."""
    transforms = _transforms(config)
    names = [name.strip() for name in config.transformed.split(",")] if config.transformed else list(NAMES)
    for name in names:
        if name not in NAMES:
            raise ValueError(f"transformed: wanted names of {', '.join(NAMES)}, got {name!r}")
    chosen = tuple(NAMES[name] for name in names)
    if transforms and not any(isinstance(guidance, chosen) and guidance.scale for guidance in guidances):
        raise ValueError(f"{config.said}: there is no guidance whose Δ could go through it; give one a strength")
    return [
        replace(guidance, transforms=transforms) if transforms and isinstance(guidance, chosen) else guidance
        for guidance in guidances
    ]
