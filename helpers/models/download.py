"""Brings files over HTTP into a folder: goes on where it stopped, asks again where that helps, and checks each file.

Comes in: a URL, a size and a hash of each; goes out: whole files. It stands apart as it runs in a
process of its own: the Hub's client reads once, at its import, whether it may use the network, and
in the rest of the course it may not.
"""

import contextlib
import hashlib
import math
import os
import queue
import ssl
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from helpers.models.kit import BLOCK, Kit, reason
from helpers.models.steps import answer, is_of_the_disk

BUSY = (408, 429, 500, 502, 503, 504)
TRIES, LONGEST_WAIT = 5, 60  # seconds
BROKEN = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)


# --- when to ask again ------------------------------------------------------------------------


class Patience(NamedTuple):
    """How long nothing may come: after ``read`` seconds a connection is made anew, after ``lost`` the network is lost.

    A byte every few seconds is a slow network, and no lost one.
    """

    read: float
    lost: float


def patience(asked: str | None) -> Patience:
    """Return how long to wait for a byte. ``asked`` is what a user has set HF_HUB_DOWNLOAD_TIMEOUT or its like to."""
    # The rest of the eight is for one more connection: whoever looks at a bar that stands still is
    # told within ten.
    read = int(asked) if asked and asked.isdecimal() and int(asked) > 0 else 5
    return Patience(read, max(8, 1.5 * read))


class Silence:
    """Seconds since something came from the network, but for those that the disk took; and how many ``blocks`` came."""

    def __init__(self):
        self.blocks = 0
        self.heard()

    def heard(self) -> None:
        """Note that something came."""
        self.since = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count no silence while this runs."""
        self.since = math.inf
        try:
            yield
        finally:
            self.heard()

    def seconds(self) -> float:
        """Return how long nothing has come."""
        return max(time.monotonic() - self.since, 0)


def seconds_to_wait(
    status: int | None,
    failures: int,
    headers: Mapping[str, str],
    silent: float = 0,
    lost: float = math.inf,
) -> float | None:
    """Return how long to wait before a request is made again, and None where it is not.

    ``status`` is the answer's, None for a connection that broke or was never made. ``failures``
    counts the requests in a row that have brought nothing, this one included. What the server asks
    for in the ``headers`` Retry-After or RateLimit counts, up to LONGEST_WAIT. Where there is no
    answer, nobody waits until nothing has come for ``lost`` seconds; ``silent`` of them are over.
    """
    if failures >= TRIES or status not in (None, *BUSY):
        return None
    wait = 2 ** (failures - 1)
    if status is None:
        return wait if silent + wait < lost else None
    asked, limit = headers.get("Retry-After", ""), parse_ratelimit_headers(headers)
    return min(
        int(asked) if asked.isdigit() else limit.reset_in_seconds if limit else wait, LONGEST_WAIT
    )


def retried(
    call: Callable[[], Any],
    broken: tuple[type[Exception], ...],
    limits: Patience,
    silence: Silence | None = None,
) -> Any:
    """Call, and call again where the server is busy or the connection is ``broken``, as ``seconds_to_wait`` says.

    ``call`` tells ``silence`` what comes: one that brought something is no failure. Raises
    httpx.ReadTimeout where nothing has come for as long as ``limits`` say, whatever it waits for: a
    name look-up has no limit of its own, and a connection is tried at each of a host's addresses.
    """
    failures, silence = 0, silence or Silence()
    silence.heard()
    while True:
        before = silence.blocks
        try:
            return _watched(call, silence, limits.lost)
        except (HfHubHTTPError, *broken) as error:
            failures = 1 if silence.blocks > before else failures + 1
            response = getattr(error, "response", None)
            wait = (
                None
                if certificate_trouble(error)
                else seconds_to_wait(
                    getattr(response, "status_code", None),
                    failures,
                    getattr(response, "headers", {}),
                    silence.seconds(),
                    limits.lost,
                )
            )
            if wait is None:
                raise
        if response is not None:
            print(f"Busy: the next try is in {wait} s", flush=True)  # helpers.models.steps shows it
            with silence.paused():
                time.sleep(wait)
        else:
            time.sleep(wait)


def _watched(call, silence, lost):
    """Call in a thread, which is left behind when it is silent for too long: nothing can end it."""
    outcome = queue.SimpleQueue()

    def run():
        try:
            outcome.put((call(), None))
        except BaseException as error:  # it is raised below
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    while True:
        try:
            result, error = outcome.get(timeout=0.1)
        except queue.Empty:
            if silence.seconds() >= lost:
                raise httpx.ReadTimeout(f"nothing came for {lost:g} s") from None
            continue
        if error:
            raise error
        return result


def certificate_trouble(error: BaseException | None) -> str | None:
    """Return OpenSSL's reason where a certificate was refused, else None."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


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
        digest, blob = (
            hashlib.sha256(),
            hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False),
        )
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                if not self.sha256:
                    blob.update(block)
        right = digest.hexdigest() == self.sha256 if self.sha256 else blob.hexdigest() == self.blob
        return digest.hexdigest() if right else None


