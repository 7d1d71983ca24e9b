"""Set-up on machines that are not right: an old Python, no index, only the CUDA build of torch.

Run: python -m helpers test tests/test_setup.py
"""

import ast
import errno
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT

from course.__main__ import _explain, check_python
from course.environment import clean, differing_packages, pins
from helpers.errors import CourseError


def user(checkout, *arguments, **variables):
    """Run a command of a checkout as a user does, with a Python that has none of the packages."""
    python = getattr(sys, "_base_executable", sys.executable)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
    return subprocess.run([python, "-m", "helpers", *arguments], cwd=checkout, env=environment | variables,
                          capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def checkout(tmp_path):
    """Return a bare checkout in a path with a space and letters beyond ASCII, and an empty index."""
    folder = tmp_path / "Kurs für Zoë"
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                           cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def only_this_index(folder):
    folder.mkdir(exist_ok=True)
    return {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder.as_uri(),
            "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 10), (3, 14)])
def test_a_python_outside_the_pins_is_refused_with_what_to_do(version):
    says = rf"This is Python {version[0]}\.{version[1]}, .*3\.11 to 3\.13\. Install one"
    with pytest.raises(CourseError, match=says):
        check_python(version)


@pytest.mark.parametrize("version", [(3, 11), (3, 12, 1), (3, 13)])
def test_a_python_inside_the_pins_passes(version):
    check_python(version)


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py", "errors.py"])
def test_an_old_python_can_read_what_tells_it_so(name):
    tree = ast.parse((ROOT / "helpers" / name).read_text(encoding="utf-8"), feature_version=(3, 4))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.AnnAssign)]


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.10"])
def test_a_real_old_python_prints_the_two_sentences(version):
    # On the PATH, or where pyenv keeps it; pyenv's own entry on the PATH is there even when the version is off.
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    works = [path for path in filter(None, found) if not subprocess.run([path, "-V"], capture_output=True).returncode]
    if not works:
        pytest.skip(f"no python{version} on this machine")
    python = works[0]
    result = subprocess.run([python, "-m", "helpers", "run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: This is Python {version}, and the course runs on Python 3.11 to 3.13.")


def test_this_environment_is_as_pinned():
    assert differing_packages(tests=True) == {}


def test_set_up_has_nothing_left_to_do_and_says_nothing(python):
    result = python("-m", "helpers", "setup", network=False)
    assert (result.returncode, result.stdout) == (0, "")


def test_no_package_index_is_an_error_that_says_what_to_check(checkout, tmp_path):
    result = user(checkout, "run", **only_this_index(tmp_path / "index"))
    assert result.returncode == 1, result.stdout + result.stderr
    assert "from the package index." in result.stderr
    assert "Check the network, the proxy (HTTPS_PROXY)" in result.stderr
    assert "Traceback" not in result.stderr
    # A second try finds the environment half-made and goes on to the same sentence.
    again = user(checkout, "run", **only_this_index(tmp_path / "index"))
    assert again.stderr == result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index has only the CPU build")
def test_the_cuda_build_of_torch_is_refused_before_it_is_downloaded(checkout, tmp_path):
    index = tmp_path / "index"
    variables = only_this_index(index)
    torch = pins(tests=False)["torch"]
    for name, version, requires in (("torch", torch, "Requires-Dist: nvidia-cublas\n"), ("nvidia_cublas", "13.0", "")):
        with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            info = f"{name}-{version}.dist-info"
            wheel.writestr(f"{info}/METADATA",
                           f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
            wheel.writestr(f"{info}/WHEEL",
                           "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    result = user(checkout, "run", **variables)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "is the CUDA build, 3 GB that this course never uses." in result.stderr
    assert "PIP_FIND_LINKS" in result.stderr
    assert not list((checkout / ".venv").rglob("torch-*"))


def test_a_mistyped_command_and_a_look_around_install_nothing(checkout):
    result = user(checkout, "walk")
    assert result.returncode == 1
    assert "There is no command called walk." in result.stderr
    assert user(checkout, "--help").returncode == 0
    assert user(checkout, "doctor").returncode == 1
    assert not (checkout / ".venv").exists()


def test_words_after_test_go_to_pytest(python):
    result = python("-m", "helpers", "test", "-k", "no_such_test", "--collect-only", "-q", "tests/test_static.py")
    assert "deselected" in result.stdout, result.stdout + result.stderr


def test_an_unknown_command_names_the_ones_there_are(python):
    result = python("-m", "helpers", "walk")
    assert result.returncode == 1
    assert all(command in result.stderr for command in ("run", "test", "lab", "ui", "bench", "doctor"))


def test_the_ui_says_when_there_is_nothing_to_show_and_when_its_port_is_taken(python, store):
    result = python("-m", "helpers", "ui", COURSE_TRACKING_URI=store)
    assert result.returncode == 1
    assert "There is nothing to show yet." in result.stderr
    Path(store.removeprefix("sqlite:///")).touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = python("-m", "helpers", "ui", "--port", port, COURSE_TRACKING_URI=store)
    assert result.returncode == 1
    assert f"Port {port} is taken." in result.stderr
    assert f"--port {port + 1}" in result.stderr


@pytest.mark.parametrize(("number", "says"), [
    (errno.ENOSPC, "The disk is full. "), (errno.EROFS, "/course/build cannot be written. Move the course"),
])
def test_what_a_disk_refuses_becomes_two_sentences(number, says):
    assert str(_explain(OSError(number, "no", "/course/build"))).startswith(says)
    assert _explain(OSError(errno.ENOENT, "no")) is None


def test_clean_removes_what_runs_leave_and_nothing_else(checkout, monkeypatch):
    monkeypatch.setattr("helpers.setup.ROOT", checkout)
    monkeypatch.setattr("helpers.setup.BUILD", checkout / "build")
    monkeypatch.setattr("helpers.setup.DATA", checkout / "data")
    monkeypatch.setattr("helpers.setup.VENV", checkout / ".venv")
    kept = sorted(path for path in checkout.rglob("*") if path.is_file())
    for name in ("build/course/page.html", "data/models/tiny-phi3/.lock", ".venv/pyvenv.cfg",
                 "course.egg-info/PKG-INFO"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    clean(everything=False)
    assert not (checkout / "build").exists()
    assert (checkout / "data" / "models").exists()
    clean(everything=True)
    assert sorted(path for path in checkout.rglob("*") if path.is_file()) == kept
