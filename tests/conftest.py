"""What the tests share: the models, a store of their own, and programs run as a user runs them."""

import collections
import functools
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock
from support import ROOT, run_python

from course.environment import install_extra
from course.tiers import BASELINE, MEASURED, find_outgrown, find_tier, read_durations
from helpers.environment import clean_process

clean_process()

SECONDS = collections.Counter()
# The same examples on every machine, however slow it is. `--hypothesis-profile=search` tries
# others.
hypothesis.settings.register_profile(
    "course",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("course")


def pytest_configure(config):
    """Give each worker the tiny model and a store of its own, as defaults of whatever it starts."""
    folder = Path(tempfile.mkdtemp(prefix="course-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["COURSE_MODEL"] = "tiny-phi3"
    os.environ["COURSE_TRACKING_URI"] = "sqlite:///" + (folder / "mlflow.db").as_posix()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Run the slowest files first, so that no worker ends with one of them while the others idle."""
    seconds = {}
    for files in read_durations(BASELINE).values():
        seconds |= files
    items.sort(
        key=lambda item: (
            -seconds.get(item.nodeid.partition("::")[0], 0 if "unit" in item.path.parts else 1e6)
        )
    )


def pytest_runtest_logreport(report):
    """Add up how long the tests of each file take."""
    SECONDS[report.nodeid.partition("::")[0]] += report.duration


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Note the durations of a whole tier, and fail where a file has outgrown its share."""
    if hasattr(session.config, "workerinput"):
        return
    tier = find_tier(set(SECONDS))
    if tier is None:
        return
    MEASURED.parent.mkdir(exist_ok=True)
    MEASURED.write_text(json.dumps(read_durations(MEASURED) | {tier: SECONDS}), encoding="utf-8")
    baseline = read_durations(BASELINE).get(tier, {})
    outgrown = find_outgrown(tier, SECONDS, baseline) if exitstatus == pytest.ExitCode.OK else {}
    for file, (now, before) in outgrown.items():
        print(
            f"\n{file} took {now:.1%} of the whole, and {before:.1%} is kept. "
            "Make it faster, or keep what it takes now: python -m helpers durations."
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def tiny():
    from helpers import prepare_model

    return prepare_model("tiny-phi3")


@pytest.fixture(scope="session")
def smol():
    from helpers import prepare_model

    return prepare_model("smollm2-135m")


@pytest.fixture(scope="session")
def site():
    """Return the folder that has PySpark, for PYTHONPATH."""
    return install_extra("spark")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, site):
    """Return a Spark cluster of this machine for a module's tests."""
    from course.cluster import running

    with running(tmp_path_factory.mktemp("clüster 1"), site) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def no_experiment_of_another_test(monkeypatch):
    """Unset the variable in which MLflow's set_experiment tells programs that a test starts of its experiment."""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)


@pytest.fixture
def python(tmp_path):
    """Return ``support.run_python`` for this test's folder."""
    return functools.partial(run_python, tmp_path)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Return a database with MLflow's tables, to copy: they take seconds to make, so ``build`` keeps them."""
    import mlflow

    folder = ROOT / "build" / f"empty-{mlflow.__version__}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = tmp_path_factory.mktemp("empty")
            mlflow.MlflowClient("sqlite:///" + (made / "mlflow.db").as_posix()).search_experiments()
            shutil.copytree(made, f"{folder}.partial", dirs_exist_ok=True)
            Path(f"{folder}.partial").rename(folder)
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path, empty_database):
    """Return the URI of an empty tracking store, in a folder with a new name that is not ASCII.

    MLflow keeps the databases that it has opened by their paths, so a path must not come twice in a
    process.
    """
    folder = Path(tempfile.mkdtemp(prefix="störe ", dir=tmp_path))
    shutil.copy(empty_database, folder)
    return "sqlite:///" + (folder / "mlflow.db").as_posix()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache in a folder whose name is not plain."""
    folder = tmp_path / "mödels cache"
    monkeypatch.setenv("COURSE_CACHE", str(folder))
    return folder


@pytest.fixture
def filled_cache(cache, tiny):
    """Return a cache of its own that has tiny-phi3."""
    shutil.copytree(tiny.onnx_dir.parent, cache / "tiny-phi3")
    return cache


@pytest.fixture(scope="session")
def phi3(tmp_path_factory):
    """Return a folder with the Hub's two repositories of Phi-3, with noise for weights."""
    from support.phi3_layout import write_noise_phi3

    root = tmp_path_factory.mktemp("hub")
    write_noise_phi3(root)
    return root


@pytest.fixture
def mounted(tmp_path):
    """Return a function that runs a command with ``folder`` mounted as tmpfs with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def run(options, command, fill=None):
        copy = f"cp -r '{fill}' '{folder}' && mount -o remount,ro '{folder}' && " if fill else ""
        script = f"mount -t tmpfs -o {options} tmpfs '{folder}' && {copy}exec \"$@\""
        return subprocess.run(
            ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *command],
            cwd=ROOT,
            env=dict(os.environ, COURSE_CACHE=str(folder)),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )

    if not shutil.which("unshare") or run("size=1m", ["true"]).returncode:
        pytest.skip("needs Linux with user namespaces to mount a disk of its own")
    return run


# --- the chat model on the toy model, as MLflow would load it -------------------------------------


@pytest.fixture(scope="module")
def chat(tiny):
    """Return a chat model for a module's tests; it answers 16 tokens where a request says nothing."""
    from support.chat import load_chat

    with closing(load_chat(tiny.onnx_dir)) as model:
        yield model


@pytest.fixture
def fresh(tiny):
    """Return a chat model for one test, which may break it."""
    from support.chat import load_chat

    with closing(load_chat(tiny.onnx_dir)) as model:
        yield model


@pytest.fixture(scope="module")
def cold(tiny):
    """Return a model that keeps no conversation: its answers are what the others' have to be."""
    from support.chat import load_chat
    from support.conversations import share_nothing

    with closing(share_nothing(load_chat(tiny.onnx_dir))) as model:
        yield model


@pytest.fixture(scope="module")
def real_chat(smol):
    """Return the chat model on the real model."""
    from support.chat import load_chat

    with closing(load_chat(smol.onnx_dir)) as model:
        yield model


@pytest.fixture(scope="module")
def as_shown(chat):
    """Return the choices of the answer to ``AS_SHOWN``, to ask for again after something went wrong."""
    from support.chat import AS_SHOWN

    return chat.predict(None, AS_SHOWN)[0]["choices"]


# --- the server of stand-ins out of a registry -----------------------------------------------------


@pytest.fixture
def registry(store, tmp_path):
    """Set a store of this test's own; return a function that registers a stand-in there, and sets ``champion``."""
    from support import stand_ins

    with stand_ins.registry(store, tmp_path) as register:
        yield register


@pytest.fixture
def program(registry, store, tmp_path, monkeypatch):
    """Return a function that starts the server as a program on this test's store."""
    from support.served_program import Program

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started = []

    def start(*words):
        started.append(Program(tmp_path / f"program{len(started)}.log", *words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


# --- a small kit that was really built ------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Let pip find handmade wheels and nothing else, and let five lines stand for constraints.txt."""
    from support import kits

    folder = tmp_path_factory.mktemp("index")
    path = folder / "constraints.txt"
    path.write_text(kits.CONSTRAINTS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("course.kit.wheels.CONSTRAINTS", path)
        for name, value in kits.only_wheels(folder / "wheels", *kits.WHEELS).items():
            patch.setenv(name, value)
        yield path


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, index):
    """Return a small kit for three systems and two Pythons: six targets that are not all this machine."""
    from course.kit.build import build
    from course.kit.wheels import PLATFORMS

    folder = tmp_path_factory.mktemp("small") / "kit"
    build(folder, ["tiny-phi3"], list(PLATFORMS), ["3.11", "3.13"])
    return folder


@pytest.fixture
def small(built, tmp_path):
    """Return a copy of the small kit that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "a kit"))
