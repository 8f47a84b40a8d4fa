"""The commands that the README and the pages of docs/ show run, page by page, on few samples, steps and pictures.

A page's commands run in its order, in a folder of their own, so that what one writes the next may read. What a page
needs and does not make (published weights, pictures, a run of another page) is put there small.
"""

import itertools
import json
import re
import runpy
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import calibration
import numpy as np
import pytest
from PIL import Image

import latents
from guided_diffusion.commands import benchmark
from guided_diffusion.networks.building import fill_at_random
from guided_diffusion.storage import checkpoints, fetch
from running import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs" / "models").glob("*.md"))]
LAUNCHER = r"(?:mpiexec -n \d+ (?=python )|torchrun --nproc_per_node \d+ |srun --mpi=pmix (?=python ))"
COMMAND = re.compile(rf"(?:{LAUNCHER})?(?:python )?(?P<script>(?:scripts|evaluations|tests|docs)/\w+\.py)(?P<rest>.*)")
OTHERS = re.compile(
    r"pip install .*|make \w+|hf download .*|python -m pytest tests/[\w/.]+|\. \.venv/bin/activate|sha256sum .*|"
    r"(?:mpiexec -n \d+ )?python THEIRS/scripts/\w+\.py .*"
)
"""What a page may show beside our own commands, and what is not run."""

NUMBERS = itertools.count()

ELSEWHERE = {"tests/hosts.py", "tests/faults.py"}
"""Scripts that take minutes or need root; they have tests of their own."""

TINY = "--image_size 32 --channel_mult 1,1,2"
NETWORK = "--num_channels 32 --num_res_blocks 1 --num_head_channels 32"
SAMPLING = "--num_samples 2 --batch_size 2 --out_dir {out_dir}"
SMALL = {
    "image_sample": SAMPLING,
    "classifier_sample": SAMPLING,
    "super_res_sample": SAMPLING,
    "demo": "--num_samples 2 --timestep_respacing 3",
    "stable_diffusion_sample": "--steps 2 --height 64 --width 64 --num_images 1 --out_dir {out_dir}",
    "image_train": f"{NETWORK} {TINY} --batch_size 2 --lr_anneal_steps 2 --lr_warmup_steps 1 --log_interval 1",
    "super_res_train": f"{NETWORK} --batch_size 2 --lr_anneal_steps 2 --large_size 32 --small_size 16 --log_interval 1",
    "classifier_train": "--batch_size 2 --iterations 2 --image_size 32 --classifier_width 64 --classifier_depth 1 "
    "--classifier_channel_mult 1,1 --classifier_attention_resolutions 16 --log_interval 1 --eval_interval 1",
    "image_nll": "--num_samples 2 --timestep_respacing 3",
    "attention_report": "--shown_steps 1 --known_images 2 --noise_levels 0.5 --blur_sigmas 1",
    "noise_gain": "--known_images 2 --noise_levels 0.5",
    "disturbances": "--num_samples 8",
    "reproduce": "--dry_run",
    "make_emoji_data": "--groups food",
    "benchmark": "",
    "evaluator": "",
    "grain": "",
    "toy": "--points 64 --steps 2",
    "inspect_checkpoint": "",
    "calibration": "--draws 2",
    "results": "--check",
    "figures": "--out_dir .",
}  # fmt: skip
"""What is added to the commands of a script; of a flag given twice, the last counts."""

PUBLISHED = "--num_channels 32 --num_head_channels 32 --use_fp16 False"
"""Networks of published checkpoints: their blocks keep their names."""

TRANSFORMER = "--network DiT-32x13x2/2"
"""With the block that guides the published ones."""

PUBLISHED_CLASSIFIER = "--classifier_width 64 --classifier_depth 1 --classifier_use_fp16 False"


