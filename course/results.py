"""Writes a page's results for other programs: junit with a test case for each code cell, and JSON with its figures.

The junit file is written with the standard library: a package for it would be one more for every
learner to install, and does not remove the characters that XML forbids. The tests read the file with
junitparser and check it against Jenkins' schema.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import nbformat
from nbformat import NotebookNode

from helpers.errors import CourseError
from helpers.files import is_writable

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
CODE_FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.+?)(?: \(\d+ min\))?$", re.MULTILINE)
# The last line of a CourseError's traceback in a notebook.
ERROR_CODE = re.compile(r"\(code: ([\w-]+)\)")
COLORS = re.compile(r"\x1b\[[0-9;]*m")
INVALID_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class CellResult:
    """A code cell after its page ran.

    Attributes
    ----------
    name : str
        Its number, as Jupyter shows it, and its first line.
    heading : str
        The last heading before it.
    status : str
        PASSED, FAILED or SKIPPED.
    seconds : float
    error_type : str
        A failed cell's error code if it raised a CourseError, else the exception's class name.
    message : str
        The exception's message.
    details : str
        The traceback.
    """

    name: str
    heading: str
    status: str
    seconds: float = 0.0
    error_type: str = ""
    message: str = ""
    details: str = ""


def read_cells(notebook: NotebookNode) -> list[CellResult]:
    """Return the results of an executed notebook's code cells, except empty ones."""
    cells = []
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = HEADING.findall(CODE_FENCE.sub("", cell.source))
            heading = re.sub(r"[`*]", "", found[-1]) if found else heading
        elif cell.cell_type == "code" and cell.source.strip():
            cells.append(_read_cell(cell, len(cells) + 1, heading))
    return cells


def mark_failure(cells: list[CellResult], failure: Exception) -> list[CellResult]:
    """Add a page's failure to its cells, unless a failed cell has it already.

    A kernel that ends leaves no error in its cell: the last cell that was started gets the failure.
    Any other failure, such as a full disk after the last cell, gets an entry for the whole page.
    """
    if any(cell.status == FAILED for cell in cells):
        return cells
    code = getattr(failure, "code", type(failure).__name__)
    message = str(failure)
    failed = {"status": FAILED, "error_type": code, "message": message, "details": message}
    started = [place for place, cell in enumerate(cells) if cell.status == PASSED]
    if code == "kernel-ended" and started:
        last = started[-1]
        return [*cells[:last], replace(cells[last], **failed), *cells[last + 1 :]]
    return [*cells, CellResult("the page as a whole", "", **failed)]


def _read_cell(cell, number, heading):
    first = next(line.strip() for line in cell.source.splitlines() if line.strip())
    name = f"cell {number}: {first[:60]}"
    timing = cell.metadata.get("papermill", {})
    seconds = timing.get("duration") or 0.0
    errors = [output for output in cell.outputs if output.output_type == "error"]
    if not errors:
        # After a failure, papermill's own status is not reliable, but its start time is.
        status = PASSED if timing.get("start_time") else SKIPPED
        return CellResult(name, heading, status, seconds)
    error = errors[0]
    lines = [COLORS.sub("", line) for line in error.traceback]
    code = ERROR_CODE.fullmatch(lines[-1]) if lines and error.ename == "CourseError" else None
    return CellResult(
        name,
        heading,
        FAILED,
        seconds,
        code[1] if code else error.ename,
        error.evalue,
        "\n".join(lines),
    )


