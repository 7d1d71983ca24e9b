"""Refuses to start where a user's file has the name of a library: Python would import that file instead.

Such a file can shadow any module. So this module imports only those that Python loads at its start.
"""
# A file of the user's can shadow pathlib, too.
# ruff: noqa: PTH100, PTH112, PTH113, PTH118, PTH120, PTH121, PTH208

import os
import sys

from helpers.errors import CourseError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = ("benchmarks", "course", "helpers", "serving")
# Many libraries install folders with these names, and nobody imports them.
NEVER_IMPORTED = ("docs", "examples", "scripts", "sitecustomize", "test", "tests", "usercustomize")


def refuse_shadowing_files(folders: list[str] | None = None) -> None:
    """Raise CourseError if a file in one of the folders shadows a library in a later one; by default in sys.path."""
    folders = [
        folder or os.curdir for folder in folders or sys.path if os.path.isdir(folder or os.curdir)
    ]
    for index, folder in enumerate(folders):
        if _has_libraries(folder):
            continue
        shadowed = {
            name.partition(".")[0]
            for later in filter(_has_libraries, folders[index:])
            for name in os.listdir(later)
        }
        shadowed = shadowed.difference(
            NEVER_IMPORTED, OURS if os.path.samefile(folder, ROOT) else ()
        )
        for name in sorted(os.listdir(folder)):
            module, _, ending = name.partition(".")
            if module in shadowed and (
                ending in ("py", "pyc")
                or ending.endswith(("so", "pyd"))
                or os.path.isfile(os.path.join(folder, name, "__init__.py"))
            ):
                raise CourseError(
                    "file-in-the-way",
                    f"{os.path.abspath(os.path.join(folder, name))} has the name of the library {module}: Python "
                    "imports it instead.",
                    "Rename or remove it, and run this again; in JupyterLab, choose Kernel > Restart first.",
                )


def _has_libraries(folder):
    return "-packages" in folder or folder.startswith(
        (os.path.join(sys.prefix, ""), os.path.join(sys.base_prefix, ""))
    )
