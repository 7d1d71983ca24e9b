"""A bare checkout of the course, and its commands as a user runs them there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import OURS, ROOT


def make_checkout(folder: Path) -> Path:
    """Copy what git has, or would take, into ``folder``, and return it."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def git(folder: Path, *words: str) -> None:
    """Run git in a folder, as an author of its own."""
    subprocess.run(
        [
            "git",
            "-c",
            "user.name=A",
            "-c",
            "user.email=a@example.org",
            "-c",
            "commit.gpgsign=false",
            *words,
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def user(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run a command of a checkout as a user does, with a Python that has none of the packages."""
    python = getattr(sys, "_base_executable", sys.executable)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("COURSE_", *OURS))
    }
    return subprocess.run(
        [python, "-m", "helpers", *arguments],
        cwd=checkout,
        env=environment | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
