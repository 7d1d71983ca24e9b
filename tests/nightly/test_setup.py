"""Set-up for real, of a small project from a small index: it is interrupted, has no index, or only torch's CUDA build.

Run: python -m helpers nightly tests/nightly/test_setup.py
"""

import contextlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from support.kits import only_wheels, write_sums
from support.user import make_checkout, user

from course.environment import UNFINISHED, pins
from helpers.files import sha256
from helpers.paths import VENV, VENV_PYTHON

PYPROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "small"
version = "1"
dependencies = ["six==1.17.0", "torch=={torch}", "uv=={uv}"]
[project.optional-dependencies]
dev = ["soupsieve==4.1.2"]
[tool.setuptools]
packages = []
"""
WHEELS = ("six-1.17.0-py3-none-any.whl", "soupsieve-4.1.2-py3-none-any.whl")
TORCH = f"torch-{pins()['torch']}"


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    """Return a folder with the wheels of uv and setuptools, from the package index."""
    folder = tmp_path_factory.mktemp("tools")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            folder,
            f"uv=={pins()['uv']}",
            "setuptools",
        ],
        check=True,
    )
    return folder


@pytest.fixture
def index(tmp_path, tools):
    """Return the folder that is pip's only index, and the variables that make it so; uv's cache is empty."""
    folder = tmp_path / "index"
    variables = only_wheels(folder, *WHEELS, f"{TORCH}+cpu-py3-none-any.whl")
    for wheel in tools.iterdir():
        shutil.copy(wheel, folder)
    return folder, variables | {"UV_CACHE_DIR": str(tmp_path / "uv")}


@pytest.fixture
def checkout(tmp_path, tools):
    """Return a checkout whose project is a small one, in a path with a space and letters beyond ASCII."""
    folder = make_checkout(tmp_path / "Kurs für Zoë")
    (folder / "pyproject.toml").write_text(PYPROJECT.format(**pins()), encoding="utf-8")
    (setuptools,) = (wheel.name.split("-")[1] for wheel in tools.glob("setuptools-*"))
    lines = [
        "six==1.17.0",
        "soupsieve==4.1.2",
        f"torch=={pins()['torch']}",
        f"uv=={pins()['uv']}",
        f"setuptools=={setuptools}",
        "",
    ]
    (folder / "constraints.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def set_up(checkout, variables, extras=()):
    """Set a checkout up as its commands do."""
    python = getattr(sys, "_base_executable", sys.executable)
    code = f"from course.__main__ import main; from course import environment; environment.set_up({extras!r})"
    return subprocess.run(
        [python, "-c", code],
        cwd=checkout,
        env=dict(os.environ, **variables),
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def packages(checkout):
    """Return the version of each package in a checkout's environment."""
    (site,) = {path.parent for path in (checkout / ".venv").rglob("pip-*.dist-info")}
    return {
        one.metadata["Name"]: one.version
        for one in importlib.metadata.distributions(path=[str(site)])
    }


def test_set_up_installs_what_is_pinned_and_more_extras_later_and_takes_none_away(checkout, index):
    _, variables = index
    hostile = {
        "UV_TARGET": str(checkout / "elsewhere"),
        "UV_DRY_RUN": "1",
        "PIP_TARGET": str(checkout / "elsewhere"),
    }
    first = user(checkout, "setup", **variables, **hostile)
    assert first.returncode == 0, first.stdout + first.stderr
    found = packages(checkout)
    assert (
        found.items()
        >= {
            "six": "1.17.0",
            "torch": f"{pins()['torch']}+cpu",
            "small": "1",
            "uv": pins()["uv"],
        }.items()
    )
    assert "soupsieve" not in found
    assert not (checkout / "elsewhere").exists()
    # A line a step: nothing is painted over where no terminal is.
    assert first.stdout.count("\n") == 4
    assert user(checkout, "setup", **variables).stdout == ""

    assert set_up(checkout, variables, ("dev",)).returncode == 0
    assert packages(checkout)["soupsieve"] == "4.1.2"
    assert set_up(checkout, variables).stdout == ""
    assert packages(checkout)["soupsieve"] == "4.1.2"


# What the environment looks like at the moment of the interruption, and after that.
MOMENTS = {
    "the environment has begun": lambda checkout: (checkout / ".venv" / "course.stamp").exists(),
    "pip is being copied": lambda checkout: any((checkout / ".venv").rglob("pip/__init__.py")),
    "pip gets uv": lambda checkout: said(checkout, "uv-"),
    "pip gets torch": lambda checkout: said(checkout, "torch=="),
    "uv installs": lambda checkout: said(checkout, "Resolved "),
}


