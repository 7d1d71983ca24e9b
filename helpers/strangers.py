"""Finds a file of a user's that Python takes for a library: folders to import from come in, a refusal goes out.

Such a file may hide whatever is imported, so this imports nothing but what Python has loaded by
itself.
"""
# It may hide pathlib, too.
# ruff: noqa: PTH100, PTH112, PTH113, PTH118, PTH120, PTH121, PTH208

import os
import sys

from helpers.errors import CourseError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OURS = ("benchmarks", "course", "helpers", "serving")
# Many libraries bring folders of such names, and nobody imports them.
UNUSED = ("docs", "examples", "scripts", "sitecustomize", "test", "tests", "usercustomize")


def refuse_strangers(folders: list[str] | None = None) -> None:
    """Raise CourseError where a file hides a library in a later one of the folders, Python's own where left out."""
    folders = [
        folder or os.curdir for folder in folders or sys.path if os.path.isdir(folder or os.curdir)
    ]
    for place, folder in enumerate(folders):
        if _has_libraries(folder):
            continue
        hidden = {
            name.partition(".")[0]
            for later in filter(_has_libraries, folders[place:])
            for name in os.listdir(later)
        }
        hidden = hidden.difference(UNUSED, OURS if os.path.samefile(folder, ROOT) else ())
        for name in sorted(os.listdir(folder)):
            module, _, ending = name.partition(".")
            if module in hidden and (
                ending in ("py", "pyc")
                or ending.endswith(("so", "pyd"))
                or os.path.isfile(os.path.join(folder, name, "__init__.py"))
            ):
                raise CourseError(
                    "file-in-the-way",
                    f"{os.path.abspath(os.path.join(folder, name))} hides the library {module}, whose name it has.",
                    "Rename or remove it, and run this again; in JupyterLab, choose Kernel > Restart first.",
                )


def _has_libraries(folder):
    return "-packages" in folder or folder.startswith(
        (os.path.join(sys.prefix, ""), os.path.join(sys.base_prefix, ""))
    )
