"""A server of plain files on this machine's loopback, which can be told to misbehave."""

import contextlib
import functools
import http.server
import threading
from pathlib import Path


class _Files(http.server.SimpleHTTPRequestHandler):
    """A server of plain files that knows ranges where it is told to, and drops connections where it is told to."""

    disable_nagle_algorithm = True

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        self.server.asked.append((self.path, self.headers["Range"]))
        if self.path in self.server.gone:
            return  # without a word
        if self.server.busy.get(self.path):
            status, seconds = self.server.busy[self.path].pop(0)
            self.send_response(status)
            self.send_header("Retry-After", seconds)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.server.answer is not None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.answer)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        if self.headers["Range"] and self.server.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Content-Type", self.guess_type(path))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        cut = self.server.cuts.pop(self.path, None)
        self.wfile.write(data[start:cut])
        if cut and self.server.leaves:
            self.server.gone.add(self.path)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def web_server(
    folder, cuts=None, ranges=True, answer=None, log=None, leaves=False, gone=(), busy=None
):
    """Serve a folder but for the paths ``gone``, and give its URL.

    ``cuts`` has the byte at which the first answer for a path breaks off; where it ``leaves``, none
    follows. ``busy`` has the first answers for a path, each a status and its Retry-After.
    """
    handler = functools.partial(_Files, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.cuts = dict(cuts or {})
        server.ranges = ranges
        server.answer = answer
        server.busy = {path: list(answers) for path, answers in (busy or {}).items()}
        server.asked = [] if log is None else log
        server.gone = set(gone)
        server.leaves = leaves
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
