"""Makes a folder of files whole, once: a receipt beside it, written last, says what belongs into it.

It knows nothing of models. What the receipt does not name is the user's, and stays.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile

from helpers.kit import is_plain, sha256


def receipt_path(folder):
    """Return the file of a folder's receipt."""
    return folder.with_name(folder.name + ".receipt.json")


def read_receipt(folder):
    """Return a folder's receipt; an empty one where there is none that can be trusted to name files.

    Returns
    -------
    dict
        ``recipe``, what the folder was made by, or None; ``facts``, what its maker found out; ``files``, the size in
        bytes, time of change and sha256 of each by relative path.
    """
    try:
        receipt = json.loads(receipt_path(folder).read_text(encoding="utf-8"))
        recipe, facts, files = receipt["recipe"], receipt.get("facts", {}), receipt["files"]
        sound = isinstance(recipe, dict | None) and isinstance(facts, dict) and all(
            is_plain(name) and type(file["size"]) is int and type(file["mtime_ns"]) is int
            and isinstance(file["sha256"], str) for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    return {"recipe": recipe, "facts": facts, "files": files} if sound else {"recipe": None, "facts": {}, "files": {}}


def write_receipt(folder, recipe, files, facts):
    """Write a folder's receipt, all of it or nothing."""
    draft = folder.with_name(folder.name + ".receipt.draft")
    draft.write_text(json.dumps({"recipe": recipe, "facts": facts, "files": files}, indent=1), encoding="utf-8")
    draft.replace(receipt_path(folder))


def is_writable(folder):
    """Tell whether files can be made in ``folder``. os.access is not asked: it says yes to root."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
            return False
        raise
    return True


def compare(folder, receipt):
    """Return the names of the files that are as the receipt says, and of those that are not.

    Only a file that was touched is hashed again, and only once: the receipt then takes its new time.
    """
    good, bad, touched = [], [], False
    for name, expected in receipt["files"].items():
        path = folder / name
        same = path.is_file() and path.stat().st_size == expected["size"]
        if same and path.stat().st_mtime_ns != expected["mtime_ns"]:
            same = sha256(path) == expected["sha256"]
            expected["mtime_ns"] = path.stat().st_mtime_ns
            touched = True
        (good if same else bad).append(name)
    if touched and not bad and is_writable(folder.parent):
        write_receipt(folder, receipt["recipe"], receipt["files"], receipt["facts"])
    return good, bad


def is_whole(folder):
    """Compare every file with its hash. One that differs is noted, so that ``ensure`` gets it anew."""
    receipt = read_receipt(folder)
    for name, expected in receipt["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != expected["sha256"]:
            expected["mtime_ns"] = 0  # its time and size may be right: they are not to be trusted
            if is_writable(folder.parent):
                write_receipt(folder, receipt["recipe"], receipt["files"], receipt["facts"])
            return False
    return True


def ensure(folder, recipe, make, resumes=False):
    """Make ``folder`` with ``make`` unless its receipt says that it is there, whole, by this recipe.

    Parameters
    ----------
    folder : pathlib.Path
        Its parent exists. It may be a link to another disk.
    recipe : dict
        What the content depends on.
    make : callable
        Gets an empty folder on the same disk and writes to it. It returns None, or ``{"facts": dict, "sha256": dict}``:
        what to keep, and the hashes that it knows.
    resumes : bool, optional
        Whether ``make`` goes on with what an earlier try left in its folder. It then may leave out files that are
        right in ``folder`` already, and names all in ``sha256``.

    Returns
    -------
    dict
        The facts.
    """
    old = read_receipt(folder)
    good, bad = compare(folder, old) if old["recipe"] == recipe else ([], [])
    if good and not bad:
        return old["facts"]
    if bad:
        more = f", nor are {len(bad) - 1} more" if bad[1:] else ""
        print(f"{folder / bad[0]} is not as it was written{more}; getting it anew.", flush=True)
    partial = _partial(folder, recipe, resumes)
    made = make(partial) or {}
    known = made.get("sha256", {})
    names = known if resumes else sorted(
        path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    files = {}
    for name in names:
        path = partial / name if (partial / name).is_file() else folder / name
        digest, status = known.get(name) or sha256(path), path.stat()
        files[name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest}
    # Until the last line, the receipt says what is the course's to remove, and vouches for nothing.
    ours = old["files"] | files
    _keep_users(folder, partial, files, old["files"])
    write_receipt(folder, None, ours, {})
    for name in old["files"].keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name in files:
        if (partial / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(folder / name)
    shutil.rmtree(partial)
    facts = made.get("facts", {})
    write_receipt(folder, recipe, files, facts)
    return facts


def _partial(folder, recipe, resumes):
    """Return the folder to make in: on the disk that ``folder`` is on, and of this recipe alone."""
    digest = hashlib.sha256(json.dumps([str(folder), recipe, resumes], sort_keys=True).encode()).hexdigest()[:8]
    partial = folder.resolve().with_name(f"{folder.name}.{digest}.partial")
    for other in folder.parent.glob(f"{folder.name}.*partial"):
        if other != partial or not resumes:
            shutil.rmtree(other)
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def _keep_users(folder, partial, files, ours):
    """Put aside what a user has under the name of a file that comes."""
    for name in files:
        path = folder / name
        if name in ours or not (partial / name).is_file() or not os.path.lexists(path):
            continue
        if path.is_file() and sha256(path) == files[name]["sha256"]:
            continue
        aside = path.with_name(path.name + ".yours")
        path.replace(aside)
        print(f"{path} was yours, and the model has a file of that name: yours is now {aside.name}.", flush=True)
