"""YAML files of settings and of plans: plain values, and not too many."""

from typing import Any

import blobfile as bf
import yaml

from .shipped import shipped_yaml

MOST_YAML = 10_000
"""Keys and values of a YAML file, those behind an alias counted as often as it stands."""

NOTES = {"paper", "published"}
"""Keys of a configuration file that are for people and tables, not flags."""


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
