"""Random flags for every script: each try ends well, or says one sentence with status 2.

  python tests/flags.py --tries 900            # all scripts; one to two seconds a try
  python tests/flags.py --tries 50 --only image_train,demo --seed 3

Each try runs a script in a child of this process, with one flag or two of random, mostly senseless values over those of
a small run; it may take 8 seconds of a core and 7 GiB. Prints a table, and the command of every try that ended in a
traceback, otherwise than with status 0 or 2, without a sentence, or too late; ends with status 1 where there was any.
Those that were at work when their time was up are shown, too, and are no faults. Ctrl-C ends it with the table so far.
`test_flags.py` makes a small part of it.
"""

import argparse
import contextlib
import importlib
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from guided_diffusion.script_util import create_classifier, create_model_and_diffusion, sr_create_model_and_diffusion
from guided_diffusion.settings.scripts import SCRIPTS
from small import SMALL

ROOT = Path(__file__).parents[1]
SECONDS, BYTES = 8, 7 * 2**30
MOST_SAID = 1200

TEXTS = [
    "", " ", "-", "--", "0", "1", "-1", "2", "3", "7", "0.5", "-7.5", "1e3", "1e-30", "1" + "0" * 29, "-1" + "0" * 30,
    "1e30", "-1e30", "1e400", "nan", "inf", "-inf", "True", "False", "None", "null", "maybe", "none", "auto", "all",
    "1000", "16384", "1000000", "2147483647", "2147483648", "-2147483649", "4294967296", "9223372036854775807",
    "9223372036854775808", "18446744073709551615", "18446744073709551616", "0x10", "1_000", "\uff14", "½", "9" * 5000,
    "1,2", "1,2,2", "0,0", "-1,-2", "1,,2", ",", "0,1", "0.2,0.7", "0.7,0.2", "2,2", "ddim2", "ddim0",
    "ddim99999999999", "logsnr4", "logsnr100000", "middle_block.1", "output_blocks.2.1", "input_blocks.99.1", "..",
    "../..", ".", "nowhere", "nowhere.npz", "nowhere.pt", "model.pt", "samples.npz", "pictures",
    "https://127.0.0.1:1/x.pt", "http://[", "://", "64,64,64", "1,1,1,1,1,1,1", "a b", "a\nb", "\x1b[31mred\x1b[0m",
    "é", "\udc80", "😀", "x" * 300, "x" * 5000, "%s%n", "{}", "[1, 2]", "'", "*", "~", "$HOME", "cosine", "linear",
    "uniform", "loss-second-moment", "never", "emoji", "dinov2", "inception", "gif", "ddim",
]  # fmt: skip

NUMBERS = ["-1", "0", "1", "2", "3", "4", "5", "8", "16", "30", "32", "64", "100", "0.1", "0.5", "0.9", "1.5", "1000"]
BOOLS = ["True", "False", "true", "0", "1", "yes"]

CLASSIFIER = {
    "classifier_width": 32, "classifier_depth": 1, "classifier_channel_mult": "1,2",
    "classifier_attention_resolutions": "8", "classifier_pool": "spatial",
}  # fmt: skip
UPSAMPLER = {"large_size": 32, "small_size": 16, "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "8"}
SHORT = {"timestep_respacing": "2", "num_samples": 2, "batch_size": 2, "out_dir": "out"}
TRAINING = {"data_dir": "pictures", "batch_size": 2, "out_dir": "out", "log_interval": 1}

BASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "image_sample": ([], SMALL | SHORT | {"model_path": "model.pt", "sag_scale": 0.5, "sag_block": "middle_block.1"}),
    "classifier_sample": (
        [],
        SMALL | SHORT | CLASSIFIER | {"model_path": "model.pt", "classifier_path": "classifier.pt", "num_classes": 2},
    ),
    "super_res_sample": ([], UPSAMPLER | SHORT | {"model_path": "sr.pt", "base_samples": "samples.npz"}),
    "stable_diffusion_sample": (
        [],
        {"model": "sd", "prompt": "a cat", "steps": 2, "height": 64, "width": 64, "compare": 0, "out_dir": "out"},
    ),
    "image_train": ([], SMALL | TRAINING | {"lr_anneal_steps": 1}),
    "classifier_train": ([], {"image_size": 16, "num_classes": 2, "iterations": 1} | CLASSIFIER | TRAINING),
    "super_res_train": ([], UPSAMPLER | TRAINING | {"lr_anneal_steps": 1}),
    "image_nll": ([], SMALL | SHORT | {"model_path": "model.pt", "data_dir": "pictures"}),
    "attention_report": ([], SMALL | SHORT | {"model_path": "model.pt", "shown_steps": 2, "known_images": 2}),
    "demo": ([], SHORT),
    "reproduce": (["plan.yaml"], {"out_dir": "out"}),
    "inspect_checkpoint": (["model.pt"], {}),
    "evaluator": (["samples32.npz", "samples32.npz"], {"features": "emoji"}),
    "make_emoji_data": (["out"], {"groups": "food"}),
    "train_emoji_features": (["pictures32", "pictures32"], {"steps": 1, "batch_size": 2, "out": "out/x.safetensors"}),
    "benchmark": ([], {"only": "merge", "repeats": 1}),
}
"""Arguments and flags of a small run of every script; files are those of `given_files`."""

