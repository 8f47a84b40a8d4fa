"""The demo, the upsampler, the inspector and the data maker as a user runs them."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from guided_diffusion.commands.make_emoji_data import base_emoji, draw_glyph
from guided_diffusion.networks.unet import UNetModel
from guided_diffusion.runs.prepare import IMAGE_GROUPS
from guided_diffusion.script_util import create_model_and_diffusion, sr_create_model_and_diffusion
from guided_diffusion.settings.options import parse_args
from guided_diffusion.tables.comparison import TO_TRY
from running import refused, run
from small import SMALL

SR = {
    "large_size": 32, "small_size": 8, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "16,8",
    "class_cond": True, "num_classes": 4,
}  # fmt: skip


def test_the_demo_leaves_what_the_readme_says(tmp_path, capsys):
    run("demo", num_samples=3, batch_size=2, timestep_respacing=4, out_dir=tmp_path / "demo")
    folder = tmp_path / "demo"
    assert {path.name for path in folder.iterdir()} == {
        "comparison.png", "index.html", "summary.txt", "guided", "unguided"
    }  # fmt: skip
    images = {}
    for name, evaluations in [("unguided", 4), ("guided", 8)]:
        assert (
            json.loads((folder / name / "manifest.json").read_text())["network_evaluations_per_sample"] == evaluations
        )
        with np.load(folder / name / "samples_3x32x32x3.npz") as file:
            images[name] = file["arr_0"]
    assert not np.array_equal(images["unguided"], images["guided"])
    picture = np.asarray(Image.open(folder / "comparison.png"))
    assert picture.shape[1] > 3 * 400
    assert picture.std() > 10
    said = capsys.readouterr().out
    assert (folder / "summary.txt").read_text() in said
    assert "no evidence" in said
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * 3
    for flag, _ in TO_TRY:
        [command] = re.findall(rf"<pre>python scripts/demo.py ({flag} --out_dir .*)</pre>", page)
        parse_args(
            "", IMAGE_GROUPS, default_configs=["emoji", "emoji_fast"], argv=command.split()
        )  # its flags are the demo's


def test_the_demo_needs_guidance(capsys, tmp_path):
    assert "sag_scale" in refused(capsys, "demo", sag_scale=0, out_dir=tmp_path / "demo")


@pytest.fixture
def upsampler(tmp_path):
    """Flags of a small upsampler with random weights and three base images."""
    torch.manual_seed(0)
    network, _ = sr_create_model_and_diffusion(**SR, learn_sigma=True)
    torch.nn.init.normal_(network.out[2].weight, std=0.1)
    torch.save(network.state_dict(), tmp_path / "sr.pt")
    images = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "base.npz", images, np.array([0, 3, 1]))
    return SR | {
        "learn_sigma": True, "model_path": tmp_path / "sr.pt", "base_samples": tmp_path / "base.npz",
        "timestep_respacing": 2, "num_samples": 4, "batch_size": 3, "out_dir": tmp_path / "out",
    }  # fmt: skip


def test_upsampling(upsampler):
    run("super_res_sample", **upsampler)
    with np.load(upsampler["out_dir"] / "samples_4x32x32x3.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert labels.tolist() == [0, 3, 1, 0]  # the base images are used round and round
    assert not np.array_equal(images[0], images[3])
    run(
        "super_res_sample",
        config=upsampler["out_dir"] / "config.yaml",
        num_samples=1,
        out_dir=upsampler["out_dir"] / "1",
    )
    with np.load(upsampler["out_dir"] / "1" / "samples_1x32x32x3.npz") as file:
        assert np.abs(file["arr_0"][0].astype(int) - images[0]).max() <= 1


def test_upsampling_a_folder(upsampler, tmp_path):
    """As many samples as pictures, which have their classes in their names; they are an npz of the same images."""
    with np.load(upsampler["base_samples"]) as file:
        images = [*file["arr_0"], file["arr_0"][0]]
    (tmp_path / "base").mkdir()
    for number, label in enumerate("dbca"):
        Image.fromarray(images[number]).save(tmp_path / "base" / f"{label}_{number}.png")
    np.savez(tmp_path / "same.npz", np.stack([images[3], images[1], images[2], images[0]]), np.arange(4))
    del upsampler["num_samples"]
    made = []
    for base in ("base", "same.npz"):
        out = tmp_path / f"out of {base}"
        run("super_res_sample", **upsampler | {"base_samples": tmp_path / base, "out_dir": out})
        with np.load(out / "samples_4x32x32x3.npz") as file:
            assert file["arr_1"].tolist() == [0, 1, 2, 3]
            made.append(file["arr_0"])
    assert np.array_equal(*made)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ([], "wanted one array arr_0, got 0"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], "wanted one array arr_1, got 0"),
        ([np.zeros((2, 8, 8, 3)), np.zeros(2, int)], "arr_0: wanted uint8 [N, 8, 8, 3], got float64 [2, 8, 8, 3]"),
        ([np.zeros((2, 9, 9, 3), np.uint8), np.zeros(2, int)], "got uint8 [2, 9, 9, 3]"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 4])], "one label from 0 to 3"),
        ([np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3, int)], "one label from 0 to 3"),
        ([np.array([{}]), np.zeros(2, int)], "got object [1]"),
    ],
)
def test_wrong_base_samples_are_refused(upsampler, capsys, arrays, said):
    np.savez(upsampler["base_samples"], *arrays)
    assert said in refused(capsys, "super_res_sample", **upsampler)


def test_missing_base_samples_are_refused(upsampler, capsys, tmp_path):
    assert "no such file" in refused(capsys, "super_res_sample", **upsampler | {"base_samples": tmp_path / "no.npz"})
    (tmp_path / "text.npz").write_text("hello")
    assert "not an npz" in refused(capsys, "super_res_sample", **upsampler | {"base_samples": tmp_path / "text.npz"})


def test_inspection(tmp_path, capsys):
    network, _ = create_model_and_diffusion(**SMALL, class_cond=True, num_classes=10)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    run("inspect_checkpoint", tmp_path / "network.pt", num_head_channels=16, image_size=16)
    said = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert f"unet, {parameters:,} parameters" in said
    assert (
        "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 16,8" in said
    )
    assert "--class_cond True --num_classes 10" in said
    assert "or --num_classes 9 --null_label True, if its last label stands for no class" in said
    assert "use_new_attention_order cannot be told" in said
    assert "input_blocks.1.1        16²     32 channels    2 heads" in said
    assert "middle_block.1           8²     64 channels    4 heads" in said
    assert "output_blocks.3.1       16²     32 channels    2 heads" in said


def test_inspection_of_one_channel(tmp_path, capsys):
    network = UNetModel(32, 1, 32, 2, 1, [2], channel_mult=(1, 1), num_heads=2)
    torch.save(network.state_dict(), tmp_path / "grey.pt")
    run("inspect_checkpoint", tmp_path / "grey.pt")
    said = capsys.readouterr().out
    assert "its images have 1 channel, the commands make networks of 3; from Python, UNetModel(in_channels=…" in said
    assert "--learn_sigma True" in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_head_channels": 0}, "num_head_channels: wanted 1 or more, or -1, got 0"),
        ({"num_heads": 0}, "num_heads: wanted a whole number from 1 to 16384, got '0'"),
        ({"image_size": -1}, "image_size: wanted a whole number from 1 to 16384, got '-1'"),
    ],
)
def test_inspection_with_wrong_flags(tmp_path, capsys, wrong, said):
    assert said in refused(capsys, "inspect_checkpoint", tmp_path / "no.pt", **wrong)


def test_inspection_of_something_else(tmp_path, capsys):
    torch.save({"net.weight": torch.ones(2)}, tmp_path / "other.pt")
    assert "those of no ADM, IDDPM or DiT network, the first is net.weight" in refused(
        capsys, "inspect_checkpoint", tmp_path / "other.pt"
    )


EMOJI_TEST = """# group: Smileys & Emotion
1F600                 ; fully-qualified     # 😀 E1.0 grinning face
263A FE0F             ; fully-qualified     # ☺️ E0.6 smiling face
263A                  ; unqualified         # ☺ E0.6 smiling face
1F44B 1F3FB           ; fully-qualified     # 👋🏻 E1.0 waving hand: light skin tone
# group: Food & Drink
1F347                 ; fully-qualified     # 🍇 E0.6 grapes
"""


def test_base_emoji_are_those_of_one_code_point(tmp_path):
    (tmp_path / "emoji-test.txt").write_text(EMOJI_TEST, encoding="utf-8")
    assert base_emoji(tmp_path / "emoji-test.txt") == [
        ("smileys-emotion", 0x1F600, "grinning-face"),
        ("smileys-emotion", 0x263A, "smiling-face"),
        ("food-drink", 0x1F347, "grapes"),
    ]


def test_a_glyph_is_centred_with_its_margin():
    glyph = draw_glyph(ImageFont.load_default(60), ord("O"), 32, 4)
    left, top, right, bottom = glyph.getchannel("A").getbbox()
    assert glyph.size == (32, 32)
    assert top == 4
    assert bottom == 28
    assert abs(left - (32 - right)) <= 1
