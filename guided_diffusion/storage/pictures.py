"""Arrays as pictures: grids of samples and rows that compare them."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import blobfile as bf
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .files import write_atomically

WHITE = 255
UINT8_RULES = {False: "trunc(127.5x + 127.5)", True: "trunc(127.5x + 128)"}
"""What `to_uint8` does, for a manifest: upstream's rule, and the nearest level, as DiT and EDM2 have it."""
SHOWN = 16
PANEL_WIDTH = 550

MADE_BY = "made by"
"""The key of a PNG's text."""


def to_uint8(x: Tensor, nearest: bool = False) -> np.ndarray:
    """[N, C, H, W] in [−1, 1] to [N, H, W, C] uint8, by one of the `UINT8_RULES`: upstream's, or the nearest level.

    A FloatingPointError names images that are not finite, which would come out black.
    """
    wrong = (~x.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if wrong:
        raise FloatingPointError(f"images {', '.join(map(str, wrong[:8]))} of {len(x)} are not finite")
    levels = 127.5 * x + 128 if nearest else (x + 1) * 127.5
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """[N, H, W, 3] uint8 as one picture, row by row on white."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    padded = np.full((rows * columns, height + gap, width + gap, channels), WHITE, np.uint8)
    padded[:n, :height, :width] = images
    sheet = padded.reshape(rows, columns, height + gap, width + gap, channels).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * (height + gap), columns * (width + gap), channels)[: -gap or None, : -gap or None]


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """Repeat the pixels of [H, W, 3] a whole number of times, to at most `side` pixels wide, at least once."""
    times = max(1, side // image.shape[1])
    return image.repeat(times, axis=0).repeat(times, axis=1)


def reduced(images: np.ndarray, side: int) -> np.ndarray:
    """[N, H, W, 3] uint8 with means over squares of pixels, so that no side has more than `side` of them."""
    times = max(1, -(-max(images.shape[1:3]) // side))
    return np.stack([np.asarray(Image.fromarray(image).reduce(times)) for image in images])


def heat(values: np.ndarray) -> np.ndarray:
    """[N, H, W] in [0, 1] as dark-blue-to-yellow pictures [N, H, W, 3] uint8."""
    stops = np.array([[18, 18, 66], [140, 40, 120], [240, 120, 60], [255, 245, 150]], dtype=np.float64)
    positions = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(values, positions, stops[:, c]) for c in range(3)], axis=-1).astype(np.uint8)


def masked(images: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Images [N, H, W, 3] uint8 in grey under the colours of `heat` of a mask's share [N, H, W] in [0, 1]."""
    grey = images.mean(axis=3, keepdims=True)
    return (0.5 * grey + 0.5 * heat(share)).astype(np.uint8)


def titled_panels(panels: Sequence[tuple[str, np.ndarray]], gap: int = 16) -> np.ndarray:
    """Pictures [H, W, 3] side by side on white, each under its title."""
    font = ImageFont.load_default(18)
    top = 34
    height = top + max(picture.shape[0] for _, picture in panels) + gap
    width = gap + sum(picture.shape[1] + gap for _, picture in panels)
    sheet = Image.new("RGB", (width, height), "white")
    draw, left = ImageDraw.Draw(sheet), gap
    for title, picture in panels:
        draw.text((left, 8), title, fill="black", font=font)
        sheet.paste(Image.fromarray(picture), (left, top))
        left += picture.shape[1] + gap
    return np.asarray(sheet)


def comparison(
    unguided: np.ndarray, blurred_share: np.ndarray, guided: np.ndarray, mask: str = "attention"
) -> np.ndarray:
    """The first samples as three panels; [N, H, W, 3] uint8, [N, H, W] in [0, 1], [N, H, W, 3] uint8."""
    columns = max(1, round(min(len(unguided), SHOWN) ** 0.5))
    panels = [
        ("unguided", unguided),
        (f"{mask} mask (brighter: more steps)", masked(guided, blurred_share)),
        ("guided" if mask != "attention" else "self-attention guidance", guided),
    ]
    return titled_panels([(title, enlarge(grid(images[:SHOWN], columns), PANEL_WIDTH)) for title, images in panels])


def save_png(picture: np.ndarray, path: str | Path, made_by: str = "") -> None:
    """Write [H, W, 3] or [H, W] uint8 as PNG, atomically. made_by: a text that goes along, for `maker_of_png`."""
    text = PngInfo()
    if made_by:
        text.add_text(MADE_BY, made_by)
    stream = io.BytesIO()  # given a file, Pillow hides the system's errors
    Image.fromarray(picture).save(stream, format="png", pnginfo=text)
    write_atomically(path, lambda file: file.write(stream.getbuffer()))


def maker_of_png(path: str | Path) -> str:
    """What `save_png` was told to have made this picture; empty where it was not told, or there is no such picture."""
    try:
        with bf.BlobFile(str(path), "rb") as file, Image.open(file) as picture:
            return str(picture.info.get(MADE_BY, ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, bf.Error):
        return ""


def labelled_grid(
    images: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    least: int = 80,
    gap: int = 4,
    font: ImageFont.FreeTypeFont | None = None,
) -> np.ndarray:
    """[rows · columns, H, W, 3] uint8 as a table with names to the left and above; cells of at least so many pixels.

    font: for letters that Pillow's own has not.
    """
    times = max(1, -(-least // images.shape[2]))
    images = images.repeat(times, axis=1).repeat(times, axis=2)
    sheet = grid(images, len(columns), gap)
    font = font or ImageFont.load_default(13)
    left = gap + math.ceil(max(font.getlength(row) for row in rows)) + 2 * gap
    top = 48 if title else 28
    whole = Image.new("RGB", (left + sheet.shape[1] + gap, top + sheet.shape[0] + gap), "white")
    whole.paste(Image.fromarray(sheet), (left, top))
    draw = ImageDraw.Draw(whole)
    draw.text((gap, gap), title, fill="black", font=font)
    for number, row in enumerate(rows):
        middle = top + number * (images.shape[1] + gap) + images.shape[1] // 2
        draw.text((gap, middle), row, fill="black", font=font, anchor="lm")
    for number, column in enumerate(columns):
        middle = left + number * (images.shape[2] + gap) + images.shape[2] // 2
        draw.text((middle, top - 3 * gap), column, fill="black", font=font, anchor="mm")
    return np.asarray(whole)


def save_animation(frames: Sequence[np.ndarray], path: str | Path, milliseconds: int = 500) -> None:
    """Write pictures [H, W, 3] uint8, smaller ones padded with white, as an endless animation: .gif or .webp."""
    height, width = (max(frame.shape[axis] for frame in frames) for axis in (0, 1))
    padding = [((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0)) for frame in frames]
    first, *rest = [
        Image.fromarray(np.pad(frame, pad, constant_values=WHITE)) for frame, pad in zip(frames, padding, strict=True)
    ]
    kind = {".gif": "gif", ".webp": "webp"}[Path(path).suffix]
    how = {"lossless": True} if kind == "webp" else {}
    stream = io.BytesIO()
    first.save(stream, format=kind, save_all=True, append_images=rest, duration=milliseconds, loop=0, **how)
    write_atomically(path, lambda file: file.write(stream.getbuffer()))