PLAIN_FLAGS = {
    "reproduce": ["rows", "samples", "batch_size", "out_dir", "inception"],
    "inspect_checkpoint": ["image_size", "num_heads", "num_head_channels"],
    "evaluator": ["json", "features", "inception", "weights", "num_samples", "metrics", "pr_dtype", "batch_size",
                  "seed", "cache", "against"],
    "make_emoji_data": ["size", "margin", "groups", "font", "emoji_test"],
    "train_emoji_features": ["init", "steps", "batch_size", "out", "seed", "lr"],
    "benchmark": ["only", "json"],
}  # fmt: skip
"""Flags of the scripts that have none of a configuration's."""


@dataclass(frozen=True)
class Tried:
    """One try: what was typed, how it ended (a word), what it said, if it left files, and its seconds of a core."""

    script: str
    words: tuple[str, ...]
    ended: str
    said: str
    left: bool
    seconds: float

    @property
    def is_fault(self) -> bool:
        return self.ended not in ("well", "sentence", "at work")


def given_files(folder: Path) -> None:
    """Weights, pictures and a plan for small runs."""
    torch.manual_seed(0)
    torch.save(create_model_and_diffusion(**SMALL)[0].state_dict(), folder / "model.pt")
    torch.save(create_classifier(16, **CLASSIFIER, num_classes=2).state_dict(), folder / "classifier.pt")
    torch.save(sr_create_model_and_diffusion(**UPSAMPLER)[0].state_dict(), folder / "sr.pt")
    for name, side in (("pictures", 16), ("pictures32", 32)):
        images = np.random.default_rng(0).integers(0, 256, (6, side, side, 3), dtype=np.uint8)
        (folder / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{'ab'[number % 2]}_{number}.png")
        np.savez(folder / f"{name.replace('pictures', 'samples')}.npz", images)
    (folder / "sd").symlink_to(ROOT / "tests" / "data" / "sd_tiny" / "model")
    row = {"name": "off", "label": "off", "set": {"sag_scale": 0, "num_samples": 2, "timestep_respacing": "2"}}
    plan = {"title": "x", "config": ["emoji"], "features": "emoji", "rows": [row]}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))


def flags_of(script: str) -> list[str]:
    """The names of a script's flags, but for `compile`, which takes minutes."""
    if script in PLAIN_FLAGS:
        return PLAIN_FLAGS[script]
    groups, without = SCRIPTS["image_sample" if script == "demo" else script]
    without = {*without, "compile"}
    return ["config", *(field.name for group in groups for field in fields(group) if field.name not in without)]


def value_of(script: str, name: str, chance: random.Random) -> str:
    """A value of a flag: any, or as often one that its kind of value could be."""
    groups = () if script in PLAIN_FLAGS else SCRIPTS["image_sample" if script == "demo" else script].groups
    kinds = {field.name: str(field.type) for group in groups for field in fields(group)}
    kind = kinds.get(name, "int")
    likely = BOOLS if "bool" in kind else NUMBERS if "int" in kind or "float" in kind else TEXTS
    return chance.choice(chance.choice([TEXTS, likely]))


def words_of(script: str, chance: random.Random) -> tuple[str, ...]:
    """A command's words: the small run's, with one flag or two of random values."""
    arguments, base = BASES[script]
    names = chance.sample(flags_of(script), chance.choice([1, 1, 2]))
    flags: Mapping[str, Any] = base | {name: value_of(script, name, chance) for name in names}
    return (*arguments, *(f"--{name}={value}" for name, value in flags.items()))


