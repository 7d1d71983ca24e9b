"""The texts of the course as HTML: its documents, and the Markdown cells of its pages."""

from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt

from support import ROOT

DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/*.md", "notebooks/*.md", "deploy/**/*.md", "notebooks/*.ipynb")
    for path in sorted(ROOT.glob(pattern))
]


def read_text(path: Path) -> str:
    """Return a document's text, or that of a page's Markdown cells."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def read_html(path: Path) -> BeautifulSoup:
    """Return a document or a page as HTML."""
    html = MarkdownIt("commonmark").enable("table").render(read_text(path))
    return BeautifulSoup(html, "html.parser")
