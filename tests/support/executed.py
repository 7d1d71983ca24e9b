"""Executes a page once for all tests that read it: in one way, on one model, until its sources change.

An entry of CARRIERS is one execution of a page. Each also covers a condition that would need a run
of its own, such as a folder with an odd name, a hostile shell, a tracking server with a login,
solved exercises.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import nbformat
from filelock import FileLock

from course.environment import install_extra
from helpers.tracking import tracking_store
from support import ROOT, TRACKS, run_python, user_environment
from support.hostile import BORNE, HOSTILE
from support.jupyter import server
from support.projects import activated, project
from support.user import make_checkout

EXECUTED = ROOT / "build" / "executed"
SOURCES = (
    "notebooks",
    "helpers",
    "serving",
    "course",
    "data",
    "tests/support",
    "MLproject",
    "pyproject.toml",
    "constraints.txt",
)
# All that may stand on stderr: what MLflow says at each registration, and the course of variables
# that it leaves out.
EXPECTED_STDERR = r"((Successfully r|R)egistered model .*|Created version .*|note: the course (removes|sets) .*|\s)*"
# Each differs from its default.
OTHER = {
    "question": "What is the capital of France?",
    "system_prompt": "Answer in one sentence.",
    "max_tokens": 24,
    "temperature": 0.3,
}
# A question like an option and with quotes in it, as many tokens as the context leaves, a whole
# number as temperature.
EXTREME = {
    "question": '-5? Who\'s the author of "Hamlet" & why?',
    "system_prompt": "",
    "max_tokens": 4000,
    "temperature": 1,
}
# Two names with most characters that mean something in URIs, templates, patterns, configuration
# files and shells. Not %20: MLflow finds no model in a folder of that name, and the tests of the
# store say so.
ODD_NAMES = ("-what? a#b it's {x} ${y} [z] $HOME %(here)s ;&\\ é ", '.say "hi" 100%')


@dataclass(frozen=True)
class Executed:
    """A page after its execution: where its files, its database and its log are, and what the command printed."""

    page: str
    folder: str
    database: str
    returncode: int
    stdout: str
    stderr: str
    extra: dict = field(default_factory=dict)

    @functools.cached_property
    def cells(self) -> list:
        """Return the code cells of the executed notebook."""
        cells = nbformat.read(self.file(".ipynb"), as_version=4).cells
        return [cell for cell in cells if cell.cell_type == "code"]

    def file(self, ending: str) -> Path:
        """Return the file of the page with this ending, such as ``.html``."""
        return Path(self.folder) / f"{self.page}{ending}"

    def shown(self, text: str) -> str:
        """Return the output of the one cell whose output holds a text."""
        (found,) = [said for said in map(output_of, self.cells) if text in said]
        return found

    def output(self, source: str) -> list[str]:
        """Return the outputs of the cells whose code holds a text."""
        return [output_of(cell) for cell in self.cells if source in cell.source]

    @property
    def store(self) -> str:
        """Return the URI of the tracking store that the page used, as a database."""
        return tracking_store(f"sqlite:///{Path(self.database).as_posix()}").uri


def output_of(cell) -> str:
    """Return what a code cell shows as text."""
    return "\n".join(
        output.text
        if output.output_type == "stream"
        else output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
    )


def checks(executed: Executed) -> list[str]:
    """Return what each check of an exercise says."""
    return [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in executed.cells
        if 'check("' in cell.source
    ]


def assert_clean(executed: Executed) -> None:
    """Assert that a page ran to its end, shows no warning, no empty widget and no stray number, and logged none."""
    assert executed.returncode == 0, executed.stdout + executed.stderr
    assert all(cell.execution_count for cell in executed.cells)
    for cell in executed.cells:
        for output in cell.outputs:
            said = output.text if output.get("name") == "stderr" else ""
            assert re.fullmatch(EXPECTED_STDERR, said), (cell.source, said)
            data = output.get("data", {})
            assert "application/vnd.jupyter.widget-view+json" not in data, cell.source
            # A number that stands alone is what a cell's last line happened to return.
            assert not re.fullmatch(r"-?[\d.]+", data.get("text/plain", "")), cell.source
    log = executed.file(".log")
    said = executed.stderr + (log.read_text(encoding="utf-8") if log.exists() else "")
    assert "Warning" not in said and "TCP without encryption" not in said, said


@functools.cache
def execute_once(name: str) -> Executed:
    """Return a carrier's execution; the first test that asks runs it, in whichever worker, and others wait for it."""
    digest = hashlib.sha256(
        sys.version.encode()
        + b"".join(
            path.relative_to(ROOT).as_posix().encode() + path.read_bytes()
            for path in _source_files()
        )
    ).hexdigest()[:12]
    folder = EXECUTED / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    result = folder / "executed.json"
    with FileLock(f"{folder}.lock"):
        # A failure counts for one session of pytest: the next one tries again.
        failure = folder / f"failed-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}.json"
        if not result.exists() and not failure.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            executed = CARRIERS[name](folder)
            written = failure if executed.returncode else result
            written.write_text(json.dumps(asdict(executed)), encoding="utf-8")
    there = result if result.exists() else failure
    return Executed(**json.loads(there.read_text(encoding="utf-8")))


