"""Guidances and transforms that came after self-attention guidance, one a file; settings: `settings/methods.py`."""
