"""Installs the course's packages into ``.venv``: pip gets uv and, on Linux, torch's CPU build; uv installs the rest.

This runs before any package is installed: it imports the standard library and modules that do the
same.
"""

import json
import os
import platform
import re
import shutil
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from course import uv_settings
from helpers.errors import CourseError
from helpers.models.kit import (
    CONNECTION_ERRORS,
    COURSE,
    PLATFORM_NAMES,
    WHEELS_INDEX,
    Kit,
    local_address,
)
from helpers.models.pip import PipError, run_pip, users_options
from helpers.models.steps import run_program
from helpers.paths import BUILD, ROOT, VENV_PYTHON

# PyTorch's own index of CPU builds, https://pytorch.org/get-started/locally. On Linux the
# build on PyPI is the CUDA one: 3 GB that a CPU never uses.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOG = BUILD / "setup.log"
CONSTRAINTS = ROOT / "constraints.txt"


def install(project: str, pins: dict[str, str], kit: Kit | None) -> None:
    """Install a project, such as ``.[dev]``, and its dependencies into ``.venv``, in the versions of constraints.txt.

    Raises CourseError: no package index, no space, or only a CUDA build of torch; a kit that does
    not answer any more, lacks a wheel, or has one that was changed.
    """
    pip = partial(_pip, kit=kit)
    _, version = run_program([VENV_PYTHON, "-m", "uv", "--version"], dict(os.environ), log)
    if version.split()[:2] != ["uv", pins["uv"]]:
        _print_step("Getting uv")
        # "--ignore-installed" overwrites what an interrupted pip left.
        pip("install", "--no-deps", "--ignore-installed", f"uv=={pins['uv']}")
    torch = _fetch_cpu_torch(pip, pins["torch"]) if kit is None and sys.platform == "linux" else []
    _print_step("Installing the course's packages")
    uv_install(VENV_PYTHON, "--editable", project, *torch, kit=kit)
    shutil.rmtree(BUILD / "torch", ignore_errors=True)


def uv_install(python: Path | str, *arguments: str | Path, kit: Kit | None = None) -> None:
    """Run ``uv pip install`` for a Python, with the versions of constraints.txt. Raises CourseError as ``install``."""
    if kit is None:
        try:
            pip = users_options("install", str(python), dict(os.environ))
        except PipError as error:
            raise to_error("pip", error.output) from None
        variables, options = uv_settings.like_pip(pip, dict(os.environ))
        options += ["--constraint", CONSTRAINTS]
    else:
        constraints = BUILD / "kit-constraints.txt"
        constraints.write_text(
            uv_settings.kit_constraints(kit, CONSTRAINTS.read_text(encoding="utf-8")),
            encoding="utf-8",
        )
        variables, options = uv_settings.from_kit(kit, constraints, dict(os.environ))
    command = [
        python,
        "-m",
        "uv",
        "pip",
        "install",
        "--python",
        python,
        "--color",
        "never",
        "--no-progress",
        *options,
        *arguments,
    ]
    code, output = run_program(command, variables, _log_and_show)
    if code:
        raise to_error("uv", output, kit)


# --- torch ------------------------------------------------------------------------------------


def _fetch_cpu_torch(pip, version):
    """Download torch's CPU build with pip; return a list with its wheel, empty if torch is installed already."""
    _print_step("Getting torch")
    folder = BUILD / "torch"
    plan = BUILD / "torch.json"
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted pip may have left half a file
    options = cpu_torch_options(pip, plan, "--constraint", str(CONSTRAINTS), f"torch=={version}")
    if json.loads(plan.read_text(encoding="utf-8"))["install"]:
        pip("download", "--no-deps", "--dest", str(folder), *options)
    return list(folder.glob("*.whl"))


def cpu_torch_options(pip: Callable[..., object], plan: Path, *options: str) -> list[str]:
    """Return pip's options for torch's CPU build on Linux, with PyTorch's own index if that has the version.

    The last of ``options`` is ``torch==VERSION``. ``pip`` runs pip, which writes what it would
    install to the file ``plan``. Raises CourseError if that is the CUDA build.
    """
    try:
        with urllib.request.urlopen(TORCH_CPU_INDEX + "/torch/", timeout=10) as page:
            # It may be a proxy's page: use the index only if the page lists the version.
            if options[-1].replace("==", "-").encode() in page.read():
                options = ("--extra-index-url", TORCH_CPU_INDEX, *options)
    except CONNECTION_ERRORS:
        pass  # pip then asks only the user's index
    pip("install", "--dry-run", "--no-deps", "--report", str(plan), *options)
    for chosen in json.loads(plan.read_text(encoding="utf-8"))["install"]:
        if any(
            re.match("(nvidia|cuda)[-_]", needed)
            for needed in chosen["metadata"].get("requires_dist", [])
        ):
            raise CourseError(
                "cuda-build",
                f"The only {options[-1]} that pip finds here is the CUDA build, 3 GB that this course never uses.",
                f"Let pip reach {TORCH_CPU_INDEX}, or put the CPU wheel of your Python version into a folder "
                "and set PIP_FIND_LINKS to it.",
            )
    return list(options)


