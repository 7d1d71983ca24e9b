"""Makes ``.venv`` from the pins in pyproject.toml, once: from pip's index, or from the kit that COURSE_KIT names.

It runs on a bare Python, so it imports the standard library alone.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from helpers.errors import CourseError
from helpers.models.kit import COURSE, PLATFORM_NAMES, WHEELS_INDEX, build_command, local_address, open_kit
from helpers.models.pip import PipError, PipFailure, run_pip
from helpers.paths import BUILD, DATA, ROOT, VENV, VENV_PYTHON
from helpers.requirements import installed_build

# PyTorch's own index of CPU builds, https://pytorch.org/get-started/locally. On Linux the
# build on PyPI is the CUDA one: 3 GB that a CPU never uses.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOG = BUILD / "setup.log"
STAMP, TESTS_STAMP = VENV / "course.stamp", VENV / "course-tests.stamp"


def pins(tests: bool) -> dict[str, str]:
    """Return the exact version of each package of the course; with ``tests``, also of what only the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + (project["optional-dependencies"]["dev"] if tests else [])
    return dict(requirement.split("==") for requirement in requirements)


def inside_venv() -> bool:
    """Tell whether the running Python is the one of ``.venv``."""
    return Path(sys.prefix) == VENV


def differing_packages(tests: bool = False) -> dict[str, tuple[str, str | None]]:
    """Return the pinned and the installed version, None for none, of each package that differs from its pin."""
    installed = {name: installed_build(name)[1] for name in pins(tests)}
    return {name: (pinned, installed[name]) for name, pinned in pins(tests).items()
            if (installed[name] or "").split("+")[0] != pinned}


def is_set_up(tests: bool) -> bool:
    """Tell whether ``.venv`` was finished with these pins, in this folder and by this Python."""
    # What the tests need includes all that the rest needs.
    stamps = [TESTS_STAMP] if tests else [STAMP, TESTS_STAMP]
    return VENV_PYTHON.exists() and any(
        stamp.exists() and stamp.read_text(encoding="utf-8") == _state() for stamp in stamps)


def set_up(tests: bool) -> Path:
    """Make ``.venv``, or complete it, and do nothing where it is complete. Return its Python.

    Raises
    ------
    CourseError
        No package index, no space, no venv module, or a CUDA build of torch as the only one; a kit that has no
        answer or lacks a wheel.
    """
    if is_set_up(tests):
        return VENV_PYTHON
    kit = open_kit()
    BUILD.mkdir(exist_ok=True)
    LOG.write_text("", encoding="utf-8")
    print(f"Setting up .venv, once; a few minutes. Details: {LOG.relative_to(ROOT)}", flush=True)
    if not _venv_works():
        _make_venv()
    course = ["install", "--constraint", "constraints.txt", "--editable", ".[dev]" if tests else "."]
    if kit:
        _pip(kit, *course, *_kit_options(kit))
    else:
        _install_torch()
        _pip(None, *course)
    (TESTS_STAMP if tests else STAMP).write_text(_state(), encoding="utf-8")
    return VENV_PYTHON


def clean(everything: bool) -> int:
    """Remove ``build/``; with ``everything``, the models in ``data/models`` and ``.venv`` too. Return the exit code."""
    # `mlflow run` keeps its own records where it is called.
    left = (BUILD, ROOT / "mlruns", ROOT / "mlflow.db")
    installed = (DATA / "models", VENV, *ROOT.glob("*.egg-info"))
    for folder in (*left, *installed) if everything else left:
        if folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise CourseError("in-use", f"{folder.relative_to(ROOT)} could not be removed.",
                              "Close what still uses it (JupyterLab, the MLflow UI) and run this again.")
    return 0


