"""Executes a page of the course with papermill, and finds the MLflow run and the answers that it logged."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from course.exercises import solve
from course.kernels import Kernel, kernel_variables
from course.pages import tracks_to_run
from course.results import ResultFiles, read_run
from course.static_page import write_page
from helpers.errors import CourseError
from helpers.models.steps import last_line
from helpers.parameters import check_variables
from helpers.paths import BUILD, NOTEBOOKS
from helpers.shadowing import refuse_shadowing_files
from helpers.stores.server import without_password
from helpers.tracking import tracking_store

PAGES = tracks_to_run()

# Kernel and client talk over an encrypted socket: a workshop's machine may have other users.
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})
# MLflow puts the tags of this variable, a JSON object, on every run that a process begins.
RUN_TAGS = "MLFLOW_RUN_CONTEXT"
EXECUTION_TAG = "course.execution"
# The artifact of a page's run with its questions and answers.
ANSWERS = "answers.csv"


@dataclass(frozen=True)
class Execution:
    """A page that ran to its end: its name, its HTML file, its MLflow run and the answers that it logged."""

    name: str
    page: Path
    run: object  # an mlflow.entities.Run, or None
    answers: list[dict[str, str]] | None  # as ``read_answers`` gives them


def execute(
    name: str,
    parameters: dict,
    folder: Path = BUILD / "course",
    solved: bool = False,
    results: ResultFiles | None = None,
    on_answers: Callable[[list[dict[str, str]]], None] | None = None,
) -> Execution:
    """Execute one page from its first cell to its last, with parameters that papermill inserts.

    ``solved`` fills its exercises with their solutions. ``name.ipynb``, ``name.html`` and
    ``name.log`` are written to ``folder`` and ``results`` are written, also if a cell fails.
    ``on_answers`` is called with the questions and answers as soon as the page has logged them: the
    rest of the page may take a minute.

    Raises
    ------
    CourseError
        There is no such page, ``folder`` or the files of ``results`` cannot be written, the kernel
        does not start, the page has no code, or a cell failed; the message is then the cell's own.
    """
    from mlflow.exceptions import MlflowException

    check_variables()
    source = nbformat.read(find_notebook(name), as_version=4)
    source = solve(source) if solved else source
    _fill_folder(folder, name)
    if results:
        results.prepare()
    tracking_uri = parameters.get("tracking_uri", "")
    if tracking_uri:  # papermill writes it into the page
        tracking_uri = without_password(tracking_uri)
        parameters = parameters | {"tracking_uri": tracking_uri}
    target = folder / f"{name}.ipynb"
    tag = uuid.uuid4().hex
    reported = False

    def on_cell_executed(cell, **_):
        nonlocal reported
        # The cell that logs the answers names their file.
        if on_answers and not reported and ANSWERS in cell.source:
            # If the page fails, its own error says more.
            with contextlib.suppress(CourseError, MlflowException, OSError):
                if answers := read_answers(_find_run(tag, tracking_uri)):
                    reported = True
                    on_answers(answers)

    try:
        _run_cells(name, source, target, parameters, tag, on_cell_executed)
        run = _find_run(tag, tracking_uri)
        execution = Execution(name, write_page(target), run, read_answers(run))
    except (CourseError, OSError) as failure:
        if results:
            _write_results_of_failure(results, name, target, parameters, tag, failure)
        raise
    if results:
        results.write(name, target, parameters, _read_figures(run), execution.answers or [])
    if on_answers and execution.answers and not reported:
        on_answers(execution.answers)
    return execution


def _run_cells(name, source, target, parameters, tag, on_cell_executed):
    """Execute a page's cells and write them to ``target``; the runs that it logs get the tag ``tag``."""
    log = target.with_suffix(".log")
    try:
        with _page_environment(tag), _kernel_log(log):
            # papermill replaces names in braces in a path: double braces stay.
            executed = papermill.execute_notebook(
                source,
                re.sub("[{}]", r"\g<0>\g<0>", str(target)),
                parameters,
                kernel_name=NATIVE_KERNEL_NAME,
                kernel_manager_class=Kernel,
                cwd=NOTEBOOKS,
                progress_bar=sys.stderr.isatty(),
                config=ENCRYPTED,
                on_cell_executed=on_cell_executed,
            )
    except DeadKernelError:
        raise CourseError(
            "kernel-ended",
            f"The system ended the Python that ran {name}, most likely because memory ran out.",
            "Close programs or choose a smaller model, and run this again; `make doctor` shows what fits.",
        ) from None
    except RuntimeError:  # jupyter_client raises it when a kernel does not answer at its start
        refuse_shadowing_files([str(NOTEBOOKS), *sys.path])
        said = last_line(log.read_text(encoding="utf-8", errors="replace")).rstrip(".")
        raise CourseError(
            "kernel-not-started",
            f"The Python that runs {name} ended before its first cell: {said}.",
            f"Read {log}: if it names a file of yours, Python may have imported that by mistake.",
        ) from None
    except papermill.PapermillExecutionError as error:
        if "[Errno 28]" in error.evalue:
            raise OSError(errno.ENOSPC, error.evalue) from None
        page = write_page(target)
        if error.ename == "CourseError":
            raise CourseError(
                "cell-refused", error.evalue, f"The page up to there: {page}."
            ) from None
        raise CourseError(
            "cell-failed",
            f"A cell of {name} failed with {error.ename}: {error.evalue[:300]}",
            f"Open {page} and read the cell.",
        ) from None
    own_cells = [
        cell
        for cell in executed.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    if not any(cell.get("execution_count") for cell in own_cells):
        raise CourseError(
            "no-cells",
            f"{name} has no code, so nothing was executed.",
            f"Look at notebooks/{name}.ipynb: its code cells are missing.",
        )


def _write_results_of_failure(results, name, target, parameters, tag, failure):
    """Write the results of a page that failed; errors on the way are ignored, because the page's error matters more."""
    from mlflow.exceptions import MlflowException

    try:
        run = _find_run(tag, parameters.get("tracking_uri", ""))
    except (CourseError, MlflowException, OSError):  # the page may have failed because of its store
        run = None
    try:
        results.write(
            name, target, parameters, _read_figures(run), read_answers(run) or [], failure
        )
    except CourseError as error:
        print(f"note: {error}", file=sys.stderr)


def _read_figures(run):
    """Return the figures of a page's run for the results; None without a run."""
    import mlflow

    return None if run is None else read_run(run, mlflow.MlflowClient())


def _fill_folder(folder, name):
    """Make the folder for a page, and copy the images that it shows."""
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for image in (NOTEBOOKS / "images").iterdir():
            shutil.copyfile(image, folder / "images" / image.name)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise CourseError(
            "pages-not-writable",
            f"The page's folder, {folder}, cannot be written.",
            f"Name one that is yours: python -m helpers notebook {name} --output DIR.",
        ) from None


def find_notebook(name: str) -> Path:
    """Return the file of a page by its name; raise CourseError with all names if there is none."""
    source = NOTEBOOKS / f"{name}.ipynb"
    if not source.exists():
        names = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise CourseError(
            "notebook-unknown", f"There is no notebook called {name!r}.", f"Choose one of: {names}."
        )
    return source


@contextlib.contextmanager
def _page_environment(tag: str) -> Iterator[None]:
    """Set the environment of kernels that start in this block: they find the course, and tag their runs."""
    tags = json.loads(os.environ.get(RUN_TAGS) or "{}") | {EXECUTION_TAG: tag}
    saved = dict(os.environ)
    os.environ.update(kernel_variables() | {RUN_TAGS: json.dumps(tags)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


def _find_run(execution, tracking_uri):
    """Return the newest run with the tag of an execution, or None. Deleted runs and experiments are searched, too."""
    import mlflow
    from mlflow.entities import ViewType

    mlflow.set_tracking_uri(tracking_store(tracking_uri).uri)
    client = mlflow.MlflowClient()
    experiments = [
        experiment.experiment_id for experiment in client.search_experiments(ViewType.ALL)
    ]
    runs = client.search_runs(
        experiments, f"tags.`{EXECUTION_TAG}` = '{execution}'", ViewType.ALL, max_results=1
    )
    return runs[0] if runs else None


@contextlib.contextmanager
def _kernel_log(path):
    """Write to a file what the kernel's process prints outside the notebook, such as a stack trace at Ctrl-C."""
    with path.open("w", encoding="utf-8") as log, _sent("stdout", 1, log), _sent("stderr", 2, log):
        yield


@contextlib.contextmanager
def _sent(name, descriptor, log):
    """Redirect a file descriptor to a log; this process's own output still reaches the terminal."""
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


def read_answers(run: object) -> list[dict[str, str]] | None:
    """Return the questions and answers of an ``mlflow.entities.Run``; None without a run or without answers."""
    import mlflow
    import pandas as pd
    from mlflow.exceptions import MlflowException

    if run is None:
        return None
    try:
        text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{ANSWERS}")
        answers = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)[
            ["question", "answer"]
        ]
    except (MlflowException, OSError, ValueError, KeyError):  # not there, or not a page's
        return None
    return answers.to_dict("records")


def print_answers(answers: list[dict[str, str]]) -> None:
    """Print what a page asked and what was answered."""
    for row in answers:
        print(f"  Q  {row['question']}\n  A  {' '.join(row['answer'].split())}", flush=True)


def print_page(execution: Execution) -> None:
    """Print how fast a page's answers came, whether its run or answers are missing, and where its HTML file is."""
    # Only the pages of `run` log questions and answers.
    if execution.name not in PAGES:
        print(f"  page: {execution.page}", flush=True)
        return
    if execution.run is None:
        print(
            f"  The run of this page is not in the store any more; page: {execution.page}",
            flush=True,
        )
        return
    if execution.answers is None:
        print(f"  The run of this page has no {ANSWERS} with questions and answers.")
    speed = execution.run.data.metrics.get("tokens_per_second")
    shown = (
        f"{speed:.0f} tokens per second" if speed else "the answer was too short to measure a speed"
    )
    print(f"  {shown}; page: {execution.page}", flush=True)
