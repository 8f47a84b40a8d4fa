"""What reports are made of, as Markdown and as self-contained HTML pages: nothing comes from outside."""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..settings.shipped import how_to_install

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Line:
    """Pictures of one name under one another: PNGs, each with a caption, and with one that a pointer brings over it."""

    name: str
    text: str
    pictures: Sequence[tuple[str, bytes, bytes | None]]


@dataclass(frozen=True)
class Curve:
    """A figure of matplotlib and what is said below it.

    draw: makes it, an ImportError where that is not installed; None where the caption says why there is none.
    """

    draw: Callable[[], Any] | None
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A table of texts with its title, what explains it, and notes below; without a head there is no table.

    Pages alone show pictures and curves; they stand above the table.
    """

    title: str
    text: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    curves: Sequence[Curve] = ()
    lines: Sequence[Line] = ()


def measured(number: Mapping[str, Any] | None, digits: int = 2, sign: str = "") -> str:
    """A value with its standard error as text. sign: `+` to show that of positive values."""
    if number is None or number["value"] is None:
        return "–"
    error = "" if number["error"] is None else f" ± {number['error']:.{digits}f}"
    return f"{number['value']:{sign}.{digits}f}{error}"


def _plain(text: str, in_table: bool = False) -> str:
    """A text as Markdown shows it: a tag in it is none, and a line or a cell does not end in it."""
    text = re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", " ".join(text.split()))
    return text.replace("|", r"\|") if in_table else text


def as_markdown(title: str, introduction: Sequence[str], sections: Sequence[Section]) -> str:
    """A report as Markdown."""
    lines = [f"# {_plain(title)}", ""]
    for text in introduction:
        lines += [_plain(text), ""]
    for section in sections:
        lines += [f"## {_plain(section.title)}", ""] if section.title else []
        lines += [_plain(section.text), ""] if section.text else []
        for cells in (section.head, ["---"] * len(section.head), *section.rows) if section.head else ():
            lines.append(" | ".join(["", *(_plain(cell, in_table=True) for cell in cells), ""]).strip())
        lines += [""] if section.head else []
        for note in section.notes:
            lines += [_plain(note), ""]
    return "\n".join(lines)


def templates(*folders: Path) -> Environment:
    """The templates of this room and of more folders; what they are given is escaped."""
    environment = Environment(
        loader=FileSystemLoader([TEMPLATES, *folders]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"data_url": _data_url, "drawn": _drawn, "album": _album, "size": _size}
    return environment


def _album(sections: Sequence[Section]) -> list[bytes]:
    """The pictures of all sections, each once."""
    lines = [line for section in sections for line in section.lines]
    return list(dict.fromkeys(png for line in lines for _, *pngs in line.pictures for png in pngs if png))


def _size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _drawn(draw: Callable[[], Any]) -> Markup:
    """A curve as SVG in the page."""
    try:
        figure = draw()
    except ImportError:
        return Markup('<p class="note">No curve here: it needs matplotlib, {}.</p>').format(how_to_install("report"))
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])
