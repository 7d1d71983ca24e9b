"""A small kit of handmade wheels, and a kit that is served, as the tests of kits share them."""

import contextlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from helpers.files import sha256
from helpers.models.kit import SUMS
from support import ROOT

COMMAND = [sys.executable, "-m", "helpers", "kit"]
NOBODY = "http://127.0.0.1:9"  # the discard port
# Pure and compiled, for one system alone, and with a marker that asks for a patch release.
CONSTRAINTS = """# such as constraints.txt
markupsafe==3.0.4
pywinpty==3.1.2 ; os_name == 'nt'
six==1.17.0
soupsieve==2.10 ; python_full_version < '3.11.5'
soupsieve==4.1.2 ; python_full_version >= '3.11.5'
"""
# What an index has of them, more than any kit wants.
WHEELS = [
    *(
        f"markupsafe-3.0.4-{python}-{python}-{system}.whl"
        for python in ("cp311", "cp312", "cp313")
        for system in (
            "win_amd64",
            "win32",
            "macosx_11_0_arm64",
            "macosx_10_9_x86_64",
            "musllinux_1_2_x86_64",
            "manylinux2014_x86_64.manylinux_2_17_x86_64",
            "manylinux2014_aarch64",
        )
    ),
    *(
        f"pywinpty-3.1.2-{python}-{python}-{system}.whl"
        for python in ("cp311", "cp313")
        for system in ("win_amd64", "manylinux2014_x86_64")
    ),
    "six-1.17.0-py2.py3-none-any.whl",
    "six-1.16.0-py2.py3-none-any.whl",
    "soupsieve-2.10-py3-none-any.whl",
    "soupsieve-4.1.2-py3-none-any.whl",
]


def only_wheels(folder: Path, *names: str, requires: str = "") -> dict[str, str]:
    """Write wheels without contents, and return the environment in which pip finds them and nothing else."""
    folder.mkdir(exist_ok=True)
    for name in names:
        project, version = name.split("-")[:2]
        with zipfile.ZipFile(folder / name, "w") as wheel:
            info = f"{project}-{version}.dist-info"
            wheel.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n{requires}",
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    return {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": folder.as_uri(),
        "HTTPS_PROXY": NOBODY,
        "https_proxy": NOBODY,
    }


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS for all files of a folder, as they are now."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SUMS]
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def list_files(folder: Path) -> dict[str, int]:
    """Return the time of change of each file of a folder, but for the lock."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@contextlib.contextmanager
def served(folder: Path, *words: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a kit as a user does, on a port that the server chooses.

    Yields its URL on this machine and the lines that it printed. Afterwards it must have said
    nothing of an error.
    """
    with subprocess.Popen(
        [*COMMAND, "serve", folder, "--port", "0", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            lines = []
            while not lines or not re.search("Participants|Only this machine", lines[-1]):
                lines.append(process.stdout.readline())
                assert lines[-1], process.communicate()
            port = re.search(r"http://\S+:(\d+)", "".join(lines))[1]
            yield f"http://127.0.0.1:{port}", lines
        finally:
            process.terminate()
            said = process.communicate()[1]
    assert said == ""
