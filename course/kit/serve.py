"""Serves a kit to the local network, and checks one. ``python -m http.server`` in the folder would do as well."""

import errno
import socket
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from helpers.errors import CourseError
from helpers.models.kit import as_word, read_kit


class KitServer(ThreadingHTTPServer):
    """Python's file server, with a longer queue: a workshop's participants connect at the same moment."""

    request_queue_size = 256

    def handle_error(self, request, client_address):
        """Print nothing about a participant who interrupts a download."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class KitHandler(SimpleHTTPRequestHandler):
    """Serves files without a log, and closes a connection that is silent for a minute."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds

    def log_message(self, *arguments):
        """Print nothing: forty participants ask for thousands of files."""


def serve(folder: Path, host: str, port: int) -> int:
    """Serve a kit until Ctrl-C, and return the exit code.

    ``host`` is ``127.0.0.1`` for this machine only, ``0.0.0.0`` for the local network. Port 0 takes any free
    one. Raises CourseError if the folder is no kit, or the address cannot be used.
    """
    kit = read_kit(str(folder))
    with _listen(folder, host, port) as server:
        port = server.server_address[1]
        print(f"The kit {folder}, {len(kit.files)} files   (Ctrl-C ends it)")
        for address in _addresses() if host == "0.0.0.0" else [host]:
            print(f"  http://{address}:{port}")
        says = "Participants open that address. Everybody in this network can read this folder, and nothing else."
        if host == "localhost" or host.startswith("127."):
            says = (
                "Only this machine can read it. To serve it to everybody in the network: "
                f"python -m helpers kit serve {as_word(folder)} --host 0.0.0.0"
            )
        print(says, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("Ended.")
    return 0


def _listen(folder, host, port):
    """Return the server, or raise a CourseError that says why it cannot listen."""
    try:
        return KitServer((host, port), partial(KitHandler, directory=str(folder)))
    except OSError as error:
        if error.errno == errno.EADDRINUSE or getattr(error, "winerror", None) == 10048:
            other = port + 1 if port < 65535 else port - 1
            again = f"python -m helpers kit serve {as_word(folder)} --host {host} --port {other}"
            raise CourseError(
                "port-taken", f"Port {port} is taken.", f"Choose another one: {again}."
            ) from None
        raise CourseError(
            "host-refused",
            f"This machine cannot listen on {host}, port {port}: {error.strerror or error}.",
            "Use --host 0.0.0.0 for every address of this machine, and a port above 1023.",
        ) from None


def _addresses():
    """Return this machine's IPv4 addresses in its networks."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    return found or ["127.0.0.1"]


def check(address: str) -> int:
    """Print a line for each file of a kit that is missing or not as it was built; return 1 if there is any."""
    kit = read_kit(address)
    problems = list(kit.problems())
    for problem in problems:
        print(f"FAIL  {problem}")
    if problems:
        fix = (
            "Tell the person who serves it."
            if kit.is_url
            else "Build it again, with the same command."
        )
        print(f"{len(problems)} of {len(kit.files)} files are not as they were built. {fix}")
    else:
        print(f"All {len(kit.files)} files are as they were built.")
    return int(bool(problems))