def lines_of(text):
    """The lines of the shell in a page: in its blocks without a language, and in its tables."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        if language:
            continue
        lines = re.sub(r"\\\n\s*", "", block).splitlines()
        found += [line for line in (re.sub(r"(^|\s+)#.*", "", line) for line in lines) if line]
    for row in re.findall(r"^\|.*\|$", text, flags=re.MULTILINE):
        found += re.findall(rf"`((?:{LAUNCHER})?python [^`]+)`", row)
    return found


def commands_of(page):
    """(script, words) of the commands of a page that are run here."""
    found = []
    for line in lines_of(page.read_text(encoding="utf-8")):
        if match := COMMAND.fullmatch(line):
            assert (ROOT / match["script"]).exists(), f"{page.name}: {line}"
            assert "..." not in line, f"{page.name}: {line} does not run as it stands"
            if match["script"] not in ELSEWHERE:
                found.append((Path(match["script"]), shlex.split(match["rest"])))
        else:
            assert OTHERS.fullmatch(line), f"{page.name}: what is {line!r}?"
    return found


def value(words, flag, default=""):
    """What a command gives a flag (the last of several)."""
    found = [after for word, after in itertools.pairwise(words) if word == f"--{flag}"]
    return found[-1] if found else default


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Above a folder of pictures of two classes."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "PICTURES").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        noise = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "PICTURES" / f"{('cat', 'dog')[number % 2]}_{number}.png")
    return folder


@pytest.fixture
def desk(tmp_path, pictures, monkeypatch):
    """The folder that commands run in, with what they name: as in a clone, beside files of the user's."""
    for name in ("scripts", "configs", "evaluations"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "disturbances").mkdir(parents=True)
    (tmp_path / "PICTURES").symlink_to(pictures / "PICTURES")
    (tmp_path / "models").mkdir()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "64x64_diffusion.pt").touch()
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "samples_64x64x64x3.npz", rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), np.array([0, 1])
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr(benchmark, "SECTIONS", dict.fromkeys(benchmark.SECTIONS, lambda repeats: []))
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(calibration, "LARGE", calibration.CASES[:1])

    load = checkpoints.load_into

    def load_into(network, path, device=None, *more, **named):
        if "://" in str(path) or path == "64x64_diffusion.pt":
            return fill_at_random(network, device)
        return load(network, path, device, *more, **named)

    find = fetch.local_path
    stand_in = tmp_path / "fetched"
    stand_in.touch()

    def local_path(path):
        return stand_in if "://" in path else find(path)

    for module in [module for name, module in sys.modules.items() if name.startswith("guided_diffusion.")]:
        for old, new in ((load, load_into), (find, local_path)):
            if getattr(module, new.__name__, None) is old:
                monkeypatch.setattr(module, new.__name__, new)
    return tmp_path


def made_small(script, words, trained):
    """The words of a command that makes little. trained: (rate, step) that a training's flags end with, by folder."""
    name = script.stem
    words = [*words]
    if name == "reproduce" and "--fetch" in words:
        words.remove("--fetch")
    if name.endswith("_train"):
        steps = int(value(words, "lr_anneal_steps", value(words, "iterations", "0")))
        trained[value(words, "out_dir")] = value(words, "ema_rate", "0.9999"), steps
    for number, word in enumerate(words):
        if match := re.fullmatch(r"(.*)/ema_([\d.]+)_(\d{6})\.pt", word):
            assert trained[match[1]] == (match[2], int(match[3])), f"{word} is not what the training leaves"
            words[number] = f"{match[1]}/ema_{match[2]}_000002.pt"
    more = SMALL[name]
    out_dir = value(words, "out_dir")
    more = more.replace("--out_dir {out_dir}", f"--out_dir {out_dir or f'runs/{next(NUMBERS)}'}")
    config = " ".join(after for word, after in itertools.pairwise(words) if word == "--config")
    if name in ("image_sample", "classifier_sample", "super_res_sample", "attention_report", "noise_gain"):
        if name in ("attention_report", "noise_gain"):
            more += " --num_samples 2 --batch_size 2" if "--model" not in words else " --steps 2 --num_images 1"
            block = "blocks.12" if "dit_" in config else "middle_block.1"
            more += f" --blocks {block}" if name == "attention_report" and "--model" not in words else ""
        if "--model" not in words:
            spacing = value(words, "timestep_respacing") or ("ddim3" if "--use_ddim" in words else "3")
            more += " --timestep_respacing " + re.sub(r"\d+", "3", spacing)
        if re.search("adm_|iddpm_", config) or value(words, "model_path") == "64x64_diffusion.pt":
            sizes = "--large_size 64 --small_size 16" if name == "super_res_sample" else "--image_size 64"
            more += f" {sizes} {PUBLISHED}"
        if re.search("dit_|sit_", config):
            more += " " + TRANSFORMER
        if "adm_classifier" in config:
            more += " " + PUBLISHED_CLASSIFIER
    return [*words, *shlex.split(more)]


