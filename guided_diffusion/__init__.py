"""Self-Attention Guidance (Hong et al., arXiv 2210.00939) on ADM and IDDPM diffusion models."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runs.prepare import load

__all__ = ["load"]

__version__ = "0.1.0"

# Must stand before torch is loaded: waiting threads sleep, several times faster where anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# So must this: where a rank is lost, torch writes pages of C++ beside the sentence that says so.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def __getattr__(name: str) -> Any:
    """`load`, when it is first asked for: to import the package alone takes no torch."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .runs.prepare import load

    return load
