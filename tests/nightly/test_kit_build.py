"""An offline kit is built on a disk that is too small, and from an index that has CUDA's torch.

Run: python -m helpers nightly tests/nightly/test_kit_build.py
"""

import shutil
import subprocess
import sys

import pytest
from support import ROOT
from support.kits import COMMAND, only_wheels

from course.environment import pins


def test_the_cuda_build_of_torch_is_refused(tmp_path, python):
    torch = f"torch-{pins()['torch']}"
    index = only_wheels(
        tmp_path / "index",
        f"{torch}-cp312-cp312-manylinux_2_28_x86_64.whl",
        requires="Requires-Dist: nvidia-cublas\n",
    )
    result = python(
        "-m",
        "helpers",
        "kit",
        "build",
        tmp_path / "kit",
        "--model",
        "tiny-phi3",
        "--platform",
        "linux",
        "--python",
        "3.12",
        **index,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "is the CUDA build, 3 GB that this course never uses." in result.stderr
    assert not list((tmp_path / "kit").rglob("torch-*"))


@pytest.fixture
def tiny_disk(tmp_path):
    """Return a function that runs a command with a disk of its own in ``folder``."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def run(size, command):
        script = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && exec \"$@\""
        return subprocess.run(
            ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *map(str, command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    if not shutil.which("unshare") or run("1m", ["true"]).returncode:
        pytest.skip("needs Linux with user namespaces to mount a disk of its own")
    return folder, run


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(tiny_disk):
    folder, run = tiny_disk
    result = run("9m", [*COMMAND, "build", folder / "kit", "--model", "tiny-phi3"])
    assert result.returncode == 1, result.stdout + result.stderr
    assert "has 9 MB free, and the rest of the kit takes about" in result.stderr
    assert "Fetching" not in result.stdout


def test_a_disk_that_fills_up_is_an_error_that_says_so(tiny_disk, index):
    folder, run = tiny_disk
    # The archive of the course is what does not fit; the wheels are nothing here.
    code = (
        "import sys; from pathlib import Path; from helpers import CourseError\n"
        "from course.kit import build, wheels\n"
        "wheels.CONSTRAINTS = Path(sys.argv[1]); build.WHEELS_MEGABYTES = 0\n"
        "try: build.build(Path(sys.argv[2]), ['tiny-phi3'], ['windows'], ['3.13'])\n"
        "except CourseError as error: print(error.code, error)"
    )
    result = run("1400k", [sys.executable, "-c", code, index, folder / "kit"])
    assert result.stdout.splitlines()[-1].startswith("disk-full The disk is full: "), (
        result.stdout + result.stderr
    )
    assert "what is finished stays." in result.stdout
