"""Local folders of diffusers' format: their parts, read from .safetensors alone. Nothing is fetched."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..settings.shipped import how_to_install
from ..storage.hashes import check_beside


def diffusers_for(what: str) -> ModuleType:
    """The library, made silent; a ValueError says that `what` needs the extra that brings it."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{what} needs the extra `stable-diffusion` ({error}): {how_to_install('stable-diffusion')}"
        ) from None
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    return diffusers


@contextmanager
def said_of(flag: str) -> Iterator[None]:
    """Let a ValueError begin with the flag that gave the folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def part(folder: Path, name: str) -> Path:
    """The folder of a model's part; a ValueError if there is none."""
    if not (folder / name).is_dir():
        raise ValueError(f"{folder} has no {name!r}; wanted a model folder of diffusers' format")
    return folder / name


def check_class(where: Path, kind: Any) -> None:
    """Raise a ValueError where the folder's configuration is not of this class."""
    given = read_json(where / "config.json")
    said = given.get("_class_name") or (given.get("architectures") or [kind.__name__])[0]
    if said != kind.__name__:
        raise ValueError(f"{where}: wanted a {kind.__name__}, got a {said}")


def read_network(where: Path, kind: Any) -> nn.Module:
    """The network of this class in a folder."""
    check_class(where, kind)
    files = [file.name for file in where.glob("*.safetensors")]
    if not files:
        raise ValueError(f"{where} has no .safetensors file; other formats are not read")
    for file in files:
        check_beside(where / file)
    variant = "fp16" if all(".fp16." in file for file in files) else None
    return loaded(
        lambda: kind.from_pretrained(where, local_files_only=True, use_safetensors=True, variant=variant), where
    )


def read_tokenizer(where: Path, kind: Any) -> Any:
    """The tokenizer of this class in a folder."""
    return loaded(lambda: kind.from_pretrained(where, local_files_only=True), where)


def read_scheduler(where: Path, diffusers: ModuleType) -> Any:
    """The scheduler of diffusers that a folder describes."""
    name = str(read_json(where / "scheduler_config.json").get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"{where}: {name!r} is no scheduler of diffusers")
    return loaded(lambda: kind.from_pretrained(where, local_files_only=True), where)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no such file {str(path)!r}; wanted a model folder of diffusers' format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted an object, got {type(value).__name__}")
    return value


def check_unread(where: Path, config: Any, keys: tuple[str, ...]) -> None:
    """Raise a ValueError where a network's configuration has a key that asks for what is not done here."""
    for key in keys:
        if config.get(key) is not None:
            raise ValueError(f"{where}: {key}: such networks are not read; wanted none, got {config[key]!r}")


def loaded(build: Callable[[], Any], where: Path) -> Any:
    """What `build` makes of files; whatever it raises is about the files."""
    try:
        return build()
    except Exception as error:
        # diffusers and transformers report damaged files by any type.
        raise ValueError(f"{where}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
