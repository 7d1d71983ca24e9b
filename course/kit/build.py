"""Builds an offline kit: a folder with wheels, models, the course, a page for participants and SHA256SUMS."""

import contextlib
import html
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from string import Template
from urllib.parse import quote

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor

from course.kit import wheels
from course.kit.wheels import WHEELS_MEGABYTES, Target
from helpers.errors import CourseError
from helpers.files import folder_bytes, is_size, locked, progress_bar, sha256
from helpers.models.catalogue import TRACKS, find_entry
from helpers.models.folders import read_receipt, receipt_path, write_receipt
from helpers.models.kit import COURSE, INDEX, SUMS, UNFINISHED, WHEELS_INDEX, as_word
from helpers.models.prepare import prepare_model
from helpers.models.sources import is_from_hub
from helpers.models.space import disk_errors, free_disk
from helpers.paths import DATA, ROOT, model_cache

# The course's own files, for a course that has no git.
COURSE_PARTS = (
    ".ci",
    ".gitattributes",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MLproject",
    "Makefile",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "course",
    "data",
    "deploy",
    "docs",
    "environment.yml",
    "helpers",
    "notebooks",
    "pyproject.toml",
    "serving",
    "tests",
)
NOT_OURS = {"__pycache__", ".ipynb_checkpoints", ".DS_Store", "mlruns", "mlflow.db"}
FEWER = "ask for fewer models, platforms and Pythons"


def build(
    folder: Path, models: Sequence[str], platforms: Sequence[str] = (), pythons: Sequence[str] = ()
) -> int:
    """Fill a folder with a kit; files of an earlier build that are whole stay. Return the exit code.

    Parameters
    ----------
    platforms : sequence of str
        Keys of ``wheels.PLATFORMS``; by default this machine's.
    pythons : sequence of str
        Such as ``"3.12"``; by default the running one.

    Raises
    ------
    CourseError
        An unknown model, no package index or no wheel in it, only a CUDA build of torch, a full
        disk, or a folder that is a file, holds something else, or is the course's own.
    """
    os.environ.pop("COURSE_KIT", None)  # a kit is built from the originals
    targets = [
        Target(system, python)
        for system in dict.fromkeys(platforms or [wheels.this_platform()])
        for python in dict.fromkeys(pythons or ["{}.{}".format(*sys.version_info[:2])])
    ]
    model_folders = {name: find_entry(name).folder for name in models}
    _refuse_other_folders(folder)
    with _disk_errors(folder), contextlib.ExitStack() as at_end:
        # Participants may read the kit, even if this user's own files are private.
        at_end.callback(os.umask, os.umask(0o022))
        (folder / "wheels").mkdir(parents=True, exist_ok=True)
        with locked(folder, lambda: _refuse_to_wait(folder)):
            listed = _begin(folder)
            for name in model_folders:
                _prepare(name)
            _check_space(folder, model_folders.values(), targets)
            files = [
                file
                for model_folder in model_folders.values()
                for file in _copy_model(folder, model_folder)
            ]
            wheel_files = wheels.add_wheels(folder / "wheels", targets)
            files += wheel_files
            files += [_write_wheels_index(folder, wheel_files), _write_course(folder / COURSE)]
            files += [_write_page(folder, targets, model_folders)]
            names = sorted(path.relative_to(folder).as_posix() for path in files)
            _delete_stale(folder, listed - set(names))
            _finish(folder, names)
    print(
        f"{folder}: {len(names)} files, {folder_bytes(folder) / 1e6:,.0f} MB. Serve it in a room: "
        f"python -m helpers kit serve {as_word(folder)}; or copy the folder to a stick."
    )
    return 0


def _refuse_other_folders(folder):
    """Raise CourseError unless a folder is new, empty or a kit, and outside the course and its models."""
    places = ((ROOT, ROOT / "data"), (model_cache(), model_cache()))
    if any(
        place.is_relative_to(folder) or folder.is_relative_to(inside) for place, inside in places
    ):
        raise CourseError(
            "kit-in-course",
            f"{folder} holds the course or its models.",
            "Build into a folder of its own, such as kit.",
        )
    is_kit = any((folder / name).is_file() for name in (SUMS, UNFINISHED))
    if folder.is_dir() and not is_kit and any(path.name != ".lock" for path in folder.iterdir()):
        raise CourseError(
            "kit-other-folder",
            f"{folder} holds something else than a kit.",
            "Build into a new or an empty folder.",
        )


def _refuse_to_wait(folder):
    raise CourseError(
        "kit-busy",
        f"Another build is at work in {folder}.",
        "Wait for its end, and run this again.",
    )


def _disk_errors(folder):
    """Turn errors of the disk into CourseErrors."""
    refused = CourseError(
        "kit-not-writable",
        f"{folder} cannot be written as a folder.",
        "Name a folder that is yours: python -m helpers kit build DIR.",
    )
    return disk_errors(
        folder,
        lambda: CourseError(
            "disk-full",
            f"The disk is full: {free_disk(folder):,.0f} MB are free in {folder}.",
            f"Free some space, or {FEWER}, and run this again; what is finished stays.",
        ),
        refused,
    )


def _begin(folder):
    """Mark the kit as unfinished, delete the files that have changed, and return those that an earlier build listed."""
    if (folder / SUMS).is_file():
        (folder / SUMS).replace(folder / UNFINISHED)
    (folder / UNFINISHED).touch()
    listed = set()
    for line in (folder / UNFINISHED).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed.add(name)
        path = (folder / name).resolve()
        if path.is_relative_to(folder) and path.is_file() and sha256(path) != digest:
            path.unlink()
    return listed


