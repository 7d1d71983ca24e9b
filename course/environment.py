"""Makes ``.venv`` from the pins in pyproject.toml, once: from pip's index, or from the kit that COURSE_KIT names.

It runs on a bare Python, so it imports the standard library alone.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from helpers.errors import CourseError
from helpers.models.kit import COURSE, PLATFORM_NAMES, WHEELS_INDEX, build_command, local_address, open_kit
from helpers.models.pip import PipError, PipFailure, run_pip
from helpers.models.steps import run_program
from helpers.paths import BUILD, DATA, ROOT, VENV, VENV_PYTHON
from helpers.requirements import installed_build

# PyTorch's own index of CPU builds, https://pytorch.org/get-started/locally. On Linux the
# build on PyPI is the CUDA one: 3 GB that a CPU never uses.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOG = BUILD / "setup.log"
STAMP, TESTS_STAMP = VENV / "course.stamp", VENV / "course-tests.stamp"


def project() -> dict:
    """Return the table ``project`` of pyproject.toml: the course's version, its dependencies."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(tests: bool) -> dict[str, str]:
    """Return the exact version of each package of the course; with ``tests``, also of what only the tests need."""
    course = project()
    requirements = course["dependencies"] + (course["optional-dependencies"]["dev"] if tests else [])
    return dict(requirement.partition(";")[0].split("==") for requirement in requirements)


def install_extra(name: str, folder: Path) -> Path:
    """Install an extra at the course's versions into a folder of its own, and return that; uv has to be there."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", folder, "--constraint",
               ROOT / "constraints.txt", *project()["optional-dependencies"][name]]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        raise CourseError("extra-failed", f"The extra {name} cannot be installed: {installed.stderr.strip()}",
                          "Look whether the package index can be reached.")
    return folder


def inside_venv() -> bool:
    """Tell whether the running Python is the one of ``.venv``."""
    return VENV.exists() and VENV.samefile(sys.prefix)  # by whatever link or spelling somebody came here


def differing_packages(tests: bool = False) -> dict[str, tuple[str, str | None]]:
    """Return the pinned and the installed version, None for none, of each package that differs from its pin."""
    found = {name: (pinned, installed_build(name)[1]) for name, pinned in pins(tests).items()}
    return {name: pair for name, pair in found.items() if (pair[1] or "").split("+")[0] != pair[0]}


def is_set_up(tests: bool) -> bool:
    """Tell whether ``.venv`` was finished with these pins, in this folder and by this Python."""
    stamps = [TESTS_STAMP] if tests else [STAMP, TESTS_STAMP]  # what the tests need includes all that the rest needs
    return VENV_PYTHON.exists() and _state() in [path.read_text(encoding="utf-8") for path in stamps if path.exists()]


def set_up(tests: bool) -> Path:
    """Make ``.venv``, or complete it, and do nothing where it is complete. Return its Python.

    Raises CourseError: no package index, no space, no venv module, or a CUDA build of torch as the only one; a kit
    that has no answer or lacks a wheel.
    """
    if is_set_up(tests):
        return VENV_PYTHON
    kit = open_kit()
    BUILD.mkdir(exist_ok=True)
    LOG.write_text("", encoding="utf-8")
    print(f"Setting up .venv, once; a few minutes. Details: {LOG.relative_to(ROOT)}", flush=True)
    _make_venv()
    if kit is None:
        torch = ["--constraint", "constraints.txt", f"torch=={pins(tests)['torch']}"]
        if sys.platform == "linux":
            torch = cpu_torch_options(_pip, BUILD / "torch.json", *torch)
        _pip("install", *torch)
    _pip("install", "--constraint", "constraints.txt", "--editable", ".[dev]" if tests else ".", kit=kit)
    (TESTS_STAMP if tests else STAMP).write_text(_state(), encoding="utf-8")
    return VENV_PYTHON


def clean(everything: bool) -> int:
    """Remove ``build/``; with ``everything``, the models in ``data/models`` and ``.venv`` too. Return the exit code."""
    # `mlflow run` keeps its own records where it is called.
    left = [BUILD, ROOT / "mlruns", ROOT / "mlflow.db"]
    for path in [*left, DATA / "models", VENV, *ROOT.glob("*.egg-info")] if everything else left:
        shutil.rmtree(path, ignore_errors=True)
        if path.is_file():
            path.unlink()
        if path.exists():
            raise CourseError("in-use", f"{path.relative_to(ROOT)} could not be removed.",
                              "Close what still uses it (JupyterLab, the MLflow UI) and run this again.")
    return 0


def _state():
    """Return a digest of all that a finished set-up depends on. pyproject.toml names the course's own packages, too."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join([*parts, str(ROOT).encode(), sys.version.encode()])).hexdigest()


def _make_venv():
    """Make ``.venv``, unless it has a Python of this version: one that was moved or upgraded has not."""
    asked = [VENV_PYTHON, "-c", "import sys, pip; print(sys.version, sys.prefix)"]
    if VENV_PYTHON.exists() and run_program(asked, dict(os.environ), _log)[1].strip() == f"{sys.version} {VENV}":
        return
    if os.pathsep in str(ROOT):
        raise CourseError("folder-name", f"Python makes no virtual environment in {ROOT}: its name has a {os.pathsep}.",
                          "Rename that folder, and run this again.")
    shutil.rmtree(VENV, ignore_errors=True)
    if run_program([sys.executable, "-m", "venv", VENV], dict(os.environ), _log)[0]:
        raise CourseError("venv-failed", "Python could not make a virtual environment.",
                          "Install Python's venv module (Debian, Ubuntu: apt install python3-venv) and run this again.")


