"""Builds an offline kit: names come in; a folder of wheels, models, the course, pages and a manifest comes out."""

import contextlib
import html
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template
from urllib.parse import quote

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor

from course.environment import project
from course.kit import wheels
from course.kit.wheels import PATCHES, WHEELS_MEGABYTES, Target
from helpers.errors import CourseError
from helpers.files import is_size, locked, progress_bar, sha256
from helpers.models.catalogue import TRACKS, find_entry
from helpers.models.folders import is_as_listed, list_file, read_receipt, receipt_path
from helpers.models.kit import COURSE, FORMAT, INDEX, MANIFEST, WHEELS_INDEX, as_word, read_kit
from helpers.models.prepare import prepare_model
from helpers.models.sources import is_from_hub
from helpers.models.space import disk_errors, free_disk
from helpers.paths import DATA, ROOT, model_cache

# The course, and what lies among it that is not the course's.
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
    """Fill a folder with a kit; what is whole in it stays, and so does what is not the kit's. Return the exit code.

    ``platforms`` are keys of ``wheels.PLATFORMS``, this machine's where there are none; ``pythons``
    are such as ``"3.12"``, the running one where there are none. Raises CourseError: an unknown
    model, no package index or no wheel in it, only a CUDA build of torch, a full disk, or a folder
    that is a file, holds something else than a kit, or is the course's own.
    """
    os.environ.pop("COURSE_KIT", None)  # a kit is made from the originals
    models = list(dict.fromkeys(models))
    platforms = list(dict.fromkeys(platforms or [wheels.this_platform()]))
    pythons = list(dict.fromkeys(pythons or ["{}.{}".format(*sys.version_info[:2])]))
    head = {
        "format": FORMAT,
        "course": project()["version"],
        "built_on": platform.platform(),
        "models": models,
        "platforms": platforms,
        "pythons": pythons,
    }
    homes = {name: find_entry(name).folder for name in models}
    targets = [Target(system, python) for system in platforms for python in pythons]
    _refuse_other_folders(folder)
    with _disk_errors(folder), contextlib.ExitStack() as at_end:
        # Whoever gets the kit may read it, also where this user's own files are private.
        at_end.callback(os.umask, os.umask(0o022))
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, lambda: _refuse_to_wait(folder)):
            site = _Site(folder, head)
            at_end.callback(shutil.rmtree, site.staging, ignore_errors=True)
            for name in models:
                _prepare(name)
            _check_space(site, homes.values(), targets)
            for name, home in homes.items():
                _add_model(site, name, home)
            for target in targets:
                wheels.add_wheels(site, target)
            site.add(COURSE, _write_course)
            wheels.keep_wanted_wheels(site, targets)
            site.add(
                WHEELS_INDEX,
                lambda draft: draft.write_text(_wheels_page(site.wanted), encoding="utf-8"),
            )
            site.add(INDEX, lambda draft: draft.write_text(_page(site), encoding="utf-8"))
            site.finish()
    kit = read_kit(str(folder))
    megabytes = sum(entry["size"] for entry in kit.files.values()) / 1e6
    print(
        f"{folder}: {len(kit.files)} files, {megabytes:,.0f} MB. Offer it to a room: "
        f"python -m helpers kit serve {as_word(folder)}; or copy the folder to a stick."
    )
    return 0


def _refuse_other_folders(folder):
    """Raise CourseError unless a folder is new, empty or a kit, and apart from the course and its models."""
    if any(
        place.is_relative_to(folder) or folder.is_relative_to(own)
        for place, own in ((ROOT, ROOT / "data"), (model_cache(), model_cache()))
    ):
        raise CourseError(
            "kit-in-course",
            f"{folder} holds the course or its models.",
            "Build into a folder of its own, such as kit.",
        )
    if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
        try:
            read_kit(str(folder), complete=False)
        except CourseError:
            raise CourseError(
                "kit-other-folder",
                f"{folder} holds something else than a kit.",
                "Build into a new or an empty folder.",
            ) from None


def _refuse_to_wait(folder):
    raise CourseError(
        "kit-busy",
        f"Another build is at work in {folder}.",
        "Wait for its end, and run this again.",
    )


def _disk_errors(folder):
    """Turn what the disk refuses into sentences."""
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


def _check_space(site, homes, targets):
    """Refuse to start where the disk does not have what is still to come."""
    needed = (
        sum(
            entry["size"]
            for home in homes
            for name, entry in _model_files(home)
            if not is_size(site.folder / name, entry["size"])
        )
        / 1e6
    )
    for target in targets:
        missing, wanted = (
            wheels.missing_wheels(site, target, PATCHES[0]),
            target.requirements(PATCHES[0]),
        )
        needed += WHEELS_MEGABYTES * len(missing) / len(wanted)
    free = free_disk(site.folder)
    if free < needed:
        raise CourseError(
            "disk-short",
            f"{site.folder} has {free:,.0f} MB free, and the rest of the kit takes about "
            f"{needed:,.0f} MB.",
            f"Free some space, or {FEWER}.",
        )


