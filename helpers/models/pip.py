"""Runs pip, and reads what it says when it fails: its words are read here and nowhere else.

Set-up calls it on a bare Python, so it imports the standard library alone.
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
from helpers.models.steps import last_line, run_behind_a_bar, run_program

# The options that a user's variables and files may set for the course's pip: where packages come
# from, how they get here, and which of them are trusted. All others say what pip does with them, or
# how it tells so: that is the course's.
USERS = frozenset(
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
        answers in its place), ``"missing"`` (no file of that package and version fits), or
        ``"other"``.
    package : str
        The requirement that is missing, such as ``"torch==2.13.0"``; empty where pip names none.
    line : str
        The last line that pip printed.
    """

    kind: str
    package: str
    line: str


# The first pattern that pip's output holds says why it failed.
KINDS = {
    "disk-full": "No space left on device",
    "certificate": "CERTIFICATE_VERIFY_FAILED",
    "unreachable": "Retrying|Connection|Read timed out|Name or service|Temporary failure|getaddrinfo",
    "missing": "No matching distribution found for",
}


def read_failure(output: str) -> PipFailure:
    """Read why pip failed from all that it printed."""
    kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, output)), "other")
    missing = re.search(r"No matching distribution found for (\S+)", output)
    return PipFailure(kind, missing[1] if missing else "", last_line(output))


class PipError(Exception):
    """pip ended with an error; ``failure`` says which, ``output`` is all that it printed. Callers raise CourseError."""

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
    """Run a Python's pip and return what it printed; raise PipError where it fails.

    ``environment`` takes the place of this process's environment.
    """
    variables = dict(os.environ) if environment is None else environment
    command = [python, "-m", "pip", *arguments, "--disable-pip-version-check"]
    settings = users_settings(arguments[0], python, variables)
    return _result(*run_program(command, variables | settings, on_output))


def users_settings(command: str, python: str, variables: dict[str, str]) -> dict[str, str]:
    """Return variables that leave a command of pip no options of the user's but ``USERS``.

    The user's are in the environment and in pip's files. With others pip would install elsewhere
    (``target``, ``user``, ``prefix``), nothing (``dry-run``) or in silence (``quiet``). To pip, an
    empty variable is none. Raises PipError where pip cannot read its files.
    """
    options = {name: _option(name) for name in variables if name.upper().startswith("PIP_")}
    emptied = {
        name: "" for name, option in options.items() if option not in USERS | {"config-file"}
    }
    if variables.get("PIP_CONFIG_FILE") == os.devnull:
        return emptied
    # What the files say of these may keep pip from listing them.
    able = {"PIP_QUIET": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    command_line = [python, "-m", "pip", "config", "list"]
    listed = _result(*run_program(command_line, variables | emptied | able, lambda text: None))
    there = {option for name, option in options.items() if variables[name]}
    kept = {
        "PIP_" + option.upper().replace("-", "_"): value
        for option, value in read_settings(command, listed).items()
        if option not in there
    }
    return emptied | kept | {"PIP_CONFIG_FILE": os.devnull}


def users_options(command: str, python: str, variables: dict[str, str]) -> dict[str, str]:
    """Return the values of those of ``USERS`` that the user's variables and files set, by the options' names.

    Raises PipError where pip cannot read its files.
    """
    settings = variables | users_settings(command, python, variables)
    options = {
        _option(name): value for name, value in settings.items() if name.upper().startswith("PIP_")
    }
    return {option: value for option, value in options.items() if value and option in USERS}


def read_settings(command: str, listed: str) -> dict[str, str]:
    """Return those of ``USERS`` that pip's files hold for a command, from what ``pip config list`` printed."""
    found = re.findall(rf"^(global|{command})\.([\w-]+)=(.+)$", listed, re.MULTILINE)
    # What stands under the command's own name wins.
    for_all_first = sorted(found, key=lambda row: row[0] == command)
    return {
        option: ast.literal_eval(value) for _, option, value in for_all_first if option in USERS
    }


def _option(name):
    return name[len("PIP_") :].lower().replace("_", "-")


def download_wheel(title: str, requirement: str, folder) -> None:
    """Download one wheel into ``folder``, behind a bar; raise CourseError or, where the disk is full, OSError."""
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
        _result(*run_behind_a_bar(title, command, r"Progress (\d+) of (\d+)", settings))
    except PipError as error:
        raise explain(error.failure, title) from None


def _result(code, output):
    if code:
        raise PipError(output)
    return output


def explain(failure: PipFailure, title: str) -> Exception:
    """Return what to raise where pip failed at ``title``: an OSError for a full disk, a CourseError for the rest."""
    if failure.kind == "disk-full":
        return OSError(errno.ENOSPC, "No space left on device")
    if failure.kind == "certificate":
        return CourseError(
            "pip-certificate",
            f"{title} failed: the package index shows a certificate that is not accepted; this machine's clock says "
            f"{datetime.now():%Y-%m-%d %H:%M}.",
            "Set the clock if it is off; if it is right, a proxy opens the connection: set PIP_CERT to the certificate "
            "that its owner gives you.",
        )
    if failure.kind in ("missing", "unreachable"):
        return CourseError(
            "pip-unreachable",
            f"{title} failed: the package index has no answer, or something else answers in its place.",
            "Check the network, the proxy (HTTPS_PROXY) and the index that pip uses, and run this again; "
            "or choose a model that is already in the cache.",
        )
    return CourseError(
        "pip-failed",
        f"{title} failed: {failure.line.rstrip('.')}.",
        "Look at pip's own settings (python -m pip config list) and run this again; if it stays, report "
        "it with that line.",
    )
