"""How clean is the ground of samples whose pictures all have a plain one, as the embedded model's do.

Looks at the frame of --border pixels: grain is where more than 1 % of it is off by more than 4 levels; a square of
noise is where its pixels have a standard deviation above 16 levels. Shares of samples, with their standard errors.

  python scripts/grain.py runs/first runs/other --json grain.json
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluations.measured import Measured, of_share
from evaluations.sources import open_source

from ..runs.ranks import command
from ..settings.options import exit_on_bad_input
from ..storage.files import json_text, write_atomically

OFF, SHARE, SQUARE = 4, 0.01, 16.0
AT_A_TIME = 4096


def frame(images: NDArray[np.uint8], border: int) -> NDArray[np.float32]:
    """The frame of images [N, H, W, 3]: its pixels, [N, P, 3]."""
    inside = np.zeros(images.shape[1:3], dtype=bool)
    inside[border:-border, border:-border] = True
    return images[:, ~inside].astype(np.float32)


def ground(images: NDArray[np.uint8], border: int, level: float) -> tuple[NDArray, NDArray]:
    """Which images [N, H, W, 3] have grain, and which are squares of noise: [N] bool each."""
    pixels = frame(images, border)
    off = (np.abs(pixels - level) > OFF).any(axis=2).mean(axis=1)
    return off > SHARE, pixels.reshape(len(pixels), -1).std(axis=1) > SQUARE


def measure(path: str, border: int, level: float) -> dict[str, Measured]:
    """Shares of grain and of squares of noise among samples."""
    images = open_source(path).images
    if images is None:
        raise ValueError(f"{path}: wanted pictures, got statistics alone")
    if len(images) < 2:
        raise ValueError(f"{path}: wanted 2 pictures or more, got {len(images)}")
    if not 0 < 2 * border < min(images.size):
        raise ValueError(f"--border: wanted 1 to {(min(images.size) - 1) // 2}, got {border}")
    starts = range(0, len(images), AT_A_TIME)
    parts = [ground(images.read(i, min(i + AT_A_TIME, len(images))), border, level) for i in starts]
    grain, squares = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
    return {"n": len(images), "grain": of_share(grain), "squares": of_share(squares)}


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", metavar="SAMPLES", nargs="+", help="folders of runs or pictures, or npz files")
    parser.add_argument("--border", type=int, default=2, help="pixels of the frame (default %(default)s)")
    parser.add_argument("--ground", type=float, default=128, help="level of the plain ground (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the shares to this file as well")
    args = parser.parse_args()
    with exit_on_bad_input():
        found = {path: measure(path, args.border, args.ground) for path in args.samples}
    for path, row in found.items():
        shares = ", ".join(f"{name} {row[name].value:.1%} ± {row[name].error:.1%}" for name in ("grain", "squares"))
        print(f"{path}: {row['n']} samples, {shares}")
    if args.json:
        plain = {
            path: row | {name: row[name].described() for name in ("grain", "squares")} for path, row in found.items()
        }
        with exit_on_bad_input("--json"):
            write_atomically(args.json, lambda file: file.write((json_text(plain, indent=1) + "\n").encode()))
