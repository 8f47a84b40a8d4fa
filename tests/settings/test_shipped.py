"""What comes with the package is found by name, and what does not is told how to get."""

import re
from dataclasses import fields
from importlib.metadata import PackageNotFoundError

import pytest

from guided_diffusion.settings import shipped as module
from guided_diffusion.settings.options import BadInput, parse_args
from guided_diffusion.settings.scripts import SCRIPTS, whose
from guided_diffusion.settings.shipped import how_to_install, shipped, shipped_yaml
from running import run


def parsed(script, *argv):
    groups, without = SCRIPTS[script]
    return parse_args("", groups, list(argv), without=without)


def test_a_configuration_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name, by_path = (parsed("image_sample", "--config", text) for text in ("emoji", str(shipped("emoji.yaml"))))
    assert by_name == by_path
    assert by_name[0].model_path == str(shipped("models", "emoji32.safetensors"))


def test_a_name_is_never_a_file_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").write_text("num_samples: 3\n")
    assert shipped_yaml("emoji") == str(shipped("emoji.yaml"))
    assert shipped_yaml("./emoji") == "./emoji"
    assert shipped_yaml("gs://bucket/emoji.yaml") == "gs://bucket/emoji.yaml"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("emoij", "did you mean emoji?"),
        ("configs/emoij.yaml", "did you mean emoji?"),
        ("imagenet256_cond", "did you mean adm_imagenet256_cond or "),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(text, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as stop:
        parsed("image_sample", "--config", text)
    said, there = stop.value.message.split("; there are ")
    assert near in said.partition("no such configuration; ")[2]
    assert there.startswith("adm_classifier128, ")


def test_a_copy_without_configurations_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "sag")
    with pytest.raises(ValueError, match=r"configs/emoji\.yaml: no such configuration; there are none$"):
        shipped_yaml("emoji")


@pytest.mark.parametrize(
    ("script", "key", "owners"),
    [
        ("super_res_sample", "sag_block", "self-attention guidance: image_sample.py, classifier_sample.py, "),
        ("image_sample", "classifier_path", "classifier guidance: classifier_sample.py"),
        ("image_sample", "ema_rate", "training: image_train.py, super_res_train.py"),
        ("image_sample", "large_size", "super-resolution: super_res_sample.py, super_res_train.py"),
        ("super_res_train", "image_size", "network: image_sample.py, classifier_sample.py, image_train.py"),
        ("image_sample", "shown_steps", "attention report: attention_report.py"),
        ("classifier_train", "prompt", "Stable Diffusion: stable_diffusion_sample.py"),
    ],
)
def test_a_key_of_another_script_says_whose_it_is(script, key, owners, tmp_path):
    (tmp_path / "one.yaml").write_text(f"{key}: 1\n")
    for argv, begin in [
        (["--config", str(tmp_path / "one.yaml")], f"--config {tmp_path}/one.yaml: unknown key {key!r}; it is of "),
        ([f"--{key}", "1"], f"unknown flag --{key}; it is of "),
    ]:
        with pytest.raises(BadInput) as stop:
            parsed(script, *argv)
        assert stop.value.message.startswith(begin + owners)


def test_owners_of_one_key_in_several_groups():
    assert whose("model_path") == (
        "sampling: image_sample.py, classifier_sample.py, super_res_sample.py, noise_gain.py, attention_report.py; "
        "likelihood: image_nll.py"
    )
    assert whose("no_such_key") == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_take_the_settings_that_are_theirs(script, capsys):
    groups, without = SCRIPTS[script]
    with pytest.raises(SystemExit):
        run(script, "--help")
    own = {field.name for group in groups for field in fields(group) if field.name not in without}
    assert set(re.findall(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE)) == own | {"config"}


def test_an_extra_is_installed_as_the_package_was(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "distribution", lambda name: name)
    assert how_to_install("report") == "pip install 'self-attention-guidance[report]'"

    def none(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "distribution", none)
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "guided_diffusion")
    assert how_to_install("report") == (
        "install what the extra `report` in self-attention-guidance's pyproject.toml names"
    )
    (tmp_path / "pyproject.toml").touch()
    assert how_to_install("report") == f"pip install -e '{tmp_path}[report]'"
