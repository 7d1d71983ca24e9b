"""Which pages a change touches, on a small course in a repository of its own.

Run: python -m helpers test tests/unit/course/test_changed.py
"""

import json
import shutil
from pathlib import Path

import pytest
from support import refuses
from support.user import git

from course.changed import Uses, changed_pages
from course.commands import run_command

COURSE = {
    "pyproject.toml": "",
    "README.md": "",
    "docs/a.md": "",
    "tests/test_a.py": "import helpers.tables",
    "data/models.toml": "",
    "data/prompts.jsonl": "",
    "data/page.css": "",
    "data/lab/settings.json": "",
    "notebooks/images/loop.svg": "",
    "helpers/__init__.py": '"""It names helpers.unused."""\n'
    '_HOME = {"show": "helpers.tables", "run": "helpers.server", "ask": "helpers.asked"}',
    "helpers/__main__.py": "",
    "helpers/tables.py": "from helpers.deep import x",
    "helpers/deep/__init__.py": "x = 1",
    "helpers/server.py": "",
    "helpers/unused.py": "",
    "helpers/written.py": "",
    "helpers/magic.py": "",
    "helpers/asked.py": "",
    "course/__main__.py": "from course.commands import run",
    "course/execute.py": "STYLE = 'page.css'",
    "course/bench.py": "",
    "course/commands.py": "def _start(x):\n    return [x]\ndef _bench(options):\n    from course import bench\n"
    "COMMANDS = {'serve': lambda x: _start('app.py'), 'bench': _bench}",
    "serving/app.py": "from serving.model import Model",
    "serving/model.py": "Model = 1",
}
CELLS = {
    "A": ["from helpers import show\nfor line in []:\n    %time line\n    !ls\n"],
    "B": ["run(['python', '-m', 'helpers', 'serve'])", "print('data:', 'app', 'a b')"],
    "C": [
        "%%writefile \"{file}\"\nfrom helpers.written import y\nopen(DATA / 'prompts.jsonl'), DATA / 'lab'",
        "from helpers import ask\nx = !python -m helpers bench\nask?",
        "import this is no Python, and it names helpers.magic",
    ],
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Return a repository that has a small course in one of its folders, with one commit."""
    repository = tmp_path_factory.mktemp("repository")
    for name, text in COURSE.items():
        write(repository / "a course" / name, text)
    for page, sources in CELLS.items():
        cells = [{"cell_type": "code", "source": source} for source in sources]
        prose = "![](images/loop.svg)" if page == "A" else "Read helpers.unused."
        cells.append({"cell_type": "markdown", "source": [prose]})
        write(repository / "a course" / "notebooks" / f"{page}.ipynb", json.dumps({"cells": cells}))
    git(repository, "init", "--initial-branch=main")
    git(repository, "add", ".")
    git(repository, "commit", "-m", "first")
    return repository


@pytest.fixture
def root(repository, tmp_path):
    """Return the folder of a small course in a copy of its repository."""
    return Path(shutil.copytree(repository, tmp_path / "copy")) / "a course"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "pages"),
    [
        # for all pages
        ("helpers/__init__.py", "ABC"),
        ("course/execute.py", "ABC"),
        ("data/page.css", "ABC"),
        # the page itself, and its image
        ("notebooks/A.ipynb", "A"),
        ("notebooks/images/loop.svg", "A"),
        # a lazy name of helpers, and what that module imports
        ("helpers/tables.py", "A"),
        ("helpers/deep/__init__.py", "A"),
        # a command, the program that it starts, and what that imports
        ("serving/app.py", "B"),
        ("serving/model.py", "B"),
        # a cell that writes a module, a file and a folder that it reads, a shell line, code that does
        # not parse
        ("helpers/written.py", "C"),
        ("data/prompts.jsonl", "C"),
        ("data/lab/settings.json", "C"),
        ("course/bench.py", "C"),
        ("helpers/magic.py", "C"),
        ("helpers/asked.py", "C"),
        # nothing that a page runs
        ("README.md", ""),
        ("docs/a.md", ""),
        ("tests/test_a.py", ""),
        ("helpers/unused.py", ""),
        ("helpers/server.py", ""),
    ],
)
def test_a_file_is_used_by_the_pages_that_import_start_or_read_it(repository, file, pages):
    uses = Uses(repository / "a course", {*COURSE, *(f"notebooks/{page}.ipynb" for page in CELLS)})
    assert "".join(page for page in CELLS if file in uses.find(f"notebooks/{page}.ipynb")) == pages


@pytest.mark.parametrize(
    ("file", "pages"),
    [
        ("pyproject.toml", "ABC"),
        ("data/models.toml", "ABC"),
        ("helpers/tables.py", "A"),
        ("helpers/new.py", ""),
        ("../elsewhere.py", ""),
    ],
)
def test_changes_that_are_not_committed_count(root, file, pages):
    write(root / file, "new")
    assert "".join(changed_pages("HEAD", root)) == pages


def test_a_branch_has_changed_what_it_committed_and_not_what_main_did_meanwhile(
    root, capsys, monkeypatch
):
    git(root, "switch", "-c", "branch")
    (root / "helpers" / "written.py").unlink()
    git(root, "mv", "serving/model.py", "serving/modell.py")
    git(root, "commit", "-a", "-m", "second")
    git(root, "switch", "main")
    write(root / "helpers" / "tables.py", "")
    git(root, "commit", "-a", "-m", "third")
    git(root, "switch", "branch")
    monkeypatch.setattr("course.changed.changed_pages.__defaults__", (root,))
    assert run_command(["changed", "--since", "main"]) == 0
    assert capsys.readouterr().out == "B\nC\n"


def test_a_file_that_is_gone_touches_the_pages_that_still_want_it(root):
    (root / "course" / "commands.py").unlink()
    assert changed_pages("HEAD", root) == ["A", "B", "C"]


@pytest.mark.parametrize("ref", ["nothing", "", "-x", "main:helpers/__init__.py"])
def test_a_reference_that_git_does_not_know_is_refused(root, ref):
    with refuses("ref-unknown"):
        changed_pages(ref, root)


def test_a_commit_without_a_common_one_is_refused(root):
    git(root, "switch", "--orphan", "other")
    git(root, "commit", "--allow-empty", "-m", "other")
    with refuses("ref-unrelated"):
        changed_pages("main", root)


def test_without_git_or_a_checkout_it_says_so(root, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path_factory.getbasetemp()))
    with refuses("not-a-checkout"):
        changed_pages("HEAD", tmp_path_factory.mktemp("plain"))
    monkeypatch.setenv("PATH", str(root))
    with refuses("git-missing"):
        changed_pages("HEAD", root)


def test_the_pages_of_the_course_use_what_they_are_known_to_use():
    from support import ROOT

    files = {
        path.relative_to(ROOT).as_posix()
        for folder in ("course", "deploy", "helpers", "serving")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    } | {"data/page.css", "notebooks/Cloud.ipynb"}
    used = Uses(ROOT, files).find("notebooks/Cloud.ipynb")
    assert {
        "serving/batch.py",
        "helpers/cloud/simulation.py",
        "course/azure.py",
        "deploy/azureml/job.yaml",
        "helpers/stores/database.py",
        "data/page.css",
    } <= used
    assert not used & {
        "helpers/show/playground.py",
        "helpers/show/drift.py",
        "course/kit/serve.py",
    }
