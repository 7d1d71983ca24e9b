"""Makes ``.venv`` from the pins in pyproject.toml, once: from pip's index, or from the kit that COURSE_KIT names.

This runs before any package is installed: it imports the standard library and modules that do the
same.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

from course.install import LOG, install, log, uv_install
from helpers.errors import CourseError
from helpers.models.kit import open_kit
from helpers.models.steps import run_program
from helpers.paths import BUILD, DATA, ROOT, VENV, VENV_PYTHON
from helpers.requirements import installed_build

# The pins and extras that .venv was set up for; UNFINISHED during set-up, and after an interrupted one.
STAMP = VENV / "course.stamp"
UNFINISHED = "Set-up has begun, and has not finished.\n"


def project() -> dict:
    """Return the table ``project`` of pyproject.toml, with the course's version and dependencies."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(extras: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the pinned version of each dependency that this system needs, of the course and of some extras."""
    course = project()
    groups = [course["dependencies"], *(course["optional-dependencies"][extra] for extra in extras)]
    requirements = itertools.chain.from_iterable(groups)
    return dict(
        requirement.partition(";")[0].split("==")
        for requirement in requirements
        if _applies(requirement)
    )


def _applies(requirement):
    """Tell whether this system needs a requirement. The only markers are ``sys_platform != '...'``."""
    other_system = re.search(r"sys_platform != '(\w+)'", requirement)
    return not other_system or other_system[1] != sys.platform


def install_extra(name: str) -> Path:
    """Install an extra into a folder of its own, again when its pins change, and return the folder.

    This is for packages that must not be in ``.venv``. Spark is one: MLflow imports it if it is
    installed.
    """
    from filelock import FileLock  # this module is imported before anything is installed

    requirements = project()["optional-dependencies"][name]
    folder = BUILD / "extras" / f"{name}-{_digest(repr(requirements))[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # The folder gets its name at the end, so that an interrupted installation does not count.
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            uv_install(sys.executable, "--target", partial, *requirements)
            partial.rename(folder)
    return folder


def inside_venv() -> bool:
    """Tell whether the running Python is the one of ``.venv``."""
    # Also by a link or another spelling of its path.
    return VENV.exists() and VENV.samefile(sys.prefix)


def differing_packages(extras: tuple[str, ...] = ()) -> dict[str, tuple[str, str | None]]:
    """Return each package whose installed version (None if missing) is not the pinned one, with both versions."""
    differing = {}
    for name, pinned in pins(extras).items():
        installed = installed_build(name)[1]
        if (installed or "").split("+")[0] != pinned:
            differing[name] = pinned, installed
    return differing


def is_set_up(extras: tuple[str, ...] = ()) -> bool:
    """Tell whether set-up finished ``.venv`` with these pins and extras, in this folder and by this Python."""
    stamp = _read_stamp()
    return (
        VENV_PYTHON.exists()
        and stamp.get("state") == _state()
        and set(extras) <= set(stamp["extras"])
    )


def set_up(extras: tuple[str, ...] = ()) -> Path:
    """Make or complete ``.venv``, unless it is complete, and return its Python.

    Raises CourseError if Python has no venv module, and as ``course.install.install`` does.
    """
    if is_set_up(extras):
        return VENV_PYTHON
    kit = open_kit()
    BUILD.mkdir(exist_ok=True)
    LOG.write_text("", encoding="utf-8")
    print(f"Setting up .venv, once; a minute or two. Details: {LOG.relative_to(ROOT)}", flush=True)
    _make_venv()
    stamp = _read_stamp()
    STAMP.write_text(UNFINISHED, encoding="utf-8")
    install(f".[{','.join(extras)}]" if extras else ".", pins(extras), kit)
    before = stamp["extras"] if stamp.get("state") == _state() else []
    STAMP.write_text(
        json.dumps({"state": _state(), "extras": sorted({*before, *extras})}), encoding="utf-8"
    )
    return VENV_PYTHON


def clean(everything: bool) -> int:
    """Remove ``build/``; with ``everything``, the models in ``data/models`` and ``.venv`` too. Return the exit code."""
    # `mlflow run` keeps its own records where it is called.
    paths = [BUILD, ROOT / "mlruns", ROOT / "mlflow.db"]
    if everything:
        paths += [DATA / "models", VENV, *ROOT.glob("*.egg-info")]
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            path.unlink()
        if path.exists():
            raise CourseError(
                "in-use",
                f"{path.relative_to(ROOT)} could not be removed.",
                "Close what still uses it (JupyterLab, the MLflow UI) and run this again.",
            )
    return 0


def _read_stamp():
    """Return the content of the stamp; an empty dict if no set-up has finished."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _state():
    """Return a digest of everything that .venv depends on: pyproject.toml, the pins, the folder, the Python."""
    return _digest((ROOT / "pyproject.toml").read_text(encoding="utf-8"), str(ROOT))


def _digest(*parts: str) -> str:
    """Return a digest of these parts, the pins and this Python: every installation depends on the last two."""
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return hashlib.sha256("\0".join([*parts, pinned, sys.version]).encode()).hexdigest()


def _make_venv():
    """Make ``.venv``; delete it first if its Python is missing or another one, or if set-up was interrupted.

    pip and uv do not notice a package that is half installed. uv's cache keeps the downloads.
    """
    if os.pathsep in str(ROOT):
        raise CourseError(
            "folder-name",
            f"Python makes no virtual environment in {ROOT}: its name has a {os.pathsep}.",
            "Rename that folder, and run this again.",
        )
    if inside_venv():
        return
    asked = [VENV_PYTHON, "-c", "import sys, pip; print(sys.version, sys.prefix)"]
    unfinished = STAMP.exists() and STAMP.read_text(encoding="utf-8") == UNFINISHED
    if (
        VENV_PYTHON.exists()
        and not unfinished
        and run_program(asked, dict(os.environ), log)[1].strip() == f"{sys.version} {VENV}"
    ):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    STAMP.write_text(UNFINISHED, encoding="utf-8")
    if run_program([sys.executable, "-m", "venv", VENV], dict(os.environ), log)[0]:
        raise CourseError(
            "venv-failed",
            "Python could not make a virtual environment.",
            "Install Python's venv module (Debian, Ubuntu: apt install python3-venv) and run this again.",
        )
