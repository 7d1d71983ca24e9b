"""What the tests share: the models, a store of their own, and programs run as a user runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
# What importing helpers has put into this process's environment; a user's shell has none of it.
OURS = ("HF_", "MLFLOW_", "DO_NOT_TRACK", "TOKENIZERS_", "TRANSFORMERS_")
TRACKS = ("TransformerPipeline", "CustomPythonWrapper")

# The same examples each time: a test that fails, fails for everybody. `--hypothesis-profile=search` looks for others.
hypothesis.settings.register_profile("course", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("course")


def pytest_configure(config):
    """Give nbmake's notebooks the tiny model and a fresh store: nbmake cannot inject parameters."""
    store = ROOT / "build" / "test"
    shutil.rmtree(store, ignore_errors=True)
    os.environ["COURSE_MODEL"] = "tiny-phi3"
    os.environ["COURSE_TRACKING_URI"] = "sqlite:///" + (store / "mlflow.db").as_posix()


@pytest.fixture(scope="session")
def tiny():
    from helpers import prepare_model

    return prepare_model("tiny-phi3")


@pytest.fixture(scope="session")
def smol():
    from helpers import prepare_model

    return prepare_model("smollm2-135m")


@pytest.fixture
def python(tmp_path):
    """Return a function that runs this Python as a user would, and gives back what it printed.

    ``network=False`` refuses every address but this machine's and fails the test if one was asked for.
    """

    def run(*arguments, network=True, cwd=ROOT, **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)} | variables
        refused = tmp_path / "refused.log"
        if not network:
            environment |= {"PYTHONPATH": str(ROOT / "tests" / "no_network"), "REFUSED_LOG": str(refused)}
        result = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env=environment,
                                capture_output=True, text=True, encoding="utf-8", errors="replace")
        assert not refused.exists(), refused.read_text(encoding="utf-8")
        return result

    return run


@pytest.fixture
def store(tmp_path):
    """Return the URI of an empty tracking store, in a folder whose name is not plain."""
    folder = tmp_path / "störe 1"
    folder.mkdir()
    return "sqlite:///" + (folder / "mlflow.db").as_posix()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache in a folder whose name is not plain."""
    folder = tmp_path / "mödels cache"
    monkeypatch.setenv("COURSE_CACHE", str(folder))
    return folder


@pytest.fixture
def mounted(tmp_path):
    """Return a function that runs a command with ``folder`` mounted as tmpfs with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def run(options, command, fill=None):
        copy = f"cp -r '{fill}' '{folder}' && mount -o remount,ro '{folder}' && " if fill else ""
        script = f"mount -t tmpfs -o {options} tmpfs '{folder}' && {copy}exec \"$@\""
        return subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *command],
                              cwd=ROOT, env=dict(os.environ, COURSE_CACHE=str(folder)),
                              capture_output=True, text=True, encoding="utf-8")

    if not shutil.which("unshare") or run("size=1m", ["true"]).returncode:
        pytest.skip("needs Linux with user namespaces to mount a disk of its own")
    return run
