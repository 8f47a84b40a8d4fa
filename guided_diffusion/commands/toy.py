"""Where guidances move the density, in two dimensions in which the score is known at every noise level.

Four classes, each a branch with twigs. The model's score is the exact one of this density blurred a little, as training
leaves it; the weak model's that of the same density blurred more. Guidances that need no attention act on the same
noise; their points are compared with the density that was not blurred. Seconds on a CPU.

  python scripts/toy.py --out toy.png
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..analysis.toy import CLASSES, ExactDenoiser, Mixture, branches, compare, guidances, sampled
from ..diffusion.diffusion import build_diffusion
from ..guidance.base import evaluations, weak_evaluations
from ..runs.ranks import command
from ..settings.model import DiffusionConfig
from ..settings.options import Parser, exit_on_bad_input, whole
from ..storage.files import json_text, write_atomically
from ..storage.pictures import save_png, titled_panels

SIDE, REACH = 300, 1.9
COLOURS = np.array([[200, 30, 60], [20, 110, 200], [230, 140, 0], [20, 150, 70]], dtype=np.uint8)
PANELS_A_ROW = 4
PASSES = ("evaluations", "weak_evaluations")


def ground(truth: Mixture) -> np.ndarray:
    """A density in grey, [SIDE, SIDE, 3] uint8."""
    line = torch.linspace(-REACH, REACH, SIDE)
    places = torch.stack(torch.meshgrid(line, line.flip(0), indexing="xy"), dim=-1).reshape(-1, 2)
    density = truth.log_density(places, torch.full((len(places),), CLASSES)).exp().reshape(SIDE, SIDE)
    grey = 255 - 110 * (density / density.quantile(0.995)).clamp(max=1).sqrt()
    return grey[:, :, None].expand(-1, -1, 3).round().numpy().astype(np.uint8)


def panel(points: Tensor, y: Tensor, behind: np.ndarray) -> np.ndarray:
    """Points in the colours of their classes over a ground, [SIDE, SIDE, 3] uint8."""
    picture = behind.copy()
    across, down = ((points * torch.tensor([1.0, -1.0]) + REACH) / (2 * REACH) * SIDE).long().unbind(1)
    inside = (across >= 0) & (across < SIDE) & (down >= 0) & (down < SIDE)
    picture[down[inside], across[inside]] = COLOURS[y[inside]]
    return picture


def figure(panels: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """The panels in rows, each under its title."""
    rows = [titled_panels(panels[i : i + PANELS_A_ROW]) for i in range(0, len(panels), PANELS_A_ROW)]
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )


def _line(name: str, found: Mapping[str, float]) -> str:
    """A line of the table for people."""
    passes = " + ".join(f"{found[by]}" for by in PASSES if found[by])
    return f"{name:<30} {passes:>9} {found['outside']:>9.1%} {found['moved']:>7.1%} {1000 * found['distance']:>10.1f}"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted 0 or more, got {text!r}")
    return value


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figure to this PNG")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--points", type=whole(8, 10**5), default=2000, help="in all (default %(default)s)")
    parser.add_argument("--steps", type=whole(2, 1000), default=50, help="of DDIM (default %(default)s)")
    parser.add_argument(
        "--smoothing", type=_positive, default=0.05, help="std of the model's blur (default %(default)s)"
    )
    parser.add_argument(
        "--weak_smoothing", type=_positive, default=0.15, help="std of the weak model's blur (default %(default)s)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="of points and noise (default %(default)s)")
    args = parser.parse_args()
    process = build_diffusion(DiffusionConfig(noise_schedule="cosine", timestep_respacing=str(args.steps))).process
    truth = branches()
    model, weak = (ExactDenoiser(truth.smoothed(by), process) for by in (args.smoothing, args.weak_smoothing))
    y = torch.arange(args.points) % CLASSES
    drawn, again = (truth.draw(y, torch.Generator().manual_seed(2 * args.seed + i)) for i in range(2))
    behind = ground(truth)
    found, panels = {}, []

    def add(name: str, points: Tensor, *passes: int) -> None:
        found[name] = dict(zip(PASSES, passes, strict=True)) | vars(compare(points, y, truth, drawn))
        panels.append((name, panel(points, y, behind)))
        print(_line(name, found[name]))

    print(f"{'guidance':<30} {'passes':>9} {'outside':>9} {'moved':>7} {'1000 dist.':>10}")
    add("the density itself", again, 0, 0)
    for name, guided_by in guidances(weak).items():
        points = sampled(model, guided_by, y, args.seed)
        add(name, points, evaluations(guided_by, process), weak_evaluations(guided_by, process))
    with exit_on_bad_input("--out"):
        if args.out:
            save_png(figure(panels), args.out)
    with exit_on_bad_input("--json"):
        if args.json:
            settings = {key: value for key, value in vars(args).items() if key not in ("out", "json")}
            text = json_text({"settings": settings, "found": found}, indent=1) + "\n"
            write_atomically(args.json, lambda file: file.write(text.encode()))
