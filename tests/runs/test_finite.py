"""Numbers that are not finite stop a run before anything of them is written."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from guided_diffusion.diffusion.samplers import State
from guided_diffusion.runs.pipeline import first_spoiled, make_shard
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.settings.guidance import ClassifierGuidanceConfig, GuidanceConfig, OtherGuidanceConfig
from guided_diffusion.settings.model import DiffusionConfig
from guided_diffusion.settings.options import merge
from guided_diffusion.settings.training import TrainingConfig
from guided_diffusion.storage.pictures import to_uint8
from running import refused, run
from small import SMALL, randomised

NAN, INF = math.nan, math.inf


def flags(tmp_path, **more):
    """A small network in a file, and the flags that sample it."""
    torch.manual_seed(0)
    state = randomised(create_model_and_diffusion(**SMALL)[0]).state_dict()
    state["out.2.bias"][0] = more.pop("bias", 0.0)
    save_file(state, str(tmp_path / "model.safetensors"))
    own = {"model_path": tmp_path / "model.safetensors", "num_samples": 4, "out_dir": tmp_path / "run", "batch_size": 4}
    return SMALL | own | more


@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_not_finite_write_no_shard(tmp_path, capsys, value):
    with pytest.raises(SystemExit) as stop:
        run("image_sample", **flags(tmp_path, bias=value, clip_denoised=False))
    assert stop.value.code == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert "samples 0, 1, 2, 3 are not finite after the step t = 7 of 8 (the first is t = 7)" in said
    assert "weights that are not finite" in said
    assert not list((tmp_path / "run").rglob("*.npz"))


def test_the_first_bad_step_of_every_sample_is_told():
    spoiled = None
    bad = {3: [], 2: [1], 1: [1, 2], 0: [2]}
    for t in (3, 2, 1, 0):
        x = torch.zeros(4, 3, 2, 2)
        x[bad[t], 0, 0, 0] = NAN
        spoiled = first_spoiled(State(t, x, None), spoiled)
    assert spoiled.tolist() == [-1, 2, 1, -1]


def pipeline_of(decoded, dtype=torch.float32, x=0.0):
    def trajectory(indices):
        state = State(0, torch.full((len(indices), 3, 2, 2), x), SimpleNamespace(condition={}))
        yield state, SimpleNamespace(evaluations=1)

    return SimpleNamespace(
        trajectory=trajectory, images=lambda x: x + decoded, nearest_levels=False, dtype=dtype, num_steps=1
    )


def test_what_only_decoding_spoils_is_told():
    with pytest.raises(FloatingPointError, match="samples 5 to 6: after decoding, images 0, 1 of 2 are not finite"):
        make_shard(pipeline_of(NAN), range(5, 7), 2, lambda *_: None)
    shard = make_shard(pipeline_of(0.0), range(5, 7), 2, lambda *_: None)
    assert np.unique(shard.images).tolist() == [127]


def test_half_precision_is_named_as_the_likely_cause():
    with pytest.raises(FloatingPointError, match=r"samples 5, 6 are .* float16 overflows: try bfloat16 or float32"):
        make_shard(pipeline_of(0.0, torch.float16, x=INF), range(5, 7), 2, lambda *_: None)


def test_pictures_are_never_made_of_what_is_not_finite():
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0, 0, 0] = NAN
    with pytest.raises(FloatingPointError, match="images 1 of 3 are not finite"):
        to_uint8(images)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("group", "key"),
    [
        (ClassifierGuidanceConfig, "classifier_scale"),
        (GuidanceConfig, "sag_scale"),
        (GuidanceConfig, "guide_scale"),
        (OtherGuidanceConfig, "cfg_scale"),
        (TrainingConfig, "lr"),
        (TrainingConfig, "weight_decay"),
    ],
)
def test_scales_and_rates_are_finite(group, key, value):
    with pytest.raises(ValueError, match=f"flags: {key}: wanted a finite number, got"):
        merge((group,), ("flags", {key: value}))


def test_the_widths_of_blurs_may_be_infinite():
    [guidance] = merge((GuidanceConfig,), ("flags", {"blur_sigma": "inf"}))
    [others] = merge((OtherGuidanceConfig,), ("flags", {"seg_sigma": "inf"}))
    assert guidance.blur_sigma == others.seg_sigma == INF
    with pytest.raises(ValueError, match="blur_sigma: wanted a finite number, got nan"):
        merge((GuidanceConfig,), ("flags", {"blur_sigma": "nan"}))


def test_a_network_of_eps_cannot_begin_where_no_signal_is(tmp_path, capsys):
    asked = flags(tmp_path, diffusion_steps=20, timestep_respacing="")
    assert "at the first step ᾱ is 0, and there a network of ε says nothing" in refused(capsys, "image_sample", **asked)
    assert DiffusionConfig(diffusion_steps=20).noise_schedule == "linear"
