"""The rooms of the package: imports run downward only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "guided_diffusion"

# Each place, and what of the package it may import.
MAY_IMPORT = {
    "__init__": set(),
    "config": set(),
    "settings": {"config"},
    "nn": set(),
    "process": set(),
    "noise": set(),
    "files": set(),
    "plans": set(),
    "fetch": {"files"},
    "checkpoints": {"files", "fetch"},
    "sample_store": {"files"},
    "parallel": {"config"},
    "dist_util": {"parallel", "checkpoints"},
    "inspection": {"settings", "script_util"},
    "pictures": {"files"},
    "denoiser": {"process"},
    "attention": {"nn"},
    "unet": {"nn", "attention"},
    "guidance": {"guidance", "process", "denoiser", "attention", "noise"},
    "samplers": {"process", "denoiser"},
    "solvers": {"process", "denoiser", "samplers"},
    "training": {
        "training", "process", "denoiser", "nn", "attention", "unet", "config", "files", "checkpoints", "noise",
        "parallel",
    },
    "gaussian_diffusion": {"process", "denoiser", "guidance", "samplers", "training"},
    "respace": {"process", "gaussian_diffusion"},
    "script_util": {
        "config", "settings", "files", "process", "denoiser", "attention", "unet", "guidance", "training",
        "gaussian_diffusion", "respace",
    },
    "sampling": {
        "config", "settings", "files", "checkpoints", "noise", "process", "denoiser", "guidance", "samplers", "solvers",
        "respace", "script_util", "unet", "inspection",
    },
    "page": set(),
    "analysis": set(),
    "known_images": {"files", "training"},
    "attention_study": {"analysis", "process", "denoiser", "attention", "guidance", "noise"},
    "watch": {"pictures", "attention", "guidance"},
    "scrubber": {"pictures", "guidance", "watch"},
    "attention_ranking": {"analysis", "attention_study", "watch"},
    "attention_page": {"page", "report"},
    "timing": {"sampling"},
    "batching": {"config", "guidance", "parallel", "sample_store", "sampling", "timing"},
    "report": {"page"},
    "comparison": {"pictures", "guidance", "samplers", "sampling"},
    "prepare": {"config", "settings", "checkpoints", "guidance", "inspection", "sampling", "script_util"},
    "stable_diffusion": {
        "stable_diffusion", "config", "noise", "pictures", "process", "denoiser", "attention", "guidance", "samplers",
        "script_util", "sampling",
    },
    "subjects": {
        "attention", "denoiser", "guidance", "prepare", "process", "sampling", "stable_diffusion",
    },
    "training_run": {
        "config", "settings", "files", "noise", "parallel", "denoiser", "pictures", "script_util", "training",
    },
    "run": {
        "config", "settings", "files", "fetch", "parallel", "sample_store", "pictures", "guidance", "samplers",
        "sampling", "batching", "__init__",
    },
    "likelihood": {
        "config", "files", "noise", "parallel", "sample_store", "denoiser", "respace", "training", "run",
    },
}  # fmt: skip


def imported(path, package="guided_diffusion"):
    """The modules of the package that a file imports, by the first name below the package; no other of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            names = [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            top, *below = name.split(".")
            if top == package:
                found.add(below[0] if below else "__init__")
            others = {"scripts", "tests", "evaluations", "guided_diffusion"} - {package}
            assert top not in others, f"{path.name} imports {name}"
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    place = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imported(path) <= MAY_IMPORT[place]


# The rooms of the evaluation, which knows nothing of guided_diffusion, from below: each may import those before it.
EVALUATIONS = [
    "__init__", "arrays", "moments", "neighbours", "scores", "networks", "inception", "emoji", "dinov2", "ranks",
    "sources", "features", "evaluation", "judge", "evaluator",
]  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "evaluations").glob("*.py")), ids=lambda path: path.name)
def test_evaluation_stands_alone(path):
    assert imported(path, "evaluations") <= set(EVALUATIONS[: EVALUATIONS.index(path.stem)])


def test_files_are_short():
    folders = [PACKAGE, *(ROOT / name for name in ("evaluations", "scripts", "tests"))]
    for path in [path for folder in folders for path in folder.rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path
