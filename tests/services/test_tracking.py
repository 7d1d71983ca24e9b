"""The tracking store in processes of their own: a full disk, and what a process that ends leaves of a server's models.

Run: python -m helpers test tests/services/test_tracking.py
"""

import http.server
import sys
import threading
from pathlib import Path

import pytest

from helpers.paths import BUILD


class NoStore(http.server.BaseHTTPRequestHandler):
    """Answers every request as a tracking server does that has no such thing."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = "logged-models" in self.path
        body = (
            b"{}"
            if found
            else b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}'
        )
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address():
    """Return the address of a tracking server."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoStore) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_disk_that_is_full_is_said_to_be(mounted):
    code = (
        "import os, sys; from helpers import CourseError, tracking_store\n"
        "try: tracking_store(f\"sqlite:///{os.environ['COURSE_CACHE']}/mlflow.db\")\n"
        "except CourseError as error: print(error.code)"
    )
    assert mounted("size=100k", [sys.executable, "-c", code]).stdout == "disk-full\n"


def test_copies_of_a_servers_models_go_away_with_the_process_and_those_of_killed_ones_at_the_next(
    python, address
):
    code = f"""
import os, sys, tempfile
from pathlib import Path
from helpers import tracking_store
tracking_store("http://{address}")
tracking_store("http://{address}")
copy = Path(tempfile.mkdtemp(), "weights")
copy.write_text("x")
print(os.getpid(), copy, flush=True)
if sys.argv[1:]:
    os._exit(9)
"""
    for words, left in ((("killed",), True), ((), False)):
        number, path = python("-c", code, *words).stdout.strip().split(" ", 1)
        assert Path(path).exists() == left
        assert Path(path).parents[1] == BUILD / f"kernel-{number}"
        assert Path(path).parents[1].exists() == left
        if left:
            killed = Path(path)
    assert not killed.exists()
