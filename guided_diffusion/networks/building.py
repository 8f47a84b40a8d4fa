"""From settings to networks: built without memory, filled from a checkpoint, and made ready to be called."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ..settings.model import MOST_WIDTH, NUM_CLASSES, ClassifierConfig, NetworkConfig, SuperResolutionConfig
from ..settings.options import numbers
from ..settings.transformer import TransformerConfig, dit_sizes
from ..storage.checkpoints import load_into, load_state_dict
from .dit import DiT, named
from .inspection import CHANNEL_MULTS, inspect, wrong_flags
from .unet import EncoderUNetModel, SuperResModel, UNetModel

log = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)

Denoising = UNetModel | DiT
"""The networks that samples are made with."""


def _levels(image_size: int, channels: int, channel_mult: str, key: str = "channel_mult") -> list[float]:
    if not channel_mult and image_size not in CHANNEL_MULTS:
        known = ", ".join(map(str, CHANNEL_MULTS))
        raise ValueError(f"{key}: none is known for image_size {image_size} (only for {known}); give it")
    levels = numbers(key, channel_mult or CHANNEL_MULTS[image_size], float)
    if not all(1 <= mult * channels <= MOST_WIDTH for mult in levels):
        raise ValueError(f"{key}: wanted levels of 1 to {MOST_WIDTH} channels, in units of {channels}; got {levels}")
    if image_size % 2 ** (len(levels) - 1):
        raise ValueError(f"image_size: {image_size} cannot be halved {len(levels) - 1} times, as {key} asks")
    return levels


def _downsampling(image_size: int, attention_resolutions: str) -> list[int]:
    """Upstream's rule: the sides in the flag become factors by which the image is downsampled."""
    return [image_size // side for side in numbers("attention_resolutions", attention_resolutions, int) if side > 0]


def network_arguments(config: NetworkConfig, learn_sigma: bool) -> dict[str, Any]:
    """What `UNetModel` is made with."""
    levels = _levels(config.image_size, config.num_channels, config.channel_mult)
    return {
        "image_size": config.image_size,
        "in_channels": 3,
        "model_channels": config.num_channels,
        "out_channels": 6 if learn_sigma else 3,
        "num_res_blocks": config.num_res_blocks,
        "attention_resolutions": _downsampling(config.image_size, config.attention_resolutions),
        "dropout": config.dropout,
        "channel_mult": levels,
        "num_classes": config.num_classes + config.null_label if config.class_cond else None,
        "use_checkpoint": config.use_checkpoint,
        "num_heads": config.num_heads,
        "num_head_channels": config.num_head_channels,
        "num_heads_upsample": config.num_heads_upsample,
        "use_scale_shift_norm": config.use_scale_shift_norm,
        "resblock_updown": config.resblock_updown,
        "use_new_attention_order": config.use_new_attention_order,
    }


def _built(kind: Callable[..., Network], arguments: dict[str, Any]) -> Network:
    """A network; a ValueError where it would get memory (not in `unfilled`) and is larger than what there is."""
    if torch.get_default_device().type != "meta":
        with unfilled():
            needed = 4 * sum(parameter.numel() for parameter in kind(**arguments).parameters())
        if needed > (there := memory()):
            raise ValueError(
                f"the network that the flags describe has {needed // 4:,} parameters, {needed / 1e9:,.0f} GB; the "
                f"memory that this process may have is {there / 1e9:,.0f} GB"
            )
    return kind(**arguments)


def lost_attention(network: Denoising) -> str:
    """What is to be said of attention_resolutions that no map of a UNet has; empty where each has one."""
    if isinstance(network, DiT):
        return ""
    factors = [2**level for level in range(len(network.channel_mult))]
    lost = [factor for factor in network.attention_resolutions if factor not in factors]
    if not lost:
        return ""
    size = network.image_size
    there, wanted = (
        ", ".join(str(size // factor) if factor else f"more than {size}" for factor in some) for some in (factors, lost)
    )
    return f"attention_resolutions: image_size {size} has maps of {there} pixels a side, none of {wanted}"


def build_network(config: NetworkConfig, learn_sigma: bool) -> UNetModel:
    """The UNet of a configuration, with random weights; a warning where it lacks attention that was asked for."""
    network = _built(UNetModel, network_arguments(config, learn_sigma))
    if said := lost_attention(network):
        log.warning(said)
    return network


def build_transformer(kind: TransformerConfig, config: NetworkConfig, learn_sigma: bool) -> DiT:
    """The transformer of a configuration, with the weights that training begins with."""
    if not (config.class_cond and config.null_label):
        raise ValueError(f"class_cond, null_label: {kind.network} has classes and a label for none; both must be True")
    arguments = {
        "name": kind.network,
        "input_size": kind.input_size(config.image_size),
        "in_channels": kind.in_channels,
        "num_classes": config.num_classes,
        "learn_sigma": learn_sigma,
    }
    return _built(named, arguments)


def upsampling(config: NetworkConfig, large_size: int, small_size: int) -> NetworkConfig:
    """The configuration of a super-resolution network; small_size is checked alone, the network takes any."""
    if not 0 < small_size <= large_size:
        raise ValueError(f"small_size: wanted 1 to large_size ({large_size}), got {small_size}")
    # Upstream's 512² upsampler has the levels of its 256² one.
    return replace(config, image_size=large_size, channel_mult=CHANNEL_MULTS[256] if large_size == 512 else "")


def build_upsampler(sizes: SuperResolutionConfig, config: NetworkConfig, learn_sigma: bool) -> SuperResModel:
    """The super-resolution network of a configuration, with random weights."""
    config = upsampling(config, sizes.large_size, sizes.small_size)
    return _built(SuperResModel, network_arguments(config, learn_sigma))


def classifier_arguments(image_size: int, config: ClassifierConfig, num_classes: int = NUM_CLASSES) -> dict[str, Any]:
    """What `EncoderUNetModel` is made with."""
    return {
        "image_size": image_size,
        "in_channels": 3,
        "model_channels": config.classifier_width,
        "out_channels": num_classes,
        "num_res_blocks": config.classifier_depth,
        "attention_resolutions": _downsampling(image_size, config.classifier_attention_resolutions),
        "channel_mult": _levels(
            image_size, config.classifier_width, config.classifier_channel_mult, "classifier_channel_mult"
        ),
        "num_head_channels": 64,
        "use_scale_shift_norm": config.classifier_use_scale_shift_norm,
        "resblock_updown": config.classifier_resblock_updown,
        "pool": config.classifier_pool,
    }


def build_classifier(image_size: int, config: ClassifierConfig, num_classes: int = NUM_CLASSES) -> EncoderUNetModel:
    """The noisy-image classifier of a configuration, with random weights."""
    return _built(EncoderUNetModel, classifier_arguments(image_size, config, num_classes))


def memory() -> float:
    """Bytes of this machine, or of what this process may take of them; infinite where the system does not say."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ImportError, ValueError, OSError, AttributeError):
        return math.inf
    return there if limit == resource.RLIM_INFINITY else min(limit, there)


def unfilled() -> torch.device:
    """A context in which networks are built without memory; `fill` gives it to them."""
    return torch.device("meta")


def fill(
    network: Denoising,
    path: str,
    config: NetworkConfig,
    learn_sigma: bool,
    device: torch.device,
    kind: TransformerConfig | None = None,
) -> None:
    """Fill a network (built on the meta device) from `path`; a ValueError names the flags that do not fit the file."""
    size = network.image_size if isinstance(network, UNetModel) else config.image_size
    explain = partial(wrong_flags, network=config, image_size=size, learn_sigma=learn_sigma, transformer=kind)
    load_into(network, path, device, explain)


SIZES = (
    "num_channels",
    "num_res_blocks",
    "channel_mult",
    "attention_resolutions",
    "use_scale_shift_norm",
    "resblock_updown",
)
"""The flags in which networks of the same kind differ, and which a checkpoint's shapes tell."""


def sized(path: str, config: NetworkConfig, kind: TransformerConfig) -> tuple[NetworkConfig, TransformerConfig]:
    """The same configuration of a network in the sizes that the shapes of its file tell; a ValueError if they do not.

    What shapes do not tell is as it was.
    """
    try:
        told = inspect({name: tensor.shape for name, tensor in load_state_dict(path).items()}, config.image_size).flags
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    sizes = {name: told[name] for name in SIZES if name in told}
    if sizes.get("attention_resolutions") == "":  # which means a map of no side
        sizes["attention_resolutions"] = "0"
    if kind.network and "network" in told:
        kind = replace(kind, network=told["network"].replace("?", str(dit_sizes(kind.network).num_heads)))
    return replace(config, **sizes), kind


def make_ready(network: Denoising | EncoderUNetModel, use_fp16: bool, compiled: bool = False) -> None:
    """Make a filled network ready to be called: without gradients, in the dtype and memory layout it runs best in."""
    network.eval().requires_grad_(False)
    if use_fp16:
        network.convert_to_fp16()
    if next(network.parameters()).device.type == "cpu":
        # Not on a GPU, whose group norm copies everything back.
        network.to(memory_format=torch.channels_last)
    if compiled:
        network.compile_blocks()


def fill_at_random(network: nn.Module, device: torch.device) -> None:
    """Numbers of no meaning for a network built on the meta device: to measure its speed without its weights.

    On the meta device there are none to fill in: such a network says what a run would do, and cannot be called.
    """
    if device.type == "meta":
        return
    network.to_empty(device=device)
    for tensor in network.state_dict().values():
        tensor.normal_(std=0.02)
