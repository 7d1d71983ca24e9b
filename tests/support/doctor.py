"""What the doctor meets in its tests: a server with one answer, a program of one line, and variables of no network."""

import contextlib
import http.server
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

YEAR = 365 * 24 * 3600
LOGIN = b"<html><body><form action='/login'>Please log in.</form></body></html>"
CLOSED = "http://127.0.0.1:9"
# Whatever this machine's pip and shell are set to, a test asks what the test names.
NOBODY = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": CLOSED + "/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "HF_ENDPOINT": CLOSED,
    "COURSE_KIT": "",
    "JAVA_HOME": "",
    "http_proxy": "",
    # In lower case they count more.
    "https_proxy": "",
    "all_proxy": "",
    "no_proxy": "127.0.0.1,localhost",
}


@contextlib.contextmanager
def answer_everything() -> Iterator[Callable[..., int]]:
    """Yield a function that starts a server with one answer to everything, and returns its port."""
    servers = []

    def start(body, kind="text/html", status=200, clock=0, certificate=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815, the name that http.server calls

            def date_time_string(self, timestamp=None):
                return formatdate(time.time() + clock, usegmt=True)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        servers.append(server)
        return server.server_port

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
