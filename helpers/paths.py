"""Returns the paths of the course's folders, the model cache and the store. Creates nothing."""

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
    """Return the folder of prepared models: COURSE_CACHE, by default ``data/models``. It may not exist yet.

    A relative COURSE_CACHE starts at the course's folder, not at the folder in which a kernel runs.
    """
    try:
        return (
            ROOT / Path(os.environ.get("COURSE_CACHE") or DATA / "models").expanduser()
        ).resolve()
    except RuntimeError:
        raise CourseError(
            "cache-path",
            "COURSE_CACHE begins with the home folder of a user whom this machine does not know.",
            "Set it to a folder that is yours.",
        ) from None


def tracking_uri() -> str:
    """Return the URI of the course's MLflow store: COURSE_TRACKING_URI, by default ``build/mlflow.db``."""
    return os.environ.get("COURSE_TRACKING_URI") or "sqlite:///" + (BUILD / "mlflow.db").as_posix()
