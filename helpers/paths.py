"""Where things stand on disk. It creates nothing."""

import os
import sys
from pathlib import Path

from helpers.errors import CourseError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
BUILD = ROOT / "build"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def model_cache():
    """Return the folder of prepared models: ``data/models``, or COURSE_CACHE where it is set.

    A relative COURSE_CACHE starts at the course's folder, whatever folder a kernel runs in.

    Returns
    -------
    pathlib.Path
        It may not exist yet.

    Raises
    ------
    CourseError
        COURSE_CACHE begins with ``~`` and a name that nobody has here.
    """
    try:
        return (ROOT / Path(os.environ.get("COURSE_CACHE") or DATA / "models").expanduser()).resolve()
    except RuntimeError:
        raise CourseError("COURSE_CACHE begins with the home folder of somebody who is not here.",
                          "Set it to a folder that is yours.") from None


def tracking_uri():
    """Return the course's MLflow store: ``build/mlflow.db``, or COURSE_TRACKING_URI where it is set.

    Returns
    -------
    str
        A tracking URI.
    """
    return os.environ.get("COURSE_TRACKING_URI") or "sqlite:///" + (BUILD / "mlflow.db").as_posix()
