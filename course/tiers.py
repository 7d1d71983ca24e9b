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

# The folders of each tier, and the models that its tests need.
TIERS = {"check": ("unit",), "test": ("unit", "pages", "services"), "nightly": ("nightly",)}
MODELS = {"check": ("tiny-phi3",), "test": ("tiny-phi3", "smollm2-135m"), "nightly": ("tiny-phi3", "smollm2-135m")}
EXTRAS = {"check": (), "test": ("spark",), "nightly": ("spark", "azure")}
# Seconds by file: of the last whole run, and as kept in git.
MEASURED, KEPT = BUILD / "durations.json", ROOT / "tests" / "durations.json"


def run_tests(tier: str, words: list[str]) -> int:
    """Prepare a tier's models and run its tests with pytest on two or more cores. Return the exit code.

    ``words`` go to pytest. Where one names a file or a folder, only that is run.
    """
    chosen = any((ROOT / word.partition("::")[0]).exists() for word in words if not word.startswith("-"))
    folders = [] if chosen else [f"tests/{folder}" for folder in TIERS[tier]]
    # Before the tests begin, so that no file's time depends on what was there already.
    for name in MODELS[tier]:
        prepare_model(name)
    if not chosen:
        shutil.rmtree(BUILD / "executed", ignore_errors=True)  # a whole run executes each page
        for name in EXTRAS[tier]:
            install_extra(name)
    command = [sys.executable, "-m", "pytest", f"--basetemp={BUILD / 'pytest'}", "--numprocesses=auto",
               "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder", "-p", "no:nbmake", *folders, *words]
    # PyTorch's threads wait busily: those of two tests side by side would make both three times slower.
    return subprocess.call(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"} | os.environ)


def keep_durations() -> int:
    """Keep in git how long each file of the tests took in the last whole runs, and print the longest. Return 0."""
    if not MEASURED.exists():
        raise CourseError("durations-missing", "No whole run of the tests has been measured here.",
                          "Run `make test` first, then this again.")
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    kept |= json.loads(MEASURED.read_text(encoding="utf-8"))
    for tier, files in kept.items():
        kept[tier] = {file: files[file] for file in sorted(files) if (ROOT / file).exists()}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(report(kept))
    return 0


def report(kept: dict[str, dict[str, float]]) -> str:
    """Return the seconds of each tier, and its ten longest files with their shares, as text."""
    lines = []
    for tier, files in kept.items():
        whole = sum(files.values())
        lines.append(f"make {tier}: {whole:.0f} s of tests in {len(files)} files")
        longest = sorted(files, key=files.get, reverse=True)[:10]
        lines += [f"  {files[file] / whole:6.1%} {files[file]:7.1f} s  {file}" for file in longest]
    return "\n".join(lines)


def tier_of(files: set[str]) -> str | None:
    """Return the tier whose folders these test files fill, None where they are only a part of one."""
    for tier, folders in TIERS.items():
        there = {path.relative_to(ROOT).as_posix() for folder in folders
                 for path in (ROOT / "tests" / folder).rglob("test_*.py")}
        if there and files == there:
            return tier
    return None


def over_their_share(measured: dict[str, float], kept: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return the files that took over half again their share of the whole, with that share and the kept one.

    Shares and not seconds, because machines differ. A file may always take four hundredths of the whole more: what
    the first test of a worker imports belongs to a file by chance.
    """
    if not kept:
        return {}
    whole, kept_whole = sum(measured.values()), sum(kept.values())
    shares = {file: (seconds / whole, kept.get(file, 0) / kept_whole) for file, seconds in measured.items()}
    return {file: (now, before) for file, (now, before) in shares.items()
            if now > 1.5 * before and now > before + 0.04}


def read_kept(tier: str, path: Path = KEPT) -> dict[str, float]:
    """Return the kept seconds of a tier's files; empty where none were kept."""
    return json.loads(path.read_text(encoding="utf-8")).get(tier, {}) if path.exists() else {}
