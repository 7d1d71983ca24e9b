"""Runs one long step of a model's set-up in a process of its own, behind one progress bar.

It turns what a failed step printed into two sentences. It knows nothing of models.
"""

import errno
import json
import os
import re
import subprocess
import sys
from datetime import datetime

from helpers.errors import CourseError
from helpers.kit import progress_bar
from helpers.paths import ROOT


def run_step(title, command, progress=None, environment=None):
    """Run one long step.

    Parameters
    ----------
    title : str
        Stands beside the bar.
    command : list
        Program and arguments. Its standard input ends when this process does.
    progress : str, optional
        A pattern with two groups, done and total, in what the program prints.
    environment : dict of str to str, optional
        Added to this process's environment.

    Returns
    -------
    str
        What the program printed.

    Raises
    ------
    CourseError
        The step failed.
    OSError
        The disk is full.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, bufsize=0,
        env=dict(os.environ, PYTHONUTF8="1", PYTHONUNBUFFERED="1", **(environment or {})),
    )
    output = ""
    try:
        with progress_bar(title, 100) as bar:
            while block := process.stdout.read(65536):
                text = block.decode("utf-8", errors="replace")
                output += text
                for seconds in re.findall(r"Waiting ([\d.]+)s before retry", text):
                    bar.write(f"The Hub is busy and asks for a pause of {seconds} s.", file=sys.stdout)
                found = re.findall(progress, output[-4000:]) if progress else []
                if found and int(found[-1][1]):
                    bar.update(100 * int(found[-1][0]) // int(found[-1][1]) - bar.n)
            if process.wait() == 0:
                bar.update(100 - bar.n)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()
    if process.returncode:
        raise _explain(title, output, "pip" in command)
    return output


def _explain(title, output, is_pip):
    """Turn what a failed step printed into the error that helps."""
    told = re.findall(r'^\{"error": .*\}$', output, re.MULTILINE)
    if told:
        return CourseError(*json.loads(told[-1])["error"])
    if "No space left on device" in output or "os error 28" in output:
        return OSError(errno.ENOSPC, "No space left on device")
    if is_pip and "CERTIFICATE_VERIFY_FAILED" in output:
        return CourseError(
            f"{title} failed: the package index shows a certificate that is not accepted; this machine's clock says "
            f"{datetime.now():%Y-%m-%d %H:%M}.",
            "Set the clock if it is off; if it is right, a proxy opens the connection: set PIP_CERT to the certificate "
            "that its owner gives you.")
    if is_pip and "DO NOT MATCH THE HASHES" in output:
        return CourseError(f"{title} failed: a file came with other content than the package index lists.",
                           "Run this again; if it stays, something on the way changes files: ask who runs the proxy.")
    if is_pip and re.search(r"No matching distribution|Name or service|Retrying|Temporary failure|Connection", output):
        return CourseError(
            f"{title} failed: the package index has no answer, or something else answers in its place.",
            "Check the network, the proxy (HTTPS_PROXY) and the index that pip uses, and run this again; "
            "or choose a model that is already in the cache.")
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
    return CourseError(f"{title} failed: {last[:300]}", "Run this again; if it stays, report it with that line.")
