"""The README's Python code runs as it stands."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_python_blocks_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["samples"].shape == (2, 3, 32, 32)
    torch.testing.assert_close(names["score"].mean(dim=(1, 2)), torch.ones(2))


def test_named_files_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        paths = set(re.findall(r"`((?:guided_diffusion|scripts|configs|tests)/[\w/.]*)`", text))
        paths |= set(re.findall(r"\]\((?!http)([^)]+)\)", text))
        assert paths
        for path in paths:
            assert (ROOT / path).exists(), f"{document}: {path}"
