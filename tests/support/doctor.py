"""What the doctor's tests share: a server with one answer, a program of one line, variables of no network."""

import contextlib
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

CLOSED = "http://127.0.0.1:9"
# Whatever this machine's pip and shell are set to, a test asks what the test names.
NO_NETWORK = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": CLOSED + "/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "HF_ENDPOINT": CLOSED,
    "COURSE_KIT": "",
    "JAVA_HOME": "",
    # In lower case they count more.
    "http_proxy": "",
    "https_proxy": "",
    "all_proxy": "",
    "no_proxy": "127.0.0.1,localhost",
}


@contextlib.contextmanager
def answer_everything() -> Iterator[Callable[..., str]]:
    """Yield a function that starts a server with one answer to everything, and returns its URL."""
    servers = []

    def start(body, status=200):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def write_program(folder: Path, name: str, says: str) -> Path:
    """Write a program that prints a line to standard error; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        (folder / f"{name}.bat").write_text(f"@echo {says} 1>&2\n", encoding="utf-8")
    else:
        (folder / name).write_text(f"#!/bin/sh\necho '{says}' >&2\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder
