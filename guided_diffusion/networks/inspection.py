"""What a checkpoint is, told from the names and shapes of its tensors; and which flag is wrong for it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..settings.model import ClassifierConfig, NetworkConfig
from ..settings.transformer import TransformerConfig, dit_name

CHANNEL_MULTS = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
    32: "1,2,2,2",
}


Shapes = Mapping[str, Sequence[int]]

LATENT_CHANNELS, LATENT_FACTOR = 4, 8
"""Of Stable Diffusion's autoencoder, which transformers of 4 channels are taken to see."""

NOT_IN_SHAPES = "num_heads, num_head_channels and use_new_attention_order cannot be told from shapes"


@dataclass(frozen=True)
class Attention:
    """One attention block: its module name, channels, and by how much its map is smaller than the image."""

    name: str
    channels: int
    downsampling: int


@dataclass(frozen=True)
class Checkpoint:
    """kind: `unet`, `super-resolution`, `classifier` or `transformer`; the flags that its shapes tell; its attention.

    channels: of its images; the commands make networks of 3, and transformers of latents of 4.
    """

    kind: str
    channels: int
    flags: dict[str, Any]
    attention: list[Attention]
    parameters: int
    image_size: int | None
    """The side of the images, where the widths are those of one size (or a pooling head tells)."""


@dataclass(frozen=True)
class _Level:
    width: int
    attention: bool


def _res_width(shapes: Shapes, block: str) -> int:
    """The channels that a residual block puts out, 0 where there is none."""
    shape = shapes.get(f"{block}.0.in_layers.2.weight")
    return shape[0] if shape else 0


