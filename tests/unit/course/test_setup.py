"""Set-up on machines that are not right: an old Python, no index, only the CUDA build of torch.

Run: python -m helpers test tests/unit/course/test_setup.py
"""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT, refuses
from support.user import make_checkout, user

from course import environment
from course.__main__ import check_python
from course.environment import clean, differing_packages, explain, is_set_up, pins
from helpers.models.kit import Kit
from helpers.models.pip import PipFailure

KIT = "http://192.168.1.5:8750"
THIS_PYTHON = "{}.{}".format(*sys.version_info[:2])


@pytest.fixture
def checkout(tmp_path):
    """Return a bare checkout in a path with a space and letters beyond ASCII."""
    return make_checkout(tmp_path / "Kurs für Zoë")


@pytest.fixture
def index(tmp_path):
    """Return an empty folder that is pip's only index, and the variables that make it so."""
    folder = tmp_path / "index"
    folder.mkdir()
    return folder, {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder.as_uri(),
                    "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Let the course's folder be one that has the pins and nothing else, and return it."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    venv = tmp_path / ".venv"
    for name, place in {"ROOT": tmp_path, "BUILD": tmp_path / "build", "DATA": tmp_path / "data", "VENV": venv,
                        "VENV_PYTHON": venv / "python", "STAMP": venv / "course.stamp",
                        "TESTS_STAMP": venv / "course-tests.stamp"}.items():
        monkeypatch.setattr(f"course.environment.{name}", place)
    return tmp_path


# --- which Python ----------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(2, 7), (3, 6), (3, 10), (3, 14)])
def test_a_python_outside_the_pins_is_refused_with_what_to_do(version):
    with refuses("python-version") as refusal:
        check_python(version)
    assert "Python {}.{}, ".format(*version) in refusal.value.what
    assert "3.11 to 3.13" in refusal.value.what
    assert refusal.value.fix.startswith("Install one")


@pytest.mark.parametrize("version", [(3, 11), (3, 12, 1), (3, 13)])
def test_a_python_inside_the_pins_passes(version):
    check_python(version)


@pytest.mark.parametrize("name", ["course/__main__.py", "course/__init__.py", "helpers/__init__.py",
                                  "helpers/__main__.py", "helpers/errors.py"])
def test_an_old_python_can_read_what_tells_it_so(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.isascii()  # Python 2 takes no other letter without a line that names the encoding
    for node in ast.walk(ast.parse(text, feature_version=(3, 4))):
        assert not isinstance(node, ast.JoinedStr | ast.AnnAssign), node.lineno
        assert not getattr(node, "annotation", None), node.lineno
        assert not getattr(node, "returns", None), node.lineno
        assert not getattr(node, "kwonlyargs", None), node
        assert not (isinstance(node, ast.Raise) and node.cause), node.lineno


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.10"])
def test_a_real_old_python_prints_the_two_sentences(version):
    # On the PATH, or where pyenv keeps it; pyenv's own entry on the PATH is there even when the version is off.
    found = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    works = [path for path in filter(None, found) if not subprocess.run([path, "-V"], capture_output=True).returncode]
    if not works:
        pytest.skip(f"no python{version} on this machine")
    result = subprocess.run([works[0], "-m", "helpers", "run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.fullmatch(rf"error: This is Python {re.escape(version)}, and .* 3\.11 to 3\.13\.\n       Install .*\n",
                        result.stderr), result.stderr


# --- what is set up --------------------------------------------------------------------------


def test_this_environment_is_as_pinned():
    assert differing_packages(("dev",)) == {}


def test_set_up_has_nothing_left_to_do_and_says_nothing(python):
    result = python("-m", "helpers", "setup", network=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "folder", "python"])
def test_a_set_up_is_finished_for_these_pins_in_this_folder_by_this_python(home, monkeypatch, changed):
    before = environment._state()
    assert environment._state() == before
    (home / "README.md").touch()
    assert environment._state() == before
    if changed == "folder":
        moved = shutil.copytree(home, home / "moved")
        monkeypatch.setattr(environment, "ROOT", moved)
    elif changed == "python":
        monkeypatch.setattr(sys, "version", sys.version + "+")
    else:
        with (home / changed).open("a", encoding="utf-8") as file:
            file.write("# one more\n")
    assert environment._state() != before


def test_what_the_tests_need_includes_the_rest(home):
    (home / ".venv").mkdir()
    for stamp, sets_up in (("course.stamp", [False]), ("course-tests.stamp", [False, True])):
        file = home / ".venv" / stamp
        file.write_text(environment._state(), encoding="utf-8")
        assert not is_set_up(tests=False)  # there is no Python
        (home / ".venv" / "python").touch()
        assert [tests for tests in (False, True) if is_set_up(tests)] == sets_up
        file.write_text("of other pins", encoding="utf-8")
        assert not is_set_up(tests=False)
        (home / ".venv" / "python").unlink()


def test_clean_removes_what_runs_leave_and_nothing_else(checkout, monkeypatch):
    for name, place in {"ROOT": "", "BUILD": "build", "DATA": "data", "VENV": ".venv"}.items():
        monkeypatch.setattr(f"course.environment.{name}", checkout / place)
    kept = sorted(path for path in checkout.rglob("*") if path.is_file())
    left = ["build/course/page.html", "mlruns/0/meta.yaml", "mlflow.db"]
    installed = ["data/models/tiny-phi3/.lock", ".venv/pyvenv.cfg", "course.egg-info/PKG-INFO"]
    for name in (*left, *installed):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    assert clean(everything=False) == 0
    assert sorted(path for path in checkout.rglob("*") if path.is_file()) == sorted(
        [*kept, *(checkout / name for name in installed)])
    clean(everything=True)
    assert sorted(path for path in checkout.rglob("*") if path.is_file()) == kept


def test_clean_names_a_folder_that_somebody_still_uses(home, monkeypatch):
    (home / "build").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    with refuses("in-use") as refusal:
        clean(everything=False)
    assert refusal.value.what.startswith("build ")


# --- why it failed ---------------------------------------------------------------------------


def kit_for(platforms, pythons):
    return Kit(KIT, {"format": 1, "complete": True, "files": {}, "models": ["tiny-phi3"], "platforms": platforms,
                     "pythons": pythons})


@pytest.fixture
def on_linux(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.parametrize(("kind", "package", "code", "what", "fix"), [
    ("disk-full", "", "disk-full", "GB are free, and set-up needs 4 GB", "Free some space"),
    ("missing", "torch==2.13.0", "pip-unreachable", "torch==2.13.0 from the package index", "HTTPS_PROXY"),
    ("unreachable", "torch==2.13.0", "pip-unreachable", "torch==2.13.0 from the package index", "pip config list"),
    ("unreachable", "", "pip-unreachable", "the packages from the package index", "HTTPS_PROXY"),
    ("conflict", "six==9", "pip-unreachable", "six==9 from the package index", "HTTPS_PROXY"),
    ("certificate", "", "pip-unreachable", "the packages from the package index", "HTTPS_PROXY"),
    ("changed", "six", "pip-failed", "pip could not install", "setup.log"),
    ("other", "", "pip-failed", "pip could not install", "setup.log"),
])
def test_why_set_up_failed_without_a_kit(kind, package, code, what, fix):
    with refuses(code) as refusal:
        raise explain(PipFailure(kind, package, "pip's last line"))
    assert what in refusal.value.what
    assert fix in refusal.value.fix
    assert "kit" not in str(refusal.value)


@pytest.mark.parametrize(("kind", "package", "code", "what", "fix"), [
    ("disk-full", "", "disk-full", "GB are free, and set-up needs 4 GB", "Free some space"),
    ("changed", "six", "kit-changed", f"{KIT} is not as it was built: six.", "kit check"),
    ("changed", "", "kit-changed", f"{KIT} is not as it was built: it is cut off.", "kit check"),
    ("unreachable", "torch==2.13.0", "kit-gone", KIT, "kit serve"),
    ("missing", "torch==2.13.0", "kit-lacks-wheel", f"no wheel of torch for Python {THIS_PYTHON} on Linux x86_64.",
     "--platform windows linux "),
    ("conflict", "six>=9", "kit-lacks-wheel", f"no wheel of six for Python {THIS_PYTHON} on Linux x86_64.",
     "--platform windows linux "),
    ("missing", "", "pip-failed", "pip could not install", "setup.log"),
    ("conflict", "", "pip-failed", "pip could not install", "setup.log"),
    ("certificate", "", "pip-failed", "pip could not install", "setup.log"),
    ("other", "", "pip-failed", "pip could not install", "setup.log"),
])
def test_why_set_up_failed_with_a_kit_for_another_system(on_linux, kind, package, code, what, fix):
    with refuses(code) as refusal:
        raise explain(PipFailure(kind, package, "pip's last line"), kit_for(["windows"], [THIS_PYTHON]))
    assert what in refusal.value.what
    assert fix in refusal.value.fix
    assert "package index" not in str(refusal.value)


@pytest.mark.parametrize(("platforms", "pythons", "code", "names"), [
    (["linux"], [THIS_PYTHON], "kit-other-version", [f"{KIT}/course.zip"]),
    (["windows", "linux"], ["3.9", THIS_PYTHON], "kit-other-version", [f"{KIT}/course.zip"]),
    (["linux"], ["3.9"], "kit-lacks-wheel", [
        "3.9 on linux", f"kit build DIR --model tiny-phi3 --platform linux --python 3.9 {THIS_PYTHON}."]),
    (["windows", "macos"], [THIS_PYTHON], "kit-lacks-wheel", [
        f"{THIS_PYTHON} on windows, macos",
        f"kit build DIR --model tiny-phi3 --platform windows macos linux --python {THIS_PYTHON}."]),
])
@pytest.mark.parametrize("kind", ["missing", "conflict"])
def test_a_wheel_that_a_kit_lacks(on_linux, kind, platforms, pythons, code, names):
    with refuses(code) as refusal:
        raise explain(PipFailure(kind, "torch==2.13.0", ""), kit_for(platforms, pythons))
    assert re.search(r"\btorch\b(?!=)", refusal.value.what)
    for name in names:
        assert name in refusal.value.fix


def test_a_system_that_no_kit_is_built_for_is_named_and_not_offered(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "FreeBSD")
    monkeypatch.setattr(platform, "machine", lambda: "amd64")
    with refuses("kit-lacks-wheel") as refusal:
        raise explain(PipFailure("missing", "torch==2.13.0", ""), kit_for(["linux"], [THIS_PYTHON]))
    assert "FreeBSD amd64" in refusal.value.what
    assert "FreeBSD" not in refusal.value.fix
    assert "None" not in refusal.value.fix


# --- a bare checkout, as a user --------------------------------------------------------------


@pytest.mark.slow
def test_no_package_index_is_an_error_that_says_what_to_check(checkout, index):
    _, variables = index
    result = user(checkout, "run", **variables)
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.fullmatch(r"error: .* from the package index\.\n       Check the network, the proxy \(HTTPS_PROXY\).*\n",
                        result.stderr)
    # A second try finds the environment half-made and goes on to the same sentence.
    made = (checkout / ".venv" / "pyvenv.cfg").stat().st_mtime_ns
    again = user(checkout, "run", **variables)
    assert again.stderr == result.stderr
    assert (checkout / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index has only the CPU build")
def test_the_cuda_build_of_torch_is_refused_before_it_is_installed(checkout, index):
    folder, variables = index
    torch = pins()["torch"]
    for name, version, requires in (("torch", torch, "Requires-Dist: nvidia-cublas\n"), ("nvidia_cublas", "13.0", "")):
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
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


def test_a_look_around_a_bare_checkout_installs_nothing(checkout, index):
    _, variables = index
    mistyped = user(checkout, "walk", **variables)
    assert (mistyped.returncode, "There is no command called walk." in mistyped.stderr) == (1, True)
    assert user(checkout, "--help", **variables).returncode == 0
    doctor = user(checkout, "doctor", **variables)
    assert (doctor.returncode, "packages are not installed" in doctor.stdout) == (1, True), doctor.stderr
    assert not (checkout / ".venv").exists()
