"""A page is added in two places, its notebook and data/pages.toml; everything else follows.

Run: python -m helpers test tests/pages/test_new_page.py
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from support import ALL_PAGES, user_environment
from support.executed import assert_clean, checks, notebook
from support.user import git, make_checkout

# These tests look at every page. They run in the checkout that has one page more.
HOUSE = (
    "tests/unit/course/test_static.py",
    "tests/unit/course/test_prose.py",
    "tests/unit/course/test_generate.py",
    "tests/unit/course/test_commands.py::test_a_page_that_is_not_there_is_refused_with_those_that_are",
    "tests/unit/notebooks/test_calls.py",
    "tests/pages/test_new_page.py::test_pages_without_tests_of_their_own_run_clean",
)
ENTRY = """
[Scratch]
track = "transformers"
minutes = 5
run = false
afterwards = "add a page"
"""
QUESTION = """**{number}. Which?**

- **a.** This. **b.** That. **c.** Neither.

<details><summary>Answer</summary>

**a.** Not **b**, not **c**: they are others.

</details>
"""
STORE = """import mlflow

from helpers.page import open_store

store = open_store(tracking_uri, "Scratch")
mlflow.set_tracking_uri(store.uri)
experiment = mlflow.set_experiment("Scratch")"""
PROSE = {
    "aim": "# A scratch page\n\n> **After this page you can** add a page.\n>\n> **Time:** 5 minutes. "
    "**You need:** this course. **You know:** a little Python.",
    "set-up": "## Set up (2 min)\n\nIf `helpers` is not found, choose another kernel at the top right: the "
    "course's Python, in the folder `.venv`.",
    "store": "A store for the runs:",
    "questions": "## Check yourself (2 min)\n\n"
    + "\n".join(QUESTION.format(number=number) for number in range(1, 5)),
    "end": "## What you built (1 min)\n\nA page.\n\n**Next:** another one. **Read on:** the others.",
}


def own_tests(page: str) -> Path:
    """Return the file of a page's own tests."""
    return Path(__file__).with_name(f"test_{re.sub('(?<!^)(?=[A-Z])', '_', page).lower()}.py")


def test_pages_without_tests_of_their_own_run_clean(tmp_path):
    for page in ALL_PAGES:
        if not own_tests(page).exists():
            (tmp_path / page).mkdir()
            executed = notebook(page, "--solved", model="tiny-phi3")(tmp_path / page)
            assert_clean(executed)
            assert f"  page: {executed.file('.html')}" in executed.stdout
            assert all(said.startswith("PASS\n") for said in checks(executed))


@pytest.fixture
def checkout(tmp_path):
    """Return a copy of the course with one page more."""
    folder = make_checkout(tmp_path / "course")
    source = nbformat.read(folder / "notebooks" / "TransformerPipeline.ipynb", as_version=4)
    parameters = next(
        cell for cell in source.cells if "parameters" in cell.metadata.get("tags", [])
    )
    opened = next(cell for cell in source.cells if cell.source.startswith("from helpers.page"))
    page = new_notebook(metadata=source.metadata)
    page.cells = [
        new_markdown_cell(PROSE["aim"]),
        new_markdown_cell(PROSE["set-up"]),
        parameters,
        new_code_cell(opened.source.split("\n\nfrom")[0].replace(", open_store", "")),
        new_markdown_cell(PROSE["store"]),
        new_code_cell(STORE),
        new_markdown_cell(PROSE["questions"]),
        new_markdown_cell(PROSE["end"]),
    ]
    for number, cell in enumerate(page.cells):
        cell.id = str(number)
    nbformat.write(page, folder / "notebooks" / "Scratch.ipynb")
    with (folder / "data" / "pages.toml").open("a", encoding="utf-8") as pages:
        pages.write(ENTRY)
    git(folder, "init")
    git(folder, "add", "--all")
    return folder


def run_in(folder, *words):
    """Run this Python in a checkout, as a contributor does."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=user_environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_a_page_is_added_in_two_places(checkout):
    done = run_in(checkout, "-m", "helpers", "generate", "--tables")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[Scratch](notebooks/Scratch.ipynb)" in (checkout / "README.md").read_text("utf-8")
    git(checkout, "add", "--all")
    done = run_in(checkout, "-m", "pytest", "-q", "-p", "no:nbmake", "-n", "0", *HOUSE)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Scratch" in run_in(checkout, "-m", "helpers", "notebook", "Nothing").stderr
