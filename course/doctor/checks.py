"""Checks what this machine can run, and prints a line for each check, with the fix below it.

The doctor prepares tiny-phi3 to try both tracks on it, and changes nothing else. Before set-up it
runs on the standard library alone, and does the checks that need no more.
"""

import csv
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import webbrowser
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from course.doctor.network import check_network
from course.doctor.result import Result, fail, ok, warn
from course.doctor.smoke import check_tracks
from course.environment import differing_packages, is_set_up, pins, project
from helpers.files import is_writable
from helpers.models.catalogue import find_entry, read_catalogue
from helpers.models.space import existing, free_disk, free_memory
from helpers.paths import BUILD, ROOT, model_cache

# Megabytes (10**6 bytes): what set-up takes, and what a run writes beside its copies of the model.
SETUP_MEGABYTES = 4000
PAGES_MEGABYTES = 100
# A run logs track A's folder once and track B's twice: this times what the model has on disk.
COPIES = 1.3


def doctor() -> int:
    """Check the machine, print a line for each check, and return the exit code: 1 if a check failed."""
    print(_version(), flush=True)
    levels = Counter()
    for level, line, fix in _run_checks():
        levels[level] += 1
        print(f"{level:<4}  {line}", flush=True)
        if fix:
            print(f"      {fix}", flush=True)
    failed = levels["FAIL"]
    warnings = f"{levels['WARN']} warning{'' if levels['WARN'] == 1 else 's'}"
    summary = f"{failed} of {levels.total()} checks failed" if failed else "Fit: no check failed"
    print(f"{summary}, {warnings}.")
    print("Read this before you paste it anywhere: it names folders and addresses of this machine.")
    return int(failed > 0)


def _version():
    """Return the course's version and, in a git checkout, its commit."""
    version = f"The course {project()['version']}"
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return version
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return f"{version}, commit {described.stdout.strip()}" if described.stdout else version


def _run_checks() -> Iterator[Result]:
    differing = differing_packages()
    missing = list(_missing_files())
    installed = not missing and all(version for _, version in differing.values())

    yield check_platform(sysconfig.get_platform(), platform.machine(), sys.maxsize)
    yield from check_packages(differing, missing)
    yield check_cores()
    yield check_writable(BUILD)
    yield check_disk(installed)
    if installed:
        yield check_memory()
        yield from check_models()
    yield check_port(8888, "JupyterLab", "JupyterLab takes the next free port by itself.")
    yield check_port(
        5000, "the MLflow UI", "Choose another port: python -m helpers ui --port 5001."
    )
    yield check_java()
    yield check_browser()
    if installed:
        yield from check_tracks()
    yield from check_network(installed)


# --- Python and its packages ------------------------------------------------------------------


def check_platform(built_for: str, processor: str, largest: int) -> Result:
    """Check that torch has builds for this Python.

    The arguments are ``sysconfig.get_platform()``, ``platform.machine()`` and ``sys.maxsize``.
    """
    line = f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {built_for}"
    if largest <= 2**32:
        return fail(
            f"{line}: a 32-bit Python",
            "Install the 64-bit Python: the packages have no other builds.",
        )
    if built_for == "win-arm64":
        return warn(
            f"{line}: torch has no build for it",
            "Install Python for x64: Windows on ARM runs it, too.",
        )
    if built_for.startswith("macosx") and processor == "x86_64":
        return warn(
            f"{line}: torch has no build for a Mac with Intel's processor",
            "On a Mac with Apple's processor, install a Python for arm64; otherwise, use another machine.",
        )
    return ok(line)


def check_packages(
    differing: dict[str, tuple[str, str | None]], missing: list[tuple[str, str]]
) -> Iterator[Result]:
    """Check that the pinned packages are installed, with all their files.

    ``differing`` is what ``differing_packages`` returns, ``missing`` has the package and the name
    of each installed file that is gone.
    """
    # Set-up does nothing in an environment that it has finished.
    fix = f"{'Delete .venv and run' if is_set_up() else 'Run'}: python -m helpers setup"
    if sum(installed is None for _, installed in differing.values()) > len(pins()) / 2:
        yield fail("the course's packages are not installed", fix)
        return
    for name, (pinned, installed) in differing.items():
        yield fail(f"{name} is {installed or 'not installed'}, and {pinned} is pinned", fix)
    for name in dict(missing):
        files = [file for package, file in missing if package == name]
        yield fail(
            f"{name} lacks {len(files)} of its files, such as {files[0]}",
            f"If an antivirus program removed them, exclude .venv from its scans. {fix}",
        )
    if not differing and not missing:
        yield ok("all packages are as pinned, and complete")


def _missing_files():
    """Yield the package and the name of each file that pip or uv installed and that is gone."""
    for package in importlib.metadata.distributions():
        # conda's own packages list files that conda leaves out.
        if (package.read_text("INSTALLER") or "").strip() in ("pip", "uv"):
            for file, *_ in csv.reader((package.read_text("RECORD") or "").splitlines()):
                if not file.endswith(".pyc") and not Path(package.locate_file(file)).exists():
                    yield package.metadata["Name"], file


# --- the machine ------------------------------------------------------------------------------


def check_cores() -> Result:
    """Check that this process may use more than one core."""
    # A container or a batch system may give a process fewer cores than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores == 1:
        return warn("1 core", "The course runs, at less than half the speed.")
    return ok(f"{cores} cores")


