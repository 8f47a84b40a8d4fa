"""A process among those of its job: what they share, the work that each takes, and how they notice a lost one."""

import atexit
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as AnswerTimeoutError
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

POLL_S = 0.1

LOOK_S = 1.0
"""Seconds between two looks at what other ranks show."""

SIGN_S = 5.0
"""Seconds between two signs of life; rank 0, for whom others wait, gives one every second."""

PATIENCE_S = 60.0
PATIENCE_STEPS = 20
"""How long a rank may show no life, in seconds, and no work, in its longest steps, where no patience is given."""

LEAST_S = 10.0
"""The least patience with rank 0 and the store, without which a rank ends."""

HUNG_S = 1800.0
"""After how many seconds without work rank 0 is lost to the others though it lives, where its steps are short."""


class Lost(SystemExit):
    """The store or rank 0 is lost, so that this rank cannot go on: one sentence, exit status 1."""

    def __init__(self, message: str):
        super().__init__(1)
        self.message = f"{message}; the same command goes on from the last whole shard"


@dataclass
class _Seen:
    """What this rank last saw of another: what it showed, and for how many seconds it has shown no life and no work."""

    shown: list[str] = field(default_factory=lambda: ["", "0", "0", "0"])
    without_life: float = 0.0
    without_work: float = 0.0
    at: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Job:
    """This process among those of its job, and the counters and texts that they share.

    store: a TCPStore, of a process alone its own. where: the store's host and port. patience: seconds that a rank may
    show no sign of life; None: 60, and no work for 20 of its longest steps. lost: the ranks that rank 0 ended without.
    started_again: whether rank 0 found an earlier run in the store.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: dist.Store = field(default_factory=dist.HashStore)
    where: str = ""
    patience: float | None = None
    lost: set[int] = field(default_factory=set)
    started_again: bool = False

    def __post_init__(self):
        self._name = f"{self.rank}:{secrets.token_hex(4)}"  # a rank that is started again is another process
        self._line = ThreadPoolExecutor(1)
        self._seen: dict[int, _Seen] = {}
        self._in_turns, self._moves, self._steps, self._longest, self._moved_at = False, 0, 0, 0.0, 0.0

    def show_life(self) -> None:
        """From now on show the other ranks that this process lives, and that it gets on with its work."""

        ended = threading.Event()

        def show() -> None:
            beat = 0
            while not ended.is_set():
                beat += 1
                self._moves += not self._in_turns  # there only the work itself counts
                try:
                    self.store.set(f"life/{self.rank}", f"{self._name} {beat} {self._moves} {self._longest:.2f}")
                except RuntimeError:
                    return  # the store is lost, as the work will notice
                ended.wait(min(SIGN_S if self.rank else 1.0, (self.patience or PATIENCE_S) / 4))

        def end() -> None:
            ended.set()
            showing.join(SIGN_S)  # inside the store, a thread would abort the process that ends

        showing = threading.Thread(target=show, daemon=True)
        showing.start()
        atexit.register(end)

    def join(self, wait_s: float) -> None:
        """Agree on one run: rank 0 begins the next one in a store that may know earlier ones, the others enter it.

        A store that outlives its workers holds what earlier ones left; the run is that whose rank 0 is seen alive.
        """
        whole = self.store
        if self.rank == 0:
            run = self.add("runs")
            self.store, self.started_again = dist.PrefixStore(f"run/{run}", whole), run > 1
            return
        first, shown, until = None, {}, time.monotonic() + wait_s
        while time.monotonic() < until:
            run = self._ask(whole.add, "runs", 0)
            first = run if first is None else first
            self.store = dist.PrefixStore(f"run/{run}", whole)
            if run and (run != first or shown.setdefault(run, self._text("life/0")) != self._text("life/0")):
                return
            time.sleep(POLL_S)
        raise Lost(f"rank {self.rank}: rank 0 did not show itself at {self.where} for {wait_s:g} s")

    def meet(self, key: str, wait_s: float) -> None:
        """Hold rank 0 until all ranks have entered the run, which they could not while it shows no life."""
        self._ask(self.store.append, f"{key}/here", f"{self.rank} ")
        until = time.monotonic() + wait_s
        while self.rank == 0 and (absent := set(range(self.size)) - self._listed(f"{key}/here")):
            if time.monotonic() > until:
                raise Lost(f"rank {', '.join(map(str, sorted(absent)))} did not come within {wait_s:g} s")
            time.sleep(POLL_S)

    def _ask(self, operation: Callable[..., T], *arguments: Any) -> T:
        """What the store answers; `Lost` if it does not."""
        if self.size == 1:
            return operation(*arguments)
        patience = self._patience_with_rank_0
        try:
            # In a thread, as an answer that was lost on its way is waited for without end.
            return self._line.submit(operation, *arguments).result(patience)
        except AnswerTimeoutError:
            trouble = f"has not answered for {patience:g} s"
        except RuntimeError:
            trouble = "is gone"
        raise Lost(
            f"rank {self.rank}: the job's store at {self.where} {trouble}: rank 0 ended, or its machine or link is lost"
        )

    def _text(self, key: str) -> str:
        return self._ask(self.store.get, key).decode() if self._ask(self.store.check, [key]) else ""

    def _listed(self, key: str) -> set[int]:
        """The numbers that ranks have appended to a text."""
        return {int(number) for number in self._text(key).split()}

    def add(self, counter: str, amount: int = 1) -> int:
        """Add to a shared counter and return its new value; no rank waits for another.

        Where a rank works for others, this is a sign that its work gets on, as `get_on` is.
        """
        self.get_on()
        total = self._ask(self.store.add, counter, amount)
        self._moved_at = time.monotonic()  # a link that was down makes no long step
        return total

    def get_on(self) -> None:
        """Show that the work gets on: to be called at every step."""
        now = time.monotonic()
        self._moves += 1
        if self._in_turns:
            self._steps += 1
            if self._steps > 2:  # the first step, after the turn was taken, may compile
                self._longest = max(self._longest, now - self._moved_at)
        self._moved_at = now

    def share(self, key: str, text: str = "") -> str:
        """Give a text to all ranks (rank 0), or get it (the others, who wait for it without using their core)."""
        if self.rank == 0:
            self._ask(self.store.set, key, text)
            return text
        while not self._ask(self.store.check, [key]):
            self._rest()
        return self._text(key)

    def turns(self, key: str, todo: Sequence[T], wait: Callable[[], None]) -> Iterator[T]:
        """Of what is to do, one thing after the other for whichever rank is free, until all of it is done.

        What a rank has taken that shows no work any more is given to another, so a thing may be done twice. Calls
        `wait` while others work.
        """
        self._in_turns, self._steps, looked = True, 0, 0.0
        try:
            while (turn := self.add(f"{key}/turn") - 1) < len(todo):
                self._ask(self.store.set, f"{key}/taken/{turn}", self._name)
                yield todo[turn]
                self._ask(self.store.append, f"{key}/done", f"{turn} ")
            while left := sorted(set(range(len(todo))) - self._listed(f"{key}/done")):
                turn = None
                if time.monotonic() - looked >= LOOK_S:
                    turn = next((turn for turn in left if self._takes_over(f"{key}/taken/{turn}")), None)
                    looked = time.monotonic()
                if turn is None:
                    self.get_on()
                    self._rest()
                    wait()
                else:
                    yield todo[turn]
                    self._ask(self.store.append, f"{key}/done", f"{turn} ")
        finally:
            self._in_turns = False

    def _takes_over(self, key: str) -> bool:
        """Whether this rank now has what another one took that is lost, or was started anew."""
        taker = self._text(key)
        rank = int(taker.partition(":")[0] or -1)  # none where a rank was lost just when it took it
        seen = self._look(rank)
        restarted = seen.shown[0] not in ("", taker)
        if not (restarted or seen.without_work > self._patience_with(seen)):
            return False
        if self._ask(self.store.compare_set, key, taker, self._name).decode() != self._name:
            return False
        why = "was started again" if restarted else f"has shown no work for {seen.without_work:.0f} s"
        sys.stderr.write(f"rank {rank} {why}: rank {self.rank} does what it had taken\n")
        return True

    def _look(self, rank: int) -> _Seen:
        """What another rank shows; time in which this one did not look, as it worked or was stopped, hardly counts."""
        seen = self._seen.setdefault(rank, _Seen())
        now = time.monotonic()
        if now - seen.at >= LOOK_S:
            passed, seen.at = min(now - seen.at, SIGN_S), now
            shown = self._text(f"life/{rank}").split() or seen.shown
            same = [before == after for before, after in zip(seen.shown, shown, strict=True)]
            seen.without_life = (seen.without_life + passed) * (same[0] and same[1])
            seen.without_work = (seen.without_work + passed) * (same[0] and same[2])
            seen.shown = shown
        return seen

    def _long_steps(self, seen: _Seen) -> float:
        """So many seconds as many of the longest steps take that this rank or another has seen."""
        return PATIENCE_STEPS * max(self._longest, float(seen.shown[3]))

    def _patience_with(self, seen: _Seen) -> float:
        """How many seconds without work this rank waits for another."""
        return self.patience or max(PATIENCE_S, self._long_steps(seen))

    @property
    def _patience_with_rank_0(self) -> float:
        """How many seconds without life this rank waits for rank 0."""
        return max(LEAST_S, self.patience or PATIENCE_S)

    def _rest(self) -> None:
        """Wait a little for rank 0; `Lost` if it is not there any more."""
        time.sleep(POLL_S)
        if self.rank == 0:
            return
        seen = self._look(0)
        if seen.without_life > self._patience_with_rank_0:
            raise Lost(f"rank {self.rank}: rank 0 has shown no sign of life for {seen.without_life:.0f} s")
        if seen.without_work > max(HUNG_S, self._long_steps(seen)):
            raise Lost(f"rank {self.rank}: rank 0 lives, but has shown no work for {seen.without_work:.0f} s")

    def leave_together(self, key: str) -> None:
        """Hold the other ranks until rank 0 is here, and rank 0, which keeps the store, until the others have left.

        Rank 0 leaves without those that are `lost`, and says so.
        """
        self.share(key)
        self.lost = set()
        if self.rank:
            self._ask(self.store.append, f"{key}/left", f"{self.rank} ")
            return
        began = time.monotonic()
        while here := sorted(set(range(1, self.size)) - self._listed(f"{key}/left")):
            seen = [self._look(rank) for rank in here]
            looked = time.monotonic() - began > 2 * LOOK_S
            if looked and all(one.without_work > self._patience_with(one) for one in seen):
                self.lost = set(here)
                sys.stderr.write(f"all is done, without rank {', '.join(map(str, here))}: no sign of life\n")
                return
            self._rest()

    @property
    def device(self) -> torch.device:
        """The GPU of this local rank among those that CUDA_VISIBLE_DEVICES leaves, else the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")
