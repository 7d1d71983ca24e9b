"""Makes the exercise cells of a page from its solutions.

A Markdown cell tagged ``solution`` holds the code, folded. The code cell tagged ``exercise`` before
it has the same code, but with three dots in place of each value whose line ends with ``# your
turn``: there the learner writes.
"""

import ast
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.errors import CourseError
from helpers.paths import NOTEBOOKS

MARK = "# your turn"
CODE = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


def make_exercise(solution: str) -> str:
    """Return a solution with three dots in place of each value or call whose first line has the mark."""
    lines = solution.split("\n")
    statements = [
        node
        for node in ast.walk(ast.parse(solution))
        if isinstance(node, ast.Assign | ast.Return | ast.Expr)
    ]
    # From the last to the first, so that the line numbers of those before stay right.
    for node in sorted(statements, key=lambda node: -node.lineno):
        value = node.value
        if lines[node.lineno - 1].endswith(MARK):
            start = lines[value.lineno - 1]
            end = lines[value.end_lineno - 1]
            # ast counts columns in bytes.
            head = start.encode()[: value.col_offset].decode()
            tail = (
                end.encode()[value.end_col_offset :].decode()
                if value.lineno == value.end_lineno
                else f"  {MARK}"
            )
            lines[value.lineno - 1 : value.end_lineno] = [f"{head}...{tail}"]
    return "\n".join(lines)


def pair(notebook: NotebookNode) -> list[tuple[NotebookNode, str]]:
    """Return each exercise cell of a page with the code of its solution."""
    pairs = []
    exercise = None
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        exercise = cell if "exercise" in tags else exercise
        if "solution" in tags:
            pairs.append((exercise, CODE.search(cell.source)[1]))
    return pairs


def solve(notebook: NotebookNode) -> NotebookNode:
    """Fill the exercise cells of a page with their solutions, in place, and return it."""
    for cell, solution in pair(notebook):
        cell.source = solution
    return notebook


def write_exercises(check: bool, folder: Path = NOTEBOOKS) -> int:
    """Write the exercise cells of every page; with ``check``, raise CourseError if one is stale instead."""
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        made = [(cell, make_exercise(solution)) for cell, solution in pair(notebook)]
        if all(cell.source == exercise for cell, exercise in made):
            continue
        if check:
            raise CourseError(
                "exercise-stale",
                f"An exercise of {path.name} does not match its solution.",
                "Write them again: python -m helpers exercises.",
            )
        for cell, exercise in made:
            cell.source = exercise
        nbformat.write(notebook, path)
    return 0
