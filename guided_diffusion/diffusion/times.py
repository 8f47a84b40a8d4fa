"""The time of a batch: a tensor for the network, and a number that the host knows without asking the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _version(t: Tensor) -> int:
    """How often t was changed in place, as far as torch counts."""
    return 0 if t.is_inference() else t._version


def known(t: Tensor, step: int) -> Tensor:
    """t [N] itself, of which the host knows from now on that all rows are at `step`."""
    t.known_step = step, _version(t)  # type: ignore[attr-defined]  # tensors take any attribute
    return t


def every_row(step: int, x: Tensor) -> Tensor:
    """[N] int64: all rows of x at `step`, on x's device, and known to the host."""
    return known(torch.full((len(x),), step, device=x.device), step)


def on_host(t: Tensor) -> Sequence[int]:
    """The steps of the rows t [N]; the device is read, and waited for, only where the host does not know them."""
    step, version = getattr(t, "known_step", (0, None))
    return [step] * len(t) if version == _version(t) else t.tolist()
