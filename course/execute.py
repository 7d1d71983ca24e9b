"""Runs a page of the course with papermill: a name and parameters come in, what it wrote and its MLflow run go out."""

import contextlib
import errno
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from course.exercises import solve
from course.static_page import write_page
from helpers.errors import CourseError
from helpers.paths import BUILD, NOTEBOOKS
from helpers.tracking import tracking_store

PAGES = ("TransformerPipeline", "CustomPythonWrapper", "ChatModel")

# Kernel and client talk over an encrypted socket: a workshop's machine may have other users.
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})
# MLflow puts the tags of this variable, a JSON object, on every run that a process begins.
RUN_TAGS, EXECUTION_TAG = "MLFLOW_RUN_CONTEXT", "course.execution"
# `mlflow run` sets these for the run that it records itself. A page opens its own.
FOREIGN_RUN = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")


@dataclass(frozen=True)
class Execution:
    """A page that ran to its end: its name, the HTML file, and the ``mlflow.entities.Run`` that it made."""

    name: str
    page: Path
    run: object


def execute(name: str, parameters: dict, folder: Path = BUILD / "course", solved: bool = False) -> Execution:
    """Run one page from its first cell to its last, with the parameters that papermill injects.

    ``solved`` fills its exercises. ``folder`` gets ``name.ipynb`` and ``name.html``, also when a cell fails, and
    ``name.log``.

    Raises
    ------
    CourseError
        There is no such page, or a cell failed; the message is the cell's own.
    """
    source = nbformat.read(find_notebook(name), as_version=4)
    source = solve(source) if solved else source
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(NOTEBOOKS / "images", folder / "images", dirs_exist_ok=True)
    target = folder / f"{name}.ipynb"
    try:
        with _tagged_runs() as execution, _kernel_log(folder / f"{name}.log"):
            papermill.execute_notebook(source, target, parameters, kernel_name="python3", cwd=NOTEBOOKS,
                                       progress_bar=sys.stderr.isatty(), config=ENCRYPTED)
    except DeadKernelError:
        raise CourseError(
            "kernel-ended", f"The system ended the Python that ran {name}, most likely for want of memory.",
            "Close programs or choose a smaller model, and run this again; `make doctor` tells what fits.",
        ) from None
    except papermill.PapermillExecutionError as error:
        if "[Errno 28]" in error.evalue:
            raise OSError(errno.ENOSPC, error.evalue) from None
        page = write_page(target)
        if error.ename == "CourseError":
            raise CourseError("cell-refused", error.evalue, f"The page up to there: {page}.") from None
        raise CourseError("cell-failed", f"A cell of {name} failed with {error.ename}: {error.evalue[:300]}",
                          f"Open {page} and read the cell.") from None
    return Execution(name, write_page(target), _find_run(name, execution, parameters.get("tracking_uri", "")))


def find_notebook(name: str) -> Path:
    """Return the file of a page by its name; CourseError lists the names where there is none."""
    source = NOTEBOOKS / f"{name}.ipynb"
    if not source.exists():
        names = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise CourseError("notebook-unknown", f"There is no notebook called {name!r}.", f"Choose one of: {names}.")
    return source


@contextlib.contextmanager
def _tagged_runs() -> Iterator[str]:
    """Let every run that a process begins from here on carry a tag of its own; yield the tag's value."""
    execution = uuid.uuid4().hex
    saved = {name: os.environ.pop(name, None) for name in (*FOREIGN_RUN, RUN_TAGS)}
    os.environ[RUN_TAGS] = json.dumps(json.loads(saved[RUN_TAGS] or "{}") | {EXECUTION_TAG: execution})
    try:
        yield execution
    finally:
        del os.environ[RUN_TAGS]
        os.environ.update({name: value for name, value in saved.items() if value is not None})


def _find_run(name, execution, tracking_uri):
    """Return the run that a page made, whatever else was logged meanwhile; the page's name is its experiment's."""
    import mlflow

    mlflow.set_tracking_uri(tracking_store(tracking_uri).uri)
    (run,) = mlflow.search_runs(experiment_names=[name], output_format="list",
                                filter_string=f"tags.`{EXECUTION_TAG}` = '{execution}'")
    return run


@contextlib.contextmanager
def _kernel_log(path):
    """Send what the kernel's process says beside the notebook, such as a stack at Ctrl-C, to a file."""
    with path.open("w", encoding="utf-8") as log, _sent("stdout", 1, log), _sent("stderr", 2, log):
        yield


@contextlib.contextmanager
def _sent(name, descriptor, log):
    """Send what goes to a descriptor to a log; what this process prints still reaches the terminal."""
    stream = getattr(sys, name)
    stream.flush()
    with os.fdopen(os.dup(descriptor), "w") as terminal:
        setattr(sys, name, terminal)
        os.dup2(log.fileno(), descriptor)
        try:
            yield
        finally:
            terminal.flush()
            os.dup2(terminal.fileno(), descriptor)
            setattr(sys, name, stream)


def print_answers(execution: Execution) -> None:
    """Print what a page asked and answered, and where to read on."""
    import mlflow
    import pandas as pd

    text = mlflow.artifacts.load_text(f"{execution.run.info.artifact_uri}/answers.csv")
    for question, answer in pd.read_csv(io.StringIO(text), keep_default_na=False).itertuples(index=False):
        print(f"  Q  {question}\n  A  {' '.join(answer.split())}")
    speed = execution.run.data.metrics["tokens_per_second"]
    print(f"  {speed:.0f} tokens per second; page: {execution.page}", flush=True)
