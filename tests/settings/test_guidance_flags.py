"""The flags of all guidances, from the command line to samples."""

import json

import numpy as np
import pytest
import torch

from guided_diffusion.networks.building import build_classifier, build_network
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.model import ClassifierConfig, NetworkConfig
from running import refused, run
from small import SMALL, randomised

CLASSES = {"class_cond": True, "num_classes": 4, "null_label": True}
CLASSIFIER = {
    "classifier_width": 64, "classifier_depth": 1, "classifier_channel_mult": "1,1", "classifier_pool": "adaptive",
    "classifier_attention_resolutions": "8",
}  # fmt: skip
OF_SMALL = {key: value for key, value in SMALL.items() if key not in ("learn_sigma", "timestep_respacing")}
SAG = {"sag_scale": 0.5, "sag_block": "middle_block.1"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.save(randomised(create_model_and_diffusion(**SMALL, **CLASSES)[0]).state_dict(), folder / "network.pt")
    classifier = randomised(build_classifier(16, ClassifierConfig(**CLASSIFIER), 4))
    torch.save(classifier.state_dict(), folder / "classifier.pt")
    return folder


@pytest.fixture
def flags(weights):
    return SMALL | CLASSES | {
        "model_path": weights / "network.pt", "timestep_respacing": 4, "num_samples": 2, "batch_size": 2
    }  # fmt: skip


def sampled(flags, out_dir, script="image_sample", **more):
    """(images, network evaluations per sample, the lines about guidance) of a run."""
    run(script, **flags, out_dir=out_dir, **more)
    manifest = json.loads((out_dir / "manifest.json").read_text())
    with np.load(out_dir / "samples_2x16x16x3.npz") as file:
        return file["arr_0"], manifest["network_evaluations_per_sample"], manifest["guidance"]


def test_scales_of_zero_are_the_unguided_sampler(flags, tmp_path):
    plain, evaluations, line = sampled(flags, tmp_path / "plain")
    zero, evaluations_zero, _ = sampled(flags, tmp_path / "zero", cfg_scale=0, pag_scale=0, seg_scale=0)
    assert np.array_equal(plain, zero)
    assert evaluations == evaluations_zero == 4
    assert line == "self-attention guidance: off"


@pytest.mark.parametrize(
    ("guidance", "evaluations", "lines"),
    [
        ({"cfg_scale": 2}, 8, ["classifier-free guidance: s_c = 2, 4 of 4 steps"]),
        ({"pag_scale": 2}, 8, ["perturbed-attention guidance: s = 2 at middle_block.1, 4 of 4 steps"]),
        ({"seg_scale": 2, "seg_blocks": "input_blocks.1.1,output_blocks.0.1", "guide_interval": "0,0.75",
          "guide_every": 2}, 6,
         ["smoothed energy guidance: s = 2, σ = inf at input_blocks.1.1,output_blocks.0.1, 3 of 4 steps, every 2"]),
        ({**SAG, "cfg_scale": 2, "pag_scale": 1, "guide_start": 1, "guide_every": 2,
          "cfg_schedule": "sigma=0,10 every=1", "pag_schedule": "t=0,1 scale=0:0.5,0.5:1", "seg_schedule": "t=0,1"}, 10,
         ["self-attention guidance: s = 0.5, ψ = 1, σ = 3 at middle_block.1, 1 of 4 steps, every 2, corrected",
          "classifier-free guidance: s_c = 2, 3 of 4 steps",
          "perturbed-attention guidance: s = 1 at middle_block.1, 4 of 4 steps, every 2, scale × 0.5 to 1"]),
        ({"cfg_scale": 2, **SAG}, 12,
         ["self-attention guidance: s = 0.5, ψ = 1, σ = 3 at middle_block.1, 4 of 4 steps, corrected",
          "classifier-free guidance: s_c = 2, 4 of 4 steps"]),
        ({**SAG, "sag_mask": "square", "pag_scale": 1}, 12,
         ["self-attention guidance: s = 0.5, square mask (0.4), σ = 3, 4 of 4 steps, corrected",
          "perturbed-attention guidance: s = 1 at middle_block.1, 4 of 4 steps"]),
    ],
)  # fmt: skip
def test_every_guidance_by_its_flags(flags, tmp_path, guidance, evaluations, lines):
    plain, _, _ = sampled(flags, tmp_path / "plain")
    images, counted, said = sampled(flags, tmp_path / "guided", **guidance)
    assert not np.array_equal(images, plain)
    assert counted == evaluations
    assert said.splitlines() == lines


def test_self_attention_classifier_free_and_classifier_guidance_together(flags, weights, tmp_path):
    by_classifier = CLASSIFIER | {"classifier_path": weights / "classifier.pt", "classifier_scale": 3}
    seen = []
    for i, guidance in enumerate([{}, {"cfg_scale": 2}, {**SAG, "cfg_scale": 2}]):
        images, evaluations, said = sampled(flags, tmp_path / str(i), "classifier_sample", **by_classifier, **guidance)
        assert said.splitlines()[-1] == "classifier guidance: scale 3"
        seen.append((images, evaluations))
    assert [evaluations for _, evaluations in seen] == [4, 8, 12]
    (one, _), (two, _), (three, _) = seen
    assert not np.array_equal(one, two)
    assert not np.array_equal(two, three)
    without, _, _ = sampled(flags, tmp_path / "without", "classifier_sample", **SAG, cfg_scale=2)
    assert not np.array_equal(without, three)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cfg_scale": 1, "null_label": False, "num_classes": 5}, "cfg_scale: needs a network with classes and a null"),
        ({"cfg_scale": 1, "labels": "none"}, "cfg_scale: with labels none there is no class to guide to"),
        ({"cfg_scale": "nan"}, "cfg_scale: wanted a finite number, got nan"),
        ({"pag_scale": 1, "pag_blocks": "middle"}, "pag_blocks: no attention block 'middle' in this network; it has:"),
        ({"seg_scale": 1, "seg_blocks": ""}, "seg_blocks: no attention block ''"),
        ({"seg_scale": 1, "seg_sigma": -1}, "seg_sigma: wanted 0 or more"),
        ({"seg_scale": 1, "seg_schedule": "t=1,0"}, "seg_schedule: guide_interval: wanted 0 ≤ low < high ≤ 1, got 1,0"),
        (
            {"sag_scale": 1},
            "sag_block: no attention block 'output_blocks.8.1' in this network; it has: input_blocks.1.1, "
            "input_blocks.3.1, middle_block.1, output_blocks.0.1, output_blocks.1.1, output_blocks.2.1, "
            "output_blocks.3.1; give --sag_block one of them, output_blocks.8.1 is only the default",
        ),
        ({"sag_scale": 1, "sag_block": "middle"}, "sag_block: no attention block 'middle' in this network; it has:"),
        (
            {"guide_scale": 2, "sel_attn_depth": 7},
            "sel_attn_block, sel_attn_depth: no attention block 'output_blocks.7.1'",
        ),
        (
            {"image_size": 48, "sag_scale": 0, "sag_block": "output_blocks.1.1"},
            "middle_block.1; attention_resolutions: image_size 48 has maps of 48, 24 pixels a side, none of 16, 8",
        ),
    ],
)
def test_wrong_flags_are_one_sentence(flags, tmp_path, capsys, wrong, said):
    assert said in refused(capsys, "image_sample", **flags | wrong, out_dir=tmp_path / "out")


