"""guided-diffusion's logger: lines of text and tables of means, to the terminal and to the files of a folder."""

import functools
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, TypeVar

from .runs.ranks import rank_told as get_rank_without_mpi_import
from .storage.files import json_text
from .training.log import ProgressFile

DEBUG, INFO, WARN, ERROR, DISABLED = range(10, 60, 10)

WIDEST = 30
"""Characters of a name or a value in a table."""

F = TypeVar("F", bound=Callable[..., Any])


class KVWriter:
    """What tables are written to."""

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        raise NotImplementedError


class SeqWriter:
    """What lines of text are written to."""

    def writeseq(self, seq: Iterable[str]) -> None:
        raise NotImplementedError


def _new(filename: str) -> TextIO:
    return open(filename, "w", encoding="utf-8")


class HumanOutputFormat(KVWriter, SeqWriter):
    """Lines, and tables with a frame, to an open file or to a new one."""

    def __init__(self, filename_or_file: str | TextIO):
        self.own_file = isinstance(filename_or_file, str)
        self.file = _new(filename_or_file) if self.own_file else filename_or_file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        shown = {
            self._truncate(name): self._truncate(f"{float(value):<8.3g}" if hasattr(value, "__float__") else str(value))
            for name, value in kvs.items()
        }
        names, values = (max(map(len, column), default=0) for column in (shown, shown.values()))
        frame = "-" * (names + values + 7)
        rows = [f"| {name:{names}} | {shown[name]:{values}} |" for name in sorted(shown, key=str.lower)]
        self.writeseq(["\n".join([frame, *rows, frame])])

    def _truncate(self, s: str) -> str:
        return s if len(s) <= WIDEST else s[: WIDEST - 3] + "..."

    def writeseq(self, seq: Iterable[str]) -> None:
        print(*seq, file=self.file, flush=True)

    def close(self) -> None:
        if self.own_file:
            self.file.close()


def _plain(kvs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: float(value) if hasattr(value, "dtype") else value for name, value in kvs.items()}


class JSONOutputFormat(KVWriter):
    """A JSON object a line."""

    def __init__(self, filename: str):
        self.file = _new(filename)

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        print(json_text(_plain(kvs)), file=self.file, flush=True)

    def close(self) -> None:
        self.file.close()


class CSVOutputFormat(KVWriter):
    """A line a table; columns may come later."""

    def __init__(self, filename: str):
        path = Path(filename)
        path.unlink(missing_ok=True)
        self._file = ProgressFile(path, step=0)
        path.touch()

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self._file.add(dict(sorted(_plain(kvs).items())))

    def close(self) -> None:
        """Every line is in the file already."""


class TensorBoardOutputFormat(KVWriter):
    """Events for TensorBoard, which must be installed; the n-th table is its step n."""

    def __init__(self, dir: str):
        from torch.utils.tensorboard import SummaryWriter

        self.dir, self.step, self.writer = dir, 1, SummaryWriter(dir)

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        for name, value in kvs.items():
            self.writer.add_scalar(name, float(value), self.step)
        self.writer.flush()
        self.step += 1

    def close(self) -> None:
        self.writer.close()


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> Any:
    """The writer `stdout`, `log`, `json`, `csv` or `tensorboard`, whose file is in the folder ev_dir."""
    os.makedirs(ev_dir, exist_ok=True)
    files = {
        "log": (HumanOutputFormat, f"log{log_suffix}.txt"),
        "json": (JSONOutputFormat, f"progress{log_suffix}.json"),
        "csv": (CSVOutputFormat, f"progress{log_suffix}.csv"),
        "tensorboard": (TensorBoardOutputFormat, f"tb{log_suffix}"),
    }
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    if format not in files:
        raise ValueError(f"log format: wanted stdout, {', '.join(files)}, got {format!r}")
    kind, name = files[format]
    return kind(os.path.join(ev_dir, name))


