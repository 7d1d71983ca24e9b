"""Writes an executed notebook as one HTML file that asks nothing of a network: for a phone, a screen, light or dark.

The colours and sizes stand in ``data/page.css``.
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

# What needs a program in the page. A widget leaves its text or HTML behind, where it has any.
LIVE = ("application/vnd.jupyter.widget-view+json", "application/javascript")
# nbconvert's cells without its head, which loads four programs from the network. The policy lets
# nothing be loaded.
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
    _drop_what_is_live(notebook)
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
    _lead_links_on(document, notebook_file.parent)
    page = notebook_file.with_suffix(".html")
    page.write_text(str(document), encoding="utf-8")
    return page


def _drop_what_is_live(notebook):
    """Take widgets and scripts out of the outputs; an output that was nothing else goes."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for kind in LIVE:
                output.get("data", {}).pop(kind, None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data", True)]


def _add_contents(document):
    """Take the title from the page's heading, and put links to the H2 headings after it."""
    for mark in document.select("a.anchor-link"):
        mark.decompose()
    title, sections = document.h1, document.select("h2[id]")
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
    """Put code, text and tables into boxes that scroll, also by the keyboard."""
    for part in document.select("pre, table"):
        label = (
            "Table"
            if part.name == "table"
            else "Output"
            if part.find_parent(class_="jp-OutputArea")
            else "Code"
        )
        part.wrap(
            document.new_tag(
                "div",
                attrs={"class": "wide", "role": "group", "aria-label": label, "tabindex": "0"},
            )
        )


def _lead_links_on(document, folder):
    """Let a link to another page lead to its HTML beside this one, and one to a file of the course to that file."""
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
    """Return the address of a file for a page in a folder: a relative one, unless they are on two drives."""
    try:
        return quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:
        return file.as_uri()


def _embed_images(document, folder):
    """Put the images' files into the page. nbconvert's own way shuts each `<details>` before its content."""
    for image in document.select('img[src]:not([src^="data:"])'):
        file = folder / unquote(image["src"])
        if file.is_file():
            kind, _ = mimetypes.guess_type(file)
            image["src"] = f"data:{kind};base64,{b64encode(file.read_bytes()).decode()}"