def test_attention_that_was_asked_for_and_is_not_there_is_said(caplog):
    for size, said in [
        (16, ""),
        (48, "attention_resolutions: image_size 48 has maps of 48, 24 pixels a side, none of"),
    ]:
        caplog.clear()
        build_network(NetworkConfig(**{**OF_SMALL, "image_size": size}), learn_sigma=True)
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)


def test_the_step_flags_alone_build_no_self_attention_guidance(flags, tmp_path):
    """Its default block is one that this network does not have."""
    _, evaluations, _ = sampled(flags, tmp_path / "out", pag_scale=1, guide_interval="0,0.5")
    assert evaluations == 6


@pytest.mark.parametrize(
    ("guidance", "version"),
    [
        ({**SAG, "guide_start": 2}, None),
        ({"cfg_scale": 1}, None),  # at 4 steps the default kept nothing from acting
        ({"cfg_scale": 1, "guide_start": 2}, 2),
    ],
)
def test_guide_start_is_of_self_attention_guidance_and_only_what_that_changed_is_begun_anew(
    flags, tmp_path, guidance, version
):
    _, evaluations, _ = sampled(flags, tmp_path / "out", **guidance)
    assert evaluations == (8 if "cfg_scale" in guidance else 6)
    identity = json.loads((tmp_path / "out" / "manifest.json").read_text())["identity"]
    assert identity.get("samples_version") == version


def test_new_flags_at_their_defaults_are_no_part_of_a_folder(flags, tmp_path):
    sampled(flags, tmp_path / "out")
    identity = json.loads((tmp_path / "out" / "manifest.json").read_text())["identity"]
    assert not [key for key in identity if key.startswith(("cfg_", "pag_", "seg_", "sag_mask", "sag_sch", "tf32"))]
