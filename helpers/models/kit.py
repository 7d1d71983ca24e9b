"""Reads an offline kit, from a folder or over HTTP: its list of files, a model, whether every file is as it was built.

The environment variable COURSE_KIT names the kit. ``course.kit`` builds and serves one. Set-up reads
it on a bare Python, so this module imports the standard library and modules that do the same.
"""

import errno
import hashlib
import http.client
import ipaddress
import json
import os
import re
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

from helpers.errors import CourseError
from helpers.files import is_plain, progress_bar, sha256
from helpers.paths import ROOT

# The list of all files, as `sha256sum` writes it: it is written last, so a kit that has it is whole.
SUMS = "SHA256SUMS"
# The list of the build before, while a kit is being built.
UNFINISHED = "SHA256SUMS.unfinished"
COURSE = "course.zip"
INDEX = "index.html"
# A page of links to the wheels with their hashes, which pip checks.
WHEELS_INDEX = "wheels/index.html"
# What `kit build --platform` calls the systems and processors that `platform` names.
PLATFORM_NAMES = {
    ("Windows", "AMD64"): "windows",
    ("Darwin", "arm64"): "macos",
    ("Linux", "x86_64"): "linux",
}
PYTHONS = ("3.11", "3.12", "3.13")
BLOCK = 1 << 20  # bytes
TIMEOUT = 8  # seconds without a byte
CONNECTION_ERRORS = (urllib.error.URLError, http.client.HTTPException, OSError)


def kit_address() -> str:
    """Return the value of COURSE_KIT; an empty text if it is not set."""
    address = os.environ.get("COURSE_KIT", "")
    return address if address.strip() else ""


def open_kit() -> "Kit | None":
    """Return the kit that COURSE_KIT names, None if it is not set. Raises CourseError as ``read_kit`` does."""
    return read_kit(kit_address()) if kit_address() else None


