"""Brings files over HTTP into a folder: goes on where it stopped, asks again where that helps, and checks each file.

Comes in: a URL, a size and a hash of each; goes out: whole files. It stands apart as it runs in a process of its own:
the Hub's client reads once, at its import, whether it may use the network, and in the rest of the course it may not.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from huggingface_hub import constants, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers
from tqdm import tqdm

from helpers.models.kit import BLOCK, Kit, reason
from helpers.models.steps import answer, is_of_the_disk

# Bytes that a cut connection may lose. The client's own blocks are of 10 MB: a minute of a bad network.
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
BUSY = (408, 429, 500, 502, 503, 504)
TRIES, LONGEST_WAIT = 5, 60  # seconds


# --- when to ask again ------------------------------------------------------------------------


def seconds_to_wait(status: int | None, failures: int, headers: Mapping[str, str]) -> float | None:
    """Return how long to wait before a request is made again, and None where it is not.

    ``status`` is the answer's, None for a connection that broke in the middle of one. ``failures`` counts the requests
    in a row that have brought nothing, this one included. What the server asks for in the ``headers`` Retry-After or
    RateLimit counts, up to LONGEST_WAIT.
    """
    if failures >= TRIES or status not in (None, *BUSY):
        return None
    asked, limit = headers.get("Retry-After", ""), parse_ratelimit_headers(headers)
    wait = int(asked) if asked.isdigit() else limit.reset_in_seconds if limit else 2 ** (failures - 1)
    return min(wait, LONGEST_WAIT)


def retried(call: Callable[[], Any], broken: tuple[type[Exception], ...], arrived: Callable[[], int] = int) -> Any:
    """Call, and call again where the server is busy or the connection is ``broken``, as ``seconds_to_wait`` says.

    ``arrived`` returns the bytes so far: a call that brought some is no failure.
    """
    failures, hooks = 0, get_session().event_hooks["response"]
    if _refuse_busy not in hooks:
        # The Hub's client would ask a busy server again itself, for as long as it says. Where a connection is lost, the
        # client's own tries remain: five, a second apart.
        hooks.append(_refuse_busy)
    while True:
        before = arrived()
        try:
            return call()
        except (HfHubHTTPError, *broken) as error:
            failures = 1 if arrived() > before else failures + 1
            response = getattr(error, "response", None)
            wait = seconds_to_wait(getattr(response, "status_code", None), failures, getattr(response, "headers", {}))
            if wait is None:
                raise
        if response is not None:
            print(f"Busy: the next try is in {wait} s", flush=True)  # helpers.models.steps shows it
        time.sleep(wait)


def _refuse_busy(response):
    if response.status_code in BUSY:
        hf_raise_for_status(response)


# --- files ------------------------------------------------------------------------------------


class File(NamedTuple):
    """A file that can be had: its URL or, in a kit, its path; its size in bytes; its sha256, or git's hash of it."""

    url: str
    size: int
    sha256: str | None
    blob: str | None = None

    def read_hash(self, path: Path) -> str | None:
        """Return the sha256 of what is at ``path``, and None where that is not this file."""
        if not path.is_file() or path.stat().st_size != self.size:
            return None
        digest, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if not self.sha256:
                    blob.update(block)
        right = digest.hexdigest() == self.sha256 if self.sha256 else blob.hexdigest() == self.blob
        return digest.hexdigest() if right else None


class ContentError(Exception):
    """A file came with another hash than its list has. Whoever wanted it makes a sentence of that."""


