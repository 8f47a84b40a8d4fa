"""The diffusion transformer: DiT's numbers, tensors and cost, diffusers' class, and what a checkpoint of one is."""

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import dits
import golden
from guided_diffusion import dit as door
from guided_diffusion.networks import dit as room
from guided_diffusion.networks.attention import attention_blocks, attention_map, record_attention, replace_attention
from guided_diffusion.networks.building import build_transformer
from guided_diffusion.networks.dit import DiT, named
from guided_diffusion.networks.inspection import inspect, wrong_flags
from guided_diffusion.settings.model import NetworkConfig
from guided_diffusion.settings.shipped import read_yaml, shipped
from guided_diffusion.settings.transformer import DIT_NAMES, TransformerConfig, dit_sizes
from guided_diffusion.storage.checkpoints import load_into
from running import refused, run

PUBLISHED = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "dit_tensors.json.gz").read_bytes()))
OF_NETWORK = ("image_size", "class_cond", "num_classes", "null_label")
OF_TRANSFORMER = ("network", "latent_factor")


def published(name):
    """(network on the meta device, its settings) of a configuration."""
    given = read_yaml(str(shipped(f"{name}.yaml")))
    network = NetworkConfig(**{key: given[key] for key in OF_NETWORK})
    transformer = TransformerConfig(**{key: given[key] for key in OF_TRANSFORMER})
    with torch.device("meta"):
        return build_transformer(transformer, network, given["learn_sigma"]), (network, transformer, given)


def small():
    """A random network, its input, timesteps and labels."""
    network = dits.filled(DiT(8, 2, 4, 32, 3, 2, num_classes=5))
    return network, (golden.normal(1, 2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5]))


@pytest.mark.parametrize("name", dits.CASES)
def test_output_is_that_of_dit(name):
    case, reference = golden.load("dit", name)
    network = dits.golden_dit(case)
    tensors = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert list(tensors.items()) == list(case["tensors"].items())
    batch, size = case["batch"], case["input_size"]
    x = 0.5 * golden.normal(case["seed"], batch, 4, size, size)
    output = network(x, torch.full((batch,), 403), reference["y"])
    golden.assert_close(output, reference["output_at_403"], 2e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_network_has_the_published_tensors(name):
    network, (config, transformer, given) = published(name)
    tensors = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert len(tensors) == 292
    assert list(tensors.items()) == list(PUBLISHED[name]["tensors"].items())
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == PUBLISHED[name]["parameters"]
    # An optimizer of DiT's numbers its parameters in this order.
    assert list(dict(network.named_parameters())) == list(tensors)
    assert attention_blocks(network).keys() == {f"blocks.{number}" for number in range(28)}
    checkpoint = inspect(PUBLISHED[name]["tensors"])
    assert checkpoint.kind == "transformer"
    assert checkpoint.parameters == PUBLISHED[name]["parameters"]
    assert checkpoint.flags.keys() == {*OF_NETWORK, *OF_TRANSFORMER, "learn_sigma"}
    assert checkpoint.flags == {key: given[key] for key in checkpoint.flags}
    assert [block.name for block in checkpoint.attention] == list(attention_blocks(network))
    assert wrong_flags(PUBLISHED[name]["tensors"], config, 0, True, transformer) == ""


def test_what_the_configurations_say():
    for name in PUBLISHED:
        whole = yaml.safe_load(shipped(f"{name}.yaml").read_text())
        assert whole["model_path"].startswith("https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-")
        assert not whole["clip_denoised"]
        assert {key: whole[key] for key in ("cfg_scale", "cfg_channels")}.items() <= whole["published"][0].items()


@pytest.mark.parametrize(("name", "multiply_adds"), [("dit_xl_256", 118.6e9), ("dit_xl_512", 525e9)])
def test_multiply_adds_are_the_published_ones(name, multiply_adds):
    """DiT calls them Gflops."""
    network, _ = published(name)
    size = network.input_size
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        network(torch.empty(1, 4, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=2e-3)


def test_every_name_is_a_network_that_training_can_begin_with():
    assert len(DIT_NAMES) == 12
    with torch.device("meta"):
        for name in DIT_NAMES:
            network = named(name)
            assert len(network.blocks) == dit_sizes(name).depth
            assert network.pos_embed.shape[1] == (32 // int(name[-1])) ** 2
    torch.manual_seed(0)
    network = named("DiT-32x2x2/4", input_size=8)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1000])
    output = network(x, t, y)
    assert output.shape == (2, 8, 8, 8)
    assert not output.any()  # every block begins as the identity, the last layer with zeros
    output.sum().backward()
    assert network.final_layer.linear.weight.grad.any()
    assert network.pos_embed.grad is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DiT-XL/3", "network: wanted DiT-S/2, DiT-S/4, "),
        ("dit", "network: wanted DiT-S/2, "),
        ("DiT-30x2x2/2", "wanted a width that is a multiple of 4 and of its 2 heads, got 30"),
        ("DiT-32x2x3/2", "of its 3 heads, got 32"),
        ("DiT-32x0x2/2", "depth: wanted 1 to 1024, got 0"),
        ("DiT-999999999x2x2/2", "width: wanted 1 to 16384, got 999999999"),
    ],
)
def test_a_name_that_says_no_sizes_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        TransformerConfig(network=name)


