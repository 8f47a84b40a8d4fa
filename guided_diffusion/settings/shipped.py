"""What comes with the package (configurations, tables, embedded models), and how to get what does not."""

import difflib
import os
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
DISTRIBUTION = "self-attention-guidance"


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
    raise ValueError(f"{path}: no such {kind}; there are {', '.join(names) or 'none'}{hint}")


def how_to_install(extra: str) -> str:
    """The command for an extra of ours, for the way this copy was installed."""
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        if (PACKAGE.parent / "pyproject.toml").is_file():
            return f"pip install -e '{PACKAGE.parent}[{extra}]'"
        return f"install what the extra `{extra}` in {DISTRIBUTION}'s pyproject.toml names"
    return f"pip install '{DISTRIBUTION}[{extra}]'"
