"""Installs an extra of pyproject.toml into a folder of its own, so that only the tests that ask for it meet it."""

import hashlib
import shutil
from pathlib import Path

from filelock import FileLock

from course import environment
from support import ROOT


def install_extra(name: str) -> Path:
    """Return the folder of an extra, which all workers and all later runs share until a pin changes."""
    requirements = environment.project()["optional-dependencies"][name]
    digest = hashlib.sha256(repr(requirements).encode()).hexdigest()[:12]
    folder = ROOT / "build" / "extras" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            # A stopped installation must not pass for a whole one, so the folder gets its name at the end.
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            environment.install_extra(name, partial).rename(folder)
    return folder