class Download:
    """Files on their way into ``folder``, by relative path; some may be in the folder ``finished`` already.

    ``sha256`` has the hash of each that is here and right, ``current`` is the one that is on its way.
    """

    def __init__(self, files: dict[str, File], folder: Path, finished: Path, headers: dict | None = None):
        self.files, self.folder, self.finished, self.headers = files, folder, finished, headers
        self.sha256, self.current, self._printed = {}, "", 0.0

    def path(self, name: str) -> Path:
        """Return where a file is that is here."""
        return next(path for path in (self.folder / name, self.finished / name) if path.exists())

    def missing(self, names: Collection[str]) -> int:
        """Return the bytes that are still to come."""
        return sum(max(self.files[name].size - max(map(_size, (
            self.folder / name, self._incomplete(name), self.finished / name))), 0) for name in names)

    def fetch(self, names: Collection[str], bar: bool = True) -> None:
        """Bring each file that is not here yet, one after the other, and check it; print ``Progress done of total``.

        Raises ContentError, what the disk refuses, or what httpx and the Hub's client raise.
        """
        total, done = sum(self.files[name].size for name in names) if bar else 0, 0
        for name in names:
            self.current = name
            if name not in self.sha256 and not any(self._take(name, place / name)
                                                   for place in (self.folder, self.finished)):
                self._fetch_one(name, lambda arrived, done=done: self._show(done + arrived, total))
            done += self.files[name].size
            self._show(done, total)

    def _fetch_one(self, name, show):
        file, incomplete, arrived = self.files[name], self._incomplete(name), self.folder / name
        arrived.parent.mkdir(parents=True, exist_ok=True)
        if _size(incomplete) > file.size:
            incomplete.unlink()
        resumed = _size(incomplete) > 0
        if file.url.startswith(("http://", "https://")):
            # http_get has asked again itself where a connection was lost, but not where it was reset.
            retried(lambda: self._get(file, incomplete, show), (httpx.ReadError,), lambda: _size(incomplete))
        else:
            _copy(Path(file.url), incomplete, show)
        incomplete.replace(arrived)
        if not self._take(name, arrived):
            arrived.unlink()
            if not resumed:
                raise ContentError
            self._fetch_one(name, show)  # the half that was here may be what is wrong: the whole file gets a try

    def _get(self, file, incomplete, show):
        class Bar(tqdm):
            def __init__(self, *arguments, **options):
                super().__init__(disable=True)

            def update(self, n=1):
                show(_size(incomplete))

        # Opened anew for each try, so that it goes on where the last one stopped.
        with incomplete.open("ab") as stream:
            http_get(file.url, stream, resume_size=stream.tell(), expected_size=file.size, headers=self.headers,
                     tqdm_class=Bar)

    def _incomplete(self, name):
        """Return the file that a download goes on in. Its name holds the hash: other content, other file."""
        return self.folder / f"{name}.{(self.files[name].sha256 or self.files[name].blob)[:12]}.incomplete"

    def _take(self, name, path):
        digest = self.files[name].read_hash(path)
        if digest:
            self.sha256[name] = digest
        return digest

    def _show(self, done, total):
        if total and (time.monotonic() - self._printed > 0.2 or done == total):
            self._printed = time.monotonic()
            print(f"Progress {done} of {total}", flush=True)


def _size(path):
    return path.stat().st_size if path.is_file() else 0


def _copy(source, target, show):
    with source.open("rb") as whole, target.open("ab") as copy:
        whole.seek(copy.tell())
        while block := whole.read(BLOCK):
            copy.write(block)
            show(copy.tell())


# --- a kit ------------------------------------------------------------------------------------


def work(order: dict) -> dict:
    """Bring the files of a kit that ``Kit.fetch`` asks for, and return the sha256 of each by name."""
    kit = Kit(order["kit"], {})
    download = Download({name: File(*file) for name, file in order["files"].items()},
                        Path(order["folder"]), Path(order["finished"]))
    try:
        download.fetch(download.files)
    except Exception as error:
        if is_of_the_disk(error):
            raise
        name = order["prefix"] + download.current
        if isinstance(error, ContentError) or "Consistency check failed" in str(error):  # http_get: another length
            raise kit.changed(name) from error
        if isinstance(error, HfHubHTTPError):
            raise kit.unread(name, f"the server answers {error.response.status_code}") from error
        why = str(error).rstrip(".") if isinstance(error, httpx.HTTPError) else reason(error)
        raise kit.unread(name, why) from error
    return download.sha256


if __name__ == "__main__":
    sys.exit(answer(work, sys.argv[1]))