PREDICT = """
import json, sys, mlflow
store, name, request, params = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
mlflow.set_tracking_uri(store)
model = mlflow.pyfunc.load_model(f"models:/{name}@champion")
print(json.dumps(model.predict(request, params=params)))
"""


def ask_in_fresh_process(
    python: Callable, store: str, name: str, request: dict, params: dict | None = None
):
    """Return what a registered model's champion answers in a new process, without the course, pickles or a network.

    ``python`` is the fixture of this name.
    """
    result = python(
        "-c",
        PREDICT,
        store,
        name,
        json.dumps(request),
        json.dumps(params),
        cwd=ROOT.parent,
        network=False,
        MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _source_files():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    ).stdout
    files = [ROOT / name for name in sorted(filter(None, listed.split("\0")))]
    return [path for path in files if path.is_file() and path.suffix not in (".png", ".svg")]


def _words(parameters):
    return [word for name, value in parameters.items() for word in ("-p", name, value)]


def notebook(
    page: str, *options: str, spark: bool = False, **parameters
) -> Callable[[Path], Executed]:
    """Return a carrier that runs a page by the course's own command, without a network."""

    def run(folder):
        database = folder / "störe 1" / "mlflow.db"
        database.parent.mkdir()
        told = {"tracking_uri": f"sqlite:///{database.as_posix()}"} | parameters
        variables = {"PYTHONPATH": str(install_extra("spark"))} if spark else {}
        result = run_python(
            folder,
            "-m",
            "helpers",
            "notebook",
            page,
            *options,
            *_words(told),
            "--output",
            folder,
            network=False,
            **variables,
        )
        return Executed(
            page, str(folder), str(database), result.returncode, result.stdout, result.stderr
        )

    return run


def as_project(
    page: str, entry: str, spark: bool = False, **parameters
) -> Callable[[Path], Executed]:
    """Return a carrier that runs a page by ``mlflow run``, from a terminal that has no letters beyond ASCII."""

    def run(folder):
        database = folder / "mlflow.db"
        words = project(entry, tracking_uri=f"sqlite:///{database.as_posix()}", **parameters)
        variables = {"PYTHONPATH": str(install_extra("spark"))} if spark else {}
        result = run_python(
            folder,
            *words,
            cwd=folder,
            network=False,
            PYTHONIOENCODING="ascii",
            **variables,
            **activated(folder),
        )
        # The entry writes to build/project, where the next run would, too.
        for ending in (".ipynb", ".html", ".log"):
            with contextlib.suppress(FileNotFoundError):
                shutil.move(
                    ROOT / "build" / "project" / f"{page}{ending}", folder / f"{page}{ending}"
                )
        return Executed(
            page, str(folder), str(database), result.returncode, result.stdout, result.stderr
        )

    return run


def in_odd_folder(folder: Path) -> Executed:
    """Run a page in a checkout with an odd name, beside another kernel and other helpers, from a hostile shell."""
    checkout = make_checkout(folder / ODD_NAMES[0])
    cache = folder / f"cache{ODD_NAMES[1]}"
    shutil.copytree(ROOT / "data" / "models" / "tiny-phi3", cache / "tiny-phi3")
    (checkout / "notebooks" / "helpers.py").write_text("mine = 1\n")
    (folder / "mine").mkdir()
    (folder / "mine" / "serving.py").touch()
    output = folder / f"out{ODD_NAMES[0]}"
    mine = {
        name: value for name, value in user_environment().items() if not name.startswith("COURSE_")
    }
    # LC_ALL, PYTHONUTF8 and PYTHONIOENCODING here mean ASCII, which cannot name this folder. With
    # PYTHONSAFEPATH Python imports the installed course. PYTHONOPTIMIZE removes docstrings that
    # MLflow reads when it is imported.
    left_out = ("LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONSAFEPATH", "PYTHONOPTIMIZE")
    hostile = {name: value for name, value in (HOSTILE | BORNE).items() if name not in left_out}
    variables = (
        mine
        | hostile
        | {
            "COURSE_CACHE": str(cache),
            "PYTHONPATH": str(folder / "mine"),
            "JUPYTER_PATH": str(other_kernel(folder / "jupyter")),
            "JUPYTER_PREFER_ENV_PATH": "0",
        }
    )
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "helpers",
            "notebook",
            "CustomPythonWrapper",
            "-p",
            "model",
            "tiny-phi3",
            "--output",
            str(output),
        ],
        cwd=checkout,
        env=variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    beside = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in (checkout.name, cache.name, output.name, "jupyter", "mine")
    )
    return Executed(
        "CustomPythonWrapper",
        str(output),
        str(checkout / "build" / "mlflow.db"),
        result.returncode,
        result.stdout,
        result.stderr,
        {"checkout": str(checkout), "beside": beside},
    )


