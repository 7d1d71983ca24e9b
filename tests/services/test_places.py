"""Where the course may stand and what may stand around it: odd names, other kernels, files in the way, no home.

Run: python -m helpers test tests/services/test_places.py
"""

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_markdown_cell, new_notebook
from support import PAGES, ROOT, refuses
from support.executed import other_kernel
from support.kits import write_sums

from course import environment
from course.commands import run_command
from course.execute import execute
from course.kernels import Kernel, Kernels, kernel_variables
from course.static_page import write_page
from helpers.models.folders import ensure
from helpers.models.kit import as_word, read_kit
from helpers.parameters import DEFAULTS
from helpers.paths import NOTEBOOKS
from helpers.shadowing import refuse_shadowing_files

# Letters that a URI, a template, a pattern, a configuration file or a shell takes for its own.
# Windows has only some.
ODD = (
    "My%20Repo",
    "100%25",
    "100%",
    "a#b",
    "it's",
    "{x}",
    "{0}",
    "[x]",
    "$HOME",
    "${HOME}",
    "%(here)s",
    "a;b&c",
    "-x",
    ".hidden",
    "~x",
    "!x",
    unicodedata.normalize("NFD", "é"),
    "コース",
    "x" * 200,
    "a.ipynb",
    "`id`",
    "a=b,c",
    *(() if os.name == "nt" else ("what?", 'say "hi"', "a\\b", "a\\", "end ", "a*", "<b>", "a|b")),
)
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")


@pytest.fixture(params=ODD, ids=[str(number) for number in range(len(ODD))])
def odd(request, tmp_path):
    """Return a folder with an odd name."""
    folder = tmp_path / request.param
    folder.mkdir()
    return folder


@pytest.fixture
def here(monkeypatch):
    """Let commands set nothing up."""
    monkeypatch.setattr("course.environment.inside_venv", lambda: False)
    monkeypatch.setattr("course.environment.differing_packages", lambda tests: {})


# --- odd names ----------------------------------------------------------------------------------


def test_a_links_address_leads_from_a_page_to_its_file(odd, monkeypatch):
    notebooks = odd / "notebooks"
    notebooks.mkdir()
    (odd / "see me?.md".replace("?", "")).touch()
    monkeypatch.setattr("course.static_page.NOTEBOOKS", notebooks)
    out = odd.parent / "out"
    out.mkdir()
    cell = new_markdown_cell(
        "[a](../see%20me.md#part) [b](ChatModel.ipynb) [c](mailto:zoe@example.org)"
    )
    nbformat.write(new_notebook(cells=[cell]), out / "page.ipynb")
    links = [
        link["href"]
        for link in BeautifulSoup(
            write_page(out / "page.ipynb").read_text(encoding="utf-8"), "html.parser"
        ).select("a[href]")
    ]
    parts = urlsplit(links[0])
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("", "", "", "part")
    assert (out / unquote(parts.path)).resolve() == odd / "see me.md"
    assert links[1:] == ["ChatModel.html", "mailto:zoe@example.org"]


def write_kit(folder):
    folder.mkdir(exist_ok=True)
    (folder / "course.zip").write_bytes(b"PK")
    write_sums(folder)


def test_a_kit_is_read_from_its_folder_and_named_as_a_shell_reads_it(odd, monkeypatch):
    write_kit(odd)
    monkeypatch.setenv("COURSE_KIT", str(odd))
    kit = environment.open_kit()
    assert kit.address == str(odd)
    if os.name == "posix":
        assert (
            str(odd)
            in subprocess.run(
                ["bash", "-c", f"printf '%s\\n' {as_word(odd)}"],
                capture_output=True,
                text=True,
                encoding="utf-8",
            ).stdout.splitlines()
        )


def test_a_relative_kit_may_have_spaces_around_it_that_are_not_its_name(tmp_path, monkeypatch):
    write_kit(tmp_path / "kit")
    assert read_kit(f" {tmp_path / 'kit'} ").address == str(tmp_path / "kit")


