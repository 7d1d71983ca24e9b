"""The static page: what it holds. tests/services/test_static_page.py looks at it in a browser.

Run: python -m helpers test tests/unit/course/test_static_page.py
"""

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook
from support.static_page import RED_DOT, write_sample

from course.static_page import write_page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("pägé"))


def test_a_page_has_no_program_and_no_widget(written):
    html = written.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "widget" not in html
    assert "hidden" not in html
    assert html.count("jp-OutputArea-child") == 7  # all outputs but the one that was a widget alone
    left = (
        "a form as text",
        "a form as HTML",
        "a script as text",
        "ValueError",
        f"base64,{RED_DOT}",
    )
    assert all(text in html for text in left)


def test_a_page_without_headings_is_a_page(tmp_path):
    nbformat.write(new_notebook(cells=[new_markdown_cell("Text.")]), tmp_path / "Plain.ipynb")
    html = write_page(tmp_path / "Plain.ipynb").read_text(encoding="utf-8")
    assert "<title>Plain</title>" in html
    assert "<nav" not in html
