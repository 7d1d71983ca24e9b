"""Starts servers and other programs for a page, and ends them with the page's kernel.

Each program has its own process group, so that the processes that it starts end with it. A watcher
process ends it even if the kernel is killed.
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
# The watcher's input ends when the kernel ends. Windows has no signal for a program without a window.
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
_programs = {}  # the last program that was started for each log


class Program:
    """A program that was started by ``start_program``.

    Attributes
    ----------
    address : str
        Such as ``http://127.0.0.1:41234``; empty if its ready line has no address.
    log : Path
        The file with its output and its errors.
    """

    def __init__(self, process: subprocess.Popen, log: Path):
        self.address = ""
        self.log = log
        self._process = process
        self._watcher = subprocess.Popen(
            [sys.executable, "-S", "-c", WATCHER, str(process.pid)],
            stdin=subprocess.PIPE,
            **_own_group(),
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def stop(self, seconds: float = 40) -> None:
        """Ask the program to end, and wait for it; then kill it and the processes that it started."""
        self._signal("SIGTERM")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """Kill the program and the processes that it started."""
        self._signal("SIGKILL")
        self._process.wait()
        self._watcher.kill()
        self._watcher.communicate()

    def _signal(self, name):
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):  # all of its processes have ended
                os.killpg(self._process.pid, signal.Signals[name])
        elif self.running:
            subprocess.run(
                ["taskkill", "/t", "/f", "/pid", str(self._process.pid)], capture_output=True
            )

    def _last_line(self):
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
        The program and its arguments.
    ready : str
        The ``http`` address that answers 200 when the program is ready; or a regular expression for
        the line that it then prints, whose first group is its address.
    log : Path
        The file for its output. Starting another program with the same log ends the first one.
    seconds : float, optional
        How long the start may take.
    **variables : str
        Additional environment variables for the program.

    Raises
    ------
    CourseError
        The address is taken, or the program ended or took too long; then with the log's last line.
    """
    log = log.resolve()
    _ask_without_proxy()
    if log in _programs:
        _programs.pop(log).stop()
    by_address = ready.startswith(("http://", "https://"))
    if by_address and _is_taken(ready):  # the other program would answer in its place
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
    except BaseException:  # also for Ctrl-C
        program.kill()
        raise
    return program


def _own_group():
    """Return the options that give a process its own group: Ctrl-C in a terminal then does not reach it."""
    return (
        {"start_new_session": True}
        if os.name == "posix"
        else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    )


def free_port() -> int:
    """Return a port of this machine on which no program listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(program, ready, by_address, until):
    """Return the program's address once it is ready."""
    while time.monotonic() < until:
        if not program.running:
            raise CourseError(
                "program-ended",
                f"The program {program.log.stem} ended before it was ready; {program._last_line()}",
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
        f"The program {program.log.stem} was not ready in time; {program._last_line()}",
        f"Read its log: {program.log}.",
    )


def _ask_without_proxy():
    """Add this machine to NO_PROXY, so that this process reaches its own programs without a proxy."""
    hosts = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    if "127.0.0.1" not in hosts:
        hosts = ",".join([*filter(None, hosts), "127.0.0.1"])
        # Libraries differ in which of the two they read.
        os.environ.update(no_proxy=hosts, NO_PROXY=hosts)


def _is_taken(address):
    parts = urlsplit(address)
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex((parts.hostname, parts.port)) == 0