def _levels(shapes: Shapes) -> tuple[list[_Level], int] | None:
    """The levels of the encoder and the number of residual blocks in each, or None if the shapes fit none.

    An encoder of L levels with n residual blocks each has 1 + L·n + (L − 1) blocks. Every division of that number is
    tried; the right one changes widths only where a level begins, and has attention in all blocks of a level or none.
    """
    total = 1 + max(int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name)))
    ups = [
        int(match[1])
        for name in sorted(shapes)
        if (match := re.match(r"output_blocks\.(\d+)\.(?:[12]\.conv|[12]\.in_layers\.2)\.weight", name))
    ]
    for blocks in range(1, total):
        if total % (blocks + 1) or (ups and min(ups) != blocks):
            continue
        levels = []
        for level in range(total // (blocks + 1)):
            first = 1 + level * (blocks + 1)
            places = [f"input_blocks.{i}" for i in range(first, first + blocks)]
            widths = {_res_width(shapes, place) for place in places}
            attention = {f"{place}.1.qkv.weight" in shapes for place in places}
            down = f"input_blocks.{first + blocks}"
            is_last = level == total // (blocks + 1) - 1
            is_down = f"{down}.0.op.weight" in shapes or _res_width(shapes, down) in widths
            if 0 in widths or len(widths) > 1 or len(attention) > 1 or not (is_last or is_down):
                break
            if not is_last and f"{down}.1.qkv.weight" in shapes:
                break
            levels.append(_Level(widths.pop(), attention.pop()))
        else:
            return levels, blocks
    return None


def _pool(shapes: Shapes) -> str:
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if "out.3.weight" in shapes:
        return "adaptive" if len(shapes["out.3.weight"]) == 4 else "spatial_v2"
    return "spatial"


def _downsampling(name: str, blocks: int, levels: int) -> int:
    """The factor by which the map at module `name` is smaller than the image."""
    kind, _, rest = name.partition(".")
    if kind == "middle_block":
        return 2 ** (levels - 1)
    index = int(rest.partition(".")[0])
    return 2 ** ((index - 1) // (blocks + 1)) if kind == "input_blocks" else 2 ** (levels - 1 - index // (blocks + 1))


def _image_size(shapes: Shapes, channel_mult: str, levels: int) -> int | None:
    if "out.2.positional_embedding" in shapes:
        side = round((shapes["out.2.positional_embedding"][1] - 1) ** 0.5)
        return side * 2 ** (levels - 1)
    return next((size for size, known in CHANNEL_MULTS.items() if known == channel_mult), None)


def _kind(inside: int, out: int) -> tuple[str, int, bool]:
    """What a denoiser of these channels is, the channels of its images, and whether it predicts Σ too (learn_sigma).

    An upsampler takes the small image beside x_t. One of 3 channels that predicts Σ and a denoiser of 6 that does not
    have one shape; the published ones are the first.
    """
    if out == 2 * inside:
        return "unet", inside, True
    if 2 * out == inside:
        return "super-resolution", out, False
    return ("super-resolution", 3, True) if inside == out == 6 else ("unet", inside, False)


def channels_said(checkpoint: Checkpoint) -> str:
    """What is to be said of a checkpoint whose images have other channels than the commands' networks, or nothing."""
    channels = checkpoint.channels
    if channels == 3 or (channels == LATENT_CHANNELS and checkpoint.kind == "transformer"):
        return ""
    return f"its images have {channels} channel{'s' * (channels > 1)}, the commands make networks of 3"


def inspect(shapes: Shapes, image_size: int | None = None) -> Checkpoint:
    """What the tensors of these names and shapes are; a ValueError if they are no network of this family.

    image_size: the side of the images if it is known; else it is guessed from the widths, of a transformer told.
    """
    if "x_embedder.proj.weight" in shapes and "pos_embed" in shapes:
        return _transformer(shapes)
    found = _levels(shapes) if "time_embed.0.weight" in shapes and "input_blocks.0.0.weight" in shapes else None
    if not found:
        raise ValueError(
            f"its tensors are those of no ADM, IDDPM or DiT network, the first is {next(iter(shapes), 'none')}"
        )
    levels, blocks = found
    channels, in_channels = shapes["time_embed.0.weight"][1], shapes["input_blocks.0.0.weight"][1]
    mult = ",".join(f"{level.width / channels:g}" for level in levels)
    is_classifier = "output_blocks.0.0.in_layers.2.weight" not in shapes
    kind, image_channels, learn_sigma = (
        ("classifier", in_channels, False) if is_classifier else _kind(in_channels, shapes["out.2.weight"][0])
    )
    image_size = image_size or _image_size(shapes, mult, len(levels))
    ds = [2**i for i, level in enumerate(levels) if level.attention]
    attention_resolutions = ",".join(str(image_size // factor) for factor in ds) if image_size else None
    out, hidden = "input_blocks.1.0.out_layers.0.weight", "input_blocks.1.0.emb_layers.1.weight"
    shared = {
        "use_scale_shift_norm": shapes[hidden][0] == 2 * shapes[out][0],
        "resblock_updown": not any(name.endswith((".op.weight", ".conv.weight")) for name in shapes),
    }
    if is_classifier:
        head = [name for name in shapes if name.startswith("out.") and name.endswith("weight")]
        classes = shapes.get("out.2.c_proj.weight") or shapes[max(head)]
        flags = {
            "classifier_width": channels,
            "classifier_depth": blocks,
            "classifier_channel_mult": mult,
            "classifier_attention_resolutions": attention_resolutions,
            **{f"classifier_{key}": value for key, value in shared.items()},
            "classifier_pool": _pool(shapes),
            "num_classes": classes[0],
        }
    else:
        labels = shapes.get("label_emb.weight")
        flags = {
            "num_channels": channels,
            "num_res_blocks": blocks,
            "channel_mult": mult,
            "attention_resolutions": attention_resolutions,
            "learn_sigma": learn_sigma,
            "class_cond": labels is not None,
            **({"num_classes": labels[0]} if labels else {}),
            **shared,
        }
    attention = [
        Attention(name, shape[1], _downsampling(name, blocks, len(levels)))
        for name, shape in (
            (key.removesuffix(".qkv.weight"), shapes[key]) for key in shapes if key.endswith(".qkv.weight")
        )
    ]
    parameters = sum(_product(shape) for shape in shapes.values())
    return Checkpoint(
        kind, image_channels, {k: v for k, v in flags.items() if v is not None}, attention, parameters, image_size
    )


def _transformer(shapes: Shapes) -> Checkpoint:
    """What a DiT is; a ValueError where tensors of it are missing."""
    needed = ("y_embedder.embedding_table.weight", "final_layer.linear.weight", "blocks.0.attn.qkv.weight")
    for name in needed:
        if name not in shapes:
            raise ValueError(f"a DiT without {name}")
    hidden_size, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    tokens = shapes["pos_embed"][1]
    blocks = [name.removesuffix(".attn.qkv.weight") for name in shapes if name.endswith(".attn.qkv.weight")]
    factor = LATENT_FACTOR if channels == LATENT_CHANNELS else 0
    image_size = round(tokens**0.5) * patch_size * (factor or 1)
    flags = {
        "network": dit_name(hidden_size, len(blocks), patch_size),
        "latent_factor": factor,
        "image_size": image_size,
        "learn_sigma": shapes["final_layer.linear.weight"][0] == 2 * channels * patch_size**2,
        "class_cond": True,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "null_label": True,
    }
    attention = [Attention(block, hidden_size, patch_size * (factor or 1)) for block in blocks]
    parameters = sum(_product(shape) for shape in shapes.values())
    return Checkpoint("transformer", channels, flags, attention, parameters, image_size)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def wrong_flags(
    shapes: Shapes,
    network: NetworkConfig | ClassifierConfig,
    image_size: int,
    learn_sigma: bool = False,
    transformer: TransformerConfig | None = None,
) -> str:
    """The flags that do not fit a checkpoint and what they should be; empty where the shapes tell none.

    network: the flags given for it; image_size: the side of its images (large_size of a super-resolution network).
    transformer: those of a transformer, where one is to be filled.
    """
    try:
        checkpoint = inspect(shapes, image_size)
    except ValueError as error:
        return str(error)
    wanted = "transformer" if transformer and transformer.network else "UNet"
    if isinstance(network, ClassifierConfig):
        wanted = "classifier"
    kinds = {"classifier": ("classifier",), "transformer": ("transformer",), "UNet": ("unet", "super-resolution")}
    if checkpoint.kind not in kinds[wanted]:
        return f"the file is a {checkpoint.kind}, wanted a {wanted}{_kind_hint(checkpoint)}"
    told = dict(checkpoint.flags)
    given: dict[str, Any] = {**vars(network), "learn_sigma": learn_sigma}
    if isinstance(network, ClassifierConfig):
        given["classifier_channel_mult"] = network.classifier_channel_mult or CHANNEL_MULTS.get(image_size, "")
    elif wanted == "transformer":
        given |= vars(transformer)
    else:
        given["channel_mult"] = network.channel_mult or CHANNEL_MULTS.get(image_size, "")
        if not network.class_cond:
            del given["num_classes"]
        if "num_classes" in told:
            told["num_classes"] -= network.null_label
    wrong = [
        f"{flag} is {given[flag]}, should be {right}{_size_hint(flag, str(right))}"
        for flag, right in told.items()
        if flag in given and not _same(given[flag], right)
    ]
    said = channels_said(checkpoint)
    return ", ".join(([said] if said else []) + wrong)


def _kind_hint(checkpoint: Checkpoint) -> str:
    """The flag that makes the network of a checkpoint of another kind than was wanted."""
    return f" (give --network {checkpoint.flags['network']})" if checkpoint.kind == "transformer" else ""


def _same(given: Any, told: Any) -> bool:
    """Whether two values of a flag mean the same: lists of numbers in any order and writing; ? stands for a number."""
    if isinstance(told, str) and re.fullmatch(r"[\d.,]+", told) and re.fullmatch(r"[\d., ]+", str(given)):
        numbers = [[float(part) for part in text.split(",") if part.strip()] for text in (str(given), told)]
        return numbers[0] == numbers[1] or (sorted(numbers[0]) == sorted(numbers[1]) and "." not in told)
    if isinstance(told, str) and "?" in told:
        return bool(re.fullmatch(re.escape(told).replace(r"\?", r"\d+"), str(given)))
    return given == told


def _size_hint(flag: str, told: str) -> str:
    size = next((size for size, known in CHANNEL_MULTS.items() if known == told), None)
    return f" (that of image_size {size})" if flag.endswith("channel_mult") and size else ""
