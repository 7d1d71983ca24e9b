"""Runs the long steps of a model's preparation as programs, with one progress bar; turns their failures into errors."""

import codecs
import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable

from helpers.errors import CourseError
from helpers.files import FORBIDDEN, FULL, progress_bar
from helpers.paths import ROOT


def run_program(
    command: list, environment: dict[str, str], on_output: Callable[[str], None]
) -> tuple[int, str]:
    """Run a program, pass its output to ``on_output`` as it arrives, and kill it if this process is interrupted.

    Returns its exit code and all its output. Its standard input is a pipe that closes when this
    process ends; `run_worker` exits then.
    """
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        env=environment | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"},
    )
    output = ""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    try:
        while block := process.stdout.read(65536):
            text = decoder.decode(block)
            output += text
            on_output(text)
        return process.wait(), output
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def run_with_bar(
    title: str,
    command: list,
    progress: str | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a program with one progress bar, and return its exit code and all its output.

    ``progress`` is a pattern with two groups, done and total, in the program's output.
    ``environment`` is added to this process's environment.
    """
    tail = ""
    unfinished_line = ""
    with progress_bar(title, 100) as bar:

        def on_output(text):
            nonlocal tail, unfinished_line
            tail = (tail + text)[-4000:]
            lines, _, unfinished_line = (unfinished_line + text).rpartition("\n")
            for note in re.findall(r"^Note for the user: (.+)$", lines, re.MULTILINE):
                bar.write(note, file=sys.stdout)
            found = re.findall(progress, tail) if progress else []
            if found and int(found[-1][1]):
                bar.update(100 * int(found[-1][0]) // int(found[-1][1]) - bar.n)

        code, output = run_program(command, dict(os.environ, **(environment or {})), on_output)
        if code == 0:
            bar.update(100 - bar.n)
    return code, output


def run_step(
    title: str,
    command: list,
    progress: str | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a program as ``run_with_bar`` does, and return its output.

    If the program fails, this raises the error that ``run_worker`` printed, OSError for a full disk, or
    CourseError with the program's last line.
    """
    code, output = run_with_bar(title, command, progress, environment)
    if code == 0:
        return output
    told = re.findall(r'^\{"(error|disk)": (\[.*\])\}$', output, re.MULTILINE)
    if told:
        raise {"error": CourseError, "disk": OSError}[told[-1][0]](*json.loads(told[-1][1]))
    if "No space left on device" in output or "os error 28" in output:
        raise OSError(errno.ENOSPC, "No space left on device")
    raise CourseError(
        "step-failed",
        f"{title} failed: {last_line(output).rstrip('.')}.",
        "Run this again; if it stays, report it with that line.",
    )


def call_in_subprocess(title: str, module: str, request: dict) -> dict:
    """Return ``work(request)`` of a module of ours, run in another process, which may use the network."""
    output = run_step(
        title,
        [sys.executable, "-m", module, json.dumps(request)],
        r"Progress (\d+) of (\d+)",
        {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
    )
    return json.loads(output.splitlines()[-1])


def notify_user(note: str) -> None:
    """Show the user a sentence, from within a process that ``call_in_subprocess`` started."""
    print(f"Note for the user: {note}", flush=True)


def run_worker(work: Callable[[dict], dict], request: str) -> int:
    """Call ``work``, and print what it returns or raises as one line of JSON, for ``call_in_subprocess``.

    Returns the exit code.
    """
    # This process ends when the one that called `call_in_subprocess` ends: two must not write to the same folder.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    try:
        result = work(json.loads(request))
        code = 0
    except CourseError as error:
        result = {"error": error.args}
        code = 1
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        result = {"disk": [error.errno, error.strerror]}
        code = 1
    print("\n" + json.dumps(result), flush=True)
    return code


def is_of_the_disk(error: Exception) -> bool:
    """Tell whether an error is about the disk: it is full, not writable, or has too small a limit for one file."""
    return isinstance(error, OSError) and error.errno in (*FULL, *FORBIDDEN, errno.EFBIG)


def last_line(output: str) -> str:
    """Return the last line of a program's output that says anything, cut at 300 characters."""
    return next(
        (line.strip()[:300] for line in reversed(output.splitlines()) if line.strip()), "no output"
    )
