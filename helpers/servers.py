"""Serves an app for a moment, and writes commands for a terminal: an app or words come in, an address or lines out."""

import contextlib
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn


@contextlib.contextmanager
def running(app: object) -> Iterator[str]:
    """Serve an ASGI app on this machine alone while the block runs; yield its address, such as http://127.0.0.1:41234.

    The port is one that is free.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # from here on it takes connections; they wait until the server is up
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def in_terminal(command: list[str], **variables: str) -> str:
    """Return a command as lines for this system's terminal, where ``.venv`` need not be activated.

    ``variables`` are set for it. On Windows the lines are PowerShell's.
    """
    programs = str(Path(sys.executable).parent)
    if sys.platform == "win32":
        quote = "'{}'".format
        words = [quote(word.replace("'", "''")) for word in command]
        lines = [f"$env:PATH = {quote(programs)} + ';' + $env:PATH"]
        lines += [f"$env:{name} = {quote(value)}" for name, value in variables.items()]
        return "\n".join([*lines, f"& {' '.join(words)}\n"])
    lines = [f'export PATH={shlex.quote(programs)}:"$PATH"']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines, f"{shlex.join(command)}\n"])
