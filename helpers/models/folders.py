"""Makes a folder of files whole, once: a receipt beside it, written last, lists what belongs into it.

What the receipt does not list is the user's, and stays. The builder of a kit uses the two functions
for single files.
"""

import copy
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from helpers.files import is_plain, is_size, is_writable, sha256


def list_file(path: Path, digest: str | None = None) -> dict:
    """Return the entry of a file for a list: its size in bytes, its time of change, its sha256 (``digest``, if known).

    ``is_as_listed`` compares with it.
    """
    status = path.stat()
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": digest or sha256(path),
    }


def is_as_listed(path: Path, entry: dict) -> bool:
    """Tell whether a file is the one that ``entry`` lists.

    A file of another time is hashed; where its content is right, ``entry`` takes the new time: it
    is hashed once.
    """
    if not is_size(path, entry["size"]):
        return False
    changed = path.stat().st_mtime_ns
    if changed != entry.get("mtime_ns"):
        if sha256(path) != entry["sha256"]:
            return False
        entry["mtime_ns"] = changed
    return True


def receipt_path(folder: Path) -> Path:
    """Return the file of a folder's receipt."""
    return folder.with_name(folder.name + ".receipt.json")


def read_receipt(folder: Path) -> dict:
    """Return a folder's receipt; an empty one where there is none that can be trusted to name files.

    It has the keys ``recipe``, what the folder was made by, or None; ``facts``, what its maker
    found out; and ``files``, the entry of each by relative path.
    """
    try:
        receipt = json.loads(receipt_path(folder).read_text(encoding="utf-8"))
        recipe, facts, files = receipt["recipe"], receipt.get("facts", {}), receipt["files"]
        sound = (
            isinstance(recipe, dict | None)
            and isinstance(facts, dict)
            and all(
                is_plain(name)
                and type(entry["size"]) is int
                and type(entry["mtime_ns"]) is int
                and isinstance(entry["sha256"], str)
                for name, entry in files.items()
            )
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    return (
        {"recipe": recipe, "facts": facts, "files": files}
        if sound
        else {"recipe": None, "facts": {}, "files": {}}
    )


def write_receipt(folder: Path, receipt: dict) -> None:
    """Write a folder's receipt, all of it or nothing."""
    draft = folder.with_name(folder.name + ".receipt.draft")
    draft.write_text(json.dumps(receipt, indent=1), encoding="utf-8")
    draft.replace(receipt_path(folder))


def compare(folder: Path, receipt: dict) -> list[str]:
    """Return the names of the files that are not as the receipt lists them.

    The receipt on the disk takes the new time of a file that was only touched.
    """
    before = copy.deepcopy(receipt)
    bad = [
        name for name, entry in receipt["files"].items() if not is_as_listed(folder / name, entry)
    ]
    if receipt != before and is_writable(folder.parent):
        write_receipt(folder, receipt)
    return bad


def is_whole(folder: Path) -> bool:
    """Hash every file that the receipt lists, whatever its time. One that differs is noted: ``ensure`` gets it anew."""
    receipt = read_receipt(folder)
    for name, entry in receipt["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != entry["sha256"]:
            entry["mtime_ns"] = 0  # its time and size may be right: they are not to be trusted
            if is_writable(folder.parent):
                write_receipt(folder, receipt)
            return False
    return True


def ensure(folder: Path, recipe: dict, make: Callable[[Path], dict | None]) -> dict:
    """Make ``folder`` with ``make``, unless its receipt says that it is there, whole, by this recipe; return the facts.

    The folder's parent exists; it may itself be a link to another disk. ``recipe`` is what the
    content depends on. ``make`` gets a folder on the same disk and writes to it: an empty one, or
    what an earlier try with this recipe has left. It returns None, or a dict with any of the keys
    ``"facts"``, what to keep, and ``"sha256"``, the hash of every file that belongs into
    ``folder``, where files that are right already may be left out. Without hashes, all that it has
    written belongs into ``folder``.
    """
    old = read_receipt(folder)
    bad = compare(folder, old) if old["recipe"] == recipe else []
    if old["recipe"] == recipe and old["files"] and not bad:
        return old["facts"]
    if bad:
        more = f", nor are {len(bad) - 1} more" if bad[1:] else ""
        print(f"{folder / bad[0]} is not as it was written{more}; getting it anew.", flush=True)
    partial = _partial(folder, recipe)
    made = make(partial) or {}
    digests = made.get("sha256") or dict.fromkeys(
        sorted(
            path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()
        )
    )
    arrived = [name for name in digests if (partial / name).is_file()]
    files = {
        name: list_file((partial if name in arrived else folder) / name, digest)
        for name, digest in digests.items()
    }
    _keep_users(folder, [name for name in arrived if name not in old["files"]], files)
    # Until the last line, the receipt lists what is the course's to remove, and vouches for
    # nothing.
    write_receipt(folder, {"recipe": None, "facts": {}, "files": old["files"] | files})
    for name in old["files"].keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name in arrived:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)
    facts = made.get("facts", {})
    write_receipt(folder, {"recipe": recipe, "facts": facts, "files": files})
    return facts


def _partial(folder, recipe):
    """Return the folder to make in: on the disk that ``folder`` is on, and of this recipe alone."""
    digest = hashlib.sha256(json.dumps([str(folder), recipe], sort_keys=True).encode()).hexdigest()[
        :8
    ]
    partial = folder.resolve().with_name(f"{folder.name}.{digest}.partial")
    for other in folder.parent.glob(f"{glob.escape(folder.name)}.*partial"):
        if other != partial:
            shutil.rmtree(other)
    partial.mkdir(exist_ok=True)
    return partial


def _keep_users(folder, names, files):
    """Put aside what a user has under the name of a file that comes, unless it is the same."""
    for name in names:
        path = folder / name
        if not os.path.lexists(path) or (path.is_file() and sha256(path) == files[name]["sha256"]):
            continue
        aside = path.with_name(path.name + ".yours")
        path.replace(aside)
        print(
            f"{path} was yours, and the model has a file of that name: yours is now {aside.name}.",
            flush=True,
        )
