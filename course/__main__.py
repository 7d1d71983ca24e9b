"""Runs ``python -m helpers COMMAND``, and prints a failure as two sentences.

This file runs on any Python, with nothing installed, and checks its version first. So an old Python
has to be able to read it: no f-strings, no annotations.
"""

import errno
import os
import sys

from helpers.errors import CourseError

OLDEST, NEWEST = (3, 11), (3, 13)


def check_python(version):
    """Raise CourseError unless the pins support this version of Python, such as ``(3, 12)``."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise CourseError(
            "python-version",
            "This is Python %d.%d, and the course runs on Python %d.%d to %d.%d."
            % (tuple(version[:2]) + OLDEST + NEWEST),
            "Install one of those and name it: make run PYTHON=python3.12, "
            "or on Windows: py -3.12 -m helpers run.",
        )


def main(arguments):
    """Run one command of the course. Return the exit code."""
    try:
        check_python(sys.version_info)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # not every terminal can print every letter
        from helpers.shadowing import refuse_shadowing_files

        refuse_shadowing_files()
        from helpers.environment import clean_process

        clean_process()
        from course.commands import run_command

        return run_command(arguments)
    except CourseError as error:
        return _fail(error)
    except BrokenPipeError:  # the program that reads our output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        known = _to_course_error(error)
        if known is None:
            raise
        return _fail(known)
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nInterrupted. What is finished stays: the same command goes on from there.\n"
        )
        return 130


def _fail(error):
    """Print a CourseError and return the exit code."""
    sys.stdout.flush()
    sys.stderr.write("error: %s\n       %s\n" % (error.what, error.fix))
    return 1


def _to_course_error(error):
    """Return a CourseError for an error of the disk, None for any other OSError."""
    if error.errno == errno.ENOSPC:
        return CourseError(
            "disk-full",
            "The disk is full.",
            "Free some space and run this again; `make clean` removes what earlier runs left.",
        )
    if error.errno == errno.ENOENT and error.filename is None:  # this is what os.getcwd raises
        return CourseError(
            "folder-gone",
            "This terminal is in a folder that no longer exists.",
            "Change to another folder, and run this again.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CourseError(
            "not-writable",
            "%s cannot be written." % (error.filename or "A file of the course"),
            "Move the course to a folder that is yours, and run this again.",
        )
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
