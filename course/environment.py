"""Makes ``.venv`` from the pins in pyproject.toml, once: from pip's index, or from the kit that COURSE_KIT names.

Standard library only.

It knows nothing about models or notebooks; ``course.commands`` goes on from here.
"""

import hashlib
import importlib.metadata
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
from helpers.models.kit import COURSE, PLATFORM_NAMES, WHEELS_INDEX, build_command, local_address, open_kit, this_machine
from helpers.paths import BUILD, DATA, ROOT, VENV, VENV_PYTHON

# PyTorch's own index of CPU builds, https://pytorch.org/get-started/locally. On Linux the
# build on PyPI is the CUDA one: 3 GB that a CPU never uses.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Distributions with the same modules, for a GPU.
GPU_BUILDS = {"onnxruntime-genai": ("onnxruntime-genai-cuda", "onnxruntime-genai-directml")}
LOG = BUILD / "setup.log"
STAMP, TESTS_STAMP = VENV / "course.stamp", VENV / "course-tests.stamp"


def pins(tests):
    """Return the course's pinned requirements.

    Parameters
    ----------
    tests : bool
        Whether to add what only the tests need.

    Returns
    -------
    dict of str to str
        Package name to exact version, such as ``{"torch": "2.13.0"}``.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + (project["optional-dependencies"]["dev"] if tests else [])
    return dict(requirement.split("==") for requirement in requirements)


def inside_venv():
    """Tell whether the running Python is the one of ``.venv``."""
    return Path(sys.prefix) == VENV


def differing_packages(tests=False):
    """Compare this interpreter's packages with the pins.

    Returns
    -------
    dict of str to tuple
        Package name to ``(pinned version, installed version or None)``, for those that differ.
    """
    differing = {}
    for name, pinned in pins(tests).items():
        installed = installed_version(name)
        if installed is None or installed.split("+")[0] != pinned:
            differing[name] = (pinned, installed)
    return differing


def installed_version(name):
    """Return the version of a package, or of its build for a GPU that stands in its place; None for neither."""
    for build in (name, *GPU_BUILDS.get(name, ())):
        try:
            return importlib.metadata.version(build)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None


def is_set_up(tests):
    """Tell whether ``.venv`` was finished with these pins, in this folder and by this Python."""
    # What the tests need includes all that the rest needs.
    stamps = [TESTS_STAMP] if tests else [STAMP, TESTS_STAMP]
    return VENV_PYTHON.exists() and any(
        stamp.exists() and stamp.read_text(encoding="utf-8") == _state() for stamp in stamps)


def set_up(tests):
    """Make ``.venv``, or complete it, and do nothing where it is complete.

    Parameters
    ----------
    tests : bool
        Whether to install what only the tests need, too.

    Returns
    -------
    pathlib.Path
        The Python of ``.venv``.

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
        shutil.rmtree(VENV, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(VENV)], "Python could not make a virtual environment.",
             "Install Python's venv module (Debian, Ubuntu: apt install python3-venv) and run this again.")
    course = ["install", "--constraint", "constraints.txt", "--editable", ".[dev]" if tests else "."]
    if kit:
        _pip(*course, *_kit_options(kit), kit=kit)
    else:
        _install_torch()
        _pip(*course)
    (TESTS_STAMP if tests else STAMP).write_text(_state(), encoding="utf-8")
    return VENV_PYTHON


