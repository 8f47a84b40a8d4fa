"""Settings: defaults < file < flags, and what is said of wrong ones."""

import re
from dataclasses import asdict, dataclass

import pytest

from guided_diffusion.script_util import (
    classifier_defaults,
    create_guidance,
    model_and_diffusion_defaults,
    sag_defaults,
    sr_model_and_diffusion_defaults,
)
from guided_diffusion.settings.guidance import ClassifierGuidanceConfig, GuidanceConfig
from guided_diffusion.settings.model import DiffusionConfig, NetworkConfig
from guided_diffusion.settings.options import BadInput, merge, option, parse_args
from guided_diffusion.settings.other_names import ELSEWHERE
from guided_diffusion.settings.scripts import GUIDANCE, SCRIPTS, whose

GROUPS = (NetworkConfig, DiffusionConfig, GuidanceConfig)


@dataclass(frozen=True)
class Paths:
    """paths"""

    model_path: str = option("", "a file", path=True)


def test_defaults_then_file_then_flags(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("image_size: 128\nlearn_sigma: true\nchannel_mult: 1,2\nblur_sigma: .inf\nsag_scale: 1\n")
    argv = ["--config", str(file), "--image_size", "32", "--class_cond", "--blur_kernel", "9"]
    network, diffusion, guidance = parse_args("", GROUPS, argv)
    assert (network.image_size, network.channel_mult, network.num_channels) == (32, "1,2", 128)
    assert network.class_cond
    assert diffusion.learn_sigma
    assert (guidance.blur_sigma, guidance.blur_kernel, guidance.scale) == (float("inf"), 9, 1.0)


def test_the_mark_of_windows_editors_is_no_part_of_a_file(tmp_path):
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbfimage_size: 128\r\nnum_heads: 2\r\n")
    network, _, _ = parse_args("", GROUPS, ["--config", str(tmp_path / "marked.yaml")])
    assert (network.image_size, network.num_heads) == (128, 2)


def test_an_empty_value_is_none():
    [guidance] = merge((GuidanceConfig,), ("flags", {"sag_scale": "", "blur_kernel": None}))
    assert guidance.sag_scale is None


def test_a_later_file_wins_and_notes_are_for_people(tmp_path):
    (tmp_path / "one.yaml").write_text("image_size: 128\nnum_heads: 2\npublished: [{fid: 1}]\npaper: Table 1\n")
    (tmp_path / "two.yaml").write_text("image_size: 64\n")
    argv = ["--config", str(tmp_path / "one.yaml"), "--config", str(tmp_path / "two.yaml")]
    network, _, _ = parse_args("", GROUPS, argv)
    assert (network.image_size, network.num_heads) == (64, 2)


def test_a_flag_replaces_the_other_name_in_a_file(tmp_path):
    (tmp_path / "one.yaml").write_text("sag_scale: 0.5\nsag_block: output_blocks.2.1\n")
    argv = ["--config", str(tmp_path / "one.yaml")]
    *_, guidance = parse_args("", GROUPS, argv)
    assert (guidance.scale, guidance.block_name) == (0.5, "output_blocks.2.1")
    *_, guidance = parse_args("", GROUPS, [*argv, "--guide_scale", "1.25", "--sel_attn_depth", "7"])
    assert (guidance.scale, guidance.block_name) == (0.25, "output_blocks.7.1")
    *_, guidance = parse_args("", GROUPS, [*argv, "--guide_scale", "1", "--sel_attn_block", "middle"])
    assert (guidance.scale, guidance.block_name) == (0, "middle_block.1")


def test_timesteps_of_improved_diffusion_are_asked_about(caplog):
    for given, warned in [([], False), (["--diffusion_steps", "4000"], True)]:
        caplog.clear()
        parse_args("", GROUPS, given)
        assert ("rescale_timesteps" in caplog.text) == warned
    caplog.clear()
    parse_args("", GROUPS, ["--diffusion_steps", "4000", "--rescale_timesteps", "False"])
    assert not caplog.text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--pag_blocks", "middle_block.1", "--pag_schedule", "t=0,0.5"],
            "pag_blocks, pag_schedule: .* pag_scale is 0",
        ),
        (
            ["--seg_sigma", "2", "--pag_scale", "1", "--cfg_channels", "3"],
            "cfg_channels: .* 0; seg_sigma: .* seg_scale is",
        ),
        (["--tsg_noise", "2"], "tsg_noise: .* tsg_scale is 0"),
        (["--momentum_decay", "0"], "momentum_decay: .* momentum_scale is 0"),
        (["--autoguidance_schedule", "every=2"], "autoguidance_schedule: .* autoguidance_scale is 0"),
        (["--pag_scale", "0", "--pag_blocks", "middle_block.1"], ""),
        (["--skip_scale", "0.5", "--skip_drawn", "1"], ""),
    ],
)
def test_a_flag_of_a_guidance_without_a_strength_is_told(argv, said, caplog, tmp_path):
    parse_args("", GUIDANCE, argv)
    assert len(caplog.messages) == bool(said)
    assert re.search(said, caplog.text)
    caplog.clear()
    names, values = (name.removeprefix("--") for name in argv[::2]), argv[1::2]
    (tmp_path / "one.yaml").write_text("".join(f"{name}: {value}\n" for name, value in zip(names, values, strict=True)))
    parse_args("", GUIDANCE, ["--config", str(tmp_path / "one.yaml")])
    assert not caplog.text


