"""Offers a kit to a room over HTTP: what its manifest lists, to be read, and nothing else of the disk."""

import contextlib
import errno
import socket
from pathlib import Path

import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse
from starlette.routing import Route

from helpers.errors import CourseError
from helpers.models.kit import INDEX, MANIFEST, WHEELS_INDEX, Kit, as_word, build_command, read_kit
from serving.service.connection import make_protocol

DOWNLOAD_SECONDS = 3_600  # for one file: a model of 2.6 GB at 6 Mbit a second
PAGES = {"": INDEX, "wheels/": WHEELS_INDEX}


def serve(folder: Path, host: str, port: int) -> int:
    """Serve a kit until Ctrl-C, and return the exit code.

    ``host`` is the address to listen on: ``127.0.0.1`` for this machine alone, ``0.0.0.0`` for the
    room. Port 0 takes any that is free. Raises CourseError for no kit, one with missing files, or
    an address that cannot be had.
    """
    kit = read_kit(str(folder))
    problems = list(kit.problems(hashes=False))
    if problems:
        raise CourseError(
            "kit-damaged",
            f"The kit {folder} is not whole: {problems[0]}",
            f"Build it again: {build_command(kit)}.",
        )
    # Bound here, not by uvicorn: two servers that start at once cannot both find the port free.
    with _listen(folder, host, port) as listener:
        port = listener.getsockname()[1]
        print(f"The kit {folder}, {len(kit.files)} files   (Ctrl-C ends it)")
        for address in _addresses() if host == "0.0.0.0" else [host]:
            print(f"  http://{f'[{address}]' if ':' in address else address}:{port}")
        says = "Participants open that address. Whoever is in this network can read the kit, and nothing else here."
        if host in ("127.0.0.1", "localhost", "::1"):
            says = (
                "This machine alone can read it. To offer it to everybody in the network: "
                f"python -m helpers kit serve {as_word(folder)} --host 0.0.0.0"
            )
        print(says, flush=True)
        try:
            make_server(kit).run(sockets=[listener])
        # Uvicorn raises the signal again once it has closed its connections.
        except KeyboardInterrupt:
            print("Ended.")
    return 0


def make_server(kit: Kit) -> uvicorn.Server:
    """Return the server of a kit, which ends connections that never send a whole request."""
    return uvicorn.Server(
        uvicorn.Config(
            application(kit),
            http=make_protocol(DOWNLOAD_SECONDS),
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
    )


def application(kit: Kit) -> Starlette:
    """Return the ASGI application that serves the files of a kit in a folder."""
    root = Path(kit.address).resolve()
    served = {MANIFEST, *kit.files}

    def answer(request):
        path = request.path_params["path"]
        name = PAGES.get(path, path)
        # A name is looked up among those listed, as it stands: no path is put together from a
        # request.
        with contextlib.suppress(OSError):  # it may go while it is looked at
            if (
                name in served
                and (file := (root / name).resolve()).is_relative_to(root)
                and file.is_file()
            ):
                return FileResponse(
                    file, stat_result=file.stat(), headers={"cache-control": "no-cache"}
                )
        raise HTTPException(404, "The kit has no such file.")

    return Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "HEAD"])])


def _listen(folder, host, port):
    """Return a socket that listens, or say why there is none."""
    if not host:
        raise CourseError(
            "host-empty",
            "--host is empty.",
            "Name 127.0.0.1 for this machine alone, or 0.0.0.0 for the room.",
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=256)
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
    """Return this machine's own IPv4 addresses in the networks that it is in."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        entry.address
        for name, entries in psutil.net_if_addrs().items()
        if name in up
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    return found or ["127.0.0.1"]
