"""The static page: what it holds. tests/services/test_static_page.py looks at it in a browser.

Run: python -m helpers test tests/unit/course/test_static_page.py
"""

from base64 import b64decode

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.static_page import write_page
from helpers.tables import show_table

WIDGET = "application/vnd.jupyter.widget-view+json"
RED_DOT = "R0lGODlhAQABAIAAAP8AAP///yH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="
LONG = "long " * 60
CODE = f'''# A comment of this cell
import json

class Wrapper:
    @property
    def size(self) -> int:
        """Say how large it is."""
        return 5 if self is not None else 6.5

print(f"{{Wrapper().size}} {LONG}")'''


def result(data):
    return new_output("execute_result", data=data, execution_count=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the page of a notebook with one of everything, an image beside it."""
    folder = tmp_path_factory.mktemp("pägé")
    (folder / "images").mkdir()
    (folder / "images" / "dot.gif").write_bytes(b64decode(RED_DOT))
    table = show_table("Fields", [("temperature", LONG, "float" * 30)], ("Field", "Meaning", "Type"))
    outputs = [
        new_output("stream", name="stdout", text=LONG + "\n\x1b[31mred\x1b[0m"),
        new_output("stream", name="stderr", text="a warning"),
        result({"text/html": table._repr_html_(), "text/plain": repr(table)}),
        result({WIDGET: {"model_id": "a"}, "text/plain": "a form as text"}),
        result({WIDGET: {"model_id": "b"}, "text/html": "<p>a form as HTML</p>", "text/plain": "hidden"}),
        result({WIDGET: {"model_id": "c"}}),
        result({"application/javascript": "hidden()", "text/plain": "a script as text"}),
        new_output("error", ename="ValueError", evalue="no", traceback=["\x1b[38;5;196mValueError\x1b[39m: no"]),
    ]
    cells = [
        new_markdown_cell("# A page about `models`\n\n> - **Aim:** read it.\n"),
        new_markdown_cell("## What's *new* & old?\n\nIt costs $5 and $6. [Elsewhere](https://example.org)\n\n"
                          f"![A red dot](images/dot.gif)\n\n```python\n{CODE}\n```\n\n"
                          f"| a | b |\n|---|---|\n| {'wide' * 40} | c |\n\n"
                          "<details><summary>An answer</summary>\n\nIt is `42`.\n\n"
                          f"```python\n{CODE}\n```\n\n</details>"),
        new_code_cell(CODE, outputs=outputs, execution_count=1),
        new_markdown_cell("## The end\n\n### Really\n\n" + "A sentence of a usual length. " * 200),
    ]
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {"a": {}}, "version_major": 2}}
    notebook = new_notebook(cells=cells, metadata={"widgets": widgets, "language_info": {"name": "python"}})
    nbformat.write(notebook, folder / "Päge.ipynb")
    return write_page(folder / "Päge.ipynb")


def test_a_page_has_no_program_and_no_widget(written):
    html = written.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "widget" not in html
    assert "hidden" not in html
    assert html.count("jp-OutputArea-child") == 7  # all outputs but the one that was a widget alone
    left = ("a form as text", "a form as HTML", "a script as text", "ValueError", f"base64,{RED_DOT}")
    assert all(text in html for text in left)


def test_a_page_without_headings_is_a_page(tmp_path):
    nbformat.write(new_notebook(cells=[new_markdown_cell("Text.")]), tmp_path / "Plain.ipynb")
    html = write_page(tmp_path / "Plain.ipynb").read_text(encoding="utf-8")
    assert "<title>Plain</title>" in html
    assert "<nav" not in html


# --- in a browser -------------------------------------------------------------------------------
