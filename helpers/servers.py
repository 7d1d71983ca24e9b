"""Serves an ASGI app while a block runs, and writes commands for the reader's terminal."""

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
    """Serve an ASGI app on a free loopback port while the block runs; yield its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # connections now wait until the server is ready
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def in_terminal(command: list[str], **variables: str) -> str:
    """Return lines that run a command in this system's terminal, in which ``.venv`` need not be activated.

    ``variables`` are environment variables for it. On Windows the lines are for PowerShell.
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