def test_pip_finds_a_kits_wheels(odd):
    from support.kits import only_wheels

    from course.install import pip_environment
    from helpers.models.kit import Kit

    only_wheels(odd / "wheels", "six-1.17.0-py2.py3-none-any.whl")
    (odd / "wheels" / "index.html").write_text('<a href="six-1.17.0-py2.py3-none-any.whl">six</a>')
    variables = pip_environment(Kit(str(odd), {}))
    path = urlsplit(variables["PIP_FIND_LINKS"])
    assert (path.scheme, path.query, path.fragment) == ("file", "", "")
    from pip._internal.utils.urls import url_to_path

    assert Path(url_to_path(variables["PIP_FIND_LINKS"])) == odd / "wheels" / "index.html"
    assert not re.search(r"\s", variables["PIP_FIND_LINKS"])  # pip splits there


def test_a_folder_is_made_anew_beside_what_another_try_left(odd):
    def make(partial):
        (partial / "a").write_text("1")

    (odd / f"{odd.name}.0000.partial").mkdir()
    ensure(odd / odd.name, {"by": 1}, make)
    assert sorted(path.name for path in odd.iterdir()) == sorted(
        [odd.name, f"{odd.name}.receipt.json"]
    )


@posix
def test_a_folder_with_the_paths_separator_is_refused_before_python_is_blamed(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(environment, "ROOT", tmp_path / "a:b")
    monkeypatch.setattr(environment, "VENV_PYTHON", tmp_path / "none")
    with refuses("folder-name") as refusal:
        environment._make_venv()
    assert "a:b" in refusal.value.what


@posix
def test_the_environment_is_known_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setattr(environment, "VENV", tmp_path / "real")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "link"))
    assert environment.inside_venv()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert not environment.inside_venv()


def test_lab_opens_a_page_whose_name_is_odd(here, odd, monkeypatch):
    started = []
    page = odd / "notebooks" / f"{odd.name}.ipynb"
    page.parent.mkdir()
    page.touch()
    monkeypatch.setattr("course.commands.ROOT", odd)
    monkeypatch.setattr("course.execute.NOTEBOOKS", page.parent)
    monkeypatch.setattr(
        "course.commands._serve", lambda command, **variables: started.append(command) or 0
    )
    run_command(["lab", odd.name] if not odd.name.startswith("-") else ["lab", "--", odd.name])
    (url,) = [
        word.split("=", 1)[1] for word in started[0] if word.startswith("--LabApp.default_url=")
    ]
    parts = urlsplit(url)
    assert (unquote(parts.path), parts.query, parts.fragment) == (
        f"/lab/tree/notebooks/{odd.name}.ipynb",
        "",
        "",
    )
    assert f"--ServerApp.root_dir={odd}" in started[0]


# --- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["python3", "another", ".venv"])
def test_the_only_kernel_is_the_running_python(tmp_path, monkeypatch, asked):
    monkeypatch.setenv("JUPYTER_PATH", str(other_kernel(tmp_path)))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    assert list(Kernels().get_all_specs()) == ["python3"]
    manager = Kernel(kernel_name=asked)
    assert manager.format_kernel_cmd()[0] == sys.executable


def test_jupyterlab_is_told_of_that_kernel_alone():
    from jupyter_server.serverapp import ServerApp

    from course.commands import lab_options

    app = ServerApp()
    app.parse_command_line(lab_options())
    assert app.kernel_spec_manager_class is Kernels


def test_the_courses_folder_comes_first_in_a_kernel(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert kernel_variables()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/elsewhere"]
    monkeypatch.delenv("PYTHONPATH")
    assert kernel_variables()["PYTHONPATH"] == str(ROOT)


@pytest.mark.parametrize("home", ["gone", "file", "mine"])
def test_jupyter_has_a_home_where_the_user_has_none(tmp_path, monkeypatch, home):
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / home))
    given = kernel_variables().get("HOME")
    assert (given is None) == (home == "mine")
    if given:
        assert Path(given).is_dir()
        Path(given).rmdir()


# --- files in the way ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "refused"),
    [
        ("random.py", True),
        ("mlflow.py", True),
        ("torch/__init__.py", True),
        ("transformers.pyc", True),
        ("pathlib.py", True),
        ("_bz2.cpython-311-x86_64-linux-gnu.so", True),
        ("mine.py", False),
        ("torch/weights.bin", False),
        ("torch.txt", False),
        ("test.py", False),
        ("helpers.py", False),
        ("Random.py", False),
        ("sitecustomize.py", False),
        ("mlflow.old.py", False),
        ("torch.numpy", False),
    ],
)
def test_a_file_with_a_librarys_name_is_named(tmp_path, file, refused):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    folders = [str(tmp_path), *sys.path]
    if not refused:
        refuse_shadowing_files(folders)
        return
    with refuses("file-in-the-way") as refusal:
        refuse_shadowing_files(folders)
    assert str(tmp_path / file.split("/")[0]) in refusal.value.what