def put_what_is_missing(desk, words):
    """Files and runs that a command reads and that none before it has made."""
    for word in words:
        path = desk / word
        if word.startswith("runs/") and word.count("/") == 1 and not path.exists() and "--out_dir" not in words:
            run("image_sample", config="emoji", sag_scale=0, num_samples=8, timestep_respacing=2, out_dir=path)
        elif word.startswith("data/emoji32") and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(desk / "PICTURES")
        elif word.startswith("models/") and not path.exists():
            latents.diffusers()
            if "vae" in word:
                path.symlink_to(latents.DATA / "model" / "vae")
                continue
            if "xl" in word:
                shutil.move(latents.variant(desk / "made", "xl"), path)
            else:
                path.symlink_to(latents.DATA / "model")
        elif word.startswith("VIRTUAL") and not path.exists():
            np.savez(path, np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8))
        elif word == "256x256_diffusion_uncond.pt" and not path.exists():
            from guided_diffusion.script_util import create_model

            network = create_model(256, 32, 1, num_head_channels=32)
            checkpoints.save_atomically(network.state_dict(), path)


def written_keys(folder):
    """Keys at the top of the JSON files, columns of tables and arrays that commands have left, by file."""
    for path in folder.rglob("*"):
        if any(each.is_symlink() for each in (path, *path.parents)) or {"cache", "models", "made"} & set(path.parts):
            continue
        if path.suffix == ".json" and path.name != "classes.json":
            found = json.loads(path.read_text())
            found = found[0] if isinstance(found, list) else found
            yield path, set(found)
            for row in found.get("rows", [])[:1] if isinstance(found.get("rows"), list) else []:
                yield path, set(row)
        elif path.suffix == ".csv":
            yield path, set(path.read_text().partition("\n")[0].split(","))
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                yield path, set(arrays.files)


def status(script):
    """How a script ends, 0 or nothing where all is well."""
    try:
        if script.stem == "calibration":
            calibration.main()
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, desk, monkeypatch):
    trained = {}
    for script, words in commands_of(page):
        if script.stem == "make_emoji_data" and not Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf").exists():
            continue
        put_what_is_missing(desk, words)
        small = made_small(script, words, trained)
        if "VIRTUAL_imagenet256_labeled.npz" in words:  # of Inception, whose weights are not at hand
            small += ["--features", "emoji"]
        monkeypatch.setattr(sys, "argv", [script.name, *small])
        said = f"{script} {shlex.join(words)}\nas {shlex.join(small)}"
        assert not status(script), f"{said}: another status than 0"
    known = set(re.findall(r"`([\w@]+)`", (ROOT / "docs" / "files.md").read_text(encoding="utf-8")))
    for path, keys in written_keys(desk):
        # Folders that a file tells of are no keys; of what is told by quarter of t the page has the name.
        keys = {re.sub(r"_q[0-3]$", "", key) for key in keys if not (desk / key).is_dir()}
        assert keys <= known, f"docs/files.md does not have {sorted(keys - known)} of {path.name}"