def check_writable(folder: Path) -> Result:
    """Check that the course can write to ``folder``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = is_writable(folder)
    except OSError:
        writable = False
    if not writable:
        return fail(
            "the course's folder cannot be written", "Move the course to a folder that is yours."
        )
    return ok("the course's folder can be written")


def check_disk(installed: bool) -> Result:
    """Check the free disk space for a run or, before the packages are installed, for set-up."""
    needed = PAGES_MEGABYTES if installed else SETUP_MEGABYTES
    free = free_disk(ROOT)
    line = f"{free:,.0f} MB are free on the disk of the course's folder"
    if free < needed:
        user = "a run" if installed else "set-up"
        return fail(f"{line}, and {user} needs {needed:,} MB", "Free some space.")
    return ok(line)


def check_memory() -> Result:
    """Check that the smallest model fits into the free memory."""
    import psutil

    needed = min(entry.memory for entry in read_catalogue().values())
    free = free_memory()
    line = f"{free:,.0f} MB of memory are free, of {psutil.virtual_memory().total / 1e6:,.0f} MB"
    if free < needed:
        return fail(
            f"{line}, and the smallest model needs {needed:,} MB",
            "Close programs, or give the container more memory.",
        )
    return ok(line)


def check_port(port: int, program: str, fix: str) -> Result:
    """Check that nothing listens on the port of a program."""
    if port_is_taken(port):
        return warn(f"port {port} is taken, and {program} starts on it", fix)
    return ok(f"port {port} is free for {program}")


def port_is_taken(port: int) -> bool:
    """Tell whether a program listens on this machine's ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_java() -> Result:
    """Check for a Java that Spark runs on, where Spark looks for it: in JAVA_HOME, then on the PATH."""
    fix = "For the section on Spark alone: install Java 17, from https://adoptium.net or your system's packages."
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=Path(home, "bin") if home else None)
    if home and not java:
        return warn(
            "JAVA_HOME is set, and there is no Java in it",
            f"Correct JAVA_HOME or unset it. {fix}",
        )
    if not java:
        return warn("there is no Java", fix)
    said = subprocess.run([java, "-version"], capture_output=True, text=True, errors="replace")
    version = re.search(r'version "((?:1\.)?(\d+)[^"]*)"', said.stderr + said.stdout)
    if version is None:  # a Mac has a `java` that only says where to get one
        return warn("there is no Java", fix)
    if int(version[2]) < 17:
        return warn(f"Java is {version[1]}", fix)
    return ok(f"Java {version[1]}")


def check_browser() -> Result:
    """Check for a browser that JupyterLab can open."""
    try:
        webbrowser.get()
    except webbrowser.Error:
        return warn(
            "JupyterLab finds no browser to open",
            "Open the address that it prints in a browser, on this machine or through a tunnel.",
        )
    return ok("JupyterLab finds a browser to open")


# --- models -----------------------------------------------------------------------------------


def check_models() -> Iterator[Result]:
    """Check each model of the catalogue and each other one in the cache: its files, memory and disk."""
    from helpers.models.prepare import cache_state, cached_models

    entries = read_catalogue()
    memory = free_memory()
    try:
        states = {name: cache_state(name) for name in dict.fromkeys([*entries, *cached_models()])}
    except OSError as error:
        yield fail(
            f"the cache of models cannot be read: {error.strerror}",
            "Set COURSE_CACHE to a folder that is yours.",
        )
        return
    shortages = {name: _shortage(entry, states[name], memory) for name, entry in entries.items()}
    for name, state in states.items():
        if state == "damaged":
            yield warn(
                f"{name}: files in its folder {find_entry(name).folder} are not as they were written",
                f"Get them again: python -m helpers prepare --model {name}",
            )
        elif shortages.get(name):
            need, fix = shortages[name]
            smaller = [
                entry
                for entry in entries.values()
                if not shortages[entry.name] and entry.memory < entries[name].memory
            ]
            if smaller:
                largest = max(smaller, key=lambda entry: entry.memory)
                fix += f", or choose a smaller model: MODEL={largest.name}"
            yield warn(f"{name}: {state}; a run needs {need}", f"{fix}.")
        elif name in entries:
            yield ok(f"{name}: {state}; memory and disk are enough for a run")
        else:
            yield ok(f"{name}: {state}")


def _shortage(entry, state, memory):
    """Return the memory or disk that a run of a model lacks here, and the fix; None if it lacks nothing."""
    if memory < entry.memory:
        return f"{entry.memory:,} MB of memory, and {memory:,.0f} MB are free", "Close programs"
    run = round(entry.disk * COPIES) + PAGES_MEGABYTES
    model = entry.disk if state == "not prepared" else 0
    cache = model_cache()
    if existing(cache).stat().st_dev == ROOT.stat().st_dev:
        needs = [("the course", ROOT, run + model)]
    else:
        needs = [("the course", ROOT, run), ("the cache of models", cache, model)]
    for place, folder, needed in needs:
        free = free_disk(folder)
        if free < needed:
            return (
                f"{needed:,} MB of disk for {place}, and {free:,.0f} MB are free",
                "Free some space, or set COURSE_CACHE to a folder on another disk",
            )
    return None