def make_junit(page: str, cells: list[CellResult], seconds: float) -> bytes:
    """Return a page's cells as a junit file with one test suite, which fits Jenkins' junit-10.xsd."""
    statuses = [cell.status for cell in cells]
    suite = {
        "name": page,
        "tests": str(len(cells)),
        "failures": str(statuses.count(FAILED)),
        "errors": "0",
        "skipped": str(statuses.count(SKIPPED)),
        "time": f"{seconds:.3f}",
    }
    root = ElementTree.Element("testsuites")
    parent = ElementTree.SubElement(root, "testsuite", suite)
    for cell in cells:
        case = ElementTree.SubElement(
            parent,
            "testcase",
            {
                "classname": _xml_text(cell.heading or page),
                "name": _xml_text(cell.name),
                "time": f"{cell.seconds:.3f}",
            },
        )
        if cell.status == FAILED:
            failure = ElementTree.SubElement(
                case,
                "failure",
                {"type": _xml_text(cell.error_type), "message": _xml_text(cell.message)},
            )
            failure.text = _xml_text(cell.details)
        elif cell.status == SKIPPED:
            ElementTree.SubElement(case, "skipped", {"message": "The page ended before this cell."})
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _xml_text(text):
    return INVALID_IN_XML.sub("", COLORS.sub("", text))


def make_json(
    page: str,
    cells: list[CellResult],
    seconds: float,
    parameters: dict,
    run: dict | None,
    answers: list[dict],
) -> bytes:
    """Return a page's results as JSON: parameters, counts of cells, the MLflow run and the answers."""
    error = None
    failed = [cell for cell in cells if cell.status == FAILED]
    if failed:
        error = {
            "code": failed[0].error_type,
            "message": failed[0].message,
            "cell": failed[0].name,
            "heading": failed[0].heading,
        }
    statuses = [cell.status for cell in cells]
    results = {
        "page": page,
        "status": FAILED if error else PASSED,
        "error": error,
        "model": parameters.get("model"),
        "parameters": parameters,
        "duration": round(seconds, 3),
        "cells": {status: statuses.count(status) for status in (PASSED, FAILED, SKIPPED)},
        "run": run,
        "answers": answers,
    }
    text = json.dumps(_nan_to_none(results), indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _nan_to_none(value):
    """Replace NaN and infinities by None: MLflow takes them as metrics, but JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _nan_to_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan_to_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_run(run: object, client: object) -> dict:
    """Return an ``mlflow.entities.Run`` for JSON, with the model version that was registered from it."""
    versions = client.search_model_versions(f"run_id = '{run.info.run_id}'", max_results=1)
    registered = None
    if versions:
        registered = {"name": versions[0].name, "version": int(versions[0].version)}
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "metrics": run.data.metrics,
        "params": run.data.params,
        "registered": registered,
    }


@dataclass(frozen=True)
class ResultFiles:
    """The paths of the files for a page's results. A file whose path is None is not written."""

    junit: Path | None = None
    json: Path | None = None

    def prepare(self) -> None:
        """Create the folders and remove an earlier run's files.

        Raises
        ------
        CourseError
            A file cannot be written.
        """
        for path in filter(None, (self.junit, self.json)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                writable = is_writable(path.parent)
            except (
                OSError
            ):  # such as a file in place of the folder, or a folder in place of the file
                writable = False
            if not writable:
                raise CourseError(
                    "results-not-writable",
                    f"The file for the results, {path}, cannot be written, so the page was not started.",
                    "Name a file in a folder that you can write to.",
                )

    def write(
        self,
        page: str,
        notebook: Path,
        parameters: dict,
        run: dict | None,
        answers: list[dict],
        failure: Exception | None = None,
    ) -> None:
        """Write the results of the executed notebook. Raises a CourseError if a file cannot be written."""
        cells = []
        seconds = 0.0
        if notebook.exists():
            executed = nbformat.read(notebook, as_version=4)
            cells = read_cells(executed)
            seconds = executed.metadata.get("papermill", {}).get("duration") or 0.0
        cells = mark_failure(cells, failure) if failure else cells
        contents = {
            self.junit: make_junit(page, cells, seconds),
            self.json: make_json(page, cells, seconds, parameters, run, answers),
        }
        for path, content in contents.items():
            try:
                if path:
                    path.write_bytes(content)
            except OSError as error:
                raise CourseError(
                    "results-not-written",
                    f"{page} has run, but its results could not be written to {path}: {error.strerror}.",
                    f"The executed notebook, {page}.ipynb, and {page}.html are in {notebook.parent}.",
                ) from None