def _check_space(folder, model_folders, targets):
    """Raise CourseError if the disk is too small for the files that are not in the kit yet."""
    needed = sum(
        size
        for model_folder in model_folders
        for track in TRACKS
        for name, size in read_receipt(model_cache() / model_folder / track)["files"].items()
        if not is_size(folder / "models" / model_folder / track / name, size)
    )
    share = wheels.missing_share(folder / "wheels", targets)
    needed = needed / 1e6 + WHEELS_MEGABYTES * share
    free = free_disk(folder)
    if free < needed:
        raise CourseError(
            "disk-short",
            f"{folder} has {free:,.0f} MB free, and the rest of the kit takes about {needed:,.0f} MB.",
            f"Free some space, or {FEWER}.",
        )


def _delete_stale(folder, names):
    """Delete files of an earlier build, and their folders if these are then empty."""
    for name in names:
        path = folder / name
        # Not behind a link of the user's.
        if path.resolve().is_relative_to(folder):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that is not empty stays
                for parent in path.parents:
                    parent.rmdir()


def _finish(folder, names):
    """Write SHA256SUMS: from now on the kit can be read."""
    lines = []
    with progress_bar("Writing the list of hashes", len(names)) as bar:
        for name in names:
            lines.append(f"{sha256(folder / name)}  {name}\n")
            bar.update(1)
    (folder / UNFINISHED).write_text("".join(lines), encoding="utf-8", newline="\n")
    (folder / UNFINISHED).replace(folder / SUMS)


# --- models -----------------------------------------------------------------------------------


def _prepare(name):
    """Prepare a model for both tracks; a repository of the Hub for the one that it was prepared for."""
    entry = find_entry(name)
    tracks = [
        track for track in TRACKS if receipt_path(model_cache() / entry.folder / track).is_file()
    ]
    prepare_model(name, tracks[0] if is_from_hub(entry) and len(tracks) == 1 else None)


def _copy_model(folder, model_folder):
    """Copy a prepared model's folders and their receipts; return the copies."""
    copies = []
    for track in TRACKS:
        source = model_cache() / model_folder / track
        target = folder / "models" / model_folder / track
        receipt = read_receipt(source)
        if not receipt["files"]:  # a model of the Hub may be for one track only
            continue
        title = f"Copying {model_folder} ({track})"
        with progress_bar(title, sum(receipt["files"].values())) as bar:
            for name, size in receipt["files"].items():
                copies.append(target / name)
                status = (source / name).stat()
                same = is_size(target / name, size)
                if not same or (target / name).stat().st_mtime_ns != status.st_mtime_ns:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / name, target / name)
                    os.utime(target / name, ns=(status.st_atime_ns, status.st_mtime_ns))
                bar.update(size)
        write_receipt(target, receipt)
        copies.append(receipt_path(target))
    return copies


# --- the course and the pages -----------------------------------------------------------------


def course_files() -> list[Path]:
    """Return the course's own files, sorted: those that git tracks, or without git all in the course's folders."""
    files = _tracked_files()
    if not files:
        for name in COURSE_PARTS:
            files += [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")
    return sorted(
        path
        for path in files
        if path.is_file()
        and not NOT_OURS & set(path.relative_to(ROOT).parts)
        and not path.is_relative_to(DATA / "models")
    )


def _tracked_files():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return []
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *COURSE_PARTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if listed.returncode:  # such as a folder of another user's
        raise CourseError(
            "not-a-checkout",
            f"git cannot list the course's files: {' '.join(listed.stderr.split())}.",
            "Do what git says, or build from a course that was unpacked from a kit's course.zip.",
        )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def _write_course(archive_path):
    """Write the course as an archive, with pages that have no outputs."""
    with zipfile.ZipFile(archive_path, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in course_files():
            data = path.read_bytes()
            if path.suffix == ".ipynb":
                notebook, _ = ClearOutputPreprocessor().preprocess(
                    nbformat.reads(data.decode("utf-8"), 4), {}
                )
                data = nbformat.writes(notebook).encode("utf-8") + b"\n"
            # With the files' own times: Python compares them with those of its compiled files.
            entry = zipfile.ZipInfo.from_file(
                path,
                f"slm-mlflow-course/{path.relative_to(ROOT).as_posix()}",
                strict_timestamps=False,
            )
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return archive_path


def _write_wheels_index(folder, wheel_files):
    """Write a page of links with hashes, as pip reads it from a server and from a folder."""
    links = [
        f'<a href="{quote(wheel.name)}#sha256={sha256(wheel)}">{html.escape(wheel.name)}</a><br>'
        for wheel in sorted(wheel_files)
    ]
    head = '<html lang="en"><head><meta charset="utf-8"><title>Wheels</title></head><body>'
    page = folder / WHEELS_INDEX
    page.write_text("\n".join(["<!DOCTYPE html>", head, *links, "</body></html>", ""]), "utf-8")
    return page


def _write_page(folder, targets, models):
    """Write the page that a participant opens."""
    default = "smollm2-135m" in models
    words = {
        "systems": ", ".join(dict.fromkeys(target.platform for target in targets)),
        "pythons": ", ".join(dict.fromkeys(target.python for target in targets)),
        "models": ", ".join(models),
        "course": COURSE,
        "run": "run" if default else f"run --model {next(iter(models))}",
    }
    template = Template((DATA / "kit.html").read_text(encoding="utf-8"))
    page = folder / INDEX
    page.write_text(
        template.substitute({name: html.escape(text) for name, text in words.items()}), "utf-8"
    )
    return page
