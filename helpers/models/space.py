"""Measures the free memory and disk in megabytes (10**6 bytes), and raises CourseError if a model does not fit."""

import contextlib
import errno
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.errors import CourseError
from helpers.files import FORBIDDEN, FULL
from helpers.models.catalogue import read_catalogue

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Return the megabytes of memory that this process can use: what is free, and what it uses already.

    So a page that has loaded its model can run its first cells again. A container's limit counts if
    it is lower than the machine's memory.
    """
    import psutil  # the other functions are also used before set-up has installed it

    available = min([psutil.virtual_memory().available, *_container_memory()])
    return (available + psutil.Process().memory_info().rss) / 1e6


def free_disk(folder: Path) -> float:
    """Return the free megabytes on the disk of ``folder``, an absolute path that need not exist yet."""
    return shutil.disk_usage(existing(folder)).free / 1e6


def existing(folder: Path) -> Path:
    """Return ``folder``, or its nearest parent that exists."""
    found = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if found is None:
        raise CourseError(
            "disk-absent",
            f"There is no disk for {folder}.",
            "Choose a folder on a disk that is there.",
        )
    return found


def _container_memory():
    """Yield the bytes that a container's limit leaves, by control groups of version 2 and version 1.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files. They count the cache
    of files as used, but the system frees it for programs: it is added again.
    """
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = (int((CGROUP / name).read_text()) for name in (limit, used))
            lines = (CGROUP / used).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no control group, or "max": no limit
            continue
        yield most - taken + int(dict(line.split() for line in lines).get(cache, 0))


def memory_needed(size: int) -> float:
    """Return the megabytes that a page needs at its peak: libraries, and two copies of a model of ``size`` bytes."""
    return 1000 + 2 * size / 1e6


def check_memory(title: str, needed: float) -> None:
    """Raise CourseError unless ``needed`` megabytes of memory are free."""
    free = free_memory()
    if free < needed:
        raise CourseError(
            "memory-short",
            f"{title} takes {math.ceil(needed):,} MB of memory, and {free:,.0f} MB are free.",
            f"Close programs{_or_smaller('memory', needed, free)}.",
        )


def check_disk(
    title: str, needed: float, folder: Path, setting: str = "COURSE_CACHE to a folder"
) -> None:
    """Raise CourseError unless ``needed`` megabytes are free on the disk of ``folder``.

    ``setting`` says in the error how to choose another folder.
    """
    if free_disk(folder) < needed:
        raise disk_full(title, needed, folder, setting)


def disk_full(
    title: str, needed: float | None, folder: Path, setting: str = "COURSE_CACHE to a folder"
) -> CourseError:
    """Return the error for a full disk; ``needed`` is in megabytes, None if it is not known."""
    free = free_disk(folder)
    amount = f"{math.ceil(needed):,} MB" if needed else "more space"
    return CourseError(
        "disk-full",
        f"The disk is too full: {title} takes {amount} in {folder}, and {free:,.0f} MB are free.",
        f"Free some space, or set {setting} on another disk{_or_smaller('disk', needed or 0, free)}; "
        "what is finished stays.",
    )


@contextlib.contextmanager
def disk_errors(
    folder: Path, full: Callable[[], CourseError], refused: CourseError
) -> Iterator[None]:
    """Turn errors of the disk of ``folder`` into CourseErrors.

    ``full`` makes the error for a full disk, with the space that is free at that moment;
    ``refused`` is the error for a folder that cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full() from error
        if error.errno == errno.EFBIG:
            # FAT32, which many USB sticks have, takes at most 4 GB in one file.
            raise CourseError(
                "file-too-large",
                f"The disk of {folder} cannot hold a file of that size.",
                "Format it as exFAT, or choose a folder on another disk.",
            ) from error
        if error.errno in (*FORBIDDEN, errno.ENOTDIR, errno.EEXIST, errno.EISDIR) or (
            error.errno == errno.ENOENT and not folder.exists()
        ):
            raise refused from error
        raise


def _or_smaller(what, needed, free):
    """Return words that name the largest smaller model of the catalogue that fits; none if no model fits."""
    fitting = {
        name: getattr(entry, what)
        for name, entry in read_catalogue().items()
        if getattr(entry, what) < needed and getattr(entry, what) <= free
    }
    if not fitting:
        return ""
    name = max(fitting, key=fitting.get)
    return f", or choose a smaller model, such as {name} ({fitting[name]:,} MB)"
