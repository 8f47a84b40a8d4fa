"""What comes with the package (configurations, tables, embedded models), how to get what does not, and YAML files."""

import difflib
import os
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import blobfile as bf
import yaml

PACKAGE = Path(__file__).parent.parent
DISTRIBUTION = "self-attention-guidance"

MOST_YAML = 10_000
"""Keys and values of a YAML file, those behind an alias counted as often as it stands."""

NOTES = {"paper", "published"}
"""Keys of a configuration file that are for people and tables, not flags."""


def shipped(*names: str) -> Path:
    """A path below `configs`: inside an installed package, or beside it in a clone."""
    inside = PACKAGE / "configs"
    return (inside if inside.is_dir() else PACKAGE.parent / "configs").joinpath(*names)


def shipped_yaml(text: str, folder: str = "", kind: str = "configuration") -> str:
    """The path of a YAML file of configs/FOLDER by its name, like `emoji`; what has a dot or a slash is a path itself.

    A ValueError says that there is no such file, which names there are, and the nearest. kind: what it calls a file.
    """
    path = str(shipped(folder, f"{text}.yaml")) if re.fullmatch(r"[\w-]+", text) else text
    if "://" in path or os.path.exists(path):
        return path
    names = sorted(file.stem for file in shipped(folder).glob("*.yaml"))
    near = difflib.get_close_matches(Path(text).stem, names)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"{path}: no such {kind}{hint}; there are {', '.join(names) or 'none'}")


def how_to_install(extra: str) -> str:
    """The command for an extra of ours, for the way this copy was installed."""
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        if (PACKAGE.parent / "pyproject.toml").is_file():
            return f"pip install -e '{PACKAGE.parent}[{extra}]'"
        return f"install what the extra `{extra}` in {DISTRIBUTION}'s pyproject.toml names"
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def parse_yaml(text: str) -> Any:
    """What a YAML text holds, plain values only; a ValueError where it is none or too much."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"not YAML ({' '.join(str(error).split())[:200]})") from None
    todo, seen = [node], 0
    while todo:
        held = todo.pop()
        seen += 1
        if seen > MOST_YAML:
            raise ValueError(f"holds more than {MOST_YAML} keys and values, counting what its aliases stand for")
        if isinstance(held, yaml.CollectionNode):
            todo += [part for item in held.value for part in (item if isinstance(item, tuple) else (item,))]
    try:
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # of an odd value PyYAML says so by any type
        raise ValueError(f"not YAML ({' '.join(str(error).split())[:200] or type(error).__name__})") from None


def read_yaml(path: str) -> dict[str, Any]:
    """The keys and values of what --config names (`shipped_yaml`); a ValueError says what is wrong with it."""
    try:
        path = shipped_yaml(path)
    except ValueError as error:
        raise ValueError(f"--config {error}") from None
    try:
        with bf.BlobFile(path, "r") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError, bf.Error) as error:
        raise ValueError(f"--config {path}: cannot be read ({type(error).__name__})") from None
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--config {path}: wanted lines of key: value")
    return {key: value for key, value in values.items() if key not in NOTES}
