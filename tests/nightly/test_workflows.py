"""The steps of the workflows, run by bash in a clean clone as a runner would; `gh` alone is a stand-in, elsewhere.

Python is the one of these tests, which has the packages: a whole environment from nothing is
another test's.

Run: python -m helpers nightly tests/nightly/test_workflows.py
"""

import json
from pathlib import Path

import junitparser
import pytest
from support.user import git, make_checkout
from support.workflows import run_steps

from helpers.paths import model_cache


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Return a clean clone of the course as it stands here, whose branch changes one page and one document."""
    folder = tmp_path_factory.mktemp("workflows")
    origin = make_checkout(folder / "origin")
    git(origin, "init", "--initial-branch=main")
    git(origin, "add", ".")
    git(origin, "commit", "-m", "the course")
    git(folder, "clone", "origin", "clone")
    git(folder / "clone", "switch", "-c", "branch")
    for name in ("notebooks/ChatModel.ipynb", "docs/ci.md"):
        with (folder / "clone" / name).open("a", encoding="utf-8") as file:
            file.write("\n")
    git(folder / "clone", "commit", "-a", "-m", "a change")
    return folder / "clone"


def run(clone, folder, workflow, job, **variables):
    variables |= {"COURSE_CACHE": str(model_cache())}  # as the workflows' cache of models
    return run_steps(workflow, job, folder, variables, clone, stand_ins={})


def test_the_steps_of_a_call_execute_a_page_and_leave_what_the_artifact_holds(clone, tmp_path):
    done = run(
        clone,
        tmp_path,
        "pages.yml",
        "page",
        PAGE="ChatModel",
        MODEL="tiny-phi3",
        SOLVED="true",
        PARAMETERS="question=Who wrote Hamlet?\nmax_tokens=8\n",
    )
    assert done.returncode == 0, done.said
    pages = clone / "build" / "pages"
    assert {"ChatModel.ipynb", "ChatModel.html", "junit.xml", "results.json"} <= {
        path.name for path in pages.iterdir()
    }
    results = json.loads((pages / "results.json").read_text(encoding="utf-8"))
    assert results["status"] == "passed"
    assert results["answers"][0]["question"] == "Who wrote Hamlet?"
    assert results["run"]["params"]["max_tokens"] == "8"
    assert results["run"]["registered"]["name"] == "slm-onnx"
    (suite,) = junitparser.JUnitXml.fromfile(str(pages / "junit.xml"))
    assert suite.failures == suite.skipped == 0 < suite.tests


def test_the_steps_of_a_call_that_fails_leave_the_artifact_too(clone, tmp_path):
    done = run(
        clone,
        tmp_path,
        "pages.yml",
        "page",
        PAGE="ChatModel",
        MODEL="gpt-5",
        SOLVED="false",
        PARAMETERS="",
    )
    assert done.returncode == 1
    assert "python -m helpers notebook ChatModel -p model gpt-5" in done.summary
    pages = clone / "build" / "pages"
    assert (
        json.loads((pages / "results.json").read_text(encoding="utf-8"))["error"]["code"]
        == "model-unknown"
    )
    assert (pages / "ChatModel.html").exists()


def test_the_steps_of_a_pull_request_find_its_pages(clone, tmp_path):
    done = run(clone, tmp_path, "pull-request.yml", "changed", BASE="main")
    assert done.returncode == 0, done.said
    assert done.output == 'pages=["ChatModel"]\n'


@pytest.mark.parametrize(
    ("workflow", "job", "options"),
    [
        ("pull-request.yml", "check", ""),
        # Their tests are run by these commands anyway; here they are only found.
        ("main.yml", "test", "--collect-only"),
        ("nightly.yml", "nightly", "--collect-only"),
    ],
)
def test_the_steps_that_run_a_tier_write_junit(clone, tmp_path, workflow, job, options):
    junit = Path(clone / "build" / "junit.xml")
    junit.unlink(missing_ok=True)
    done = run(clone, tmp_path, workflow, job, PYTEST_ADDOPTS=options)
    assert done.returncode == 0, done.said[-5000:]
    assert junit.exists()
    assert "To repeat this: `make" in done.summary
