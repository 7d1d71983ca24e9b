"""A page's results as junit and JSON, on small notebooks that look executed.

Run: python -m helpers test tests/unit/course/test_results.py
"""

import json
import sys
from pathlib import Path

import junitparser
import nbformat
import pytest
import xmlschema
from support import ROOT, refuses

from course.results import ResultFiles, read_run
from helpers import CourseError

SCHEMA = xmlschema.XMLSchema(ROOT / "tests" / "support" / "junit-10.xsd")
PARAMETERS = {"model": "tiny-phi3"}


def code(source, seconds=1.5, error=None, begun=True):
    """Return a code cell as papermill leaves it; it calls a cell that never began completed, too."""
    times = {
        "start_time": "2026-01-02T03:04:05" if begun else None,
        "duration": seconds if begun else None,
        "status": "failed" if error else "completed",
    }
    return nbformat.v4.new_code_cell(
        source, metadata={"papermill": times}, outputs=[error] if error else []
    )


def course_error(
    name="disk-full", what="It is <full> & \x1b[31mred\x1b[0m \x00.", fix="Make room."
):
    error = CourseError(name, what, fix)
    return nbformat.v4.new_output(
        "error", ename="CourseError", evalue=str(error), traceback=error._render_traceback_()
    )


def notebook(*cells):
    return nbformat.v4.new_notebook(
        cells=list(cells), metadata={"papermill": {"duration": 12.3456}}
    )


def text(source):
    return nbformat.v4.new_markdown_cell(source)


def written(tmp_path, page, failure=None, run=None, answers=()):
    """Return what was written for a page: the junit file's one suite, as another program reads it, and the JSON."""
    if page is not None:
        nbformat.write(page, tmp_path / "Page.ipynb")
    files = ResultFiles(tmp_path / "new" / "junit.xml", tmp_path / "new" / "results.json")
    files.prepare()
    files.write("Page", tmp_path / "Page.ipynb", PARAMETERS, run, list(answers), failure)
    SCHEMA.validate(files.junit)
    (suite,) = junitparser.JUnitXml.fromfile(str(files.junit))
    return suite, json.loads(files.json.read_text(encoding="utf-8"))


def results(suite):
    """Return the kind and the type of each test case's result; None where it passed."""
    return [
        (type(case.result[0]).__name__, case.result[0].type) if case.result else None
        for case in suite
    ]


def test_a_page_that_ran_has_a_passed_test_case_for_each_cell_with_code(tmp_path):
    page = notebook(
        text("# A *page*\n\n```\n# no heading\n```"),
        code("\n# first\nx = 1"),
        code(" "),
        text("## Ask `it` (4 min)\nText."),
        code("y" * 100, seconds=0.25),
    )
    run = {"id": "1", "metrics": {"speed": float("nan"), "tokens": 7.0}}
    suite, found = written(
        tmp_path, page, run=run, answers=[{"question": "Wo?", "answer": "Straße"}]
    )
    assert [(case.classname, case.name, case.time) for case in suite] == [
        ("A page", "cell 1: # first", 1.5),
        ("Ask it", "cell 2: " + "y" * 60, 0.25),
    ]
    assert results(suite) == [None, None]
    assert (suite.name, suite.tests, suite.failures, suite.skipped, suite.time) == (
        "Page",
        2,
        0,
        0,
        12.346,
    )
    assert found == {
        "page": "Page",
        "status": "passed",
        "error": None,
        "model": "tiny-phi3",
        "parameters": PARAMETERS,
        "duration": 12.346,
        "cells": {"passed": 2, "failed": 0, "skipped": 0},
        "run": {"id": "1", "metrics": {"speed": None, "tokens": 7.0}},
        "answers": [{"question": "Wo?", "answer": "Straße"}],
    }


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (course_error(), "disk-full"),
        (
            nbformat.v4.new_output(
                "error", ename="ValueError", evalue="no", traceback=["(code: x)"]
            ),
            "ValueError",
        ),
        (nbformat.v4.new_output("error", ename="KeyError", evalue="", traceback=[]), "KeyError"),
    ],
)
def test_a_cell_that_failed_has_a_failure_of_the_errors_kind_and_the_cells_after_it_are_skipped(
    tmp_path, error, kind
):
    page = notebook(code("1"), text("## Here"), code("2", error=error), code("3", begun=False))
    suite, found = written(tmp_path, page, CourseError("cell-refused", "It failed.", "Read it."))
    assert results(suite) == [None, ("Failure", kind), ("Skipped", None)]
    assert (suite.tests, suite.failures, suite.skipped) == (3, 1, 1)
    assert found["status"] == "failed"
    assert found["error"] == {
        "code": kind,
        "message": error.evalue,
        "cell": "cell 2: 2",
        "heading": "Here",
    }
    assert found["cells"] == {"passed": 1, "failed": 1, "skipped": 1}


