"""Runs the tests in three tiers. A tier is a set of folders in ``tests/``, so a test's place says when it runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from course.environment import install_extra
from helpers.errors import CourseError
from helpers.models.prepare import prepare_model
from helpers.paths import BUILD, ROOT

# Each tier's test folders, models and extras.
TIERS = {"check": ("unit",), "test": ("unit", "pages", "services"), "nightly": ("nightly",)}
MODELS = {"check": ("tiny-phi3",), "test": ("tiny-phi3", "smollm2-135m"), "nightly": ("tiny-phi3", "smollm2-135m")}
EXTRAS = {"check": (), "test": ("spark",), "nightly": ("spark", "azure")}
# Seconds by test file: in the last whole run of each tier, and as kept in git to compare with.
MEASURED = BUILD / "durations.json"
KEPT = ROOT / "tests" / "durations.json"
# What a file's share of the whole time may grow by before the suite fails: as a factor, and in addition. In a tier that
# is short, what a worker imports first is a tenth of the whole, and it counts for whichever file comes first.
GROWTH = 1.5
ADDED_SHARE = {"check": 0.12, "test": 0.06, "nightly": 0.06}


def run_tests(tier: str, pytest_options: list[str]) -> int:
    """Prepare a tier's models and run its tests with pytest, in up to four processes. Return the exit code.

    Where an option is a path in ``tests``, only that path is run.
    """
    has_paths = any(Path(option).parts[:1] == ("tests",) for option in pytest_options)
    folders = [] if has_paths else [f"tests/{folder}" for folder in TIERS[tier]]
    # The models come first, so that no test file's time has a download in it.
    for name in MODELS[tier]:
        prepare_model(name)
    if not has_paths and tier != "check":
        shutil.rmtree(BUILD / "executed", ignore_errors=True)  # a whole run executes each page anew
        for name in EXTRAS[tier]:
            install_extra(name)
    BUILD.mkdir(exist_ok=True)
    # The tests of pages and services wait for half of their time, so there is one process more than cores for them.
    processes = min((os.cpu_count() or 1) + (tier != "check"), 4)
    command = [sys.executable, "-m", "pytest", f"--basetemp={BUILD / 'pytest'}", f"--numprocesses={processes}",
               "--dist=loadfile", "--no-loadscope-reorder", "-p", "no:nbmake", *folders, *pytest_options]
    # PyTorch's idle threads spin: with more than one thread each, two tests side by side take three times as long.
    return subprocess.call(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"} | os.environ)


def keep_durations() -> int:
    """Write the seconds of the last whole runs to tests/durations.json, and print the longest files. Return 0."""
    if not MEASURED.exists():
        raise CourseError("durations-missing", "No whole run of the tests has been measured here.",
                          "Run `make test` first, then this again.")
    kept = _read_all_kept(KEPT) | json.loads(MEASURED.read_text(encoding="utf-8"))
    for tier, files in kept.items():
        kept[tier] = {file: files[file] for file in sorted(files) if (ROOT / file).exists()}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(format_durations(kept))
    return 0


def format_durations(kept: dict[str, dict[str, float]]) -> str:
    """Return the seconds of each tier, and its ten longest files with their shares, as text."""
    lines = []
    for tier, files in kept.items():
        whole = sum(files.values())
        lines.append(f"make {tier}: {whole:.0f} s of tests in {len(files)} files")
        longest = sorted(files, key=files.get, reverse=True)[:10]
        lines += [f"  {files[file] / whole:6.1%} {files[file]:7.1f} s  {file}" for file in longest]
    return "\n".join(lines)


def tier_of(files: set[str]) -> str | None:
    """Return the tier whose test files are exactly these, or None."""
    for tier, folders in TIERS.items():
        there = {path.relative_to(ROOT).as_posix() for folder in folders
                 for path in (ROOT / "tests" / folder).rglob("test_*.py")}
        if there and files == there:
            return tier
    return None


def over_their_share(tier: str, measured: dict[str, float], kept: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return the files whose share of the whole time grew too much, each with its new share and the kept one.

    Shares and not seconds, because machines differ.
    """
    if not kept:
        return {}
    whole, kept_whole = sum(measured.values()), sum(kept.values())
    shares = {file: (seconds / whole, kept.get(file, 0) / kept_whole) for file, seconds in measured.items()}
    return {file: (now, before) for file, (now, before) in shares.items()
            if now > GROWTH * before and now > before + ADDED_SHARE[tier]}


def read_kept(tier: str, path: Path = KEPT) -> dict[str, float]:
    """Return the kept seconds of a tier's files; empty where none were kept."""
    return _read_all_kept(path).get(tier, {})


def _read_all_kept(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
