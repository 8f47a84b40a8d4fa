"""Settings as frozen dataclasses: one field = one key of a YAML file = one flag of a script."""

import argparse
import dataclasses
import logging
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from numbers import Real
from typing import Any

import blobfile as bf

from .other_names import OTHER_NAMES, hint
from .shipped import read_yaml, shipped_yaml

log = logging.getLogger(__name__)


MOST = 2**31 - 1
"""What a whole number may be at most, where its setting does not say less or more."""

MOST_SEED, MOST_AT_A_TIME, MOST_SIDE = 2**64 - 1, 2**20, 2**14
"""Of seeds, of images in a batch, and of the pixels along a side."""

MOST_SAID = 1000
"""Characters of a sentence about bad input: its beginning and its end are kept."""


class BadInput(SystemExit):
    """What the user gave is wrong: one sentence, exit status 2."""

    def __init__(self, message: str):
        super().__init__(2)
        # What controls a terminal is written as an escape.
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        half = MOST_SAID // 2
        self.message = message if len(message) <= MOST_SAID else f"{message[:half]} … {message[-half:]}"


def quoted(value: Any) -> str:
    """A value as a sentence shows it: of a long one, the beginning."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are `BadInput`; a flag is written out."""

    def __init__(self, **about: Any):
        super().__init__(**about, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if word.startswith("--") and word.endswith("=--"):  # which argparse takes for no value at all
                self.error(f"argument {word[:-3]}: wanted a value, got --")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise BadInput(f"{message} (--help lists the flags)")


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """For a flag of `Parser`: what reads a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {least} to {most}, got {quoted(text)}")
        return value

    return read


def option(
    default: Any,
    help: str,
    path: bool | str = False,
    later: bool = False,
    words: Mapping[str, Any] | None = None,
    infinite: bool = False,
    most: int = MOST,
) -> Any:
    """A dataclass field with the help text of its flag.

    path: a file to read, in a YAML file relative to that file; a suffix: so are values that end with it. later: newer
    than results that it does not change at its default (`later_defaults`). words: values that a word stands for.
    infinite: a number that may be inf; no other may be. most: what a whole number is at most, its sign aside.
    """
    about = {"help": help, "path": path, "later": later, "words": words or {}, "infinite": infinite, "most": most}
    return dataclasses.field(default=default, metadata=about)


def is_path(field: dataclasses.Field, value: Any) -> bool:
    """Whether the value of a setting names a file to read."""
    path = field.metadata["path"]
    return bool(value) and (path is True or (bool(path) and str(value).endswith(path)))


def check_paths(*groups: Any) -> None:
    """Raise a ValueError for a setting that names a local file or folder that is not there."""
    for group in groups:
        for field in dataclasses.fields(group):
            path = getattr(group, field.name)
            if is_path(field, path) and "://" not in str(path) and not os.path.exists(path):
                raise ValueError(f"{field.name}: no such file or folder {path!r}")


def later_defaults(*groups: type) -> dict[str, Any]:
    """The flags that came later: at these values, a result is the same as from before there was the flag."""
    return {
        field.name: field.default for group in groups for field in dataclasses.fields(group) if field.metadata["later"]
    }


def parse_value(text: Any, kind: Any, key: str) -> Any:
    """The value of one setting from a flag's text or a YAML scalar, as the field's type `kind` wants it."""
    optional = isinstance(kind, types.UnionType)
    if optional:
        if text is None or text == "":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        word = str(text).lower()
        if word in words:
            return words[word]
        raise ValueError(f"{key}: wanted True or False, got {quoted(text)}")
    fits = isinstance(text, (str, Real, date, os.PathLike)) and not (isinstance(text, bool) and kind is not str)
    if not fits or (kind is int and isinstance(text, float) and not text.is_integer()):
        raise ValueError(f"{key}: wanted {kind.__name__}, got {quoted(text)}")
    try:
        return kind(text)
    except (ValueError, OverflowError, TypeError):
        raise ValueError(f"{key}: wanted {kind.__name__}, got {quoted(text)}") from None


def numbers(key: str, text: str, kind: type) -> list[Any]:
    """The values of a setting that lists them, like 1,2,2."""
    return [parse_value(part, kind, key) for part in text.split(",")]


def _fields(groups: tuple[type, ...], without: Container[str] = ()) -> dict[str, tuple[dataclasses.Field, Any]]:
    found = {}
    for group in groups:
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name not in without:
                found[field.name] = (field, hints[field.name])
    return found


def _check_size(key: str, value: Any, infinite: bool, most: int) -> None:
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not infinite)):
        raise ValueError(f"{key}: wanted a finite number, got {value}")
    if isinstance(value, int) and abs(value) > most:
        raise ValueError(f"{key}: wanted at most {most}, got {quoted(value)}")


def merge(groups: tuple[type, ...], *layers: tuple[str, Mapping[str, Any]], without: Container[str] = ()) -> list[Any]:
    """An instance of every dataclass in `groups` from layers (source, {key: value}), the later one winning.

    without: fields that are no keys here. A ValueError names the source and the key that is unknown, and whose it is or
    the nearest right one.
    """
    fields = _fields(groups, without)
    values: dict[str, Any] = {}
    for source, layer in layers:
        for key in layer:
            for other in OTHER_NAMES.get(key, set()) - set(layer):
                values.pop(other, None)
        for key, value in layer.items():
            if key not in fields:
                raise ValueError(f"{source}: unknown key {quoted(key)}{hint(key, fields)}")
            field, kind = fields[key]
            words = field.metadata["words"]
            values[key] = words[value] if str(value) in words else parse_value(value, kind, f"{source}: {key}")
            about = field.metadata
            _check_size(f"{source}: {key}", values[key], about["infinite"], about["most"])
    return [
        group(**{field.name: values[field.name] for field in dataclasses.fields(group) if field.name in values})
        for group in groups
    ]


def parse_args(
    description: str,
    groups: tuple[type, ...],
    argv: list[str] | None = None,
    default_configs: Sequence[str] = (),
    without: Container[str] = (),
    unread: tuple[type, ...] = (),
) -> list[Any]:
    """Command line to one instance of every dataclass in `groups`: defaults < `--config` files < flags.

    without: fields of the groups that are no flags here. unread: groups of other scripts whose fields a `--config` file
    may have all the same. A group's method `remark(given, explicit)`, if it has one, is asked for a warning about what
    was given and what was not; explicit: by flags, not by files.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = f" (default: {', then '.join(default_configs)})" if default_configs else ""
    parser.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        help="YAML file of settings, one `flag: value` a line, or the name of one that comes with the package (emoji); "
        "a later file wins, and flags win over files" + default,
    )
    for group in groups:
        section = parser.add_argument_group(group.__doc__)
        hints = typing.get_type_hints(group)
        # A group's own flags come before those it shares with others.
        for field in sorted(dataclasses.fields(group), key=lambda field: field.name not in group.__annotations__):
            if field.name in without:
                continue
            is_bool = bool in (hints[field.name], *typing.get_args(hints[field.name]))
            shown = "" if field.default in ("", None) else f" (default: {field.default})"
            section.add_argument(
                f"--{field.name}",
                default=argparse.SUPPRESS,
                metavar="BOOL" if is_bool else field.name.rpartition("_")[2].upper(),
                help=field.metadata["help"].replace("%", "%%") + shown,
                nargs="?" if is_bool else None,
                const="True" if is_bool else None,
            )
    known, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        parser.error(f"{quoted(unknown[0])} belongs to no flag; each takes one value (--config A --config B)")
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        parser.error(f"unknown flag {unknown[0]}{hint(name, _fields(groups, without), '--')}")
    flags = vars(known)
    files = flags.pop("config", None) or list(default_configs)
    with exit_on_bad_input():
        return configure(groups, files, ("command line", flags), without, unread)


