"""Small functions for files and folders: hashes, safe names, a test for write access, a progress bar, a lock."""

import contextlib
import errno
import hashlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

# Error numbers of a full disk, and of files that cannot be written.
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def sha256(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_size(path: Path, size: int) -> bool:
    """Tell whether ``path`` is a file of that many bytes."""
    return path.is_file() and path.stat().st_size == size


def folder_bytes(folder: Path | str) -> int:
    """Return the bytes of all files below ``folder``."""
    return sum(
        path.stat().st_size
        for path in Path(folder).rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def is_plain(name: str) -> bool:
    """Tell whether a relative name stays inside its folder on every system: no drive, no stream, no ``..``."""
    return (
        name.isprintable()
        and not re.search(r"[\\:]", name)
        and str(PurePosixPath(name)) == name
        and name not in (".", "")
        and not name.startswith("/")
        and ".." not in name.split("/")
    )


def is_writable(folder: Path) -> bool:
    """Tell whether files can be made in ``folder``. os.access is always true for root."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno in (*FORBIDDEN, *FULL):
            return False
        raise
    return True


def progress_bar(title: str, total: int) -> Any:
    """Return a tqdm bar on stdout, because a notebook shows stderr in red.

    It is updated twice a second. In a file or the log of a CI job, which cannot be updated, it is
    printed at the start and at the end.
    """
    from tqdm import tqdm  # set-up imports this module before tqdm is installed

    updates = sys.stdout.isatty() or type(sys.stdout).__module__.startswith("ipykernel")
    return tqdm(
        desc=title,
        total=total,
        file=sys.stdout,
        mininterval=0.5 if updates else float("inf"),
        bar_format="{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}",
    )


@contextlib.contextmanager
def locked(folder: Path, on_busy: Callable[[], None]) -> Iterator[None]:
    """Hold the lock ``folder/.lock``. If another process holds it, call ``on_busy``, then wait.

    ``on_busy`` tells the user that this process waits, or raises an error.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_busy()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