def clean(everything):
    """Remove ``build/``; with ``everything``, the models in ``data/models`` and ``.venv`` too."""
    # `mlflow run` keeps its own records where it is called.
    left = (BUILD, ROOT / "mlruns", ROOT / "mlflow.db")
    installed = (DATA / "models", VENV, *ROOT.glob("*.egg-info"))
    for folder in (*left, *installed) if everything else left:
        if folder.is_file():
            folder.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            raise CourseError(f"{folder.relative_to(ROOT)} could not be removed.",
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


def _install_torch():
    """Install the CPU build of torch, and refuse the CUDA one."""
    requirement = f"torch=={pins(tests=False)['torch']}"
    options = ["--constraint", "constraints.txt", requirement]
    if sys.platform == "linux":
        if reachable(TORCH_CPU_INDEX + "/torch/", requirement.replace("==", "-")):
            options += ["--extra-index-url", TORCH_CPU_INDEX]
        plan = _pip("install", "--dry-run", *options)
        if re.search(r"^Would install.* (nvidia|cuda)[-_]", plan, re.MULTILINE):
            raise cuda_refused(requirement)
    _pip("install", *options)


def cuda_refused(requirement):
    """Return the error for a machine where pip would take the CUDA build of torch."""
    return CourseError(
        f"The only {requirement} that pip finds here is the CUDA build, 3 GB that this course never uses.",
        f"Let pip reach {TORCH_CPU_INDEX}, or put the CPU wheel of your Python version into a folder "
        "and set PIP_FIND_LINKS to it.",
    )


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


def reachable(url, expected):
    """Tell whether ``url`` answers with a page that holds ``expected``. A proxy's own page does not."""
    try:
        with urllib.request.urlopen(url, timeout=10) as page:
            return expected.encode() in page.read()
    except (urllib.error.URLError, OSError, ValueError):
        return False


def _pip(*arguments, kit=None):
    """Run the environment's pip and return what it printed."""
    return _run([str(VENV_PYTHON), "-m", "pip", *arguments, "--disable-pip-version-check"],
                "pip could not install the course's packages.", f"Read the end of {LOG.relative_to(ROOT)}.", kit)


def _run(command, what, fix, kit=None):
    """Run a set-up program, keep its output in the log, show that it is alive. Return the output."""
    output = []
    environment = dict(_kit_environment(kit) if kit else os.environ, PYTHONUTF8="1")
    with LOG.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
        try:
            for line in process.stdout:
                log.write(line)
                output.append(line)
                if sys.stdout.isatty() and line.startswith(("Collecting", "Downloading", "Installing")):
                    print(f"\r{line.strip()[:70]:<70}", end="", flush=True)
            code = process.wait()
        finally:
            process.kill()
    if sys.stdout.isatty():
        print("\r" + " " * 70 + "\r", end="", flush=True)
    text = "".join(output)
    if code:
        raise _explain(text, what, fix, kit)
    return text


def _explain(text, what, fix, kit):
    """Turn a failed program's output into the sentence that helps."""
    if "No space left on device" in text:
        free = shutil.disk_usage(ROOT).free / 1e9
        return CourseError(f"The disk is full: {free:.1f} GB are free, and set-up needs 4 GB.",
                           "Free some space and run this again; what is downloaded stays.")
    missing = re.search(r"No matching distribution found for (\S+)", text)
    lost = re.search(r"Retrying|Connection|getaddrinfo|Read timed out", text)
    if kit:
        # To pip, a wheel that a constraint names and nobody has is a conflict.
        missing = missing or re.search(r"The user requested \(constraint\) (\S+)", text)
        return _explain_kit(kit, missing, lost, text) or CourseError(what, fix)
    if missing or lost or re.search(r"Could not find a version|ResolutionImpossible", text):
        return CourseError(
            f"pip could not get {missing[1] if missing else 'the packages'} from the package index.",
            "Check the network, the proxy (HTTPS_PROXY) and pip's index (python -m pip config list), "
            "and run this again; what is installed stays.")
    return CourseError(what, fix)


def _explain_kit(kit, missing, lost, text):
    """Return the sentence for a set-up that failed with a kit, and None for what is no fault of the kit."""
    changed = re.search(r"DO NOT MATCH THE HASHES.*?^ +(\S+)", text, re.DOTALL | re.MULTILINE)
    if changed or "is invalid." in text:
        return CourseError(
            f"A wheel of the kit {kit.address} is not as it was built: {changed[1] if changed else 'it is cut off'}.",
            "Build or copy the kit again; `python -m helpers kit check` names every such file.")
    if lost:
        return CourseError(f"The kit {kit.address} has stopped answering.",
                           "Check that `kit serve` still runs there and that this machine is in the same network, and "
                           "run this again.")
    python = "{}.{}".format(*sys.version_info[:2])
    system = PLATFORM_NAMES.get((platform.system(), platform.machine()))
    if missing and system in kit.manifest["platforms"] and python in kit.manifest["pythons"]:
        return CourseError(f"The kit has another version of {re.split('[=<>~! ]', missing[1])[0]} than this course.",
                           f"Take the course from the kit, too: {kit.place(COURSE)}.")
    if missing:
        again = build_command(kit, [system] if system else [], [python])
        return CourseError(f"The kit has no wheel of {re.split('[=<>~! ]', missing[1])[0]} for {this_machine()}.",
                           f"Use a Python that it was built for ({', '.join(kit.manifest['pythons'])} on "
                           f"{', '.join(kit.manifest['platforms'])}), or build it with: {again}")
    return None