def test_a_file_that_comes_after_the_library_hides_nothing(tmp_path):
    (tmp_path / "mlflow.py").touch()
    refuse_shadowing_files([*sys.path, str(tmp_path)])


def test_the_courses_own_packages_hide_what_is_called_so_and_nobody_elses_do(tmp_path):
    for folder in ("site-packages", "mine"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helpers.py").touch()
    refuse_shadowing_files([str(ROOT), str(tmp_path / "site-packages")])
    with refuses("file-in-the-way"):
        refuse_shadowing_files([str(tmp_path / "mine"), str(tmp_path / "site-packages")])


@pytest.mark.parametrize("cwd", ["gone", "course"])
def test_nothing_is_in_the_way_of_the_course_itself(tmp_path, cwd):
    code = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); " if cwd == "gone" else ""
    code += "from helpers.shadowing import refuse_shadowing_files; refuse_shadowing_files()"
    (tmp_path / "gone").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "gone"], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "file", ["random.py", "argparse.py", "pathlib.py", "tomllib.py", "mlflow.py"]
)
def test_a_command_names_the_file_that_is_in_its_way(tmp_path, file):
    (tmp_path / file).write_text("x = 1\n")
    result = subprocess.run(
        [sys.executable, "-m", "helpers", "help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*\n       Rename .*\n", result.stderr), result.stderr
    assert str(tmp_path / file) in result.stderr


@pytest.mark.parametrize(
    ("page", "file"),
    [
        *((page, "helpers.py") for page in PAGES),
        ("ChatModel", "helpers/__init__.py"),
        ("ChatModel", "helpers/notes.txt"),
        ("ChatModel", "mlflow.py"),
        ("TransformerPipeline", "torch/__init__.py"),
        ("CustomPythonWrapper", "pandas.py"),
    ],
)
def test_a_page_in_a_plain_jupyter_names_the_file_that_is_in_its_way(
    tmp_path, monkeypatch, page, file
):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("x = 1")
    cells = nbformat.read(NOTEBOOKS / f"{page}.ipynb", as_version=4).cells
    place = next(
        number for number, cell in enumerate(cells) if cell.source.startswith("from helpers")
    )
    # IPython puts the page's folder before the libraries, where a folder without modules comes
    # before set-up's link.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    code = (
        "import sys, json; sys.path[:] = [sys.argv[2], *sys.path[1:]]\n"
        "exec(json.loads(sys.argv[1]), json.loads(sys.argv[3]))"
    )
    words = [json.dumps(cells[place].source), str(tmp_path), json.dumps(DEFAULTS)]
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    said = result.stderr.splitlines()[-1]
    name = file.split("/")[0].partition(".")[0]
    assert name in said
    if name == "helpers":  # none of ours is imported; the text above the cell says what to do
        assert said.startswith(("ModuleNotFoundError", "ImportError")), said
        above = "\n".join(cell.source for cell in cells[:place])
        assert "A file or a folder of yours that is called `helpers`" in above
    else:
        assert said.startswith("helpers.errors.CourseError") and "Rename or remove it" in said


# --- folders that cannot be written --------------------------------------------------------------


@pytest.mark.parametrize("fault", ["file", "closed"])
def test_a_pages_folder_that_cannot_be_written_is_refused_with_the_option(
    tmp_path, monkeypatch, fault
):
    place = tmp_path / "place"
    if fault == "file":
        place.touch()
    else:

        def refuse(*arguments, **options):
            raise PermissionError(13, "Permission denied", str(place))

        monkeypatch.setattr(Path, "mkdir", refuse)
    with refuses("pages-not-writable") as refusal:
        execute("ChatModel", {}, place)
    assert "--output" in refusal.value.fix


@pytest.mark.parametrize("command", [["notebook", "ChatModel"], ["ui"]])
def test_a_command_says_so_before_anything_long(python, command):
    result = python(
        "-m",
        "helpers",
        *command,
        MLFLOW_RUN_CONTEXT="{tags",
        COURSE_TRACKING_URI="sqlite:///build/none.db",
    )
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: A variable of this shell .*MLFLOW_RUN_CONTEXT.*\n +Correct or unset it.*\n",
        result.stderr,
    )
