"""Measures what this machine has free, in megabytes (10**6 bytes), and refuses what does not fit."""

import math
import shutil
from pathlib import Path

from helpers.catalogue import read_catalogue
from helpers.errors import CourseError

CGROUP = Path("/sys/fs/cgroup")


def free_memory():
    """Return the memory that this process can still take, with what it holds already.

    In a container the container's limit counts, where it is lower than the machine's. A page that has
    loaded a model and runs its first cells once more is not asked to find the memory twice.

    Returns
    -------
    float
        Megabytes.
    """
    import psutil  # the rest of this module serves before set-up, too

    available = min([psutil.virtual_memory().available, *_container_memory()])
    return (available + psutil.Process().memory_info().rss) / 1e6


def free_disk(folder):
    """Return the free megabytes of the disk that ``folder`` is or will be on.

    Parameters
    ----------
    folder : pathlib.Path
        Absolute; it need not exist.
    """
    return shutil.disk_usage(existing(folder)).free / 1e6


def existing(folder):
    """Return ``folder``, or the nearest of its parents that is there."""
    there = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    if there is None:
        raise CourseError(f"There is no disk for {folder}.", "Choose a folder on a disk that is there.")
    return there


def _container_memory():
    """Yield the bytes that a container's limit leaves: control groups, version 2 and version 1.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files. Memory that only caches files
    counts as used there, and goes back when a program wants it.
    """
    for limit, used, cache in (("memory.max", "memory.current", "inactive_file"),
                               ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes",
                                "total_inactive_file")):
        try:
            most, taken = (int((CGROUP / name).read_text()) for name in (limit, used))
            lines = (CGROUP / used).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # no control group, or "max": no limit
            continue
        yield most - taken + int(dict(line.split() for line in lines).get(cache, 0))


def memory_needed(size):
    """Return the megabytes that a notebook takes at its peak: its libraries, and two copies of the model at a time.

    Parameters
    ----------
    size : int
        Bytes of the model's files.
    """
    return 1000 + 2 * size / 1e6


def check_memory(title, needed):
    """Raise CourseError unless ``needed`` megabytes of memory are free."""
    free = free_memory()
    if free < needed:
        raise CourseError(f"{title} takes {math.ceil(needed):,} MB of memory, and {free:,.0f} MB are free.",
                          f"Close programs{_or_smaller('memory', needed, free)}.")


def check_disk(title, needed, folder):
    """Raise CourseError unless ``needed`` megabytes are free on the disk of ``folder``."""
    if free_disk(folder) < needed:
        raise disk_full(title, needed, folder)


def disk_full(title, needed, folder):
    """Return the CourseError that says what is missing on the disk of ``folder``, in megabytes where it is known."""
    free = free_disk(folder)
    room = f"{math.ceil(needed):,} MB" if needed else "more room"
    return CourseError(
        f"The disk is too full: {title} takes {room} in {folder}, and {free:,.0f} MB are free.",
        f"Free some space, or set COURSE_CACHE to a folder on another disk{_or_smaller('disk', needed or 0, free)}; "
        "what is finished stays.",
    )


def too_large(folder):
    """Return the CourseError for a file system that has a limit for one file, as a stick's FAT32 has: 4 GB."""
    return CourseError(f"The disk of {folder} cannot hold a file of that size.",
                       "Format it as exFAT, or choose a folder on another disk.")


def _or_smaller(what, needed, free):
    """Name the largest model of the catalogue that takes less memory or disk, and fits; nothing where none does."""
    fitting = {name: getattr(card, what) for name, card in read_catalogue().items()
               if getattr(card, what) < needed and getattr(card, what) <= free}
    if not fitting:
        return ""
    name = max(fitting, key=fitting.get)
    return f", or choose a smaller model, such as {name} ({fitting[name]:,} MB)"