def configure(
    groups: tuple[type, ...],
    files: Sequence[str],
    over: tuple[str, Mapping[str, Any]],
    without: Container[str] = (),
    unread: tuple[type, ...] = (),
) -> list[Any]:
    """As `merge`, of the settings in configuration files and those over them, (source, {key: value})."""
    known_here, elsewhere = _fields(groups, without), _fields(unread)
    read = {
        file: {key: value for key, value in read_yaml(file).items() if key in known_here or key not in elsewhere}
        for file in files
    }
    layers = [(f"--config {file}", _from_folder(bf.dirname(shipped_yaml(file)), read[file], groups)) for file in files]
    configs = merge(groups, *layers, over, without=without)
    given = set(over[1]).union(*(layer for _, layer in layers))
    for config in configs:
        if hasattr(config, "remark") and (remark := config.remark(given, over[1])):
            log.warning(remark)
    return configs


def _from_folder(folder: str, values: dict[str, Any], groups: tuple[type, ...]) -> dict[str, Any]:
    """The values of a configuration file with its relative paths taken from the file's folder."""
    fields = _fields(groups)
    return {
        key: bf.join(os.path.abspath(folder) if "://" not in folder else folder, value)
        if key in fields and is_path(fields[key][0], value) and "://" not in str(value)
        else value
        for key, value in values.items()
    }


@contextmanager
def exit_on_bad_input(flag: str = "") -> Iterator[None]:
    """Turn a ValueError or OSError inside into `BadInput`: for what the user gave.

    flag: that gave the files of an OSError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        said = str(error)
        if flag and isinstance(error, OSError):
            said = f"{flag}: {error.filename}: {error.strerror}" if error.filename else f"{flag}: {error}"
        raise BadInput(" ".join(said.split())) from None


def resolved(*groups: Any) -> dict[str, Any]:
    """All settings of a run as one flat dict, local paths made absolute: what config.yaml holds."""
    settings = {}
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            is_local = is_path(field, value) and "://" not in str(value)
            settings[field.name] = os.path.abspath(value) if is_local else value
    return settings


def check_seed(seed: int) -> None:
    """Raise a ValueError for a seed that Philox cannot take."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"seed: wanted a number from 0 to 2^64 − 1, got {seed}")
