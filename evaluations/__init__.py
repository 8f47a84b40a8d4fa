"""Metrics of samples: features, moments, neighbours, scores, and the evaluator. Knows nothing of guided_diffusion."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; waiting threads sleep
