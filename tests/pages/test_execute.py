"""How a page is executed, on small pages of one cell: its own run, its errors, its kernel.

Run: python -m helpers test tests/pages/test_execute.py
"""

import os
import re

import mlflow
import nbformat
import papermill
import pytest
from support import PAGES, ROOT, refuses

from course.execute import execute, print_answers

# A page in small: it logs a run of its own, while somebody else logs one to the same experiment,
# before and after it.
SMALL_PAGE = """
import subprocess, sys, mlflow
def log(question):
    mlflow.set_tracking_uri({store!r})
    mlflow.set_experiment("Small")
    with mlflow.start_run():
        mlflow.log_metric("tokens_per_second", 7)
        mlflow.log_text("question,answer\\n" + question + ",yes\\n", "answers.csv")
if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] == "stranger":
        log("stranger")
    else:
        import os
        strangers = {{k: v for k, v in os.environ.items() if k != "MLFLOW_RUN_CONTEXT"}}
        stranger = [sys.executable, {file!r}, "stranger"]
        subprocess.run(stranger, env=strangers, check=True)
        log("mine")
        subprocess.run(stranger, env=strangers, check=True)
"""


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Return a folder that stands for the course's notebooks."""
    folder = tmp_path / "notebooks"
    (folder / "images").mkdir(parents=True)
    monkeypatch.setattr("course.execute.NOTEBOOKS", folder)
    return folder


def write_page(path, source):
    """Write a notebook of one code cell, with a cell for papermill's parameters before it."""
    cells = [
        nbformat.v4.new_code_cell("tracking_uri = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def test_a_page_that_ran_beside_others_prints_its_own_answers(
    notebooks, store, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_RUN_CONTEXT", '{"team": "blue"}')
    file = tmp_path / "small.py"
    file.write_text(SMALL_PAGE.format(store=store, file=str(file)), encoding="utf-8")
    write_page(notebooks / "Small.ipynb", file.read_text(encoding="utf-8"))
    told = []
    page = tmp_path / "out" / "Small.html"
    execution = execute(
        "Small",
        {"tracking_uri": store},
        tmp_path / "out",
        on_answers=lambda answers: told.append((answers, page.exists())),
    )
    assert len(mlflow.search_runs(experiment_names=["Small"])) == 3
    assert execution.run.data.tags["team"] == "blue"
    ((answers, ended),) = told  # before the page is there
    assert not ended
    print_answers(answers)
    assert re.findall("  Q  (.*)", capsys.readouterr().out) == ["mine"]
    assert execution.page == page
    assert os.environ["MLFLOW_RUN_CONTEXT"] == '{"team": "blue"}'


def test_a_notebook_whose_python_is_ended_by_the_system_says_so(notebooks, tmp_path):
    write_page(
        notebooks / "Dies.ipynb",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)\nos._exit(9)",
    )
    with refuses("kernel-ended"):
        execute("Dies", {}, tmp_path / "out")


@pytest.mark.parametrize("page", PAGES[1:2])  # they share the call that looks
def test_papermill_fails_on_a_parameter_that_the_notebook_does_not_have(page, store, tmp_path):
    # The plain papermill that anybody may run, which only logs a line by itself.
    with pytest.raises(papermill.PapermillExecutionError, match="no parameter called temprature"):
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{page}.ipynb",
            tmp_path / "out.ipynb",
            kernel_name="python3",
            parameters={"temprature": 1.0, "model": "tiny-phi3", "tracking_uri": store},
            progress_bar=False,
        )


def test_an_error_in_a_notebook_is_two_sentences_without_a_stack(python, tmp_path):
    result = python(
        "-m",
        "helpers",
        "notebook",
        "TransformerPipeline",
        "-p",
        "max_tokens",
        "0",
        "--output",
        tmp_path,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: max_tokens is 0. Choose a whole number")
    assert str(tmp_path / "TransformerPipeline.html") in result.stderr
    html = (tmp_path / "TransformerPipeline.html").read_text(encoding="utf-8")
    assert "CourseError: max_tokens is 0." in html
    assert "Traceback" not in html + result.stderr


def test_a_refused_connection_is_noticed(python):
    code = "import socket, contextlib\nwith contextlib.suppress(OSError): socket.create_connection(('192.0.2.1', 9), 1)"
    with pytest.raises(AssertionError, match=r"socket\.\w+ 192\.0\.2\.1"):
        python("-c", code, network=False)


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ("exit", "kernel-not-started", "I am in the way"),
        ("stranger", "file-in-the-way", "ipykernel.py"),
    ],
)
def test_a_kernel_that_ends_at_its_start_says_why(tmp_path, monkeypatch, fault, code, says):
    name = {"exit": "sitecustomize.py", "stranger": "ipykernel.py"}[fault]
    (tmp_path / name).write_text(
        "import sys\nif 'ipykernel_launcher' in sys.orig_argv: sys.exit('I am in the way')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    with refuses(code) as refusal:
        execute("ChatModel", {"model": "tiny-phi3"}, tmp_path / "out")
    assert says in refusal.value.what