class ContentError(Exception):
    """A file came with another hash than its list has. Whoever wanted it makes a sentence of that."""


class LengthError(Exception):
    """A file came longer or shorter than its list has it, such as a proxy's page in its place."""


class Download:
    """Files on their way into ``folder``, by relative path; some may be in the folder ``finished`` already.

    ``sha256`` has the hash of each that is here and right, ``current`` is the one that is on its
    way.
    """

    def __init__(
        self, files: dict[str, File], folder: Path, finished: Path, headers: dict | None = None
    ):
        self.files, self.folder, self.finished, self.headers = files, folder, finished, headers
        self.sha256, self.current, self._printed = {}, "", 0.0

    def path(self, name: str) -> Path:
        """Return where a file is that is here."""
        return next(path for path in (self.folder / name, self.finished / name) if path.exists())

    def missing(self, names: Collection[str]) -> int:
        """Return the bytes that are still to come."""
        return sum(
            max(
                self.files[name].size
                - max(
                    map(_size, (self.folder / name, self._incomplete(name), self.finished / name))
                ),
                0,
            )
            for name in names
        )

    def fetch(self, names: Collection[str], bar: bool = True) -> None:
        """Bring each file that is not here yet, one after the other, and check it; print ``Progress done of total``.

        Raises ContentError, what the disk refuses, or what httpx and the Hub's client raise.
        """
        total, done = sum(self.files[name].size for name in names) if bar else 0, 0
        for name in names:
            self.current = name
            if name not in self.sha256 and not any(
                self._take(name, place / name) for place in (self.folder, self.finished)
            ):
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
            limits, silence = patience(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT")), Silence()
            retried(
                lambda: self._get(file, incomplete, show, limits, silence), BROKEN, limits, silence
            )
        else:
            _copy(Path(file.url), incomplete, show)
        incomplete.replace(arrived)
        if not self._take(name, arrived):
            arrived.unlink()
            if not resumed:
                raise ContentError
            # The half that was here may be what is wrong: the whole file gets a try.
            self._fetch_one(name, show)

    def _get(self, file, incomplete, show, limits, silence):
        """Bring what is still missing of a file; what has come stays, so that another try goes on from there.

        Neither the Hub's client nor its http_get: that one asks again by itself, for a minute where
        a network is lost.
        """
        start = _size(incomplete)
        if start == file.size:
            incomplete.touch()  # a file of nothing
            return
        # A range is one of the file itself.
        headers = (self.headers or {}) | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with get_session().stream(
            "GET", file.url, headers=headers, timeout=limits.read
        ) as response:
            hf_raise_for_status(response)
            # Or it knows no ranges.
            start = start if response.status_code == httpx.codes.PARTIAL_CONTENT else 0
            length = response.headers.get("Content-Length", "")
            if (
                length.isdecimal()
                and int(length) != file.size - start
                and "Content-Encoding" not in response.headers
            ):
                # What is here stays.
                raise LengthError(f"{length} bytes come, and {file.size - start} are missing")
            with incomplete.open("ab" if start else "wb") as stream:
                for block in response.iter_bytes():
                    silence.blocks += 1
                    with silence.paused():
                        stream.write(block)
                        stream.flush()
                        show(stream.tell())
        if _size(incomplete) != file.size:
            raise LengthError(f"{_size(incomplete)} bytes came, and {file.size} are listed")

    def _incomplete(self, name):
        """Return the file that a download goes on in. Its name holds the hash: other content, other file."""
        return (
            self.folder
            / f"{name}.{(self.files[name].sha256 or self.files[name].blob)[:12]}.incomplete"
        )

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
    download = Download(
        {name: File(*file) for name, file in order["files"].items()},
        Path(order["folder"]),
        Path(order["finished"]),
    )
    try:
        download.fetch(download.files)
    except Exception as error:
        if is_of_the_disk(error):
            raise
        name = order["prefix"] + download.current
        if isinstance(error, ContentError | LengthError):
            raise kit.changed(name) from error
        if isinstance(error, HfHubHTTPError):
            raise kit.unread(name, f"the server answers {error.response.status_code}") from error
        why = str(error).rstrip(".") if isinstance(error, httpx.HTTPError) else reason(error)
        raise kit.unread(name, why) from error
    return download.sha256


if __name__ == "__main__":
    os._exit(answer(work, sys.argv[1]))  # at once: a thread may be left that waits for a server
