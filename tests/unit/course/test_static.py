"""What can be known without running a model: notebooks, pins, prose, CI.

Run: python -m helpers test tests/unit/course/test_static.py
"""

import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from support import ALL_PAGES, ROOT, TRACKS

from course.environment import pins
from course.exercises import pair, write_exercises
from course.pages import read_pages
from helpers import read_catalogue
from helpers.exercises import load_checks
from helpers.parameters import DEFAULTS, PARAMETERS

NOTEBOOKS = {
    track: nbformat.read(ROOT / "notebooks" / f"{track}.ipynb", as_version=4) for track in ALL_PAGES
}


def cells(track, kind):
    return [cell for cell in NOTEBOOKS[track].cells if cell.cell_type == kind]


def prose(track):
    return "\n".join(cell.source for cell in cells(track, "markdown"))


def defaults(track):
    """Return the notebook's parameters with the defaults that no environment variable changes."""
    (cell,) = [
        cell for cell in cells(track, "code") if "parameters" in cell.metadata.get("tags", [])
    ]
    namespace = {}
    exec(cell.source.replace("os.environ.get", "{}.get"), namespace)
    return {name: namespace[name] for name in (*PARAMETERS, "track") if name in namespace}


def test_notebooks_hold_no_outputs(tmp_path):
    # What git has: on the disk, a learner's own run may stand in it.
    for page in ALL_PAGES:
        committed = subprocess.run(
            ["git", "show", f":notebooks/{page}.ipynb"], cwd=ROOT, capture_output=True
        )
        if committed.returncode:
            pytest.skip("not a git checkout")
        (tmp_path / f"{page}.ipynb").write_bytes(committed.stdout)
    command = [
        sys.executable,
        "-m",
        "nbstripout",
        "--verify",
        "--extra-keys",
        "metadata.papermill cell.metadata.papermill",
        *tmp_path.glob("*.ipynb"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_tracks_have_the_same_headings_in_the_same_order():
    first, second = (re.findall(r"^## .*$", prose(track), re.MULTILINE) for track in TRACKS)
    assert first == second != []


@pytest.mark.parametrize("page", read_pages(), ids=lambda page: page.name)
def test_every_heading_says_its_minutes_and_they_are_what_the_page_promises(page):
    headings = re.findall(r"^## .*$", prose(page.name), re.MULTILINE)
    minutes = [re.search(r" \((\d+) min\)$", heading) for heading in headings]
    assert all(minutes), headings
    assert sum(int(found[1]) for found in minutes) == page.minutes <= 45
    assert f"**Time:** {page.minutes} minutes" in NOTEBOOKS[page.name].cells[0].source


def test_every_notebook_is_in_the_list_of_pages():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(ALL_PAGES)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_a_page_has_its_exercises_made_from_their_solutions_and_four_questions(page):
    pairs = pair(NOTEBOOKS[page])
    checks = re.findall(
        r'check\("([\w ]+)"\)', "\n".join(cell.source for cell in cells(page, "code"))
    )
    assert len(set(checks)) == len(pairs)
    assert set(checks) <= set(load_checks())
    (questions,) = [
        cell.source
        for cell in cells(page, "markdown")
        if cell.source.startswith("## Check yourself")
    ]
    assert re.findall(r"^\*\*(\d)\. .*\?\*\*$", questions, re.MULTILINE) == ["1", "2", "3", "4"]
    answers = re.findall(
        r"<details><summary>Answer</summary>\n\n(.*?)\n\n</details>", questions, re.DOTALL
    )
    assert len(answers) == 4
    for answer in answers:  # the right one, and why each of the others is not
        right = re.match(r"\*\*([abc])\.\*\* ", answer)[1]
        assert all(f"ot **{other}**" in answer for other in "abc" if other != right), answer


def test_no_exercise_is_stale():
    write_exercises(check=True)


def test_tracks_have_the_same_parameters_cell():
    first, second = ([cell.source for cell in cells(track, "code")][:1] for track in TRACKS)
    assert first == second


@pytest.mark.parametrize("page", read_pages(), ids=lambda page: page.name)
def test_a_page_has_the_parameters_of_the_course(page):
    own = {"track": "onnx"} if page.track == "either" else {}
    assert defaults(page.name) == DEFAULTS | own


@pytest.mark.parametrize("track", ALL_PAGES)
def test_a_notebook_opens_with_its_aim_and_closes_with_what_was_built(track):
    sources = [cell.source for cell in NOTEBOOKS[track].cells]
    assert sources[0].startswith("# ")
    for promise in ("**After this page you can**", "**Time:**", "**You need:**", "**You know:**"):
        assert promise in sources[0]
    assert sources[-1].startswith("## What you built")
    assert "**Next:**" in sources[-1]
    assert "**Read on:**" in sources[-1]


@pytest.mark.parametrize("track", ALL_PAGES)
def test_every_code_cell_fits_on_a_screen_and_no_cell_is_empty(track):
    for cell in cells(track, "code"):
        lines = len(cell.source.splitlines())
        assert 0 < lines <= 45, cell.source[:80]
    assert all(cell.source.strip() for cell in cells(track, "markdown"))


@pytest.mark.parametrize("track", ALL_PAGES)
def test_a_page_says_which_kernel_to_choose_before_it_imports_the_course(track):
    first = next(
        place
        for place, cell in enumerate(NOTEBOOKS[track].cells)
        if cell.source.startswith("from helpers")
    )
    before = "\n".join(cell.source for cell in NOTEBOOKS[track].cells[:first])
    assert "choose another kernel at the top right" in before and "`.venv`" in before


@pytest.mark.parametrize("track", ALL_PAGES)
def test_files_that_the_prose_names_are_there(track):
    for name in re.findall(r"`(\w+\.ipynb)`", prose(track)):
        assert (ROOT / "notebooks" / name).is_file(), name


def test_modules_import_only_what_the_contracts_in_pyproject_allow():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("check", [["check"], ["format", "--check"]], ids=["rules", "layout"])
def test_the_code_is_clean(check):
    command = [sys.executable, "-m", "ruff", *check, "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_wrapper_that_the_notebook_writes_is_clean():
    # ruff skips a cell that starts with a magic, so this one goes in by hand.
    (cell,) = [
        cell
        for cell in cells("CustomPythonWrapper", "code")
        if cell.source.startswith("%%writefile")
    ]
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--stdin-filename",
        "notebooks/prompt_model.py",
        "-",
    ]
    source = cell.source.split("\n", 1)[1] + "\n"
    result = subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_every_pin_is_exact_and_stands_in_the_constraints():
    constraints = [
        line.partition(" ;")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ]
    for name, version in pins(("dev", "nightly", "bench")).items():
        if name != "pip":  # pip is the one package that does not constrain itself
            assert f"{name}=={version}" in constraints
    assert not [line for line in constraints if line.startswith(("nvidia", "cuda", "triton"))]


def test_transformers_is_inside_the_range_that_mlflow_declares():
    from mlflow.ml_package_versions import _ML_PACKAGE_VERSIONS

    models = _ML_PACKAGE_VERSIONS["transformers"]["models"]
    low, pinned, high = (
        tuple(map(int, version.split(".")))
        for version in (models["minimum"], pins()["transformers"], models["maximum"])
    )
    assert low <= pinned <= high


def test_mlproject_has_the_parameters_of_the_notebooks():
    entries = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    pages = {re.sub("(?<!^)(?=[A-Z])", "_", page).lower(): page for page in ALL_PAGES}
    assert entries.keys() - pages.keys() == {"serve", "batch"}
    for name, page in pages.items():
        if name not in entries:  # a page need not have one
            continue
        entry = entries[name]
        assert {name: value["default"] for name, value in entry["parameters"].items()} == defaults(
            page
        )
        assert f" {page} " in entry["command"]
        assert all(f"-p {name} {{{name}}}" in entry["command"] for name in defaults(page))


def test_the_catalogue_is_complete():
    cards = read_catalogue()
    assert {"tiny-phi3", "smollm2-135m", "phi-3-mini-4k"} <= cards.keys()
    wheel = cards["smollm2-135m"].source["wheel"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", wheel[key]) for key in ("sha256", "member_sha256"))
    for card in cards.values():
        assert card.context_length >= 4096
        assert card.disk >= card.download


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make test" in readme
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")
    assert "python -m helpers test" in readme


def test_the_versions_of_python_agree_everywhere():
    from course.__main__ import NEWEST, OLDEST

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == f">={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"
