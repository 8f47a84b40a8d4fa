"""What a run shows while it works, and how it is stopped."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ..storage.files import json_text
from .ranks import Job

SECONDS_BETWEEN_LINES = 10
"""Where there is no terminal for a bar."""

SECONDS_BETWEEN_REPORTS = 2
"""Of a rank among several, to the others."""

ONE_KEY_S = 0.3
"""A launcher passes on the Ctrl-C that a rank got by itself: signals so close together are one."""


class Progress:
    """How far the whole job is, shown by rank 0: a bar on a terminal, else lines, or JSON lines."""

    def __init__(self, job: Job, counter: str, samples: int, done: int, steps: int, log_json: bool):
        self._job, self._counter, self._steps, self._json = job, counter, steps, log_json
        self._samples, self._before, self._started, self._said = samples, done, time.monotonic(), time.monotonic()
        quiet = True if log_json or job.rank else None
        self._bar = tqdm(total=samples, initial=done, unit="image", dynamic_ncols=True, disable=quiet)
        self._unsaid, self._reported = 0, -math.inf

    def add(self, image_steps: int) -> None:
        """Count so many steps of an image; other ranks are asked and told at most every few seconds."""
        self._unsaid += image_steps
        if self._job.size > 1 and time.monotonic() - self._reported < SECONDS_BETWEEN_REPORTS:
            self._job.get_on()
        else:
            self.report()

    def report(self) -> None:
        """Tell the other ranks, and show what all of them have made."""
        total = self._job.add(self._counter, self._unsaid)
        self._unsaid, self._reported = 0, time.monotonic()
        if self._job.rank == 0:
            self._show(self._made(total))

    def _made(self, image_steps: int) -> int:
        """Of so many steps of images, the images; what is made a second time for a lost rank is not counted."""
        return min(image_steps // self._steps, self._samples - self._before)

    def _show(self, made: int) -> None:
        done = self._before + made
        if not self._bar.disable:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self.say(made)

    def say(self, made: int) -> None:
        """One line: how many are done, how fast, and how long it still takes."""
        self._said = time.monotonic()
        rate = made / max(1e-9, self._said - self._started)
        left = self._samples - self._before - made
        line = {
            "samples": self._before + made,
            "of": self._samples,
            "images_per_s": round(rate, 3),
            "seconds_left": round(left / rate) if rate else None,
        }
        known = {key: value for key, value in line.items() if value is not None}
        text = json_text(line) if self._json else ", ".join(f"{key} {value}" for key, value in known.items())
        sys.stderr.write(f"{text}\n")

    def close(self) -> None:
        self.report()
        self._bar.close()
        if self._json and self._job.rank == 0:
            self.say(self._made(self._job.add(self._counter, 0)))


class Signals:
    """SIGTERM and SIGINT: stop at the next step, or at the end of the shard if that comes within `grace` seconds.

    A second Ctrl-C ends at once.
    """

    def __init__(self, grace: float, job: Job, counter: str):
        self._grace, self._job, self._counter = grace, job, counter
        self._asked: tuple[int, float] | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        self._asked = self._asked or (number, now)
        if number == signal.SIGINT and now - self._asked[1] > ONE_KEY_S:
            raise KeyboardInterrupt

    def stop_if_asked(self, shard_is_done: bool) -> None:
        """Exit if a signal came: a rank that ends takes the job along, so it first waits for the others' shards."""
        if self._asked is None:
            return
        number, since = self._asked
        if not shard_is_done and time.monotonic() - since < self._grace:
            return
        if self._job.add(self._counter) == 1:
            name = signal.Signals(number).name
            sys.stderr.write(f"stopped by {name}; the same command goes on from the last whole shard\n")
        while self._job.add(self._counter, 0) < self._job.size and time.monotonic() - since < self._grace:
            time.sleep(0.1)
        raise SystemExit(128 + number)
