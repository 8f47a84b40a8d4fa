"""The flags of the guidances of `settings/methods.py`, from the command line to samples."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dits
from guided_diffusion.networks.dit import DiT
from guided_diffusion.runs.identity import LATER
from guided_diffusion.runs.prepare import IMAGE_GROUPS, Configs, image_run
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.methods import METHODS
from guided_diffusion.settings.options import merge
from running import refused, run
from small import SMALL, randomised

CLASSES = {"class_cond": True, "num_classes": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(randomised(create_model_and_diffusion(**SMALL, **CLASSES)[0]).state_dict(), folder / "network.pt")
    for name, smaller in [("weak", SMALL | {"channel_mult": "1,1"} | CLASSES), ("classless", SMALL)]:
        state = randomised(create_model_and_diffusion(**smaller)[0], seed=1).state_dict()
        save_file({key: tensor.half() for key, tensor in state.items()}, folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no weights")
    return folder


@pytest.fixture
def flags(weights):
    return SMALL | CLASSES | {
        "model_path": weights / "network.pt", "timestep_respacing": 2, "num_samples": 2, "batch_size": 2
    }  # fmt: skip


def sampled(flags, out_dir, **more):
    """(images, manifest) of a run."""
    run("image_sample", **flags, out_dir=out_dir, **more)
    with np.load(out_dir / "samples_2x16x16x3.npz") as file:
        return file["arr_0"], json.loads((out_dir / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("guidance", "evaluations", "lines"),
    [
        ({"icg_scale": 2}, 4, ["independent condition guidance: s = 2, 2 of 2 steps"]),
        ({"tsg_scale": 2, "tsg_power": 0.25}, 4, ["time-step guidance: s = 2, noise 1 (t/T)^0.25, 2 of 2 steps"]),
        ({"tpg_scale": 2, "tpg_schedule": "t=0,0.5"}, 3,
         ["token perturbation guidance: s = 2 at middle_block.1, 1 of 2 steps"]),
        ({"skip_scale": 2, "skip_layers": "middle_block.1,input_blocks.1.0", "skip_drawn": 1}, 4,
         ["skip-layer guidance: s = 2, without 1 of middle_block.1,input_blocks.1.0, 2 of 2 steps"]),
        ({"momentum_scale": 2, "momentum_decay": 0, "apg_eta": 0, "cfg_zero": True}, 2,
         ["momentum guidance: s = 2, β = 0, 2 of 2 steps",
          "the differences of all go through CFG-Zero*, APG (η = 0, r = inf, β = 0)"]),
        ({"icg_scale": 1, "tsg_scale": 1, "transformed": "icg", "low_frequencies": 0.5}, 6,
         ["independent condition guidance: s = 1, 2 of 2 steps",
          "time-step guidance: s = 1, noise 1 (t/T)^1, 2 of 2 steps",
          "the differences of icg go through low frequencies × 0.5"]),
    ],
)  # fmt: skip
def test_every_method_by_its_flags(flags, tmp_path, guidance, evaluations, lines):
    plain, about = sampled(flags, tmp_path / "plain")
    assert not [key for key in about["identity"] if key in LATER]
    images, about = sampled(flags, tmp_path / "guided", **guidance)
    assert not np.array_equal(images, plain)
    assert about["network_evaluations_per_sample"] == evaluations
    assert "weak_network_evaluations_per_sample" not in about
    assert about["guidance"].splitlines() == lines


def test_autoguidance_takes_a_smaller_network_in_half_precision(flags, weights, tmp_path):
    weak = {"weak_model_path": weights / "weak.safetensors", "autoguidance_scale": 1}
    plain, _ = sampled(flags, tmp_path / "plain")
    images, about = sampled(flags, tmp_path / "guided", **weak)
    assert not np.array_equal(images, plain)
    assert about["network_evaluations_per_sample"] == about["weak_network_evaluations_per_sample"] == 2
    assert about["guidance"] == "autoguidance: s = 1, 2 of 2 steps"
    # The contents of the weak network's file count.
    assert about["identity"]["weak_model_path"] != str(weights / "weak.safetensors")


def test_autoguidance_takes_a_smaller_transformer(flags, tmp_path):
    """Its heads, which shapes do not tell, are as many as the sampled network's."""

    def saved(name, *sizes):
        network = dits.filled(DiT(16, *sizes, num_heads=4, num_classes=4))
        torch.save(network.state_dict(), tmp_path / name)
        return network

    def pipeline(**more):
        return image_run(Configs.of(merge(IMAGE_GROUPS, ("test", flags | more))), torch.device("cpu")).pipeline

    saved("network.pt", 2, 3, 32, 2)
    weak = saved("weak.pt", 4, 3, 16, 1)
    flags |= {"network": "DiT-32x2x4/2", "null_label": True, "model_path": tmp_path / "network.pt"}
    made = pipeline(weak_model_path=tmp_path / "weak.pt", autoguidance_scale=1)
    x, t = torch.ones(1, 3, 16, 16), torch.tensor([1])
    assert torch.equal(made.guidances[0].network(x, t, t), weak(x, t, t))
    assert not np.array_equal(made.sample(2), pipeline().sample(2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"autoguidance_scale": 1}, "weak_model_path: autoguidance_scale needs the weights of a weak network"),
        ({"weak_model_path": "weak.safetensors"}, "autoguidance_scale: weak_model_path needs a strength other than 0"),
        ({"weak_model_path": "gone.pt", "autoguidance_scale": 1}, "weak_model_path: "),
        ({"weak_model_path": "broken.safetensors", "autoguidance_scale": 1}, "not a safetensors file"),
        (
            {"weak_model_path": "classless.safetensors", "autoguidance_scale": 1},
            "does not fit the network that the flags describe: class_cond is True, should be False",
        ),
        ({"icg_scale": 1, "class_cond": False}, "icg_scale: needs a network with classes"),
        ({"icg_scale": "nan"}, "icg_scale: wanted a finite number, got nan"),
        ({"tsg_scale": 1, "tsg_noise": -1}, "tsg_noise: wanted a finite number, 0 or more"),
        ({"tpg_scale": 1, "tpg_blocks": "middle"}, "tpg_blocks: no attention block 'middle' in this network; it has:"),
        ({"skip_scale": 1, "skip_layers": "output_blocks.0.0"}, "skip_layers: no layer 'output_blocks.0.0' that keeps"),
        ({"skip_scale": 1, "skip_drawn": 3}, "skip_drawn: wanted 1 to 1, the number of layers, got 3"),
        ({"momentum_scale": 1, "momentum_decay": 1}, "momentum_decay: wanted 0 to less than 1, got 1.0"),
        ({"transformed": "cfg"}, "transformed: says of which guidances, but nothing of the kind is on"),
        ({"tsg_scale": 1, "cfg_zero": True, "transformed": "dog"}, "transformed: wanted names of sag, cfg, pag, seg"),
        ({"tsg_scale": 1, "cfg_zero": True, "transformed": "cfg"}, "CFG-Zero*: there is no guidance whose Δ could go"),
        ({"tsg_scale": 1, "apg_cap": 0}, "apg_cap: wanted more than 0"),
        ({"momentum_scale": 1, "momentum_schedule": "t=2"}, "momentum_schedule: t: wanted lo,hi; got 't=2'"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, weights, tmp_path, capsys, wrong, said):
    if "weak_model_path" in wrong:
        wrong = wrong | {"weak_model_path": weights / wrong["weak_model_path"]}
    assert said in refused(capsys, "image_sample", **flags | wrong, out_dir=tmp_path / "out")


def test_all_of_their_flags_came_later():
    for group in METHODS:
        for name in group.__dataclass_fields__:
            assert name in LATER
