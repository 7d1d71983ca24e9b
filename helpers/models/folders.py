"""Makes a folder once: a receipt beside it, written last, says how it was made and which files belong to it.

Files that the receipt does not list are the user's, and stay.
"""

import filecmp
import glob
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from helpers.files import is_plain, is_size

NOTHING = {"recipe": None, "facts": {}, "files": {}}


def receipt_path(folder: Path) -> Path:
    """Return the file of a folder's receipt."""
    return folder.with_name(folder.name + ".receipt.json")


def read_receipt(folder: Path) -> dict:
    """Return a folder's receipt; one that lists nothing if there is none, or none that can be read.

    Returns
    -------
    dict
        ``recipe``: what the content depends on, None while a folder is being changed; ``facts``:
        what its maker found out; ``files``: the size in bytes of each file by its relative path.
    """
    try:
        receipt = json.loads(receipt_path(folder).read_text(encoding="utf-8"))
        recipe = receipt["recipe"]
        facts = receipt.get("facts", {})
        # Receipts of earlier versions also have each file's time and hash.
        files = {
            name: entry["size"] if isinstance(entry, dict) else entry
            for name, entry in receipt["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return NOTHING
    sound = (
        isinstance(recipe, dict | None)
        and isinstance(facts, dict)
        and all(is_plain(name) and isinstance(size, int) for name, size in files.items())
    )
    return {"recipe": recipe, "facts": facts, "files": files} if sound else NOTHING


def write_receipt(folder: Path, receipt: dict) -> None:
    """Write a folder's receipt, all of it or nothing."""
    draft = folder.with_name(folder.name + ".receipt.draft")
    draft.write_text(json.dumps(receipt, indent=1), encoding="utf-8")
    draft.replace(receipt_path(folder))


def changed_files(folder: Path) -> list[str]:
    """Return the names of the files that are missing, or have another size than the receipt says."""
    files = read_receipt(folder)["files"]
    return [name for name, size in files.items() if not is_size(folder / name, size)]


def ensure(folder: Path, recipe: dict, make: Callable[[Path], dict | None]) -> dict:
    """Make ``folder`` with ``make``, unless it is complete and has the same recipe; return the facts.

    Parameters
    ----------
    folder : Path
        Its parent exists. It may be a link to another disk.
    recipe : dict
        What the content depends on.
    make : callable
        Takes a folder on the same disk and writes to it. The folder is empty, or has what an
        interrupted call with this recipe left. Returns None, or a dict with any of ``"facts"`` and
        ``"files"``: the names of all files that belong to ``folder``, where those that are there
        and right need not be written. Without ``"files"``, all that it wrote belongs to it.
    """
    old = read_receipt(folder)
    if old["recipe"] == recipe and old["files"]:
        changed = changed_files(folder)
        if not changed:
            return old["facts"]
        print(f"{folder / changed[0]} is missing or damaged; getting it again.", flush=True)
    partial = _partial_folder(folder, recipe)
    made = make(partial) or {}
    written = {
        path.relative_to(partial).as_posix(): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    names = made.get("files", written)
    files = {
        name: written[name] if name in written else (folder / name).stat().st_size for name in names
    }
    new = [name for name in names if name in written]
    _keep_users_files(folder, partial, [name for name in new if name not in old["files"]])
    # Until the last line the folder has old and new files. The receipt lists both: they may be replaced.
    write_receipt(folder, NOTHING | {"files": old["files"] | files})
    for name in old["files"].keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name in new:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)
    facts = made.get("facts", {})
    write_receipt(folder, {"recipe": recipe, "facts": facts, "files": files})
    return facts


def _partial_folder(folder, recipe):
    """Return the folder to make in: on the disk of ``folder``, and for this recipe only."""
    digest = hashlib.sha256(json.dumps([str(folder), recipe], sort_keys=True).encode()).hexdigest()
    partial = folder.resolve().with_name(f"{folder.name}.{digest[:8]}.partial")
    for other in partial.parent.glob(f"{glob.escape(folder.name)}.*partial"):
        if other != partial:
            shutil.rmtree(other)
    partial.mkdir(exist_ok=True)
    return partial


def _keep_users_files(folder, partial, names):
    """Rename a user's file that has the name of a new one, unless both are the same."""
    for name in names:
        path = folder / name
        if path.is_file() and not filecmp.cmp(path, partial / name, shallow=False):
            aside = path.with_name(path.name + ".yours")
            while aside.exists():
                aside = aside.with_name(aside.name + ".yours")
            path.replace(aside)
            print(
                f"The model has a file called {name}, too: yours is now {aside}.",
                flush=True,
            )
