"""What a training run tells of itself: a bar, progress.csv, and TensorBoard's events where that is installed."""

import csv
import io
import time
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..storage.files import write_atomically, writing

QUARTILES = 4


class ProgressFile:
    """A CSV of one line a step; columns may come later, and lines after `step`, of a run that was cut off, go."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self._rows: list[dict[str, str]] = []
        self._columns: list[str] = []
        if path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                self._rows = [row for row in reader if _is_whole(row) and int(row["step"]) <= step]
                self._columns = list(reader.fieldnames or [])
            self._write_all()

    def add(self, line: dict[str, float]) -> None:
        """Append a line; where it has new columns, the file is written anew."""
        row = {name: f"{value:.9g}" if isinstance(value, float) else str(value) for name, value in line.items()}
        self._rows.append(row)
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write_all()
        else:
            with writing(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(self._text([row], header=False))

    def _write_all(self) -> None:
        text = self._text(self._rows, header=True)
        write_atomically(self.path, lambda file: file.write(text.encode()))

    def _text(self, rows: list[dict[str, str]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _is_whole(row: dict[str, str]) -> bool:
    return (row.get("step") or "").isdecimal() and None not in row.values()


def _tensorboard(folder: Path, step: int):
    """TensorBoard's writer, which hides what came after `step`; None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class TrainingLog:
    """Means over the steps between two lines, and where they go.

    folder: of progress.csv. step: done so far. total: steps to do, None if there is no end.
    """

    def __init__(self, folder: Path, step: int, total: int | None):
        self._file = ProgressFile(folder / "progress.csv", step)
        self._events = _tensorboard(folder, step)
        self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=None)
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._images, self._since = 0, time.perf_counter()

    def advance(self, images: int) -> None:
        """One step over so many images is done."""
        self._images += images
        self._bar.update()

    def add(self, name: str, values: Tensor) -> None:
        """Values, of any number, that go into a column's mean; those that are not finite do not."""
        values = values[values.isfinite()]
        if len(values):
            self._sums[name] = self._sums.get(name, 0.0) + float(values.double().sum())
            self._counts[name] = self._counts.get(name, 0) + len(values)

    def add_losses(self, losses: dict[str, Tensor], t: Tensor, num_timesteps: int) -> None:
        """Losses [N] at steps t [N]: also by quarter of the timesteps, NAME_q0 nearest the image to NAME_q3."""
        quarter = QUARTILES * t // num_timesteps
        for name, values in losses.items():
            self.add(name, values)
            for q in range(QUARTILES):
                self.add(f"{name}_q{q}", values[quarter == q])

    def write(self, step: int, images: int) -> None:
        """A line for this step, after so many images in all; the means begin anew."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        speed = {"images_per_s": self._images / (time.perf_counter() - self._since)}
        line = {"step": step, "images": images, **dict(sorted(means.items(), key=_column_order)), **speed}
        self._file.add(line)
        if self._events:
            for name, value in (means | speed).items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        shown = {name: value for name, value in line.items() if "_q" not in name}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items() if name in means})
        if self._bar.disable:
            print(" ".join(f"{name} {value:.6g}" for name, value in shown.items()), flush=True)
        self._begin()

    def close(self) -> None:
        self._bar.close()
        if self._events:
            self._events.close()


def _column_order(column: tuple[str, float]) -> tuple[bool, str]:
    """Whole means first, then those of quarters, which may not all be there yet in the first line."""
    return "_q" in column[0], column[0]