class Logger:
    """What is said, and named values until the next table of them.

    dir: of its files. comm: an MPI communicator, over which values are averaged; rank 0 alone then writes them.
    """

    DEFAULT: "Logger | None" = None
    CURRENT: "Logger | None" = None

    def __init__(self, dir: str, output_formats: Sequence[Any], comm: Any = None):
        self.name2val: dict[str, Any] = defaultdict(float)
        self.name2cnt: dict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir, self.output_formats, self.comm = dir, output_formats, comm

    def logkv(self, key: str, val: Any) -> None:
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        count = self.name2cnt[key]
        self.name2val[key] = (self.name2val[key] * count + val) / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        values = dict(self.name2val)
        if self.comm is not None:
            counted = {name: (value, self.name2cnt.get(name, 1)) for name, value in values.items()}
            values = mpi_weighted_mean(self.comm, counted)
        if values:
            for output in self.output_formats:
                if isinstance(output, KVWriter):
                    output.writekvs(values)
        self.name2val.clear()
        self.name2cnt.clear()
        return values

    def log(self, *args: Any, level: int = INFO) -> None:
        if level >= self.level:
            self._do_log(args)

    def _do_log(self, args: Iterable[Any]) -> None:
        for output in self.output_formats:
            if isinstance(output, SeqWriter):
                output.writeseq(map(str, args))

    def set_level(self, level: int) -> None:
        self.level = level

    def set_comm(self, comm: Any) -> None:
        self.comm = comm

    def get_dir(self) -> str:
        return self.dir

    def close(self) -> None:
        for output in self.output_formats:
            output.close()


def mpi_weighted_mean(comm: Any, local_name2valcount: Mapping[str, tuple[Any, int]]) -> dict[str, float]:
    """The mean of all ranks' values, {name: (value, count)}, weighted by their counts; on rank 0, else empty."""
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    for values in comm.gather(local_name2valcount) or []:
        for name, (value, count) in values.items():
            try:
                totals[name] += float(value) * count
            except ValueError:
                warn(f"{name}: {value!r} is no number to take a mean of")
            else:
                counts[name] += count
    return {name: totals[name] / count for name, count in counts.items()}


def configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None, log_suffix: str = ""
) -> None:
    """Begin to log in a folder: `dir`, else $OPENAI_LOGDIR, else a new one for temporary files.

    format_strs: as of `make_output_format`; else $OPENAI_LOG_FORMAT (stdout,log,csv), of ranks but the first
    $OPENAI_LOG_FORMAT_MPI (log), whose files' names tell the rank. comm: as of `Logger`.
    """
    new = datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
    folder = os.path.expanduser(dir or os.environ.get("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), new))
    os.makedirs(folder, exist_ok=True)
    rank = get_rank_without_mpi_import()
    if rank:
        log_suffix += f"-rank{rank:03}"
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT_MPI", "log") if rank else ("OPENAI_LOG_FORMAT", "stdout,log,csv")
        format_strs = os.environ.get(variable, default).split(",")
    outputs = [make_output_format(name, folder, log_suffix) for name in format_strs if name]
    Logger.CURRENT = Logger(folder, outputs, comm)
    log(f"logging to {folder}")


def _configure_default_logger() -> None:
    configure()
    Logger.DEFAULT = Logger.CURRENT


def get_current() -> Logger:
    """The logger in use; one as `configure()` makes it if there is none."""
    if Logger.CURRENT is None:
        _configure_default_logger()
    return Logger.CURRENT


def reset() -> None:
    """Go back to the logger that was there by default."""
    if Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT
        log("logging as before")


@contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """Log elsewhere for a while, as `configure` says."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        Logger.CURRENT.close()
        Logger.CURRENT = before


def logkv(key: str, val: Any) -> None:
    """Give a name a value in the next table."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Add a value to a name's mean in the next table."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Give names values in the next table."""
    for name, value in d.items():
        logkv(name, value)


def dumpkvs() -> dict[str, Any]:
    """Write the table and begin a new one; returns what was written."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The next table as it is by now."""
    return get_current().name2val


record_tabular, dump_tabular = logkv, dumpkvs


def log(*args: Any, level: int = INFO) -> None:
    """Say something, unless its level is below the logger's."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    log(*args, level=WARN)


def error(*args: Any) -> None:
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Say nothing below a level."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Average values over an MPI communicator."""
    get_current().set_comm(comm)


def get_dir() -> str:
    """The folder of the log's files."""
    return get_current().get_dir()


@contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds that the block takes to `wait_NAME` in the next table."""
    since = time.perf_counter()
    try:
        yield
    finally:
        getkvs()[f"wait_{scopename}"] += time.perf_counter() - since


def profile(n: str) -> Callable[[F], F]:
    """A decorator: `profile_kv` around every call of a function."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate
