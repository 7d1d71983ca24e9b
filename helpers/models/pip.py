"""Runs pip and finds out why it failed. No other module reads pip's output.

Set-up calls it on a bare Python: it imports the standard library and modules that do the same.
"""

import ast
import errno
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from helpers.errors import CourseError
from helpers.models.steps import last_line, run_program, run_with_bar

# The options of pip that keep the user's values: where packages come from, how they are downloaded,
# and which of them are trusted. The others change what pip does or prints: the course sets these.
USER_OPTIONS = frozenset(
    (
        "index-url",
        "pypi-url",
        "extra-index-url",
        "no-index",
        "find-links",
        "trusted-host",
        "proxy",
        "no-proxy-env",
        "cert",
        "client-cert",
        "keyring-provider",
        "no-input",
        "timeout",
        "default-timeout",
        "retries",
        "resume-retries",
        "cache-dir",
        "no-cache-dir",
        "constraint",
        "build-constraint",
        "only-binary",
        "require-hashes",
        "uploaded-prior-to",
        "use-feature",
        "use-deprecated",
    )
)


@dataclass(frozen=True)
class PipFailure:
    """Why pip failed.

    Attributes
    ----------
    kind : str
        ``"disk-full"``, ``"certificate"``, ``"unreachable"`` (no index answers, or something else
        answers in its place), ``"missing"`` (the index has no file of that package and version for
        this machine), or ``"other"``.
    package : str
        The requirement that is missing, such as ``"torch==2.13.0"``; empty if pip names none.
    line : str
        The last line that pip printed.
    """

    kind: str
    package: str
    line: str


# Why pip failed, by the first pattern that its output contains.
KINDS = {
    "disk-full": "No space left on device",
    "certificate": "CERTIFICATE_VERIFY_FAILED",
    "unreachable": "Retrying|Connection|Read timed out|Name or service|Temporary failure|getaddrinfo",
    "missing": "No matching distribution found for",
}


def read_failure(output: str) -> PipFailure:
    """Return why pip failed, from its output."""
    kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, output)), "other")
    missing = re.search(r"No matching distribution found for (\S+)", output)
    return PipFailure(kind, missing[1] if missing else "", last_line(output))


class PipError(Exception):
    """pip failed: ``output`` is what it printed, ``failure`` says why. Callers turn it into a CourseError."""

    def __init__(self, output: str):
        super().__init__(output)
        self.output = output
        self.failure = read_failure(output)


def run_pip(
    *arguments: str,
    python: str = sys.executable,
    environment: dict[str, str] | None = None,
    on_output: Callable[[str], None] = lambda text: None,
) -> str:
    """Run a Python's pip and return its output; raise PipError if it fails.

    ``environment`` replaces this process's environment.
    """
    variables = dict(os.environ) if environment is None else environment
    command = [python, "-m", "pip", *arguments, "--disable-pip-version-check"]
    settings = users_settings(arguments[0], python, variables)
    return _result(*run_program(command, variables | settings, on_output))


def users_settings(command: str, python: str, variables: dict[str, str]) -> dict[str, str]:
    """Return variables that switch off all of the user's options for a command of pip, except ``USER_OPTIONS``.

    Users set options in the environment and in pip's files. Others than ``USER_OPTIONS`` could make
    pip install elsewhere (``target``, ``user``, ``prefix``), install nothing (``dry-run``) or print
    nothing (``quiet``). pip ignores an empty variable. Raises PipError if pip cannot read its files.
    """
    options = {name: _option(name) for name in variables if name.upper().startswith("PIP_")}
    emptied = {
        name: "" for name, option in options.items() if option not in USER_OPTIONS | {"config-file"}
    }
    if variables.get("PIP_CONFIG_FILE") == os.devnull:
        return emptied
    # With these options in its files, pip would not list them.
    able = {"PIP_QUIET": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    command_line = [python, "-m", "pip", "config", "list"]
    listed = _result(*run_program(command_line, variables | emptied | able, lambda text: None))
    in_environment = {option for name, option in options.items() if variables[name]}
    kept = {
        "PIP_" + option.upper().replace("-", "_"): value
        for option, value in read_settings(command, listed).items()
        if option not in in_environment
    }
    return emptied | kept | {"PIP_CONFIG_FILE": os.devnull}


def users_options(command: str, python: str, variables: dict[str, str]) -> dict[str, str]:
    """Return the ``USER_OPTIONS`` that the user's variables and files set, as values by the options' names.

    Raises PipError if pip cannot read its files.
    """
    settings = variables | users_settings(command, python, variables)
    options = {
        _option(name): value for name, value in settings.items() if name.upper().startswith("PIP_")
    }
    return {option: value for option, value in options.items() if value and option in USER_OPTIONS}


def read_settings(command: str, listed: str) -> dict[str, str]:
    """Return the ``USER_OPTIONS`` for a command in the output of ``pip config list``."""
    found = re.findall(rf"^(global|{command})\.([\w-]+)=(.+)$", listed, re.MULTILINE)
    # A setting for the command itself overrides a global one.
    for_all_first = sorted(found, key=lambda row: row[0] == command)
    return {
        option: ast.literal_eval(value)
        for _, option, value in for_all_first
        if option in USER_OPTIONS
    }


def _option(name):
    return name[len("PIP_") :].lower().replace("_", "-")


def download_wheel(title: str, requirement: str, folder) -> None:
    """Download one wheel into ``folder``, with a progress bar; raise CourseError, or OSError for a full disk."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--progress-bar",
        "raw",
        "--disable-pip-version-check",
        "--dest",
        folder,
        requirement,
    ]
    try:
        settings = users_settings("download", sys.executable, dict(os.environ))
        _result(*run_with_bar(title, command, r"Progress (\d+) of (\d+)", settings))
    except PipError as error:
        raise pip_error(error.failure, title) from None


def _result(code, output):
    if code:
        raise PipError(output)
    return output


def pip_error(failure: PipFailure, title: str) -> Exception:
    """Return what to raise if pip failed at the step ``title``: OSError for a full disk, else CourseError."""
    if failure.kind == "disk-full":
        return OSError(errno.ENOSPC, "No space left on device")
    if failure.kind == "certificate":
        return CourseError(
            "pip-certificate",
            f"{title} failed: the package index shows a certificate that is not accepted; this machine's clock says "
            f"{datetime.now():%Y-%m-%d %H:%M}.",
            "Set the clock if it is wrong; if it is right, a proxy opens the connection: set PIP_CERT to the "
            "certificate that its owner gives you.",
        )
    if failure.kind in ("missing", "unreachable"):
        return CourseError(
            "pip-unreachable",
            f"{title} failed: the package index does not answer, or something else answers in its place.",
            "Check the network, the proxy (HTTPS_PROXY) and the index that pip uses, and run this again; "
            "or choose a model that is already in the cache.",
        )
    return CourseError(
        "pip-failed",
        f"{title} failed: {failure.line.rstrip('.')}.",
        "Look at pip's own settings (python -m pip config list) and run this again; if it stays, report "
        "it with that line.",
    )
