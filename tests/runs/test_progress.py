"""What ranks tell each other of their progress."""

from types import SimpleNamespace

import torch.distributed as dist

from guided_diffusion.runs import progress as module
from guided_diffusion.runs.progress import Progress
from guided_diffusion.runs.ranks import Job


def test_other_ranks_are_told_at_most_every_few_seconds_and_at_the_end(monkeypatch):
    store, now = dist.HashStore(), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    first, second = (Progress(Job(rank, 2, store=store), "steps", 100, 0, 1, log_json=True) for rank in (0, 1))
    asked, add = [], store.add
    job = second._job
    job.store = SimpleNamespace(add=lambda *arguments: asked.append(1) or add(*arguments))
    moves = job._moves
    for _ in range(100):
        second.add(1)
        now[0] += 0.05
    assert 2 <= len(asked) <= 3
    assert job._moves == moves + 100  # each step is a sign that the work gets on
    second.report()
    assert first._job.add("steps", 0) == 100


def test_alone_every_step_is_shown():
    progress = Progress(Job(), "steps", 10, 0, 2, log_json=True)
    for done in range(1, 4):
        progress.add(2)
        assert progress._job.add("steps", 0) == 2 * done
