"""Ranks that are lost, stopped or started again: what they had taken is done by another, and nobody waits for ever."""

import threading
import time

import pytest
import torch.distributed as dist

from guided_diffusion.runs.ranks import job as of_jobs
from guided_diffusion.runs.ranks.job import Job, Lost

TODO = ["a", "b", "c", "d"]


def two(patience=1.0):
    """Ranks 0 and 1 over one store, neither of which shows life yet."""
    store = dist.HashStore()
    return [Job(rank, 2, store=store, where="host:1", patience=patience) for rank in (0, 1)]


def quickly(monkeypatch):
    """Looks and signs ten times as often or more, each look for no more than it is: a busy machine changes nothing."""
    monkeypatch.setattr(of_jobs, "LOOK_S", 0.1)
    monkeypatch.setattr(of_jobs, "SIGN_S", 0.1)
    monkeypatch.setattr(of_jobs, "POLL_S", 0.02)
    monkeypatch.setattr(of_jobs, "LEAST_S", 1)


def nothing():
    pass


def test_what_a_lost_rank_had_taken_is_done_by_another(monkeypatch, capsys):
    quickly(monkeypatch)
    first, other = two()
    lost = other.turns("key", TODO, nothing)
    assert next(lost) == "a"
    first.show_life()
    waited = []
    assert list(first.turns("key", TODO, lambda: waited.append(1))) == ["b", "c", "d", "a"]
    assert len(waited) > 10
    first.leave_together("end")
    assert first.lost == {1}
    said = capsys.readouterr().err
    assert said.count("rank 1 has shown no work for 1 s: rank 0 does what it had taken\n") == 1
    assert said.endswith("all is done, without rank 1: no sign of life\n")


def test_one_that_comes_back_does_the_same_again_and_leaves(monkeypatch):
    quickly(monkeypatch)
    first, other = two()
    back = other.turns("key", TODO, nothing)
    assert next(back) == "a"
    assert list(first.turns("key", TODO, nothing)) == ["b", "c", "d", "a"]
    assert list(back) == []
    first.patience = other.patience = 60
    other.show_life()
    leaving = threading.Thread(target=other.leave_together, args=["end"])
    leaving.start()
    first.leave_together("end")
    leaving.join()
    assert first.lost == set()


def test_a_rank_that_works_slowly_keeps_what_it_took(monkeypatch):
    quickly(monkeypatch)
    first, other = two()
    other.show_life()
    slow = other.turns("key", ["a"], nothing)
    assert next(slow) == "a"
    left = []

    def work():
        for _ in range(10):
            time.sleep(0.3)
            other.add("steps")
        left.extend(slow)

    working = threading.Thread(target=work)
    working.start()
    assert list(first.turns("key", ["a"], nothing)) == []
    working.join()
    assert left == []


def test_a_rank_that_is_started_again_has_lost_its_turn(monkeypatch, capsys):
    quickly(monkeypatch)
    first, other = two(patience=60)
    assert next(other.turns("key", ["a", "b"], nothing)) == "a"
    again = Job(1, 2, store=first.store)
    again.show_life()
    assert list(first.turns("key", ["a", "b"], nothing)) == ["b", "a"]
    assert "rank 1 was started again: rank 0 does what it had taken" in capsys.readouterr().err
    assert list(again.turns("key", ["a", "b"], nothing)) == []


def test_patience_grows_with_the_longest_step_but_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(of_jobs.time, "monotonic", lambda: now[0])
    job = Job()
    turns = job.turns("key", ["a"], nothing)
    next(turns)
    for seconds in (500, 7, 4):  # the first may compile
        now[0] += seconds
        job.add("steps")
    assert job._patience_with(of_jobs._Seen()) == 20 * 7
    assert job._patience_with(of_jobs._Seen(shown=["", "0", "0", "9.0"])) == 20 * 9
    assert Job()._patience_with(of_jobs._Seen()) == 60


def test_a_rank_that_waits_ends_when_rank_0_shows_no_life(monkeypatch):
    quickly(monkeypatch)
    _, other = two()
    with pytest.raises(Lost) as end:
        other.share("text")
    assert end.value.code == 1
    assert "rank 1: rank 0 has shown no sign of life for 1 s; the same command goes on" in end.value.message


def test_a_rank_ends_when_rank_0_lives_but_hangs(monkeypatch):
    quickly(monkeypatch)
    monkeypatch.setattr(of_jobs, "HUNG_S", 2)
    first, other = two()
    first.show_life()
    hung = first.turns("key", ["a"], nothing)
    next(hung)
    with pytest.raises(Lost, match="1") as end:
        other.share("text")
    assert "rank 0 lives, but has shown no work for 2 s" in end.value.message


class _Stuck:
    """A store that does not answer any more, or is not there."""

    def __init__(self, gone):
        self.gone = gone

    def add(self, _key, _amount):
        if self.gone:
            raise dist.DistNetworkError("Connection reset by peer")
        time.sleep(2)


@pytest.mark.parametrize(("gone", "trouble"), [(True, "is gone"), (False, "has not answered for 1 s")])
def test_a_rank_ends_when_the_store_is_lost(monkeypatch, gone, trouble):
    quickly(monkeypatch)
    with pytest.raises(Lost) as end:
        Job(1, 2, store=_Stuck(gone), where="10.0.0.1:5", patience=1.0).add("steps")
    assert f"rank 1: the job's store at 10.0.0.1:5 {trouble}: rank 0 ended" in end.value.message


def test_all_ranks_enter_the_run_whose_rank_0_lives(monkeypatch):
    quickly(monkeypatch)
    store = dist.HashStore()
    before = Job(0, 2, store=store)
    before.join(1)
    before.store.set("life/0", "0:killed 7 7 0.0")
    late = Job(1, 2, store=store)
    with pytest.raises(Lost, match="1"):
        late.join(0.5)
    joining, looked = Job(1, 2, store=store), threading.Event()
    text_of = joining._text
    monkeypatch.setattr(joining, "_text", lambda key: (looked.set(), text_of(key))[1])
    waiting = threading.Thread(target=joining.join, args=[60])
    waiting.start()
    looked.wait()
    now = Job(0, 2, store=store)
    now.join(1)
    waiting.join()
    now.share("text", "new")
    assert joining.share("text") == "new"
    now.show_life()
    later = Job(1, 2, store=store)
    later.join(60)
    assert later.share("text") == "new"


def test_rank_0_meets_all_or_says_who_did_not_come(monkeypatch):
    quickly(monkeypatch)
    first, other = two()
    with pytest.raises(Lost) as end:
        first.meet("group", 0.1)
    assert end.value.message.startswith("rank 1 did not come within 0.1 s")
    other.meet("group", 0.1)
    first.meet("group", 0.1)