def _state():
    """Return a digest of all that a finished set-up depends on."""
    parts = [(ROOT / "pyproject.toml").read_bytes(), (ROOT / "constraints.txt").read_bytes(),
             str(ROOT).encode(), sys.version.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _venv_works():
    """Tell whether ``.venv`` has a Python of this version: one that was moved or upgraded has not."""
    if not VENV_PYTHON.exists():
        return False
    asked = [str(VENV_PYTHON), "-c", "import sys, pip; print(sys.version, sys.prefix)"]
    answer = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", errors="replace")
    return answer.stdout.strip() == f"{sys.version} {VENV}"


def _make_venv():
    shutil.rmtree(VENV, ignore_errors=True)
    with LOG.open("a", encoding="utf-8") as log:
        made = subprocess.run([sys.executable, "-m", "venv", str(VENV)], stdout=log, stderr=subprocess.STDOUT)
    if made.returncode:
        raise CourseError(
            "venv-failed", "Python could not make a virtual environment.",
            "Install Python's venv module (Debian, Ubuntu: apt install python3-venv) and run this again.")


def _install_torch():
    """Install the CPU build of torch, and refuse the CUDA one."""
    requirement = f"torch=={pins(tests=False)['torch']}"
    options = ["--constraint", "constraints.txt", requirement]
    if sys.platform == "linux":
        options += torch_index_options(requirement)
        plan = _pip(None, "install", "--dry-run", *options)
        if re.search(r"^Would install.* (nvidia|cuda)[-_]", plan, re.MULTILINE):
            raise cuda_refused(requirement)
    _pip(None, "install", *options)


def torch_index_options(requirement: str) -> list[str]:
    """Return the options that make pip look into PyTorch's own index, where that one has the ``requirement``."""
    if reachable(TORCH_CPU_INDEX + "/torch/", requirement.replace("==", "-")):
        return ["--extra-index-url", TORCH_CPU_INDEX]
    return []


def reachable(url: str, expected: str) -> bool:
    """Tell whether ``url`` answers with a page that holds ``expected``. A proxy's own page does not."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return expected.encode() in page.read()
    except (urllib.error.URLError, OSError, ValueError):
        return False


def cuda_refused(requirement: str) -> CourseError:
    """Return the error for a machine where pip would take the CUDA build of torch."""
    return CourseError(
        "cuda-build",
        f"The only {requirement} that pip finds here is the CUDA build, 3 GB that this course never uses.",
        f"Let pip reach {TORCH_CPU_INDEX}, or put the CPU wheel of your Python version into a folder "
        "and set PIP_FIND_LINKS to it.")


def _kit_options(kit):
    """Return the options that make pip take everything from a kit, the build backend of the course too."""
    # A page of links with hashes, from a folder as well: pip then checks what a stick has, too.
    options = ["--no-index", "--find-links", kit.place(WHEELS_INDEX)]
    if kit.address.startswith("http://"):
        options += ["--trusted-host", urlsplit(kit.address).netloc]
    return options


def _kit_environment(kit):
    """Return an environment in which pip knows no other index, and no proxy on the way to a kit in the room."""
    environment = {name: value for name, value in os.environ.items()
                   if not name.upper().startswith("PIP_") or name.upper() in ("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR")}
    environment["PIP_CONFIG_FILE"] = os.devnull  # the one value that makes pip read no configuration file
    if kit.is_url and local_address(kit.address):
        for name in ("no_proxy", "NO_PROXY"):
            environment[name] = ",".join(filter(None, [os.environ.get(name), urlsplit(kit.address).hostname]))
    return environment


def _pip(kit, *arguments):
    """Run the environment's pip, keep its output in the log, show that it is alive. Return the output."""
    with LOG.open("a", encoding="utf-8") as log:

        def on_output(text):
            log.write(text)
            lines = re.findall(r"^(?:Collecting|Downloading|Installing).*", text, re.MULTILINE)
            if lines and sys.stdout.isatty():
                print(f"\r{lines[-1].strip()[:70]:<70}", end="", flush=True)

        try:
            return run_pip(*arguments, python=str(VENV_PYTHON), on_output=on_output,
                           environment=_kit_environment(kit) if kit else None)
        except PipError as error:
            raise explain(error.failure, kit) from None
        finally:
            if sys.stdout.isatty():
                print("\r" + " " * 70 + "\r", end="", flush=True)


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
        return _explain_missing_wheel(package, kit)
    if not kit and failure.kind in ("missing", "unreachable", "conflict", "certificate"):
        return CourseError(
            "pip-unreachable", f"pip could not get {failure.package or 'the packages'} from the package index.",
            "Check the network, the proxy (HTTPS_PROXY) and pip's index (python -m pip config list), "
            "and run this again; what is installed stays.")
    return CourseError("pip-failed", "pip could not install the course's packages.",
                       f"Read the end of {LOG.relative_to(ROOT)}.")


def _explain_missing_wheel(package, kit):
    """Return the error for a wheel that a kit lacks: for this machine, or in the version of this course."""
    python = "{}.{}".format(*sys.version_info[:2])
    system = PLATFORM_NAMES.get((platform.system(), platform.machine()))
    built = kit.manifest
    if system in built["platforms"] and python in built["pythons"]:
        return CourseError("kit-other-version", f"The kit has another version of {package} than this course.",
                           f"Take the course from the kit, too: {kit.place(COURSE)}.")
    again = build_command(kit, [system] if system else [], [python])
    machine = f"Python {python} on {platform.system()} {platform.machine()}"
    return CourseError("kit-lacks-wheel", f"The kit has no wheel of {package} for {machine}.",
                       f"Use a Python that it was built for ({', '.join(built['pythons'])} on "
                       f"{', '.join(built['platforms'])}), or build it with: {again}.")