def other_kernel(folder: Path) -> Path:
    """Write a kernel ``python3`` whose Python is gone, and return the folder for JUPYTER_PATH."""
    home = folder / "kernels" / "python3"
    home.mkdir(parents=True)
    (home / "kernel.json").write_text(
        json.dumps(
            {
                "argv": ["/gone/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Other",
                "language": "python",
            }
        ),
        encoding="utf-8",
    )
    return folder


def on_tracking_server(folder: Path, pages: tuple[str, ...] = TRACKS[:1]) -> Executed:
    """Run pages at the same time, solved and with other parameters, on a fresh tracking server with a login.

    The executed page is the first one.
    """
    (folder / "temporary").mkdir()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    with server(
        command, dict(os.environ), folder / "server.log", r"http://127\.0\.0\.1:[1-9]\d*"
    ) as address:
        host = address.removeprefix("http://")
        parameters = OTHER | {"model": "tiny-phi3", "tracking_uri": f"http://ann:ses%40me@{host}"}
        environment = user_environment() | {
            "TMPDIR": str(folder / "temporary"),
            "no_proxy": "127.0.0.1",
        }
        begun = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "helpers",
                    "notebook",
                    page,
                    "--solved",
                    "--output",
                    str(folder),
                    *map(str, _words(parameters)),
                ],
                cwd=ROOT,
                env=environment,
                text=True,
                encoding="utf-8",
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for page in pages
        ]
        said = [process.communicate() for process in begun]
        codes = [process.returncode for process in begun]
    return Executed(
        pages[0],
        str(folder),
        str(folder / "mlflow.db"),
        next(filter(None, codes), 0),
        "".join(out for out, _ in said),
        "".join(err for _, err in said),
        {"host": host},
    )


def by_other_tools(folder: Path) -> Executed:
    """Put parameters into a page with papermill, then execute it with nbmake, as somebody's CI may do.

    nbmake takes no parameters: what papermill does not set comes from the environment.
    """
    checkout = make_checkout(folder / "a course")
    page = checkout / "notebooks" / "TransformerPipeline.ipynb"
    database = folder / "mlflow.db"
    variables = user_environment() | {
        "PYTHONPATH": str(checkout),
        "COURSE_CACHE": str(ROOT / "data" / "models"),
        "COURSE_MODEL": "tiny-phi3",
        "COURSE_TRACKING_URI": f"sqlite:///{database.as_posix()}",
    }
    # The variables of Python itself would stop papermill and pytest, which are not the course's
    # own.
    hostile = {
        name: value for name, value in (HOSTILE | BORNE).items() if not name.startswith("PYTHON")
    }
    prepared = subprocess.run(
        [sys.executable, "-m", "papermill", page, page, "--prepare-only", "-p", "max_tokens", "8"],
        cwd=checkout,
        env=variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--nbmake",
            "--overwrite",
            "-q",
            "-p",
            "no:cacheprovider",
            page,
        ],
        cwd=checkout,
        env=variables | hostile,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Executed(
        "TransformerPipeline",
        str(page.parent),
        str(database),
        prepared.returncode or result.returncode,
        prepared.stdout + result.stdout,
        prepared.stderr + result.stderr,
    )


CARRIERS: dict[str, Callable[[Path], Executed]] = {
    "tracking-server": on_tracking_server,
    "other-tools": by_other_tools,
    "odd-folder": in_odd_folder,
    "project": as_project("ChatModel", "chat_model", model="tiny-phi3", **EXTREME),
    "operations": notebook("Operations", "--solved", track="onnx", model="tiny-phi3"),
    "cloud": as_project("Cloud", "cloud", spark=True, model="tiny-phi3", track="transformers"),
    # make nightly
    "two-on-a-server": functools.partial(on_tracking_server, pages=TRACKS),
    "operations-project": as_project(
        "Operations", "operations", model="tiny-phi3", track="transformers"
    ),
    "cloud-onnx": notebook("Cloud", "--solved", spark=True, track="onnx", model="tiny-phi3"),
    **{
        f"real-{page}": notebook(page, "--solved", model="smollm2-135m", **OTHER)
        for page in (*TRACKS, "ChatModel")
    },
    **{
        f"real-Operations-{track}": notebook(
            "Operations", "--solved", model="smollm2-135m", track=track
        )
        for track in ("transformers", "onnx")
    },
    "real-Cloud": notebook("Cloud", spark=True, model="smollm2-135m", track="onnx"),
}
