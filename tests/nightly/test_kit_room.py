"""A room without a network: a whole kit of this machine's packages, a participant, and set-up from a kit that is wrong.

Run: python -m helpers nightly tests/nightly/test_kit_room.py
"""

import http.client
import json
import os
import subprocess
import sys
import zipfile
from urllib.parse import urlsplit

import pytest
from support import OURS, ROOT, interrupt, refuses
from support.kits import COMMAND, NOBODY, list_files, served
from support.user import user
from support.web_server import web_server

from course.environment import pins
from helpers.files import sha256
from helpers.models.kit import read_kit


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Return a kit of tiny-phi3 and all packages for this machine, whose build was interrupted once."""
    folder = tmp_path_factory.mktemp("kit") / "Kit für alle"
    command = [*COMMAND, "build", folder, "--model", "tiny-phi3"]
    if sys.platform != "win32":  # which has no SIGINT for another process
        # After torch, in the middle of the others.
        interrupt(command, lambda: any(map(zipfile.is_zipfile, folder.glob("wheels/*.whl"))))
        with refuses("kit-incomplete"):
            read_kit(str(folder))
    before = list_files(folder) if folder.exists() else {}
    finished = {name: when for name, when in before.items() if name.endswith(".whl")}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    assert finished.items() <= list_files(folder).items()
    return folder


# --- the participant -------------------------------------------------------------------


def participant(folder, url):
    """Unpack the course as a participant does, and run its one command with nothing but the kit to ask."""
    folder.mkdir(parents=True)
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/course.zip")
    (folder / "course.zip").write_bytes(connection.getresponse().read())
    with zipfile.ZipFile(folder / "course.zip") as zipped:
        zipped.extractall(folder)
    course = folder / "slm-mlflow-course"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("COURSE_", "PIP_", "UV_", *OURS))
    }
    # An index that would be asked if set-up did not shut it out, and would refuse: no log may name
    # it.
    environment |= {
        "COURSE_KIT": url,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_INDEX_URL": NOBODY,
        "PIP_EXTRA_INDEX_URL": NOBODY,
        "HTTPS_PROXY": NOBODY,
        "HTTP_PROXY": NOBODY,
        "http_proxy": NOBODY,
        "PYTHONPATH": str(ROOT / "tests" / "support" / "no_network"),
        "REFUSED_LOG": str(folder / "refused.log"),
    }
    python = getattr(sys, "_base_executable", sys.executable)
    command = [
        python,
        "-m",
        "helpers",
        "notebook",
        "TransformerPipeline",
        "-p",
        "model",
        "tiny-phi3",
    ]
    return course, subprocess.run(
        command,
        cwd=course,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def test_a_participant_runs_a_notebook_from_one_url_and_nothing_else(big, tmp_path):
    with served(big) as (url, _):
        course, result = participant(tmp_path / "Zoë und Jörg", url)
    kit, output = read_kit(str(big)), result.stdout
    log = (course / "build" / "setup.log").read_text(encoding="utf-8")
    assert result.returncode == 0, output[-3000:] + log[-3000:]
    refused = course.parent / "refused.log"
    assert not refused.exists(), refused.read_text(encoding="utf-8")
    assert NOBODY not in log
    assert output.count("  Q  ") == output.count("  A  ") == 2
    assert output.count("tokens per second; page: ") == 1
    # Nothing was made here: the files are the kit's own, to the last byte.
    assert "Exporting" not in output
    assert "Making random weights" not in output
    home = course / "data" / "models" / "tiny-phi3"
    in_kit = {
        name: digest
        for name, digest in kit.files.items()
        if name.startswith("models/tiny-phi3/transformers/") and not name.endswith(".receipt.json")
    }
    assert len(in_kit) > 4
    assert {name: sha256(home.parent / name.removeprefix("models/")) for name in in_kit} == in_kit
    own = course / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    code = "from course.environment import differing_packages; print(differing_packages())"
    assert (
        subprocess.run([own, "-c", code], cwd=course, capture_output=True, text=True).stdout
        == "{}\n"
    )


def test_a_model_comes_from_a_folder_as_well(big, tmp_path, python, tiny):
    cache = tmp_path / "cache"
    result = python(
        "-m",
        "helpers",
        "prepare",
        "--model",
        "tiny-phi3",
        network=False,
        COURSE_KIT=str(big),
        COURSE_CACHE=str(cache),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Exporting" not in result.stdout
    made, copied = tiny.onnx_dir / "model.onnx", cache / "tiny-phi3" / "onnx" / "model.onnx"
    assert sha256(copied) == sha256(made)


def test_the_whole_kit_is_as_it_was_built_and_every_command_of_the_course_can_come_from_it(big):
    result = subprocess.run(
        [*COMMAND, "check", big], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "are as they were built." in result.stdout
    names = {
        path.name.split("-")[0].lower().replace("_", "-") for path in (big / "wheels").glob("*.whl")
    }
    assert {*pins(("dev",)), "setuptools"} <= names
    with zipfile.ZipFile(big / "course.zip") as course:
        notebook = json.loads(course.read("slm-mlflow-course/notebooks/TransformerPipeline.ipynb"))
        inside = set(course.namelist())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "helpers/models/kit.py",
        "course/commands.py",
        "serving/chat/engine.py",
        "data/kit.html",
    ):
        assert f"slm-mlflow-course/{name}" in inside
    assert not [
        name for name in inside if ".venv" in name or "/build/" in name or "data/models/" in name
    ]


# --- set-up from a kit that is not right --------------------------------------------------------


@pytest.fixture
def course(built, tmp_path):
    """Return the course as a participant unpacks it."""
    with zipfile.ZipFile(built / "course.zip") as zipped:
        zipped.extractall(tmp_path)
    return tmp_path / "slm-mlflow-course"


def test_a_kit_that_stops_answering_is_named(built, course):
    with web_server(built, gone=["/wheels/index.html"]) as url:
        result = user(course, "setup", COURSE_KIT=url)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"error: The kit {url} does not answer any more." in result.stderr
