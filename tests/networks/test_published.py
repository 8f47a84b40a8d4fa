"""The configurations of all published checkpoints: the networks they build are those that were published."""

import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml

from guided_diffusion.diffusion.diffusion import build_diffusion
from guided_diffusion.networks.attention import find_block
from guided_diffusion.networks.building import build_classifier, build_network
from guided_diffusion.networks.inspection import inspect, wrong_flags
from guided_diffusion.networks.unet import SuperResModel, UNetModel
from guided_diffusion.script_util import sr_create_model_and_diffusion
from guided_diffusion.settings.guidance import GuidanceConfig
from guided_diffusion.settings.model import ClassifierConfig, DiffusionConfig, NetworkConfig
from guided_diffusion.settings.options import merge
from guided_diffusion.settings.shipped import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "published_tensors.json.gz").read_bytes()))
GROUPS = (NetworkConfig, DiffusionConfig, GuidanceConfig, ClassifierConfig)
# Keys that belong to a script, not to the network.
OF_SCRIPTS = {"model_path", "classifier_path", "classifier_scale", "large_size", "small_size"}


def build(name):
    """(network on the meta device, its settings as given)."""
    given = read_yaml(str(CONFIGS / f"{name}.yaml"))
    network, diffusion, _, classifier = merge(GROUPS, (name, {k: v for k, v in given.items() if k not in OF_SCRIPTS}))
    build_diffusion(diffusion)
    with torch.device("meta"):
        if "classifier_path" in given:
            return build_classifier(network.image_size, classifier), given
        if "large_size" in given:
            settings = {key: value for key, value in vars(network).items() if key not in ("image_size", "channel_mult")}
            sizes = given["large_size"], given["small_size"]
            return sr_create_model_and_diffusion(*sizes, **settings, learn_sigma=diffusion.learn_sigma)[0], given
        return build_network(network, diffusion.learn_sigma), given


def test_there_is_a_configuration_for_every_published_checkpoint():
    assert len(PUBLISHED) == 19
    emoji = {f"emoji{which}" for which in ("", "_autoguidance", "_classifier", "_fast", "_weak")}
    others = emoji | {"dit_xl_256", "dit_xl_512", "sit_xl_256"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PUBLISHED) | others


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_has_the_published_tensors(name):
    network, _ = build(name)
    assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == PUBLISHED[name]
    # An optimizer of upstream numbers its parameters in this order.
    assert list(dict(network.named_parameters())) == list(PUBLISHED[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_a_configuration_says(name):
    network, given = build(name)
    whole = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert "paper" in whole
    address = given.get("model_path") or given["classifier_path"]
    assert address.startswith("https://openaipublic.blob.core.windows.net/diffusion/")
    if name.startswith("iddpm"):
        assert {"rescale_timesteps", "rescale_learned_sigmas"} <= set(given)
    if "sag_scale" in given:
        find_block(network, given["sag_block"])
        assert {row.get("sag_scale") for row in whole["published"]} >= {given["sag_scale"]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_tell_the_flags(name):
    network, given = build(name)
    checkpoint = inspect(PUBLISHED[name], given.get("large_size"))
    assert checkpoint.image_size == given.get("image_size", given.get("large_size"))
    for flag, told in checkpoint.flags.items():
        if flag in given:
            assert str(given[flag]) == str(told)
    assert checkpoint.parameters == sum(parameter.numel() for parameter in network.parameters())
    with torch.device("meta"):
        blocks = {block.name: block.channels for block in checkpoint.attention}
    assert blocks == {
        module.removesuffix(".qkv"): part.in_channels
        for module, part in network.named_modules()
        if module.endswith(".qkv")
    }


RIGHT = {
    "image_size": 256, "num_channels": 256, "num_res_blocks": 2, "attention_resolutions": "32,16,8",
    "num_head_channels": 64, "resblock_updown": True, "class_cond": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"num_channels": 128}, "num_channels is 128, should be 256"),
        ({"num_res_blocks": 3}, "num_res_blocks is 3, should be 2"),
        ({"class_cond": False}, "class_cond is False, should be True"),
        ({"num_classes": 10}, "num_classes is 10, should be 1000"),
        ({"attention_resolutions": "16,8"}, "attention_resolutions is 16,8, should be 32,16,8"),
        ({"attention_resolutions": "8, 16, 32"}, ""),
        ({"learn_sigma": False}, "learn_sigma is False, should be True"),
        ({"channel_mult": "1,2,3,4"}, "channel_mult is 1,2,3,4, should be 1,1,2,2,4,4 (that of image_size 256)"),
        ({"resblock_updown": False}, "resblock_updown is False, should be True"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False, should be True"),
        ({"num_channels": 192, "class_cond": False}, "num_channels is 192, should be 256, class_cond is False"),
    ],
)
def test_the_wrong_flag_is_named(change, said):
    flags = RIGHT | {"learn_sigma": True} | change
    learn_sigma = flags.pop("learn_sigma")
    told = wrong_flags(PUBLISHED["adm_imagenet256_cond"], NetworkConfig(**flags), 256, learn_sigma)
    assert told.startswith(said)
    assert bool(told) == bool(said)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [UNetModel, SuperResModel])
def test_channels_and_learned_variances_are_told_apart(kind, channels, learn_sigma):
    with torch.device("meta"):
        network = kind(32, channels, 32, channels * (1 + learn_sigma), 1, [2], channel_mult=(1, 1), num_heads=2)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    given = NetworkConfig(
        image_size=32, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="16", num_heads=2,
        use_scale_shift_norm=False,
    )  # fmt: skip
    told = wrong_flags(shapes, given, 32, learn_sigma)
    if kind is SuperResModel and channels != 3 and learn_sigma:
        # A denoiser of twice the channels has the same shapes.
        assert inspect(shapes).kind == "unet"
        return
    assert inspect(shapes).kind == ("unet" if kind is UNetModel else "super-resolution")
    assert inspect(shapes).flags["learn_sigma"] == learn_sigma
    plural = "" if channels == 1 else "s"
    said = f"its images have {channels} channel{plural}, the commands make networks of 3"
    assert told == ("" if channels == 3 else said)
    assert f"learn_sigma is {not learn_sigma}, should be {learn_sigma}" in wrong_flags(
        shapes, given, 32, not learn_sigma
    )


def test_a_network_of_another_kind_is_named():
    network = NetworkConfig(**RIGHT)
    assert "is a classifier" in wrong_flags(PUBLISHED["adm_classifier256"], network, 256, True)
    assert "is a unet" in wrong_flags(PUBLISHED["adm_imagenet256_cond"], ClassifierConfig(), 256)
    assert "no ADM, IDDPM or DiT network" in wrong_flags({"conv1.weight": [64, 3, 7, 7]}, network, 256, True)


def test_a_wrong_classifier_flag_is_named():
    told = wrong_flags(PUBLISHED["adm_classifier64"], ClassifierConfig(), 64)
    assert told == "classifier_depth is 2, should be 4"


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_the_pool_of_a_classifier_is_told(pool):
    config = ClassifierConfig(classifier_pool=pool, classifier_width=64, classifier_depth=1)
    with torch.device("meta"):
        network = build_classifier(64, config, 7)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert wrong_flags(shapes, config, 64) == ""
    assert inspect(shapes, 64).flags["num_classes"] == 7
    assert network(torch.empty(2, 3, 64, 64, device="meta"), torch.empty(2, device="meta")).shape == (2, 7)
