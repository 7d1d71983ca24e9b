"""A notebook with one of everything, written as a static page."""

from base64 import b64decode
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.static_page import write_page
from helpers.show.tables import show_table

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


def _result(data):
    return new_output("execute_result", data=data, execution_count=1)


def write_sample(folder: Path) -> Path:
    """Write the page of a notebook with one of everything, an image beside it; return the page's file."""
    (folder / "images").mkdir()
    (folder / "images" / "dot.gif").write_bytes(b64decode(RED_DOT))
    table = show_table(
        "Fields", [("temperature", LONG, "float" * 30)], ("Field", "Meaning", "Type")
    )
    outputs = [
        new_output("stream", name="stdout", text=LONG + "\n\x1b[31mred\x1b[0m"),
        new_output("stream", name="stderr", text="a warning"),
        _result({"text/html": table._repr_html_(), "text/plain": repr(table)}),
        _result({WIDGET: {"model_id": "a"}, "text/plain": "a form as text"}),
        _result(
            {
                WIDGET: {"model_id": "b"},
                "text/html": "<p>a form as HTML</p>",
                "text/plain": "hidden",
            }
        ),
        _result({WIDGET: {"model_id": "c"}}),
        _result({"application/javascript": "hidden()", "text/plain": "a script as text"}),
        new_output(
            "error",
            ename="ValueError",
            evalue="no",
            traceback=["\x1b[38;5;196mValueError\x1b[39m: no"],
        ),
    ]
    cells = [
        new_markdown_cell("# A page about `models`\n\n> - **Aim:** read it.\n"),
        new_markdown_cell(
            "## What's *new* & old?\n\nIt costs $5 and $6. [Elsewhere](https://example.org)\n\n"
            f"![A red dot](images/dot.gif)\n\n```python\n{CODE}\n```\n\n"
            f"| a | b |\n|---|---|\n| {'wide' * 40} | c |\n\n"
            "<details><summary>An answer</summary>\n\nIt is `42`.\n\n"
            f"```python\n{CODE}\n```\n\n</details>"
        ),
        new_code_cell(CODE, outputs=outputs, execution_count=1),
        new_markdown_cell("## The end\n\n### Really\n\n" + "A sentence of a usual length. " * 200),
    ]
    widgets = {
        "application/vnd.jupyter.widget-state+json": {"state": {"a": {}}, "version_major": 2}
    }
    notebook = new_notebook(
        cells=cells, metadata={"widgets": widgets, "language_info": {"name": "python"}}
    )
    nbformat.write(notebook, folder / "Päge.ipynb")
    return write_page(folder / "Päge.ipynb")