def test_it_is_diffusers_class_but_for_two_numbers():
    """diffusers' has timestep frequencies 10000^(−i/127), not /128, and one epsilon of 1e-5."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `stable-diffusion` is not installed")
    ours, inputs = small()
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    ).eval()  # fmt: skip
    state = ours.state_dict()
    renamed = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    renamed["proj_out_2"] = "final_layer.linear"
    parts = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj"}
    parts |= {"ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
    filled = {}
    for number in range(3):
        block = f"transformer_blocks.{number}"
        renamed |= {f"{block}.{new}": f"blocks.{number}.{old}" for new, old in parts.items()}
        for layer, place in (("linear_1", 0), ("linear_2", 2)):
            renamed[f"{block}.norm1.emb.timestep_embedder.{layer}"] = f"t_embedder.mlp.{place}"
        filled[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
        for kind in ("weight", "bias"):
            rows = state[f"blocks.{number}.attn.qkv.{kind}"].chunk(3)
            filled |= {f"{block}.attn1.to_{part}.{kind}": row for part, row in zip("qkv", rows, strict=True)}
    filled |= {f"{new}.{kind}": state[f"{old}.{kind}"] for new, old in renamed.items() for kind in ("weight", "bias")}
    theirs.load_state_dict(filled)

    def output():
        x, t, y = inputs
        with torch.no_grad():
            return theirs(x, t, y, return_dict=False)[0]

    wanted = ours(*inputs)
    assert golden.difference(output(), wanted) > 0.01
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    assert golden.difference(output(), wanted) <= 1e-6


def test_map_times_values_is_the_output_of_every_block():
    network, inputs = small()
    plain = network(*inputs)

    def by_hand(q, k, v):
        return attention_map(q, k) @ v

    for block in attention_blocks(network).values():
        with replace_attention(block, fn=by_hand):
            torch.testing.assert_close(network(*inputs), plain, atol=1e-5, rtol=1e-5)
        with replace_attention(block, fn=lambda q, k, v: v):
            assert not torch.allclose(network(*inputs), plain, atol=1e-3)
    assert torch.equal(network(*inputs), plain)


def test_what_is_recorded_are_squares_of_tokens_with_mean_one():
    network, inputs = small()
    blocks = attention_blocks(network)
    with record_attention(*blocks.values()) as scores:
        recorded = network(*inputs)
    assert torch.equal(recorded, network(*inputs))
    for block in blocks.values():
        assert scores[block].shape == (2, 4, 4)
        torch.testing.assert_close(scores[block].mean(dim=(1, 2)), torch.ones(2))
        assert scores[block].std() > 0


def test_half_precision_is_that_of_the_blocks_alone():
    network, inputs = small()
    plain = network(*inputs)
    assert network.dtype is torch.float32
    network.convert_to(torch.bfloat16)
    assert network.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in network.blocks.parameters()} == {torch.bfloat16}
    assert network.x_embedder.proj.weight.dtype is network.final_layer.linear.weight.dtype is torch.float32
    output = network(*inputs)
    assert output.dtype is torch.float32
    assert 0 < golden.difference(output, plain) < 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, t, y: (x[:, :3], t, y), "x: wanted 4×8×8, got 3×8×8"),
        (lambda x, t, y: (x[..., :6], t, y), "x: wanted 4×8×8, got 4×8×6"),
        (lambda x, t, y: (x.half(), t, y), "x: wanted float32, got float16"),
        (lambda x, t, y: (x, t), "y: wanted classes, int64 from 0 to 5, one for 2 rows or for each; got NoneType"),
        (lambda x, t, y: (x, t, y + 1), "got 1 to 6"),
    ],
)
def test_wrong_input_is_one_sentence(change, said):
    network, inputs = small()
    with pytest.raises(ValueError, match=said):
        network(*change(*inputs))


def test_the_door_is_the_room():
    assert door is room


@pytest.mark.parametrize("wrapped", [lambda state: state, lambda state: {"ema": state, "model": {
    name: tensor + 1 for name, tensor in state.items()}, "opt": {"state": {}, "param_groups": []},
    "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)}], ids=["published", "of a training"])  # fmt: skip
def test_published_and_training_files_load(tmp_path, wrapped):
    network, inputs = small()
    torch.save(wrapped(network.state_dict()), tmp_path / "file.pt")
    with torch.device("meta"):
        loaded = DiT(8, 2, 4, 32, 3, 2, num_classes=5)
    load_into(loaded, str(tmp_path / "file.pt"))
    assert torch.equal(loaded(*inputs), network(*inputs))


RIGHT = {"image_size": 64, "class_cond": True, "num_classes": 5, "null_label": True}


@pytest.mark.parametrize(
    ("network", "transformer", "said"),
    [
        ({}, {}, ""),
        ({}, {"network": "DiT-32x3x4/2"}, ""),  # heads cannot be told
        ({"num_classes": 7}, {}, "num_classes is 7, should be 5"),
        ({}, {"network": "DiT-S/2"}, "network is DiT-S/2, should be DiT-32x3x?/2"),
        ({"image_size": 128}, {}, "image_size is 128, should be 64"),
        ({"image_size": 8}, {"latent_factor": 0}, "latent_factor is 0, should be 8, image_size is 8, should be 64"),
        ({}, {"network": "", "latent_factor": 0}, "is a transformer, wanted a UNet (give --network DiT-32x3x?/2)")
    ],
)  # fmt: skip
def test_the_wrong_flag_is_named(network, transformer, said):
    shapes = {name: tensor.shape for name, tensor in small()[0].state_dict().items()}
    kind = TransformerConfig(**{"network": "DiT-32x3x2/2", "latent_factor": 8} | transformer)
    found = wrong_flags(shapes, NetworkConfig(**RIGHT | network), 64, True, kind)
    assert found.removeprefix("the file ") == said


def test_a_part_of_one_is_none():
    shapes = {name: tensor.shape for name, tensor in small()[0].state_dict().items()}
    del shapes["y_embedder.embedding_table.weight"]
    assert wrong_flags(shapes, NetworkConfig(**RIGHT), 64) == "a DiT without y_embedder.embedding_table.weight"


def test_inspect_checkpoint_tells_what_it_is(tmp_path, capsys):
    torch.save(small()[0].state_dict(), tmp_path / "dit.pt")
    run("inspect_checkpoint", tmp_path / "dit.pt")
    said = capsys.readouterr().out
    assert said.startswith("transformer, ")
    assert "--image_size 64 --network DiT-32x3x?/2 --latent_factor 8 --learn_sigma True --class_cond True" in said
    assert "the number of heads cannot be told from shapes (the ? of --network)" in said
    assert f"  {'blocks.2':<20} {'4²':>6}  {32:>5} channels\n" in said
    assert "heads for" not in said
    assert "guess" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"class_cond": "False"}, "class_cond, null_label: DiT-32x3x2/2 has classes and a label for none"),
        ({"image_size": 24}, "image_size: wanted a multiple of 16 for DiT-32x3x2/2 in latents of 1/8 the side, got 24"),
        ({"network": ""}, "latent_factor: the UNet sees images; give --network a transformer"),
        ({"fidelity": "reference", "sag_scale": 1}, "fidelity: reference is the authors' code, which knows UNets only"),
        ({"sag_scale": 1}, "sag_block: no attention block 'output_blocks.8.1' in this network; it has: blocks.0, "),
        ({"cfg_scale": 1, "cfg_channels": 5}, "cfg_channels: wanted 1 to 4, the network's channels, got 5"),
        ({"sag_scale": 1, "sag_block": "blocks.1", "sag_channels": 0}, "sag_channels: wanted 1 to 4"),
        ({}, "vae_path: give a local folder with the autoencoder of the latents (docs/dit.md says how to get one)"),
        ({"vae_path": "nowhere"}, "vae_path: no such folder 'nowhere'"),
    ],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(capsys, flags, said):
    base = RIGHT | {"network": "DiT-32x3x2/2", "latent_factor": 8, "model_path": "none.pt", "learn_sigma": "True"}
    assert said in refused(capsys, "image_sample", **base | flags)
