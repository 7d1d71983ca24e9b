"""Runs a program as a container would, without a container: in comes what its image holds, out comes the program.

It sees a root of its own that is read-only but for WRITABLE, is a user without any right, and
reaches itself alone: the network of its own has nothing but loopback. Linux's namespaces do that,
by util-linux, for a user without rights, too.
"""

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from support.service import wait_for

# What stands for the system of an image: programs and libraries, and none of this machine's
# settings.
SYSTEM = ("/bin", "/lib", "/lib64", "/sbin", "/usr", "/etc/ld.so.cache")
WRITABLE = ("/tmp", "/dev/shm")  # the second one is there in every container, however read-only
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENTER = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-c"]
LOOPBACK_UP = """
import fcntl, socket, struct
SET_FLAGS, UP_AND_RUNNING = 0x8914, 0x41
fcntl.ioctl(socket.socket(), SET_FLAGS, struct.pack("16sh14x", b"lo", UP_AND_RUNNING))
"""
# Asks several requests at once, in the program's network; prints status and text of each answer.
CLIENT = """
import http.client, json, sys
from concurrent.futures import ThreadPoolExecutor
port, requests = json.load(sys.stdin)

def ask(request):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(request.get("method", "GET"), request["path"], request.get("body"), request.get("headers", {}))
    answer = connection.getresponse()
    return answer.status, answer.read().decode()

with ThreadPoolExecutor(len(requests)) as pool:
    print(json.dumps(list(pool.map(ask, requests))))
"""


def lacking() -> str | None:
    """Return why this machine runs nothing in namespaces; None where it does."""
    if sys.platform != "linux" or not shutil.which("unshare") or not shutil.which("nsenter"):
        return "needs Linux with util-linux"
    tried = subprocess.run([*ENTER, "mount -t tmpfs tmpfs /tmp"], capture_output=True, text=True)
    return (
        f"this machine allows no user namespaces: {tried.stderr.strip()}"
        if tried.returncode
        else None
    )


@dataclass(frozen=True)
class Image:
    """What a program finds: files of this machine by their place there, its variables, its user, where it starts."""

    files: dict[str, Path]
    variables: dict[str, str]
    user: str  # user:group, two numbers
    folder: str

    def script(self, root: Path, words: list[str]) -> str:
        """Return the shell script that builds the root in a tmpfs at this folder, and runs a program there."""
        there = {
            **{place: Path(place) for place in (*SYSTEM, *DEVICES)},
            "/proc": Path("/proc"),
            "/sys": Path("/sys"),
            sys.base_prefix: Path(sys.base_prefix),
            **self.files,
        }
        steps = [
            [sys.executable, "-S", "-c", LOOPBACK_UP],
            ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", root],
        ]
        for place, source in there.items():
            steps += _put(source, f"{root}{place}", writable=place in ("/proc", "/sys", *DEVICES))
        user, group = self.user.split(":")
        for place in WRITABLE:
            steps += [
                ["mkdir", f"{root}{place}"],
                ["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}{place}"],
            ]
        steps += [
            ["mount", "-o", "remount,bind,ro", root],
            [
                "setpriv",
                "--no-new-privs",
                "unshare",
                "--user",
                f"--map-user={user}",
                f"--map-group={group}",
                f"--root={root}",
                f"--wd={self.folder}",
                "env",
                "-i",
                *(f"{name}={value}" for name, value in self.variables.items()),
                *words,
            ],
        ]
        # The shell stays, so that the program's network can be entered by it; it ends as the
        # program does.
        return "set -e\n" + "\n".join(shlex.join(map(str, step)) for step in steps) + "\nexit 0\n"

    def run(self, folder: Path, words: list[str]) -> subprocess.CompletedProcess:
        """Run a program to its end, with a root in this folder."""
        return subprocess.run(
            [*ENTER, self.script(_root(folder), words)], capture_output=True, text=True
        )

    @contextlib.contextmanager
    def running(self, folder: Path, words: list[str]) -> Iterator["Running"]:
        """Run a program while the block runs, with a root and a log in this folder."""
        with (folder / "log").open("w", encoding="utf-8") as log:
            shell = subprocess.Popen(
                [*ENTER, self.script(_root(folder), words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Running(shell, folder / "log")
        finally:
            for process in (
                [*psutil.Process(shell.pid).children(recursive=True), shell]
                if shell.poll() is None
                else []
            ):
                process.kill()
            shell.wait()


class Running:
    """A program that runs in namespaces."""

    def __init__(self, shell: subprocess.Popen, log: Path):
        self.shell, self._log = shell, log

    def said(self) -> str:
        """Return what it has printed."""
        return self._log.read_text(encoding="utf-8")

    def process(self) -> psutil.Process:
        """Return the program itself."""
        (program,) = psutil.Process(self.shell.pid).children()
        return program

    def enter(self, words: list[str], **options) -> subprocess.Popen:
        """Start a program of this machine in its network."""
        return subprocess.Popen(
            [
                "nsenter",
                f"--target={self.shell.pid}",
                "--user",
                "--net",
                "--preserve-credentials",
                *words,
            ],
            text=True,
            **options,
        )

    def begin(self, port: int, requests: list[dict]) -> subprocess.Popen:
        """Begin to ask all of these at once; ``answers`` has what came of it."""
        client = self.enter(
            [sys.executable, "-S", "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        client.stdin.write(json.dumps([port, requests]))
        client.stdin.close()
        return client

    def ask(self, port: int, path: str, **request) -> tuple[int, str]:
        """Return the status and the text of an answer."""
        ((status, text),) = answers(self.begin(port, [{"path": path} | request]))
        return status, text

    def wait(self, begun: str) -> None:
        """Wait until it has printed this."""
        wait_for(lambda: begun in self.said() or self.shell.poll() is not None, begun, 120)
        assert self.shell.poll() is None, self.said()


def answers(client: subprocess.Popen) -> list[tuple[int, str]]:
    """Return the statuses and the texts that a client of ``begin`` got."""
    text = client.stdout.read()
    client.stdout.close()
    assert client.wait() == 0
    return [tuple(answer) for answer in json.loads(text)]


def _root(folder):
    root = folder / "root"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _put(source, target, writable):
    """Return the steps that put a file or a folder to a place in the root."""
    if not source.exists():
        return []
    parent = ["mkdir", "-p", Path(target).parent]
    # /bin is usr/bin by now.
    if source.is_symlink() and source.is_dir() and source.parent == Path("/"):
        return [parent, ["cp", "-P", source, target]]
    empty = ["mkdir", "-p", target] if source.is_dir() else ["touch", target]
    return [
        parent,
        empty,
        ["mount", "--rbind", source, target],
        *([] if writable else [["mount", "-o", "remount,bind,ro", target]]),
    ]
