"""Writes an executed notebook as one HTML file that loads nothing from a network.

``data/page.css`` has its colours and sizes, for phones and screens, light and dark.
"""

import mimetypes
import os
import warnings
from base64 import b64encode
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

from helpers.paths import DATA, NOTEBOOKS

# Outputs that need a program in the page. A widget usually has a text or HTML output as well.
LIVE_OUTPUTS = ("application/vnd.jupyter.widget-view+json", "application/javascript")
# nbconvert's cells without its head, which loads four programs from the network. The content policy
# forbids loading anything.
TEMPLATE = """
{%- extends 'lab/base.html.j2' -%}
{%- block header -%}
<!DOCTYPE html>
<html lang="{{ resources.language_code }}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ resources.metadata.name | escape_html }}</title>
<style>{{ resources.page_css }}</style>
</head>
{%- endblock header -%}
{%- block body_header -%}<body><main>{%- endblock body_header -%}
{%- block body_footer -%}</main></body>{%- endblock body_footer -%}
{%- block footer -%}</html>{%- endblock footer -%}
"""


def write_page(notebook_file: Path) -> Path:
    """Write ``name.html`` beside ``name.ipynb``, its images inside, and return its path."""
    notebook = nbformat.read(notebook_file, as_version=4)
    _drop_live_outputs(notebook)
    exporter = HTMLExporter(
        exclude_input_prompt=True, exclude_output_prompt=True, raw_template=TEMPLATE
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=SyntaxWarning)
        html, _ = exporter.from_notebook_node(
            notebook,
            {
                "metadata": {"path": str(notebook_file.parent), "name": notebook_file.stem},
                "page_css": (DATA / "page.css").read_text(encoding="utf-8"),
            },
        )
    document = BeautifulSoup(html, "html.parser")
    _add_contents(document)
    _let_wide_parts_scroll(document)
    _embed_images(document, notebook_file.parent)
    _redirect_links(document, notebook_file.parent)
    page = notebook_file.with_suffix(".html")
    page.write_text(str(document), encoding="utf-8")
    return page


def _drop_live_outputs(notebook):
    """Remove widgets and scripts from the outputs, and outputs that are then empty."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in LIVE_OUTPUTS:
                output.get("data", {}).pop(kind, None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]


def _add_contents(document):
    """Use the page's first heading as its title, and add links to the H2 headings below it."""
    for mark in document.select("a.anchor-link"):
        mark.decompose()
    title = document.h1
    sections = document.select("h2[id]")
    if not title:
        return
    document.title.string = title.get_text()
    if sections:
        nav = document.new_tag("nav", attrs={"aria-label": "On this page"})
        items = nav.append(document.new_tag("ul"))
        for section in sections:
            link = document.new_tag("a", href=f"#{section['id']}", string=section.get_text())
            items.append(document.new_tag("li")).append(link)
        title.insert_after(nav)


def _let_wide_parts_scroll(document):
    """Put code, text and tables into boxes that scroll, by the keyboard, too."""
    for part in document.select("pre, table"):
        label = "Output" if part.find_parent(class_="jp-OutputArea") else "Code"
        if part.name == "table":
            label = "Table"
        part.wrap(
            document.new_tag(
                "div",
                attrs={"class": "wide", "role": "group", "aria-label": label, "tabindex": "0"},
            )
        )


def _redirect_links(document, folder):
    """Point links to other pages at their HTML files beside this one, and links to the course's files at these."""
    for link in document.select("a[href]"):
        target, mark, anchor = link["href"].partition("#")
        if not target or urlsplit(target).scheme:
            continue
        to = (
            target.removesuffix(".ipynb") + ".html"
            if target.endswith(".ipynb")
            else _address(NOTEBOOKS / unquote(target), folder)
        )
        link["href"] = to + mark + anchor


def _address(file, folder):
    """Return the relative address of a file for a page in a folder; an absolute one if it is on another drive."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:
        return file.as_uri()


def _embed_images(document, folder):
    """Put the images' files into the page. nbconvert's own option closes each `<details>` too early."""
    for image in document.select('img[src]:not([src^="data:"])'):
        file = folder / unquote(image["src"])
        if file.is_file():
            kind, _ = mimetypes.guess_type(file)
            image["src"] = f"data:{kind};base64,{b64encode(file.read_bytes()).decode()}"