class _Site:
    """The folder of a kit while it is built: what its manifest lists, and what of that is wanted still."""

    def __init__(self, folder: Path, head: dict):
        self.folder, self.head, self.wanted = folder, head, {}
        self.staging = folder / "kit.partial"
        try:
            self.listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        except FileNotFoundError:
            self.listed = {}
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir()
        self.note(self.listed)

    def has(self, name: str) -> bool:
        """Tell whether a file is there as it is listed."""
        return name in self.listed and is_as_listed(self.folder / name, self.listed[name])

    def keep(self, name: str) -> None:
        """Take a file that is there as it is listed."""
        self.wanted[name] = self.listed[name]

    def add(self, name: str, make: Callable[[Path], object]) -> None:
        """Let ``make`` write a file, and put it in place."""
        draft = self.staging / "draft"
        make(draft)
        self.take(name, draft)

    def take(self, name: str, draft: Path) -> None:
        """Move a finished file into the kit, unless the same is there."""
        path, digest = self.folder / name, sha256(draft)
        if path.is_file() and sha256(path) == digest:
            draft.unlink()
        elif os.path.lexists(path) and name not in self.listed:
            raise CourseError(
                "kit-file-of-yours",
                f"{path} is there already, and no kit has written it.",
                "Move it away, or build into another folder.",
            )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.replace(path)
        self.listed[name] = list_file(path, digest)
        self.keep(name)

    def note(self, files: dict, complete: bool = False) -> None:
        """Write the manifest; until the last time it says that the kit is not finished."""
        draft = self.staging / MANIFEST
        manifest = self.head | {"complete": complete, "files": dict(sorted(files.items()))}
        draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        draft.replace(self.folder / MANIFEST)

    def finish(self) -> None:
        """Remove what an earlier build listed and this one does not want, and write the manifest."""
        for name in self.listed.keys() - self.wanted.keys():
            path = self.folder / name
            # Not behind a link that somebody has made.
            if path.resolve().is_relative_to(self.folder.resolve()):
                path.unlink(missing_ok=True)
                # A folder that somebody has put a file into stays.
                with contextlib.suppress(OSError):
                    for parent in path.parents:
                        parent.rmdir()
        self.note(self.wanted, complete=True)


# --- models ---------------------------------------------------------------------------------


def _prepare(name):
    """Prepare a model; a repository of the Hub for the one track that somebody has prepared it for."""
    entry = find_entry(name)
    tracks = [
        track for track in TRACKS if receipt_path(model_cache() / entry.folder / track).is_file()
    ]
    prepare_model(name, tracks[0] if is_from_hub(entry) and len(tracks) == 1 else None)


def _model_files(home) -> Iterator[tuple[str, dict]]:
    """Yield the path in the kit and the entry of each file of a prepared model, its receipts included."""
    for track in TRACKS:
        folder = model_cache() / home / track
        for file, entry in read_receipt(folder)["files"].items():
            yield f"models/{home}/{track}/{file}", entry
        if receipt_path(folder).is_file():  # a model of the Hub may be for one track alone
            yield f"models/{home}/{receipt_path(folder).name}", list_file(receipt_path(folder))


def _add_model(site, name, home):
    """Copy the folders of a prepared model and their receipts."""
    files = list(_model_files(home))
    with progress_bar(f"Copying {name}", sum(entry["size"] for _, entry in files)) as bar:
        for path, entry in files:
            if site.has(path) and site.listed[path]["sha256"] == entry["sha256"]:
                site.keep(path)
            else:
                source = model_cache() / path.removeprefix("models/")
                site.add(path, lambda draft, source=source: shutil.copyfile(source, draft))
                if site.wanted[path]["sha256"] != entry["sha256"]:
                    raise CourseError(
                        "model-changed",
                        f"{source} is not as it was prepared.",
                        f"Write it anew: python -m helpers prepare --model {name}.",
                    )
            bar.update(entry["size"])
    site.note(site.listed)


# --- the course and the pages -----------------------------------------------------------------


def course_files() -> list[Path]:
    """Return the course's own files, sorted.

    In a git checkout these are the files that git tracks: what a user put beside them stays where
    it is. A course that was unpacked from a kit has no git. There all files in the course's folders
    count, but for what a run leaves.
    """
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
    """Return the course's files that git tracks; none where there is no git, or no checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return []
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *COURSE_PARTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def _write_course(draft):
    """Write the course as an archive that is the same, byte for byte, as long as no file is touched."""
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in course_files():
            data = path.read_bytes()
            if path.suffix == ".ipynb":  # without what a run has left in it
                notebook, _ = ClearOutputPreprocessor().preprocess(
                    nbformat.reads(data.decode("utf-8"), 4), {}
                )
                data = nbformat.writes(notebook).encode("utf-8") + b"\n"
            # With the files' own times: Python takes a module that was unpacked over an older one
            # for older by them.
            entry = zipfile.ZipInfo.from_file(
                path,
                f"slm-mlflow-course/{path.relative_to(ROOT).as_posix()}",
                strict_timestamps=False,
            )
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)


def _wheels_page(files):
    """Return a page of links with hashes, as pip reads it from a server and from a folder."""
    wheels = {
        name.removeprefix("wheels/"): files[name]["sha256"]
        for name in sorted(files)
        if name.endswith(".whl")
    }
    links = [
        f'<a href="{quote(name)}#sha256={digest}">{html.escape(name)}</a><br>'
        for name, digest in wheels.items()
    ]
    head = '<html lang="en"><head><meta charset="utf-8"><title>Wheels</title></head><body>'
    return "\n".join(["<!DOCTYPE html>", head, *links, "</body></html>", ""])


def _page(site):
    """Return what a person sees who opens the kit's URL or its folder."""
    models = sorted({name.split("/")[1] for name in site.wanted if name.startswith("models/")})
    words = {
        "systems": ", ".join(site.head["platforms"]),
        "pythons": ", ".join(site.head["pythons"]),
        "models": ", ".join(models),
        "course": COURSE,
        "run": f"run --model {models[0]}" if "smollm2-135m" not in models and models else "run",
    }
    page = Template((DATA / "kit.html").read_text(encoding="utf-8"))
    return page.substitute({name: html.escape(text) for name, text in words.items()})
