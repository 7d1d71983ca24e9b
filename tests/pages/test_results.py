"""The files of a page's results when it is really executed, on pages of a few cells.

Run: python -m helpers test tests/pages/test_results.py
"""

import json

import junitparser
import nbformat
import pytest
from support import refuses

from course.execute import execute
from course.results import ResultFiles

LOGS = """import mlflow
mlflow.set_tracking_uri(tracking_uri)
with mlflow.start_run(run_name="mine"):
    mlflow.log_metric("tokens", 7)
    mlflow.log_text("question,answer\\nWhy?,So.\\n", "answers.csv")"""
REFUSES = "from helpers import CourseError\nraise CourseError('disk-full', 'The disk is full.', 'Make room.')"


@pytest.fixture
def run_page(tmp_path, monkeypatch, store):
    """Return a function that executes a page of some cells, and gives the junit file's test suite and the JSON."""
    folder = tmp_path / "notebooks"
    (folder / "images").mkdir(parents=True)
    monkeypatch.setattr("course.execute.NOTEBOOKS", folder)
    files = ResultFiles(tmp_path / "new" / "junit.xml", tmp_path / "new" / "results.json")

    def run(*sources, refused=""):
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(
            nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_markdown_cell("# Title"), *cells],
                metadata={"kernelspec": kernel},
            ),
            folder / "Page.ipynb",
        )
        if refused:
            with refuses(refused):
                execute("Page", {"tracking_uri": store}, tmp_path / "out", results=files)
        else:
            execute("Page", {"tracking_uri": store}, tmp_path / "out", results=files)
        (suite,) = junitparser.JUnitXml.fromfile(str(files.junit))
        return suite, json.loads(files.json.read_text(encoding="utf-8"))

    return run


def test_a_page_that_runs_to_its_end_has_its_runs_figures_and_answers(run_page, store):
    suite, found = run_page(LOGS)
    assert [(case.classname, case.result) for case in suite] == [("Page", []), ("Title", [])]
    assert found["status"] == "passed"
    assert found["parameters"]["tracking_uri"] == store
    assert (found["run"]["name"], found["run"]["metrics"]) == ("mine", {"tokens": 7.0})
    assert found["answers"] == [{"question": "Why?", "answer": "So."}]
    assert 0 < suite.time == pytest.approx(found["duration"])


def test_a_cell_that_is_refused_has_the_courses_code_and_what_was_logged_before_it(run_page):
    suite, found = run_page(LOGS, REFUSES, "1", refused="cell-refused")
    assert [case.result[0].type if case.result else "" for case in suite][1:] == [
        "",
        "disk-full",
        None,
    ]
    assert found["error"]["code"] == "disk-full"
    assert found["error"]["message"] == "The disk is full. Make room."
    assert found["run"]["metrics"] == {"tokens": 7.0}


def test_a_page_without_code_is_a_failure(run_page):
    suite, found = run_page(refused="no-cells")
    assert (suite.failures, found["error"]["code"]) == (1, "no-cells")