# --- pip --------------------------------------------------------------------------------------


def _pip(*arguments, kit):
    """Run the pip of ``.venv``; raise CourseError where it fails."""
    try:
        run_pip(
            *arguments,
            python=str(VENV_PYTHON),
            on_output=_log_and_show,
            environment=pip_environment(kit),
        )
    except PipError as error:
        raise to_error("pip", error.output, kit) from None


def pip_environment(kit: Kit | None) -> dict[str, str] | None:
    """Return an environment in which pip takes packages only from the kit; without a kit None: this process's own."""
    if kit is None:
        return None
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("PIP_")
        or name.upper() in ("PIP_CACHE_DIR", "PIP_NO_CACHE_DIR")
    }
    # pip checks the hashes in the kit's page of links. It splits this variable at spaces, so a folder
    # has to be a URI.
    links = kit.place(WHEELS_INDEX) if kit.is_url else Path(kit.place(WHEELS_INDEX)).as_uri()
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": links}
    if kit.address.startswith("http://"):
        environment["PIP_TRUSTED_HOST"] = urlsplit(kit.address).netloc
    if kit.is_url and local_address(kit.address):
        environment |= {"NO_PROXY": "*", "no_proxy": "*"}
    return environment


# --- what is shown ----------------------------------------------------------------------------


def log(text: str) -> None:
    """Append a program's output to set-up's log."""
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a", encoding="utf-8") as file:
        file.write(text)


def _print_step(title):
    """Print a line for a step that takes seconds."""
    print(f"{title} ...", flush=True)


def _log_and_show(text):
    """Log the output of pip or uv, and show the current package in a terminal."""
    log(text)
    lines = re.findall(
        r"^ *((?:Collecting|Downloading|Building|Prepared|Installing|Installed) .*)",
        text,
        re.MULTILINE,
    )
    if lines and sys.stdout.isatty():
        print(f"\r{lines[-1].strip()[:70]:<70}", end="\r", flush=True)


def to_error(program: str, output: str, kit: Kit | None = None) -> CourseError:
    """Return the error for a failed pip or uv: its own message, and what to do."""
    details = f"Details: {LOG.relative_to(ROOT)}."
    message = final_error(output)
    if re.search(r"No space left on device|os error (28|112)\b", output):
        return CourseError(
            "disk-full",
            f"The disk is full: {shutil.disk_usage(ROOT).free / 1e9:.1f} GB are free, and "
            "set-up needs 4 GB.",
            "Free some space and run this again; what is downloaded stays.",
        )
    if kit is None:
        # pip and uv do not name a variable such as PIP_NO_INDEX or UV_OFFLINE that stopped them.
        variables = sorted(name for name in os.environ if name.upper().startswith(("PIP_", "UV_")))
        settings = [*variables, "python -m pip config list"]
        return CourseError(
            "install-failed",
            f"{program} could not install the course's packages: {message}",
            f"Check the network, the proxy (HTTPS_PROXY) and pip's settings ({', '.join(settings)}), "
            f"and run this again; what is downloaded stays. {details}",
        )
    if re.search(
        "(?i)hash mismatch|do not match the hashes|invalid package format| is invalid", output
    ):
        return CourseError(
            "kit-changed",
            f"A wheel of the kit {kit.address} is not as it was built: {message}",
            "Build or copy the kit again; `python -m helpers kit check` names every such file.",
        )
    try:
        with kit.open(WHEELS_INDEX) as page:
            page.read()
    except CONNECTION_ERRORS:
        return CourseError(
            "kit-gone",
            f"The kit {kit.address} does not answer any more.",
            "Check that `kit serve` still runs there and that this machine is in the same network, and run this again.",
        )
    if re.search("No solution found|No matching distribution found|ResolutionImpossible", output):
        return _missing_wheel_error(message, kit)
    return CourseError(
        "install-failed",
        f"{program} could not install the course's packages from the kit: {message}",
        f"Run this again; if it stays, report it with the log. {details}",
    )


def final_error(output: str) -> str:
    """Return the last error message of pip or uv as one sentence without colours."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", output).split("\n")
    lines = [line.strip().removeprefix("cause: ") for line in lines if line.strip()] or [
        "It printed nothing"
    ]
    last = max(
        (number for number, line in enumerate(lines) if line.lower().startswith("error: ")),
        default=-1,
    )
    return (
        re.sub("(?i)^error: ", "", ". ".join(line.rstrip(".") for line in lines[last:][:8])) + "."
    )


def _missing_wheel_error(message, kit):
    """Return the error for a wheel that a kit lacks."""
    python = "{}.{}".format(*sys.version_info[:2])
    machine = platform.system(), platform.machine()
    system = PLATFORM_NAMES.get(machine)
    target = f"--python {python}" + (f" --platform {system}" if system else "")
    return CourseError(
        "kit-lacks-wheel",
        f"The kit lacks wheels for this course on Python {python}, {' '.join(machine)}: {message}",
        f"Take the course from the kit, too ({kit.place(COURSE)}), use a Python that the kit's page "
        f"names, or build the kit with {target}.",
    )