def test_letters_that_xml_forbids_are_left_out(tmp_path):
    suite, _ = written(tmp_path, notebook(code("\x08x", error=course_error())))
    (case,) = suite
    assert case.name == "cell 1: x"
    assert case.result[0].message == "It is <full> & red . Make room."
    assert case.result[0].text == "CourseError: It is <full> & red .\nMake room.\n(code: disk-full)"


@pytest.mark.parametrize(
    ("page", "failure", "expected"),
    [
        # A kernel that ends leaves no error in the cell that it was at.
        (
            notebook(code("1"), code("2"), code("3", begun=False)),
            "kernel-ended",
            [None, ("Failure", "kernel-ended"), ("Skipped", None)],
        ),
        (notebook(code("1")), "disk-full", [None, ("Failure", "disk-full")]),
        (notebook(text("# No code")), "no-cells", [("Failure", "no-cells")]),
        (
            notebook(code("1", begun=False)),
            "kernel-not-started",
            [("Skipped", None), ("Failure", "kernel-not-started")],
        ),
        (None, "kernel-not-started", [("Failure", "kernel-not-started")]),
    ],
)
def test_a_failure_that_no_cell_shows_is_in_the_files_too(tmp_path, page, failure, expected):
    suite, found = written(tmp_path, page, CourseError(failure, "It failed.", "Read it."))
    assert results(suite) == expected
    assert suite.failures == 1
    assert (found["status"], found["error"]["code"]) == ("failed", failure)


def test_a_file_that_cannot_be_written_is_refused_before_the_page_and_an_old_one_removed(tmp_path):
    (tmp_path / "a file").write_text("old", encoding="utf-8")
    (tmp_path / "a folder").mkdir()
    # No file can be made there.
    nowhere = [Path("/proc/self/junit.xml")] if sys.platform == "linux" else []
    for path in (tmp_path / "a file" / "junit.xml", tmp_path / "a folder", *nowhere):
        with refuses("results-not-writable") as refusal:
            ResultFiles(json=path).prepare()
        assert str(path) in refusal.value.what
    ResultFiles(junit=tmp_path / "a file").prepare()
    assert not (tmp_path / "a file").exists()


def test_where_writing_fails_after_the_page_the_error_says_where_the_page_is(tmp_path):
    files = ResultFiles(junit=tmp_path / "junit.xml")
    files.prepare()
    files.junit.mkdir()
    with refuses("results-not-written") as refusal:
        files.write("Page", tmp_path / "out" / "Page.ipynb", PARAMETERS, None, [])
    assert str(files.junit) in refusal.value.what
    assert str(tmp_path / "out") in refusal.value.fix


def test_a_run_has_its_figures_and_the_version_that_was_registered_from_it(store):
    import mlflow

    mlflow.set_tracking_uri(store)
    client = mlflow.MlflowClient(store)
    run = client.create_run("0", run_name="mine")
    client.log_metric(run.info.run_id, "tokens", 7)
    client.log_param(run.info.run_id, "model", "tiny-phi3")
    run = client.get_run(run.info.run_id)
    found = {
        "id": run.info.run_id,
        "name": "mine",
        "metrics": {"tokens": 7.0},
        "params": {"model": "tiny-phi3"},
    }
    assert read_run(run, client) == found | {"registered": None}
    client.create_registered_model("slm")
    client.create_model_version("slm", "file:///x", run_id=run.info.run_id)
    assert read_run(run, client) == found | {"registered": {"name": "slm", "version": 1}}
