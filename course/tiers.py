"""Runs one tier of the tests (check, test or nightly), and compares the files' times with a baseline.

A tier is a set of folders in ``tests``: the folder of a test decides when it runs.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from course.environment import install_extra
from helpers.errors import CourseError
from helpers.models.prepare import prepare_model
from helpers.paths import BUILD, ROOT


@dataclass(frozen=True)
class Tier:
    """The folders that one tier runs, what it needs, and how much a file's share of its time may grow."""

    folders: tuple[str, ...]  # of tests/
    models: tuple[str, ...]
    extras: tuple[str, ...]
    # Imports take a tenth of a short tier's time, and count for the first file of each worker.
    most_added: float = 0.06


BOTH_MODELS = ("tiny-phi3", "smollm2-135m")
TIERS = {
    "check": Tier(("unit",), ("tiny-phi3",), (), most_added=0.12),
    "test": Tier(("unit", "pages", "services"), BOTH_MODELS, ("spark",)),
    "nightly": Tier(("nightly",), BOTH_MODELS, ("spark", "azure")),
}
# Seconds by tier and test file: of the last whole runs, which tests/conftest.py writes, and the
# baseline in git.
MEASURED = BUILD / "durations.json"
BASELINE = ROOT / "tests" / "durations.json"
# A file's share of the time may grow by this factor, or by `most_added`.
MOST_GROWTH = 1.5


def run_tests(name: str, pytest_options: list[str]) -> int:
    """Prepare a tier's models and extras, and run its tests with pytest in up to four processes. Return the exit code.

    A whole run removes the executed pages first. If an option is a path in ``tests``, only that path
    is run, and its tests install the extras that they need. Raises CourseError if another whole run
    in this folder has not ended.
    """
    tier = TIERS[name]
    has_paths = any(Path(option).parts[:1] == ("tests",) for option in pytest_options)
    folders = [] if has_paths else [f"tests/{folder}" for folder in tier.folders]
    # Before the tests, so that no test file's time includes a download.
    for model in tier.models:
        prepare_model(model)
    BUILD.mkdir(exist_ok=True)
    lock = FileLock(BUILD / "tests.lock", blocking=False)  # held until this function returns
    if not has_paths and name != "check":
        try:
            lock.acquire()
        except Timeout:
            raise CourseError(
                "tests-running",
                "Another run of the tests has not ended in this folder.",
                "Wait until it has ended, or run them in another clone.",
            ) from None
        shutil.rmtree(
            BUILD / "executed", ignore_errors=True
        )  # a whole run executes each page again
        for extra in tier.extras:
            install_extra(extra)
    # Tests of pages and services are idle for half of their time, so they get one process more than
    # there are cores.
    processes = min((os.cpu_count() or 1) + (name != "check"), 4)
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"--numprocesses={processes}",
        "--dist=loadfile",
        "--no-loadscope-reorder",
        "-p",
        "no:nbmake",
        *folders,
        *pytest_options,
    ]
    variables = {
        # PyTorch's idle threads keep a core busy: with several threads each, two tests side by side
        # take three times as long.
        "OMP_NUM_THREADS": "1",
        # Here pytest makes a folder for each run, so that two runs do not remove each other's
        # files.
        "PYTEST_DEBUG_TEMPROOT": str(BUILD),
    }
    return subprocess.call(command, cwd=ROOT, env=variables | os.environ)


def update_baseline() -> int:
    """Write the seconds of the last whole runs to tests/durations.json, and print the longest files. Return 0."""
    measured = read_durations(MEASURED)
    if not measured:
        raise CourseError(
            "durations-missing",
            "No whole run of the tests has been measured here.",
            "Run `make test` first, then this again.",
        )
    baseline = read_durations(BASELINE) | measured
    for tier, files in baseline.items():
        baseline[tier] = {file: files[file] for file in sorted(files) if (ROOT / file).exists()}
    BASELINE.write_text(json.dumps(baseline, indent=1) + "\n", encoding="utf-8")
    print(format_durations(baseline))
    return 0


def read_durations(path: Path) -> dict[str, dict[str, float]]:
    """Return the seconds by tier and test file from a JSON file; an empty dict if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def format_durations(durations: dict[str, dict[str, float]]) -> str:
    """Return the seconds of each tier, and its ten longest files with their shares, as text."""
    lines = []
    for tier, files in durations.items():
        whole = sum(files.values())
        lines.append(f"make {tier}: {whole:.0f} s of tests in {len(files)} files")
        longest = sorted(files, key=files.get, reverse=True)[:10]
        lines += [f"  {files[file] / whole:6.1%} {files[file]:7.1f} s  {file}" for file in longest]
    return "\n".join(lines)


def find_tier(files: set[str]) -> str | None:
    """Return the name of the tier whose test files are exactly these, or None."""
    return next(
        (name for name, tier in TIERS.items() if files and files == _test_files(tier)), None
    )


def _test_files(tier):
    paths = itertools.chain.from_iterable(
        (ROOT / "tests" / folder).rglob("test_*.py") for folder in tier.folders
    )
    return {path.relative_to(ROOT).as_posix() for path in paths}


def find_outgrown(
    tier: str, measured: dict[str, float], baseline: dict[str, float]
) -> dict[str, tuple[float, float]]:
    """Return the files whose share of the time grew too much, each with its share now and in the baseline.

    Shares are compared, not seconds, because machines differ in speed. A new file's share in the
    baseline is 0; a deleted file is ignored.
    """
    if not baseline:
        return {}
    before = {file: baseline.get(file, 0) for file in measured}
    shares = {
        file: (measured[file] / sum(measured.values()), before[file] / sum(before.values()))
        for file in measured
    }
    return {
        file: (now, then)
        for file, (now, then) in shares.items()
        if now > MOST_GROWTH * then and now > then + TIERS[tier].most_added
    }
