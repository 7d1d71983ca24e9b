"""What a check of the doctor returns: a level, a line, and what to do about it."""

from typing import NamedTuple


class Result(NamedTuple):
    """The result of one check."""

    level: str  # "OK", "WARN" or "FAIL"
    line: str
    fix: str = ""


def ok(line: str) -> Result:
    """Return the result of a check that found nothing wrong."""
    return Result("OK", line)


def warn(line: str, fix: str) -> Result:
    """Return the result for something that only part of the course needs."""
    return Result("WARN", line, fix)


def fail(line: str, fix: str) -> Result:
    """Return the result for something without which the course does not run."""
    return Result("FAIL", line, fix)
