"""``python -m helpers COMMAND``: from a bare checkout to a running course.

This file and ``setup.py`` beside it run on whatever Python is there, with nothing installed:
they check its version, set up ``.venv`` and run the command in it.
"""

import errno
import os
import subprocess
import sys

from helpers.errors import CourseError

# No f-strings and no annotations in this file: an old Python must get as far as the sentence below.
OLDEST, NEWEST = (3, 11), (3, 13)
COMMANDS = ("run", "test", "lab", "ui", "bench", "doctor", "prepare", "notebook", "generate", "setup", "kit",
            "clean", "distclean", "help")
NEED_TESTS = ("test", "bench", "generate")


def check_python(version):
    """Raise CourseError unless ``version``, such as ``(3, 12)``, is one that the pins support."""
    if not OLDEST <= tuple(version[:2]) <= NEWEST:
        raise CourseError(
            "This is Python %d.%d, and the course runs on Python %d.%d to %d.%d."
            % (tuple(version[:2]) + OLDEST + NEWEST),
            "Install one of those and name it: make run PYTHON=python3.12, "
            "or on Windows: py -3.12 -m helpers run",
        )


def main(arguments):
    """Set up what the command needs, then run it. Return the exit code."""
    try:
        check_python(sys.version_info)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # a terminal or a pipe may not take every letter
        return _main(arguments)
    except CourseError as error:
        return _fail(error)
    except OSError as error:
        known = _explain(error)
        if known is None:
            raise
        return _fail(known)
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. What is finished stays: the same command goes on from there.\n")
        return 130


def _fail(error):
    """Print a CourseError and return the exit code."""
    sys.stdout.flush()
    sys.stderr.write("error: %s\n       %s\n" % (error.what, error.fix))
    return 1


def _explain(error):
    """Return a CourseError for what a disk refuses, and None for any other OSError."""
    if error.errno == errno.ENOSPC:
        return CourseError("The disk is full.",
                           "Free some space and run this again; `make clean` removes what earlier runs left.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CourseError("%s cannot be written." % (error.filename or "A file of the course"),
                           "Move the course to a folder that is yours, and run this again.")
    return None


def _main(arguments):
    from helpers import setup

    command = arguments[0] if arguments else "help"
    if command in ("-h", "--help"):
        command = "help"
    if command not in COMMANDS:
        raise CourseError("There is no command called %s." % command, "Choose one of: %s." % ", ".join(COMMANDS))
    if command in ("clean", "distclean"):
        return setup.clean(everything=command == "distclean")
    tests = command in NEED_TESTS
    if command == "doctor" and (setup.inside_venv() or not setup.is_set_up(tests)):
        from helpers.doctor import doctor  # it looks at what is there, and installs nothing

        return doctor()
    if setup.inside_venv():
        setup.set_up(tests)
    elif command != "help" and setup.differing_packages(tests):
        python = str(setup.set_up(tests))
        line = [python, "-m", "helpers"] + arguments
        if os.name == "posix":
            os.execv(python, line)
        return subprocess.call(line)
    if command == "help" and setup.differing_packages():
        print("python -m helpers COMMAND, with one of: %s." % ", ".join(COMMANDS))
        print("The first that needs it sets up .venv; `help` says more after that.")
        return 0
    from helpers import cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