def said(checkout, text):
    with contextlib.suppress(FileNotFoundError):
        return text in (checkout / "build" / "setup.log").read_text(encoding="utf-8")
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="which has no SIGINT for another process")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_set_up_that_was_interrupted_goes_on_with_the_same_command(checkout, index, moment, how):
    _, variables = index
    python = getattr(sys, "_base_executable", sys.executable)
    process = subprocess.Popen(
        [python, "-m", "helpers", "setup"],
        cwd=checkout,
        env=dict(os.environ, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not MOMENTS[moment](checkout) and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, how)
    output = process.communicate()[0]
    assert process.returncode in (130, -how), output
    assert (checkout / ".venv" / "course.stamp").read_text(encoding="utf-8") == UNFINISHED
    again = user(checkout, "setup", **variables)
    assert again.returncode == 0, again.stdout + again.stderr
    assert packages(checkout).keys() >= {"six", "torch", "small", "uv", "pip"}
    own = checkout / ".venv" / VENV_PYTHON.relative_to(VENV)
    assert subprocess.run([own, "-m", "pip", "check"], capture_output=True).returncode == 0


@pytest.mark.parametrize("uv_is_there", [False, True])
def test_an_index_that_does_not_answer_is_an_error_with_pips_or_uvs_own_words(
    checkout, index, uv_is_there
):
    folder, variables = index
    variables |= {"PIP_RETRIES": "0", "UV_HTTP_RETRIES": "0"}
    gone = {"PIP_NO_INDEX": "0", "PIP_FIND_LINKS": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    if uv_is_there:
        # pip alone finds uv and torch, as the folder has no six for uv.
        (folder / WHEELS[0]).unlink()
        gone = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "0"}
    result = user(checkout, "run", **variables | gone)
    assert result.returncode == 1, result.stdout + result.stderr
    words = "127.0.0.1:9" if uv_is_there else "No matching distribution found for uv=="
    assert words in result.stderr
    assert "Check the network, the proxy (HTTPS_PROXY) and pip's settings" in result.stderr
    assert "\x1b" not in result.stderr
    assert "Traceback" not in result.stderr
    assert (checkout / ".venv" / "course.stamp").read_text(encoding="utf-8") == UNFINISHED


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index has only the CPU build")
def test_the_cuda_build_of_torch_is_refused_before_it_is_installed(checkout, index):
    folder, variables = index
    (folder / f"{TORCH}+cpu-py3-none-any.whl").unlink()
    only_wheels(folder, f"{TORCH}-py3-none-any.whl", requires="Requires-Dist: nvidia-cublas\n")
    result = user(checkout, "run", **variables)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "is the CUDA build, 3 GB that this course never uses." in result.stderr
    assert not list((checkout / ".venv").rglob("torch-*"))


# --- from a kit ---------------------------------------------------------------------------------


@pytest.fixture
def kit(index, tmp_path):
    """Return the folder of a kit that has these wheels, and variables whose index must not be asked."""
    folder = tmp_path / "Kit, für alle"
    shutil.copytree(index[0], folder / "wheels")
    write_lists(folder)
    return folder, {
        "UV_CACHE_DIR": index[1]["UV_CACHE_DIR"],
        "PIP_NO_CACHE_DIR": "1",
        "COURSE_KIT": str(folder),
        "PIP_FIND_LINKS": index[0].as_uri(),
        "UV_FIND_LINKS": str(index[0]),
    }


def write_lists(folder):
    links = [
        f'<a href="{path.name}#sha256={sha256(path)}">{path.name}</a>'
        for path in (folder / "wheels").glob("*.whl")
    ]
    page = "\n".join(["<!DOCTYPE html>", *links])
    (folder / "wheels" / "index.html").write_text(page, encoding="utf-8")
    write_sums(folder)


@pytest.mark.parametrize("over_http", [False, True])
def test_set_up_from_a_kit(checkout, kit, over_http):
    from support.web_server import web_server

    folder, variables = kit
    with web_server(folder) if over_http else contextlib.nullcontext(str(folder)) as address:
        result = user(checkout, "setup", **variables | {"COURSE_KIT": address})
    assert result.returncode == 0, result.stdout + result.stderr
    assert packages(checkout).keys() >= {"six", "torch", "small", "uv"}


@pytest.mark.parametrize(
    ("wheel", "change", "code"),
    [
        ("six", "absent", "The kit lacks wheels for this course on Python"),
        ("uv", "absent", "The kit lacks wheels for this course on Python"),
        ("torch", "another", "is not as it was built"),
        ("setuptools", "another", "is not as it was built"),
        ("uv", "another", "is not as it was built"),
        ("six", "cut", "is not as it was built"),
    ],
)
def test_a_wheel_that_a_kit_lacks_or_that_was_changed_is_refused(
    checkout, kit, wheel, change, code
):
    folder, variables = kit
    (path,) = (folder / "wheels").glob(f"{wheel}-*.whl")
    if change == "absent":
        path.unlink()
        write_lists(folder)
    elif change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        with zipfile.ZipFile(path, "a") as zipped:
            zipped.writestr("changed_by_somebody.py", "")
    result = user(checkout, "setup", **variables)
    assert result.returncode == 1, result.stdout + result.stderr
    assert code in result.stderr
    assert wheel in result.stderr
    assert not list((checkout / ".venv").rglob("changed_by_somebody.py"))