def test_fields_can_be_left_out():
    network, _, _ = parse_args("", GROUPS, ["--num_heads", "2"], without=("image_size",))
    assert network.num_heads == 2
    assert "--image_size" in refused(["--image_size", "64"], without=("image_size",))
    with pytest.raises(ValueError, match="unknown key 'image_size'"):
        merge(GROUPS, ("file", {"image_size": 64}), without=("image_size",))


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "one.yaml"
    for written, read in [("w/a.pt", tmp_path / "configs/w/a.pt"), ("/b.pt", "/b.pt"), ("gs://c/d.pt", "gs://c/d.pt")]:
        file.write_text(f"model_path: {written}\n")
        [paths] = parse_args("", (Paths,), ["--config", "configs/one.yaml"])
        assert paths.model_path == str(read)
    [paths] = parse_args("", (Paths,), ["--config", "configs/one.yaml", "--model_path", "w/a.pt"])
    assert paths.model_path == "w/a.pt"


def refused(argv, **settings):
    with pytest.raises(BadInput) as stop:
        parse_args("", GROUPS, argv, **settings)
    assert stop.value.code == 2
    return stop.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image_sise: 64\n", "unknown key 'image_sise'; did you mean 'image_size'?"),
        ("image_size: big\n", "image_size: wanted int, got 'big'"),
        ("image_size: [1]\n", "image_size: wanted int"),
        ("image_size: true\n", "image_size: wanted int"),
        ("class_cond: 3\n", "class_cond: wanted True or False, got 3"),
        ("- 1\n", "wanted lines of key: value"),
        ("a: b: c\n", "not YAML"),
        ("guide_scale: 1.5\nsag_scale: 0.5\n", "sag_scale, guide_scale: two names of one strength"),
        ("fidelity: exact\n", "fidelity: wanted corrected or reference"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, text, said):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    error = refused(["--config", str(file)])
    assert said in error
    assert "\n" not in error


def test_a_missing_file_is_refused(tmp_path):
    assert "no.yaml: no such configuration; there are adm_" in refused(["--config", str(tmp_path / "no.yaml")])


@pytest.mark.parametrize("flags", [["--guide_scale", "nan"], ["--sag_threshold", "inf"], ["--sel_attn_block", "side"]])
def test_impossible_guidance_is_refused(flags):
    assert f"{flags[0][2:]}: wanted" in refused(flags)


