"""The package from anywhere: a wheel, an editable install, a clone on the path, and copies inside other packages."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from running import SCRIPTS, environment

ROOT = Path(__file__).parent.parent
PARTS = ("guided_diffusion", "evaluations", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
LIBRARIES = os.pathsep.join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
SHORT = ["--num_samples", "2", "--timestep_respacing", "2"]
WHERE = """
from {package}.settings.options import parse_args
from {package}.settings.scripts import SCRIPTS
print(parse_args("", SCRIPTS["image_sample"].groups, ["--config", "emoji"])[0].model_path)
"""
"""Prints where the weights of the shipped configuration are, for any name of the package."""


def call(folder, *arguments, path=""):
    """What a command prints that runs in a folder. path: the PYTHONPATH."""
    process = subprocess.run(
        [*map(str, arguments)], cwd=folder, env=environment(PYTHONPATH=str(path)),
        stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


def copy(part, target):
    """A file or folder of the clone, without what Python wrote into it."""
    if (ROOT / part).is_dir():
        shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(ROOT / part, target)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for part in PARTS:
        copy(part, folder / part)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    call(folder, sys.executable, *PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, clone)
    [path] = folder.iterdir()
    return path


def installed(folder, *what):
    """The programs of a new environment that has this one's libraries, and what pip is asked to install."""
    venv.create(folder, symlinks=os.name != "nt")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    flags = ("--no-deps", "--no-build-isolation", "--ignore-installed")
    call(folder, programs / "python", *PIP, "install", *flags, *what, path=LIBRARIES)
    site = call(folder, programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "libraries.pth").write_text(LIBRARIES.replace(os.pathsep, "\n"))
    return programs


def test_the_wheel_holds_every_file_and_no_other_package(wheel, clone):
    files = [path.relative_to(clone) for path in clone.rglob("*") if path.is_file() and path.parent != clone]
    files = [f"guided_diffusion/{path}" if path.parts[0] == "configs" else str(path) for path in files]
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name for name in files if name.startswith(("guided_diffusion/", "evaluations/"))}
    assert wheel.stat().st_size < 15e6


def test_a_wheel_runs_the_demo(wheel, tmp_path):
    programs = installed(tmp_path / "env", wheel)
    assert "look at runs/demo/index.html" in call(tmp_path, programs / "sag-demo", *SHORT)
    assert (tmp_path / "runs/demo/comparison.png").is_file()
    weights = call(tmp_path, programs / "python", "-c", WHERE.format(package="guided_diffusion")).strip()
    assert Path(weights).is_file()
    assert weights.startswith(str(tmp_path / "env"))


def test_an_editable_install_finds_the_clones_configurations(clone, tmp_path):
    programs = installed(tmp_path / "env", "--editable", clone)
    weights = call(tmp_path, programs / "python", "-c", WHERE.format(package="guided_diffusion")).strip()
    assert weights == str(clone / "configs/models/emoji32.safetensors")


def test_a_clone_on_the_path_finds_its_configurations(clone, tmp_path):
    weights = call(tmp_path, sys.executable, "-c", WHERE.format(package="guided_diffusion"), path=clone).strip()
    assert weights == str(clone / "configs/models/emoji32.safetensors")


@pytest.mark.parametrize("configs", ["theirs/sag/configs", "theirs/configs"])
def test_a_copy_inside_another_package_finds_its_configurations(configs, tmp_path):
    copy("guided_diffusion", tmp_path / "theirs/sag")
    copy("configs", tmp_path / configs)
    weights = call(tmp_path, sys.executable, "-c", WHERE.format(package="theirs.sag"), path=tmp_path).strip()
    assert weights == str(tmp_path / configs / "models/emoji32.safetensors")


def test_a_copy_inside_another_package_samples(tmp_path):
    copy("guided_diffusion", tmp_path / "theirs/sag")
    copy("configs", tmp_path / "theirs/sag/configs")
    program = "from theirs.sag.commands.image_sample import main; main()"
    program += "; import sys; assert 'guided_diffusion' not in sys.modules"
    call(tmp_path, sys.executable, "-c", program, "--config", "emoji", "--out_dir", "out", *SHORT, path=tmp_path)
    assert (tmp_path / "out/samples_2x32x32x3.npz").is_file()


def test_console_commands_are_the_scripts(wheel):
    archive = zipfile.ZipFile(wheel)
    [path] = [name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt")]
    lines = [line for line in archive.read(path).decode().splitlines() if " = " in line]
    assert all(line.startswith("sag-") for line in lines)
    places = [line.partition(" = ")[2] for line in lines]
    for module, _, name in (place.partition(":") for place in places):
        assert callable(getattr(importlib.import_module(module), name))
    commands = {place.partition(":")[0].rpartition(".")[2] for place in places}
    # The features belong to the clone: another training of them is for developers.
    assert commands == {path.stem for path in SCRIPTS.glob("*.py")} - {"train_emoji_features"} | {"evaluator"}