def read_kit(address: str) -> "Kit":
    """Return the kit at an ``http`` or ``https`` URL or in a folder; a relative folder starts at the course's folder.

    Raises CourseError if nothing answers there, or something that is not a finished kit.
    """
    kit = Kit(_normal_address(address), {})
    try:
        text = b"".join(kit._read(SUMS))
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.NOT_FOUND:
            raise _no_kit(kit) from None
        raise CourseError(
            "kit-other-answer",
            f"{kit.address} answers with HTTP {error.code} instead of a kit's {SUMS}.",
            "A proxy may stand in between, or the server be busy: set NO_PROXY to the kit's address, "
            "and run this again.",
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise _no_kit(kit) from None
    except PermissionError:
        raise CourseError(
            "kit-not-readable",
            f"You have no right to read the kit {kit.address}.",
            "Ask its owner to run: chmod -R a+rX on that folder.",
        ) from None
    except (*CONNECTION_ERRORS, ValueError) as error:  # ValueError: a host name that cannot be one
        raise CourseError(
            "kit-no-answer",
            f"The kit {kit.address} does not answer: {reason(error)}.",
            "Check the address, that `kit serve` runs there, and that this machine is in the same "
            "network; or take the kit on a stick and set COURSE_KIT to its folder.",
        ) from None
    return Kit(kit.address, _read_sums(text, kit.address))


def _no_kit(kit):
    """Return the error for an address without SHA256SUMS: no kit, or one that is being built."""
    try:
        with kit.open(UNFINISHED):
            return CourseError(
                "kit-incomplete",
                f"The kit {kit.address} is not finished.",
                "Run `kit build` with the same folder again: it continues where it stopped.",
            )
    except CONNECTION_ERRORS:
        return CourseError(
            "kit-absent",
            f"{kit.address} is no kit: it has no {SUMS}.",
            "Name the address that `kit serve` printed, such as http://192.168.1.5:8750, or the "
            "folder of `kit build`; a kit without that file is from an older course: build it again.",
        )


def _read_sums(text, address):
    """Return the hash of each file that SHA256SUMS lists, by its path."""
    lines = text.decode("utf-8", errors="replace").splitlines()
    files = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if files and all(
        is_plain(name) and re.fullmatch("[0-9a-f]{64}", digest) for name, digest in files.items()
    ):
        return files
    if text.lstrip()[:1] == b"<":
        raise CourseError(
            "kit-other-answer",
            f"{address} answers with a web page instead of a kit's {SUMS}.",
            "A proxy or the network's sign-in page may stand in between: sign in, or set NO_PROXY "
            "to the kit's address.",
        )
    raise CourseError(
        "kit-broken", f"{SUMS} of the kit {address} is broken.", "Build or copy the kit again."
    )


def local_address(url: str) -> bool:
    """Tell whether a URL is in the local network: such an address is asked directly, without a proxy."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(".local")


@dataclass(frozen=True)
class Kit:
    """An offline kit.

    Attributes
    ----------
    address : str
        A URL without a slash at its end, or a folder.
    files : dict of str to str
        The SHA-256 of each file by its relative path.
    """

    address: str
    files: dict[str, str]

    @property
    def is_url(self) -> bool:
        """Whether the kit is read over HTTP."""
        return self.address.startswith(("http://", "https://"))

    def place(self, name: str) -> str:
        """Return the URL or the path of a file."""
        return f"{self.address}/{quote(name)}" if self.is_url else str(Path(self.address) / name)

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading."""
        if not self.is_url:
            return Path(self.place(name)).open("rb")
        proxies = [urllib.request.ProxyHandler({})] if local_address(self.address) else []
        return urllib.request.build_opener(*proxies).open(self.place(name), timeout=TIMEOUT)

    def _read(self, name):
        """Yield the blocks of a file."""
        with self.open(name) as stream:
            while block := stream.read(BLOCK):
                yield block
            # At the end of a connection that broke, Python's HTTP client returns no more bytes and no error.
            if getattr(stream, "length", 0):
                raise ConnectionResetError(errno.ECONNRESET, "the connection broke")

    def _read_or_raise(self, name):
        """Yield the blocks of a file; raise CourseError if it cannot be read."""
        try:
            yield from self._read(name)
        except CONNECTION_ERRORS as error:
            raise CourseError(
                "kit-unread",
                f"{name} of the kit {self.address} could not be read: {reason(error)}.",
                "Check that `kit serve` still runs, or that the USB stick is plugged in, and run this "
                "again; copied files are kept.",
            ) from None

    def models(self) -> list[str]:
        """Return the folder names of its models, sorted."""
        return sorted({name.split("/")[1] for name in self.files if name.startswith("models/")})

    def receipt(self, model_folder: str, track: str) -> dict | None:
        """Return the receipt (see helpers.models.folders) of one track's folder of a model; None without one."""
        name = f"models/{model_folder}/{track}.receipt.json"
        if name not in self.files:
            return None
        text = b"".join(self._read_or_raise(name))
        if hashlib.sha256(text).hexdigest() != self.files[name]:
            raise self._changed(name)
        return json.loads(text)

    def fetch(self, model_folder: str, track: str, folder: Path) -> None:
        """Copy one track's files of a model into ``folder``, except for those that have the right hash.

        Raises CourseError if the kit stops answering or a file has another hash, and what the disk
        raises.
        """
        sizes = self.receipt(model_folder, track)["files"]
        with progress_bar(
            f"Fetching {model_folder} ({track}) from the kit", sum(sizes.values())
        ) as bar:
            for file, size in sizes.items():
                name = f"models/{model_folder}/{track}/{file}"
                if (folder / file).is_file() and sha256(folder / file) == self.files[name]:
                    bar.update(size)
                else:
                    self._copy(name, folder / file, bar)

    def _copy(self, name, target, bar):
        target.parent.mkdir(parents=True, exist_ok=True)
        incomplete = target.with_name(target.name + ".incomplete")
        digest = hashlib.sha256()
        with incomplete.open("wb") as copy:
            for block in self._read_or_raise(name):
                digest.update(block)
                copy.write(block)
                bar.update(len(block))
        if digest.hexdigest() != self.files[name]:
            incomplete.unlink()
            raise self._changed(name)
        incomplete.replace(target)

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each file that is missing or not as it was built."""
        with progress_bar("Checking the kit", len(self.files)) as bar:
            for name, expected in self.files.items():
                digest = hashlib.sha256()
                try:
                    for block in self._read(name):
                        digest.update(block)
                except CONNECTION_ERRORS as error:
                    yield f"{name} could not be read: {reason(error)}."
                else:
                    if digest.hexdigest() != expected:
                        yield f"{name} is not as it was built."
                bar.update(1)

    def _changed(self, name):
        return CourseError(
            "kit-changed",
            f"{name} of the kit {self.address} is not as it was built, and was not used.",
            "Build or copy the kit again; `python -m helpers kit check` names every such file.",
        )


def as_word(path: object) -> str:
    """Return a path as one word of a command for a terminal."""
    return (
        shlex.quote(str(path))
        if os.name == "posix" and re.search(r'["$`\\!]', str(path))
        else f'"{path}"'
    )


def _normal_address(address):
    """Return a URL without a page's name or a slash at its end, or an absolute folder."""
    try:
        if "://" not in address:
            # The name of a folder may end in a space.
            folder = (ROOT / Path(address).expanduser()).resolve()
            stripped = (ROOT / Path(address.strip()).expanduser()).resolve()
            return str(folder if folder.exists() else stripped)
        parts = urlsplit(re.sub(rf"/({INDEX}|{SUMS})?([?#].*)?$", "", address.strip()))
        port = parts.port  # raises ValueError if it is none
        if (
            parts.scheme in ("http", "https")
            and parts.hostname
            and port != 0
            and not parts.username
        ):
            return parts.geturl()
    except (ValueError, RuntimeError):  # RuntimeError: ~somebody who has no account here
        pass
    shown = re.sub("//.*@", "//", address)  # without a password
    raise CourseError(
        "kit-address",
        f"{shown} is not an address that a kit can have.",
        "Set COURSE_KIT to a URL such as http://192.168.1.5:8750, without a name or a password, or to a "
        "folder.",
    )


def reason(error: Exception) -> str:
    """Return why reading failed, without a path or an address."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    why = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return str(getattr(why, "strerror", None) or why)
