"""Starts the servers of a page as programs of their own: a command comes in, an address goes out once it is ready.

Each has a process group of its own, so that what it starts ends with it. All end with the kernel,
also where that is killed: a watcher stands beside each.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from helpers.errors import CourseError
from helpers.paths import ROOT

READY_SECONDS = 120  # MLflow's server takes 10 s here, a small machine four times as long
# Its input ends with the process that holds the other end. Windows has no signal that a program
# without a window gets.
WATCHER = """
import os, signal, subprocess, sys, time
sys.stdin.read()
if os.name == "posix":
    for sign in signal.SIGTERM, signal.SIGKILL:
        try:
            os.killpg(int(sys.argv[1]), sign)
        except ProcessLookupError:
            break
        time.sleep(2)
else:
    subprocess.run(["taskkill", "/t", "/f", "/pid", sys.argv[1]], capture_output=True)
"""
_programs = {}  # the last one that was started for each log


class Program:
    """A program that ``start_program`` started.

    Attributes
    ----------
    address : str
        Such as ``http://127.0.0.1:41234``; empty where its ready line names none.
    log : Path
        What it prints and what it complains of, in one file.
    """

    def __init__(self, process: subprocess.Popen, log: Path):
        self.address, self.log, self._process = "", log, process
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-c", WATCHER, str(process.pid)],
            stdin=subprocess.PIPE,
            **_own_group(),
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def stop(self, seconds: float = 40) -> None:
        """Ask it to end, and wait that long; then end it, and whatever it started and left behind."""
        self._signal("SIGTERM")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """End it and what it started, at once and without a goodbye."""
        self._signal("SIGKILL")
        self._process.wait()
        self._watcher.kill()
        self._watcher.communicate()

    def _signal(self, name):
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(self._process.pid, signal.Signals[name])
        elif self.running:
            subprocess.run(
                ["taskkill", "/t", "/f", "/pid", str(self._process.pid)], capture_output=True
            )

    def _last_words(self):
        lines = [
            line.strip()
            for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        ]
        last = next((line for line in reversed(lines) if line), None)
        return (
            f"the last line that it printed: {last.rstrip('.')}." if last else "it printed nothing."
        )


def start_program(
    command: list[str], ready: str, log: Path, seconds: float = READY_SECONDS, **variables: str
) -> Program:
    """Start a program, and return once it is ready.

    Parameters
    ----------
    command : list of str
        The program and its words.
    ready : str
        The ``http`` address that answers 200 when it is ready; or a regular expression for a line
        that it prints then, whose first group is its address.
    log : Path
        The file for its output. One program a log: who starts another with the same log ends the
        first.
    seconds : float, optional
        How long it may take.
    **variables : str
        Environment variables for it, beside those of this process.

    Raises
    ------
    CourseError
        The address is taken; the program ended, or took too long. It says the last line of the log.
    """
    log = log.resolve()
    _ask_without_proxy()
    if log in _programs:
        _programs.pop(log).stop()
    by_address = ready.startswith(("http://", "https://"))
    if by_address and _is_taken(ready):  # or the stranger would pass for the program
        raise CourseError(
            "port-taken",
            f"Another program listens at {ready} already.",
            "End it, or choose another port.",
        )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            **_own_group(),
        )
    program = _programs[log] = Program(process, log)
    try:
        program.address = _wait(program, ready, by_address, time.monotonic() + seconds)
    except BaseException:  # Ctrl-C, too, while it starts
        program.kill()
        raise
    return program


def _own_group():
    """Return what gives a process a group of its own, so that Ctrl-C in a terminal does not reach it."""
    return (
        {"start_new_session": True}
        if os.name == "posix"
        else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    )


def free_port() -> int:
    """Return a port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(program, ready, by_address, until):
    """Return the program's address once it is ready."""
    while time.monotonic() < until:
        if not program.running:
            raise CourseError(
                "program-ended",
                f"The program {program.log.stem} ended before it was ready; "
                f"{program._last_words()}",
                f"Read its log: {program.log}.",
            )
        if by_address:
            with contextlib.suppress(httpx.TransportError):  # nobody listens yet
                if httpx.get(ready, timeout=5, trust_env=False).status_code == 200:
                    return "{0.scheme}://{0.netloc}".format(urlsplit(ready))
        else:
            whole_lines, _, _ = program.log.read_text(
                encoding="utf-8", errors="replace"
            ).rpartition("\n")
            if found := re.search(ready, whole_lines, re.MULTILINE):
                return found[1] if found.re.groups else ""
        time.sleep(0.1)
    raise CourseError(
        "program-not-ready",
        f"The program {program.log.stem} was not ready in time; {program._last_words()}",
        f"Read its log: {program.log}.",
    )


def _ask_without_proxy():
    """Let this process ask this machine without a proxy, whatever the shell says: a program is one's own."""
    hosts = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    if "127.0.0.1" not in hosts:
        hosts = ",".join([*filter(None, hosts), "127.0.0.1"])
        # The libraries differ in which one they read.
        os.environ.update(no_proxy=hosts, NO_PROXY=hosts)


def _is_taken(address):
    parts = urlsplit(address)
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex((parts.hostname, parts.port)) == 0
