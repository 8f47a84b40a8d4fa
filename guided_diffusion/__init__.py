"""Self-Attention Guidance (Hong et al., arXiv 2210.00939) on ADM and IDDPM diffusion models."""

__version__ = "0.1.0"
