"""The site of the documents is made without a warning, and its links go somewhere."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from running import ended, started

ROOT = Path(__file__).parent.parent


class Page(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, _tag, attrs):
        for name, value in attrs:
            if name in ("href", "src"):
                self.links.add(urlsplit(value))
            elif name == "id":
                self.ids.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """As `make docs` makes it, without the lists of objects beside pages, which take a third of the time."""
    for name in ("furo", "myst_parser", "sphinx"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    flags = ["-q", "-W", "--keep-going", "-c", ROOT / "docs", "-d", folder / "doctrees", "-D", "toc_object_entries=0"]
    process = started(sys.executable, "-m", "sphinx", *flags, ROOT, folder / "html", PYTHONPATH=str(ROOT))
    _, said = ended(process)
    assert process.returncode == 0, said
    return folder / "html"


def test_every_link_goes_to_a_file_and_a_place_in_it(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 50
    for path, page in pages.items():
        for link in page.links:
            if link.scheme or link.netloc:
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            assert target.is_file(), f"{path.relative_to(site)}: {link.geturl()}"
            if link.fragment and target in pages:
                assert unquote(link.fragment) in pages[target].ids, f"{path.relative_to(site)}: {link.geturl()}"


def test_pages_have_what_they_are_made_of(site):
    def text(page):
        return (site / page).read_text(encoding="utf-8")

    assert "url=README.html" in text("index.html")
    assert 'href="docs/sampling.html#console-commands"' in text("README.html")
    assert re.search(r'href="[^"]*_downloads/\w+/calibration.json"', text("docs/evaluation.html"))
    assert "A tour of self-attention guidance" in text("docs/tour.html")
    guidance = text("docs/api/guidance.html")
    assert 'id="guided_diffusion.guidance.self_attention.SelfAttentionGuidance"' in guidance
    assert "<strong>scale</strong>: the paper's s" in guidance
    assert "factory" not in guidance
    assert 'id="guided_diffusion.load"' in text("docs/api/python.html")


def test_every_technique_sampler_and_solver_has_a_place():
    """All modules of their rooms but those that build from settings."""
    told = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.rst"))
    for room in ("diffusion", "guidance"):
        for path in (ROOT / "guided_diffusion" / room).rglob("*.py"):
            if path.stem not in ("__init__", "building"):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                assert f"automodule:: {module}\n" in told, f"{module} is not in docs/api/"