@pytest.mark.parametrize("interval", ["0.5", "0.7,0.2", "-1,1", "0,2", "a,b", "0,1,2"])
def test_impossible_intervals_are_refused(small, interval):
    with pytest.raises(ValueError, match="guide_interval"):
        create_guidance(small[0], sag_scale=1.0, sag_block="middle_block.1", guide_interval=interval)


def test_help_explains_every_guidance_flag(capsys):
    with pytest.raises(SystemExit):
        parse_args("", (*GROUPS, ClassifierGuidanceConfig), ["--help"])
    text = capsys.readouterr().out
    for flag in [*asdict(GuidanceConfig()), "classifier_guidance"]:
        assert f"--{flag} " in text
    for symbol in ("1 + s", "ψ", "σ", "t/T", "x̂_t"):
        assert symbol in text


def test_upstream_defaults():
    defaults = model_and_diffusion_defaults()
    assert defaults["image_size"] == 64
    assert (defaults["num_channels"], defaults["num_heads"], defaults["attention_resolutions"]) == (128, 4, "16,8")
    assert defaults["use_scale_shift_norm"]
    assert (defaults["learn_sigma"], defaults["noise_schedule"], defaults["diffusion_steps"]) == (False, "linear", 1000)
    assert classifier_defaults()["classifier_pool"] == "attention"
    assert sr_model_and_diffusion_defaults()["large_size"] == 256
    assert "image_size" not in sr_model_and_diffusion_defaults()


def test_the_sag_authors_defaults_are_not_those_of_our_commands():
    assert sag_defaults() == {
        "guide_scale": 1.5,
        "guide_start": 250,
        "sel_attn_block": "output",
        "sel_attn_depth": 2,
        "blur_sigma": 9,
        "classifier_guidance": False,
    }
    assert GuidanceConfig().guide_scale == 1
    assert GuidanceConfig().guide_start == 250


@pytest.mark.parametrize(
    ("script", "flag", "said"),
    [
        ("image_sample", "--guidance_scale", "did you mean --cfg_scale, which is guidance_scale − 1?"),
        ("image_sample", "--num_inference_steps", "did you mean --timestep_respacing?"),
        ("image_sample", "--num-samples", "did you mean --num_samples?"),
        ("image_sample", "--eta", "did you mean --ddim_eta?"),
        ("image_sample", "--output_dir", "did you mean --out_dir?"),
        ("image_sample", "--negative_prompt", "it is of Stable Diffusion: stable_diffusion_sample.py"),
        ("image_train", "--learning_rate", "did you mean --lr?"),
        ("image_train", "--resolution", "did you mean --image_size?"),
        ("stable_diffusion_sample", "--sampler", "did you mean --scheduler?"),
    ],
)
def test_names_of_other_tools_are_understood(script, flag, said):
    with pytest.raises(BadInput) as stop:
        parse_args("", SCRIPTS[script].groups, [flag, "1"], without=SCRIPTS[script].without)
    assert said in stop.value.message


def test_the_names_given_for_them_are_settings():
    for other, names in ELSEWHERE.items():
        for known in names:
            assert whose(known.partition(",")[0]), other


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("dropout", "1.5", "dropout: wanted a share from 0 to less than 1, got 1.5"),
        ("dropout", "1.0", "dropout: wanted a share from 0 to less than 1, got 1.0"),
        ("dropout", "-0.1", "dropout: wanted a share from 0 to less than 1, got -0.1"),
        ("num_head_channels", "0", "num_head_channels: wanted 1 or more, or -1, got 0"),
        ("num_heads_upsample", "0", "num_heads_upsample: wanted 1 or more, or -1, got 0"),
        ("num_heads", "0", "num_heads: wanted 1 or more, got 0"),
    ],
)
def test_impossible_networks_are_refused(flag, value, said):
    assert refused([f"--{flag}", value]) == said
