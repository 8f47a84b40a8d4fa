"""The rooms of the package: imports run downward only, and are relative."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "guided_diffusion"

# Each room may import those above it; the door (the files of the package itself) may import all, and nobody the door.
ROOMS = [
    "settings",
    "storage",
    "diffusion",
    "networks",
    "guidance",
    "stable_diffusion",
    "runs",
    "training",
    "tables",
    "analysis",
    "commands",
]
NOT_FOR = {"training": {"guidance", "stable_diffusion"}}
JUDGES = {"tables", "commands"}
"""Rooms that may import `evaluations`."""

# The modules of the evaluation, which knows nothing of guided_diffusion: each may import those before it.
EVALUATIONS = [
    "disturbances", "arrays", "pickles", "measured", "moments", "neighbours", "scores", "networks", "inception",
    "emoji", "dinov2", "ranks", "sources", "pairing", "features", "evaluation", "judge", "__init__", "evaluator",
]  # fmt: skip


def imported(path, root=ROOT):
    """Every module and name that a file imports, from its top-level package on: {("guided_diffusion", "runs", …)}."""
    here = path.relative_to(root).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
            assert base[:1] != ("guided_diffusion",) or node.level or here[0] != base[0], (
                f"{path}: an import that is not relative"
            )
    return found


def wrong_imports(path, root=ROOT):
    """What a file of a room imports of the project though its room may not."""
    room = path.relative_to(root).parts[1]
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) - NOT_FOR.get(room, set())
    wrong = []
    for package, *below in imported(path, root):
        if package == "guided_diffusion":
            fits = below[0] in allowed or below == ["__version__"]
        else:
            fits = package not in {"scripts", "tests"} and (package != "evaluations" or room in JUDGES)
        if not fits:
            wrong.append(".".join([package, *below]))
    return wrong


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    assert {str(path): wrong for path in files if (wrong := wrong_imports(path))} == {}


def test_every_folder_is_a_room():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from ..guidance.base import Step", []),
        ("from . import ranks", []),
        ("from ..storage import files", []),
        ("from .. import __version__", []),
        ("from ..training.data import load_data", ["guided_diffusion.training.data.load_data"]),
        ("from .. import training", ["guided_diffusion.training"]),
        ("from ..unet import UNetModel", ["guided_diffusion.unet.UNetModel"]),
        ("def f():\n    from ..tables import page", ["guided_diffusion.tables.page"]),
        ("import evaluations.judge", ["evaluations.judge"]),
        ("from evaluations import judge", ["evaluations.judge"]),
    ],
)
def test_a_broken_order_is_seen(tmp_path, line, wrong):
    path = tmp_path / "guided_diffusion" / "runs" / "run.py"
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert wrong_imports(path, tmp_path) == wrong


def test_an_import_by_the_packages_own_name_is_seen(tmp_path):
    path = tmp_path / "guided_diffusion" / "runs" / "run.py"
    path.parent.mkdir(parents=True)
    path.write_text("from guided_diffusion.runs.ranks import Job\n")
    with pytest.raises(AssertionError, match="not relative"):
        wrong_imports(path, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "evaluations").glob("*.py")), ids=lambda path: path.name)
def test_evaluation_stands_alone(path):
    before = EVALUATIONS[: EVALUATIONS.index(path.stem)]
    for package, *below in imported(path):
        assert package not in {"guided_diffusion", "scripts", "tests"}
        assert package != "evaluations" or not below or below[0] in before


def test_a_room_has_few_files():
    for room in ROOMS[:-1]:
        assert len(list((PACKAGE / room).glob("*.py"))) <= 13, room
