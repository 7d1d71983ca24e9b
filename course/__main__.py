"""``python -m helpers COMMAND``: from a bare checkout to a running course.

An argument list comes in, an exit code goes out. This file runs on whatever Python is there, with
nothing installed: it checks the version first, so an old Python has to be able to read it. No
f-strings, no annotations.
"""

import errno
import os
import sys

from helpers.errors import CourseError

OLDEST, NEWEST = (3, 11), (3, 13)


def check_python(version):
    """Raise CourseError unless ``version``, such as ``(3, 12)``, is one that the pins support."""
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
            stream.reconfigure(errors="replace")  # a terminal or a pipe may not take every letter
        from helpers.strangers import refuse_strangers

        refuse_strangers()
        from helpers.environment import clean_process

        clean_process()
        from course.commands import run_command

        return run_command(arguments)
    except CourseError as error:
        return _fail(error)
    except BrokenPipeError:  # whoever read along, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        known = _explain(error)
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


def _explain(error):
    """Return a CourseError for what a disk refuses, and None for any other OSError."""
    if error.errno == errno.ENOSPC:
        return CourseError(
            "disk-full",
            "The disk is full.",
            "Free some space and run this again; `make clean` removes what earlier runs left.",
        )
    if error.errno == errno.ENOENT and error.filename is None:  # so os.getcwd says it
        return CourseError(
            "folder-gone",
            "The folder that this terminal is in is gone.",
            "Go to another one, and run this again.",
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
