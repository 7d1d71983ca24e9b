"""Runs a program that takes long in a process of its own: its output comes in, a bar or two sentences go out."""

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
    """Run a program, hand on what it prints as it comes, and end it when this process is interrupted.

    Returns its exit code and all that it printed. Its standard input ends when this process does.
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
    try:
        while block := process.stdout.read(65536):
            text = block.decode("utf-8", errors="replace")
            output += text
            on_output(text)
        return process.wait(), output
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def run_behind_a_bar(
    title: str,
    command: list,
    progress: str | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a program behind one progress bar, and return its exit code and all that it printed.

    ``progress`` is a pattern with two groups, done and total, in what the program prints.
    ``environment`` is added to this process's environment.
    """
    tail = ""
    with progress_bar(title, 100) as bar:

        def on_output(text):
            nonlocal tail
            tail = (tail + text)[-4000:]
            for note in re.findall(r"^Note for the user: (.+)$", text, re.MULTILINE):
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
    """Run one long step of a model's set-up as ``run_behind_a_bar`` does, and return what it printed.

    Raises CourseError where it failed, its own one where ``answer`` printed one, and OSError for
    what the disk refused.
    """
    code, output = run_behind_a_bar(title, command, progress, environment)
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


def ask(title: str, module: str, order: dict, environment: dict[str, str] | None = None) -> dict:
    """Let a module of ours do its ``work`` in a process of its own, which may use the network; return its answer."""
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    output = run_step(
        title,
        [sys.executable, "-m", module, json.dumps(order)],
        r"Progress (\d+) of (\d+)",
        online | (environment or {}),
    )
    return json.loads(output.splitlines()[-1])


def tell(note: str) -> None:
    """Show a sentence to whoever waits for this process, and for its ``answer``."""
    print(f"Note for the user: {note}", flush=True)


def answer(work: Callable[[dict], dict], order: str) -> int:
    """Do ``work`` for the process that called ``ask``: print what it returns or raises as a line of JSON."""
    # When that process ends, however it ends, so does this one: nobody else may write to its
    # folder.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    try:
        result, code = work(json.loads(order)), 0
    except CourseError as error:
        result, code = {"error": error.args}, 1
    except OSError as error:
        if not is_of_the_disk(error):
            raise
        result, code = {"disk": [error.errno, error.strerror]}, 1
    print("\n" + json.dumps(result), flush=True)
    return code


def is_of_the_disk(error: Exception) -> bool:
    """Tell whether an error is what the disk or its owner refuses, which is no fault of whoever sent the file."""
    return isinstance(error, OSError) and error.errno in (*FULL, *FORBIDDEN, errno.EFBIG)


def last_line(output: str) -> str:
    """Return the last line of a program's output that says anything, cut at 300 characters."""
    return next(
        (line.strip()[:300] for line in reversed(output.splitlines()) if line.strip()), "no output"
    )
