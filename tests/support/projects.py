"""The words of ``mlflow run`` for an entry of MLproject, and the variables of somebody who types them."""

import os
import sys
from pathlib import Path

from support import ROOT


def project(entry: str, local: bool = True, **parameters) -> list:
    """Return the words that run an entry in this environment; or, not ``local``, in one that is made for it."""
    options = [word for name, value in parameters.items() for word in ("-P", f"{name}={value}")]
    return [
        "-m",
        "mlflow",
        "run",
        ROOT,
        "-e",
        entry,
        *(["--env-manager", "local"] if local else []),
        *options,
    ]


def activated(folder: Path) -> dict[str, str]:
    """Return the variables of an activated environment; what MLflow keeps of the runs themselves goes to ``folder``."""
    return {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": "sqlite:///" + (folder / "projects.db").as_posix(),
    }
