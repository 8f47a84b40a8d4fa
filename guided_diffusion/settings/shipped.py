"""What comes with the package: configurations, tables, and embedded models."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent


def shipped(*names: str) -> Path:
    """A path below `configs`: inside an installed package, or beside it in a clone."""
    inside = PACKAGE / "configs"
    return (inside if inside.is_dir() else PACKAGE.parent / "configs").joinpath(*names)
