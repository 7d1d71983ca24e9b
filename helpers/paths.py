"""Says where things stand on disk, and creates nothing: the course's folders, the model cache, the store."""

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


def model_cache() -> Path:
    """Return the folder of prepared models: ``data/models``, or COURSE_CACHE where it is set. It may not exist yet.

    A relative COURSE_CACHE starts at the course's folder, whatever folder a kernel runs in.
    """
    try:
        return (
            ROOT / Path(os.environ.get("COURSE_CACHE") or DATA / "models").expanduser()
        ).resolve()
    except RuntimeError:
        raise CourseError(
            "cache-path",
            "COURSE_CACHE begins with the home folder of somebody who is not here.",
            "Set it to a folder that is yours.",
        ) from None


def tracking_uri() -> str:
    """Return the URI of the course's MLflow store: ``build/mlflow.db``, or COURSE_TRACKING_URI where it is set."""
    return os.environ.get("COURSE_TRACKING_URI") or "sqlite:///" + (BUILD / "mlflow.db").as_posix()