def _child(script: str, words: tuple[str, ...], said: Path) -> None:
    """Run a script in this process, which it ends: its status, 1 after a traceback."""
    os.setsid()
    os.environ["SAG_CACHE"] = str(said.with_name("cache"))
    os.environ.pop("OPENAI_LOGDIR", None)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    sys.stdout = open(said.with_name("out"), "w", 1, errors="backslashreplace")  # noqa: SIM115 (until the end)
    sys.stderr = open(said, "w", errors="backslashreplace")  # noqa: SIM115
    sys.argv = [f"{script}.py", *words]
    code = 0
    try:
        runpy.run_path(
            str(ROOT / ("evaluations" if script == "evaluator" else "scripts") / sys.argv[0]), {}, "__main__"
        )
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        code = 1 if isinstance(stop.code, str) else stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def attempt(script: str, words: tuple[str, ...], given: Path, folder: Path) -> Tried:
    """One try in a folder of its own, with links to the given files, two folders deep so that `../..` stays inside."""
    place, said = folder / "a" / "b", folder / "said"
    place.mkdir(parents=True)
    for file in given.iterdir():
        (place / file.name).symlink_to(file.resolve())
    here = os.getcwd()
    os.chdir(place)
    child = os.fork()
    if not child:
        _child(script, words, said)
    os.chdir(here)
    until, status, used = time.monotonic() + 40 * SECONDS, None, None  # on a busy machine
    while status is None and time.monotonic() < until:
        done, found, used = os.wait4(child, os.WNOHANG)
        status = found if done else time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it may have started
    if status is None:
        os.waitpid(child, 0)
    text = said.read_text(errors="replace") if said.exists() else ""
    left = any(path.is_file() for path in place.parent.rglob("*") if not path.is_symlink())
    ended = _ended(status, text)
    if ended == "late" and (left or text or said.with_name("out").stat().st_size):
        ended = "at work"  # as long as was asked for
    return Tried(script, words, ended, text, left, used.ru_utime)


def _ended(status: int | None, said: str) -> str:
    if status is None:
        return "late"
    if os.WIFSIGNALED(status):
        return "late" if os.WTERMSIG(status) == signal.SIGXCPU else "killed"
    if "Traceback" in said:
        return "traceback"
    last = (said.splitlines() or [""])[-1]
    code = os.WEXITSTATUS(status)
    if code == 2:
        right = re.match(r"(error|\S+\.py: error): ", last) and last.isprintable() and len(last) <= MOST_SAID
        return "sentence" if right else "no sentence"
    return "well" if code == 0 or (code == 1 and "was measured" in last) else f"status {code}"


def tries(count: int, scripts: list[str], seed: int) -> Iterator[Tried]:
    """So many tries, the scripts in turn."""
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="flags"))
    try:
        (folder / "given").mkdir()
        given_files(folder / "given")
        for number in range(count):
            script = scripts[number % len(scripts)]
            place = folder / "tries"
            yield attempt(script, words_of(script, chance), folder / "given", place)
            shutil.rmtree(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until_stopped(found: Iterator[Tried]) -> Iterator[Tried]:
    """What is found until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        yield from found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=900)
    parser.add_argument("--only", default=",".join(BASES), help="scripts, comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for script in BASES:  # once, not in every child
        importlib.import_module(
            "evaluations.evaluator" if script == "evaluator" else f"guided_diffusion.commands.{script}"
        )
    importlib.import_module("diffusers")
    table: dict[str, Counter[str]] = {}
    tried_of: Counter[str] = Counter()
    faults = 0
    for tried in until_stopped(tries(args.tries, args.only.split(","), args.seed)):
        counts = table.setdefault(tried.script, Counter())
        counts[tried.ended] += 1
        tried_of[tried.script] += 1
        counts["sentence, files left"] += tried.ended == "sentence" and tried.left
        counts["sentence after 2 s"] += tried.ended == "sentence" and tried.seconds > 2
        faults += tried.is_fault
        if tried.is_fault or tried.ended == "at work":
            tail = "\n    ".join(tried.said.splitlines()[-4:])
            print(f"{tried.ended}: {tried.script}.py {shlex.join(tried.words)[:1500]}\n    {tail[:1500]}", flush=True)
    for script, counts in table.items():
        ends = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count)
        print(f"{script:<25}{tried_of[script]} tries: {ends}")
    print(f"{faults} faults in {sum(tried_of.values())} tries")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
