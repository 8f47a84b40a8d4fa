"""Self-contained HTML pages: tables, pictures, and pictures to compare by a slider. Nothing comes from outside."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #8884; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.5rem 0; }
figcaption, .note { color: #777; }
img { max-width: 100%; image-rendering: pixelated; }
svg { max-width: 100%; height: auto; background: #fff; }
.scroll { overflow-x: auto; }
.slider { position: relative; display: inline-block; line-height: 0; }
.slider .over { position: absolute; inset: 0; overflow: hidden; width: 50%; border-right: 2px solid #fff; }
.slider .over img { max-width: none; }
.slider input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
"""

SCRIPT = """
for (const slider of document.querySelectorAll(".slider")) {
  const over = slider.querySelector(".over");
  const move = () => { over.style.width = slider.querySelector("input").value + "%"; };
  slider.querySelector("input").addEventListener("input", move);
  move();
}
"""


def page(title: str, *parts: str) -> str:
    """A whole page of parts that are HTML already."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, note: bool = False) -> str:
    return f"<p{' class=note' if note else ''}>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>'


def picture(png: bytes, caption: str) -> str:
    """A PNG with its caption."""
    return (
        f'<figure><img src="{_data(png)}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def svg(figure: Any) -> str:
    """A figure of matplotlib as a picture in the page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def slider(before: bytes, after: bytes, caption: str) -> str:
    """Two PNGs of one size, one over the other: moving the slider uncovers the left one."""
    left, right = _data(before), _data(after)
    text = escape(caption)
    return (
        f'<figure><div class="slider"><img src="{right}" alt="right: {text}"><div class="over"><img src="{left}" '
        f'alt="left: {text}"></div><input type="range" min="0" max="100" value="50" aria-label="compare: {text}"></div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
