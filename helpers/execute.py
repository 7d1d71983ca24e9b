"""Runs a notebook of the course with papermill and writes what it left as notebook and as page."""

import contextlib
import errno
import os
import shutil
import sys
import warnings

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from traitlets.config import Config

from helpers.errors import CourseError
from helpers.paths import BUILD, NOTEBOOKS
from helpers.tracking import tracking_store

TRACKS = ("TransformerPipeline", "CustomPythonWrapper")

# Kernel and client talk over an encrypted socket: a workshop's machine may have other users.
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})


def execute(name, parameters, folder=BUILD / "course"):
    """Run one notebook from its first cell to its last.

    Parameters
    ----------
    name : str
        Such as ``"TransformerPipeline"``.
    parameters : dict
        What papermill injects.
    folder : pathlib.Path, optional
        Gets ``name.ipynb`` and ``name.html``, also when a cell fails, and ``name.log``.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    CourseError
        There is no such notebook, or a cell failed; the message is the cell's own.
    """
    source = NOTEBOOKS / f"{name}.ipynb"
    if not source.exists():
        names = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        raise CourseError(f"There is no notebook called {name!r}.", f"Choose one of: {names}.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(NOTEBOOKS / "images", folder / "images", dirs_exist_ok=True)
    target = folder / f"{name}.ipynb"
    # `mlflow run` sets these for the run that it records itself. The notebook opens its own.
    for variable in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        os.environ.pop(variable, None)
    try:
        with _kernel_log(folder / f"{name}.log"):
            papermill.execute_notebook(source, target, parameters, kernel_name="python3", cwd=NOTEBOOKS,
                                       progress_bar=sys.stderr.isatty(), config=ENCRYPTED)
    except DeadKernelError:
        raise CourseError(
            f"The system ended the Python that ran {name}, most likely for want of memory.",
            "Close programs or choose a smaller model, and run this again; `make doctor` tells what fits.",
        ) from None
    except papermill.PapermillExecutionError as error:
        if "[Errno 28]" in error.evalue:
            raise OSError(errno.ENOSPC, error.evalue) from None
        page = _write_page(target)
        if error.ename == "CourseError":
            raise CourseError(error.evalue, f"The page up to there: {page}") from None
        raise CourseError(f"A cell of {name} failed with {error.ename}: {error.evalue[:300]}",
                          f"Open {page} and read the cell.") from None
    return _write_page(target)


@contextlib.contextmanager
def _kernel_log(path):
    """Send what the kernel's process says beside the notebook, such as a stack at Ctrl-C, to a file."""
    with path.open("w", encoding="utf-8") as log, os.fdopen(os.dup(2), "w") as terminal:
        sys.stderr.flush()
        standard_error, sys.stderr = sys.stderr, terminal
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            terminal.flush()
            os.dup2(terminal.fileno(), 2)
            sys.stderr = standard_error


def latest_run(name, tracking_uri=""):
    """Return the newest MLflow run of the notebook ``name`` in a store, the course's own where it is empty."""
    import mlflow

    mlflow.set_tracking_uri(tracking_store(tracking_uri).uri)
    (run,) = mlflow.search_runs(experiment_names=[name], max_results=1, output_format="list")
    return run


def print_answers(name, page, tracking_uri=""):
    """Print what the latest run of a notebook asked and answered, and where to read on.

    Parameters
    ----------
    name : str
        The notebook, whose name is its experiment's.
    page : pathlib.Path
        What ``execute`` returned.
    tracking_uri : str, optional
        The store that the notebook logged to; empty for the course's own.
    """
    import mlflow

    run = latest_run(name, tracking_uri)
    answers = mlflow.MlflowClient().load_table(run.info.experiment_id, "answers.json", [run.info.run_id])
    for question, answer in zip(answers["question"], answers["answer"], strict=True):
        print(f"  Q  {question}\n  A  {' '.join(answer.split())}")
    print(f"  {run.data.metrics['tokens_per_second']:.0f} tokens per second; page: {page}", flush=True)


def _write_page(notebook_file):
    """Write the executed notebook as one HTML file, its images inside. Return its path."""
    notebook = nbformat.read(notebook_file, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=SyntaxWarning)
        html, _ = HTMLExporter(embed_images=True).from_notebook_node(
            notebook, {"metadata": {"path": str(notebook_file.parent), "name": notebook_file.stem}})
    page = notebook_file.with_suffix(".html")
    page.write_text(html, encoding="utf-8")
    return page