def cpu_torch_options(pip: Callable[..., str], plan: Path, *options: str) -> list[str]:
    """Return the ``options`` and more, with which ``pip`` takes the CPU build of torch on Linux.

    The last of ``options`` is torch and its version; ``plan`` is a file to write to. Raises CourseError where pip
    would take the CUDA build.
    """
    try:
        with urllib.request.urlopen(TORCH_CPU_INDEX + "/torch/", timeout=10) as page:  # or a proxy's own page
            if options[-1].replace("==", "-").encode() in page.read():
                options = ("--extra-index-url", TORCH_CPU_INDEX, *options)
    except (OSError, ValueError):
        pass  # pip asks its own index alone
    pip("install", "--dry-run", "--no-deps", "--report", str(plan), *options)
    for chosen in json.loads(plan.read_text(encoding="utf-8"))["install"]:
        if any(re.match("(nvidia|cuda)[-_]", needed) for needed in chosen["metadata"].get("requires_dist", [])):
            raise CourseError(
                "cuda-build",
                f"The only {options[-1]} that pip finds here is the CUDA build, 3 GB that this course never uses.",
                f"Let pip reach {TORCH_CPU_INDEX}, or put the CPU wheel of your Python version into a folder "
                "and set PIP_FIND_LINKS to it.")
    return list(options)


def _log(text):
    with LOG.open("a", encoding="utf-8") as log:
        log.write(text)


def _pip(*arguments, kit=None):
    """Run the environment's pip, keep its output in the log, show that it is alive. Return the output."""

    def on_output(text):
        _log(text)
        for line in re.findall(r"^(?:Collecting|Downloading|Installing).*", text, re.MULTILINE)[-1:]:
            show(line.strip())

    def show(line):
        if sys.stdout.isatty():
            print(f"\r{line[:70]:<70}", end="\r", flush=True)

    try:
        return run_pip(*arguments, python=str(VENV_PYTHON), on_output=on_output, environment=_environment(kit))
    except PipError as error:
        raise explain(error.failure, kit) from None
    finally:
        show("")


def _environment(kit):
    """Return an environment in which pip asks a kit and nobody else; None, which is this one, without a kit."""
    if kit is None:
        return None
    environment = {name: value for name, value in os.environ.items()
                   if not name.upper().startswith("PIP_") or name.upper() in ("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR")}
    # A page of links with hashes, from a folder as well: pip then checks what a stick has, too. It splits at spaces.
    links = kit.place(WHEELS_INDEX) if kit.is_url else Path(kit.place(WHEELS_INDEX)).as_uri()
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": links}
    if kit.address.startswith("http://"):
        environment["PIP_TRUSTED_HOST"] = urlsplit(kit.address).netloc
    if kit.is_url and local_address(kit.address):
        environment |= {"NO_PROXY": "*", "no_proxy": "*"}
    return environment


def explain(failure: PipFailure, kit=None) -> CourseError:
    """Return the error for a set-up in which pip failed, with a kit or without."""
    package = re.split("[=<>~! ]", failure.package)[0]
    if failure.kind == "disk-full":
        return CourseError("disk-full", f"The disk is full: {shutil.disk_usage(ROOT).free / 1e9:.1f} GB are free, and "
                           "set-up needs 4 GB.", "Free some space and run this again; what is downloaded stays.")
    if kit and failure.kind == "changed":
        return CourseError(
            "kit-changed",
            f"A wheel of the kit {kit.address} is not as it was built: {failure.package or 'it is cut off'}.",
            "Build or copy the kit again; `python -m helpers kit check` names every such file.")
    if kit and failure.kind == "unreachable":
        return CourseError(
            "kit-gone", f"The kit {kit.address} has stopped answering.",
            "Check that `kit serve` still runs there and that this machine is in the same network, and run this again.")
    if kit and package and failure.kind in ("missing", "conflict"):
        return _lacking(package, kit)
    if not kit and failure.kind in ("missing", "unreachable", "conflict", "certificate"):
        return CourseError(
            "pip-unreachable", f"pip could not get {failure.package or 'the packages'} from the package index.",
            "Check the network, the proxy (HTTPS_PROXY) and pip's index (python -m pip config list), "
            "and run this again; what is installed stays.")
    return CourseError("pip-failed", "pip could not install the course's packages.",
                       f"Read the end of {LOG.relative_to(ROOT)}.")


def _lacking(package, kit):
    """Return the error for a wheel that a kit lacks: for this machine, or in the version of this course."""
    python = "{}.{}".format(*sys.version_info[:2])
    system = PLATFORM_NAMES.get((platform.system(), platform.machine()))
    platforms, pythons = kit.manifest["platforms"], kit.manifest["pythons"]
    if system in platforms and python in pythons:
        return CourseError("kit-other-version", f"The kit has another version of {package} than this course.",
                           f"Take the course from the kit, too: {kit.place(COURSE)}.")
    again = build_command(kit, [system] if system else [], [python])
    machine = f"Python {python} on {platform.system()} {platform.machine()}"
    return CourseError("kit-lacks-wheel", f"The kit has no wheel of {package} for {machine}.",
                       f"Use a Python that it was built for ({', '.join(pythons)} on {', '.join(platforms)}), "
                       f"or build it with: {again}.")
