"""Installs an extra of pyproject.toml into a folder of its own, so that no other test meets what is in it."""

import functools
import os
from pathlib import Path

from course import environment
from support import ROOT

TEMPORARY = ROOT / "build" / "test" / os.environ.get("PYTEST_XDIST_WORKER", "main")  # emptied before each session


@functools.cache
def install_extra(name: str) -> Path:
    """Install an extra, once in a session, and return its folder."""
    return environment.install_extra(name, TEMPORARY / name)
