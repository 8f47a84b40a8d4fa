"""The Python code of the README and of docs/ runs as it stands."""

import itertools
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from golden import fill
from guided_diffusion.networks.attention import record_attention
from guided_diffusion.respace import SpacedDiffusion

ROOT = Path(__file__).parent.parent


def run_blocks(document, count):
    """The names that the Python code of a document leaves."""
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == count
    names = {"__name__": document}
    for block in blocks:
        exec(compile(block, document, "exec"), names)
    return names


def test_the_code_of_the_readme_and_of_the_page_on_python_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run_blocks("README.md", 1)
    assert names["images"].shape == names["unguided"].shape == (4, 32, 32, 3)
    assert (names["images"] != names["unguided"]).any()
    names = run_blocks("docs/python.md", 2)
    assert names["samples"].shape == (2, 3, 32, 32)
    torch.testing.assert_close(names["score"].mean(dim=(1, 2)), torch.ones(2))


def test_the_cells_of_the_tour_run():
    """One after another; each but the first ends with a picture."""
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    names = {}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(notebook["cells"]) == 10
    for number, cell in enumerate(cells):
        assert number == 0 or cell.rpartition("\n")[2].startswith("sheet(")
        exec(compile(cell, f"cell {number}", "exec"), names)
    assert names["sheet"](names["score"]).size == (4 * 128, 128)
    shares = [mask.float().mean().item() for mask in names["masks"].values()]
    assert shares == sorted(shares, reverse=True)
    assert (names["both"] != names["guided"]).any()


def test_the_code_about_evaluation_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SAG_CACHE", str(tmp_path))
    distance = run_blocks("docs/evaluation.md", 1)["distance"]
    found = json.loads((ROOT / "docs" / "disturbances" / "emoji.json").read_text())
    [held_out] = found["samples"].values()
    assert distance["value"] == pytest.approx(held_out["value"], rel=0.01)


def test_tables_of_results_are_those_of_the_committed_files():
    """And a page that says another number is found."""
    results = runpy.run_path(str(ROOT / "docs" / "results.py"))
    texts = {page: page.read_text(encoding="utf-8") for page in results["PAGES"]}
    assert {name for text in texts.values() for _, name, _ in results["PLACE"].findall(text)} == set(results["TABLES"])
    for page, text in texts.items():
        assert results["filled"](text) == text, f"{page.name}: run docs/results.py"
    text = texts[ROOT / "docs" / "tables.md"]
    assert results["filled"](text.replace("| unguided | 50 |", "| unguided | 51 |")) == text


def test_the_code_about_own_networks_guides_a_network_that_is_not_ours():
    names = run_blocks("docs/own_network.md", 3)
    network, guidance, diffusion = names["network"], names["guidance"], names["diffusion"]
    # The score is that of the attention map that PyTorch's layer itself gives out.
    seen = []
    layer = network.attention
    handle = layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs))
    before = network(names["samples"], torch.tensor([10, 10]))
    handle.remove()
    attention = layer(*seen[0], average_attn_weights=False)[1]
    torch.testing.assert_close(names["score"], attention.mean(dim=1).sum(dim=1).unflatten(1, (8, 8)))
    # Nothing is left that listens, and guidance is what makes the samples others.
    assert not layer._forward_pre_hooks
    with record_attention(guidance.block):
        assert torch.equal(network(names["samples"], torch.tensor([10, 10])), before)
    noise = torch.randn(2, 3, 16, 16)
    ends = []
    for given in (None, guidance, replace(guidance, scale=0.0)):
        torch.manual_seed(1)
        ends.append(diffusion.p_sample_loop(network, noise.shape, noise=noise, guidance=given))
    assert not torch.allclose(ends[0], ends[1], atol=1e-3)
    assert torch.equal(ends[0], ends[2])


def test_a_block_that_is_not_heard_stops_the_sampling():
    names = run_blocks("docs/own_network.md", 3)
    other = replace(names["guidance"], block=names["Block"](names["Network"]().attention, (8, 8)))
    with pytest.raises(ValueError, match="attention that was to be recorded was not heard"):
        names["diffusion"].p_sample_loop(names["network"], (1, 3, 16, 16), guidance=other)


def test_an_override_and_a_guidance_act_together():
    names = run_blocks("docs/coming_from_guided_diffusion.md", 1)
    network, guidance, diffusion = fill(names["network"]), names["guidance"], names["diffusion"]
    assert names["edited"].shape == names["noise"].shape == (2, 3, 32, 32)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([2, 2])
    found = [diffusion.p_sample(network, x, t, guidance=given)["pred_xstart"] for given in (None, guidance)]
    diffusion.__class__ = SpacedDiffusion
    found += [diffusion.p_sample(network, x, t, guidance=given)["pred_xstart"] for given in (None, guidance)]
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(one, other, atol=1e-4)


def test_named_files_exist():
    pages = [path.relative_to(ROOT) for folder in (ROOT, ROOT / "docs") for path in sorted(folder.glob("*.md"))]
    assert len(pages) >= 18
    for document in pages:
        text = (ROOT / document).read_text(encoding="utf-8")
        paths = {ROOT / path for path in re.findall(r"`((?:guided_diffusion|scripts|configs|tests)/[\w/.]*)`", text)}
        links = re.findall(r"\]\((?!http)([^)#]+)", text)
        paths |= {(ROOT / document).parent / link for link in links}
        for path in paths:
            assert path.exists(), f"{document}: {path}"


def anchors(text):
    """What headings of a page can be linked by."""
    heads = re.findall(r"^#+ (.*)", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_go_to_headings_and_every_page_is_listed():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", text):
            assert anchor in anchors((page.parent / path if path else page).read_text(encoding="utf-8")), (
                f"{page.name}: #{anchor}"
            )
        if page.parent.name == "docs" and page.name != "README.md":
            assert f"]({page.name})" in index, f"{page.name} is not in docs/README.md"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
