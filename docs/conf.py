"""The site of the documents (`make docs`): the Markdown pages where they stand in the repository, and API pages.

Sphinx's source is the repository itself, so that links between pages are right as they are written; one to a file that
is no page becomes a download of it.
"""

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes

from guided_diffusion import __version__

ROOT = Path(__file__).parent.parent
API = ("python", "guidance", "diffusion", "networks", "stable_diffusion", "evaluations", "door")
CARDS = [
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in ("configs/models", "configs/tables/results", "evaluations")
    for path in sorted((ROOT / folder).glob("*.md"))
]
PROJECT = ("docs/README", "CONTRIBUTING", "CHANGELOG")

project = html_title = "Self-Attention Guidance"
release = __version__
html_theme = "furo"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
highlight_language = "sh"
smartquotes = False  # of --flag they make –flag

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "README"
source_suffix = {".md": "markdown", ".ipynb": "markdown", ".rst": "restructuredtext"}
include_patterns = ["docs/**", *(f"{page}.md" for page in (root_doc, *PROJECT, *CARDS))]
exclude_patterns = [".*", "build", "data", "runs", "tests"]
myst_heading_anchors = 4

# Docstrings are prose; what stands in backticks is code, and a link where it is a name that has a place here.
default_role = "py:obj"
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_mock_imports = ["diffusers", "mpi4py", "transformers"]
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
viewcode_follow_imported_members = False


def contents() -> str:
    """What stands beside every page: the pages in the groups of docs/README.md, then those that it does not have."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    groups = {
        head: [f"docs/{page}" for page in re.findall(r"\]\((\w+)\.\w+\)", row)]
        for head, row in re.findall(r"^\| (\w.*?) \| (.*) \|$", index, flags=re.MULTILINE)
    }
    groups |= {"API": [f"docs/api/{page}" for page in API], "What is embedded": CARDS, "This project": PROJECT}
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {head[0].upper()}{head[1:]}\n\n/" + "\n/".join(pages) + "\n```\n"
        for head, pages in groups.items()
    )


def read(app: Any, docname: str, source: list[str]) -> None:
    """Gives the front page the contents, and makes Markdown of a notebook: of cells of code, blocks of it."""
    if docname == root_doc:
        source[0] += contents()
    elif Path(app.env.doc2path(docname)).suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(source[0])["cells"]]
        source[0] = "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells)


def signature(_app: Any, _what: str, _name: str, _object: Any, _options: Any, given: str | None, returned: str) -> Any:
    """Defaults that Python does not write as Python: a function by its name, `...` for what is made anew."""
    default = re.compile(r"<(?:(?:built-in )?function (\w+)|factory)>")
    return given and (default.sub(lambda match: match[1] or "...", given), returned)


def described(_app: Any, what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """What a docstring tells of by name, as `scale: the paper's s. seed, labels: …` at the beginning, stands out."""
    if what != "module":
        told = re.compile(r"(?:^|(?<=\n\n)|(?<=[.;]\s))([a-z]\w*(?:, [a-z]\w*)*)(?=:\s)")
        lines[:] = told.sub(r"**\1**", "\n".join(lines)).split("\n")


def without_object(_app: Any, tree: nodes.document) -> None:
    """That a class has no base need not be said."""
    for paragraph in [node for node in tree.findall(nodes.paragraph) if node.astext() == "Bases: object"]:
        paragraph.parent.remove(paragraph)


def finish(app: Any, _error: Exception | None) -> None:
    """Hosts and people look for index.html."""
    (Path(app.outdir) / "index.html").write_text(
        '<meta http-equiv="refresh" content="0; url=README.html"><a href="README.html">the documents</a>\n'
    )


def setup(app: Any) -> None:
    for event, hook in (
        ("source-read", read), ("autodoc-process-signature", signature), ("autodoc-process-docstring", described),
        ("doctree-read", without_object), ("build-finished", finish),
    ):  # fmt: skip
        app.connect(event, hook)
