"""Self-Attention Guidance (Hong et al., arXiv 2210.00939) on ADM and IDDPM diffusion models."""

import os

__version__ = "0.1.0"

# Must stand before torch is loaded: waiting threads sleep, several times faster where anything else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
