"""Copies this package under a name of its own, for MLflow to log."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..package import PackagedCode

SOURCES = Path(__file__).parent


def package_code(folder: Path) -> "PackagedCode":
    """Copy this package into ``folder``, named by its sources. See `serving.package`."""
    # Imported here, because a copy that was logged with a model lies in no package `serving`.
    from ..package import copy_package

    return copy_package(sorted(SOURCES.glob("*.py")), folder, "chat", "model", "ChatModel")
