"""Reads an offline kit, from a folder or over HTTP: what it holds, whole files of it, whether it is as it was built.

COURSE_KIT names the kit. ``course.kit`` builds one and offers it to a room; set-up reads one on a
bare Python, so this imports the standard library alone.
"""

import contextlib
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
from urllib.parse import quote, urlsplit

from helpers.errors import CourseError
from helpers.files import is_plain, progress_bar
from helpers.models.steps import ask
from helpers.paths import ROOT

MANIFEST, INDEX, WHEELS_INDEX, COURSE = (
    "manifest.json",
    "index.html",
    "wheels/index.html",
    "course.zip",
)
# One more where an older reader would misread what `kit build` writes.
FORMAT = 1
# What `kit build --platform` calls the systems and processors that `platform` names.
PLATFORM_NAMES = {
    ("Windows", "AMD64"): "windows",
    ("Darwin", "arm64"): "macos",
    ("Linux", "x86_64"): "linux",
}
PYTHONS = ("3.11", "3.12", "3.13")
BLOCK = 1 << 20
LARGEST_MANIFEST = 64 << 20
TIMEOUT = 8  # seconds without a byte
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError)


def kit_address() -> str:
    """Return what COURSE_KIT says, empty where it is not set."""
    address = os.environ.get("COURSE_KIT") or ""
    return address if address.strip() else ""


def open_kit() -> "Kit | None":
    """Return the kit that COURSE_KIT names, None where it is not set. Raises CourseError as ``read_kit`` does."""
    return read_kit(kit_address()) if kit_address() else None


def read_kit(address: str, complete: bool = True) -> "Kit":
    """Return the kit at an ``http`` or ``https`` URL or in a folder; a relative folder starts at the course's folder.

    Raises CourseError where it has no answer, is no kit, or, unless ``complete`` is False, is still
    being built.
    """
    kit = Kit(_place(address), {})
    try:
        with kit.open(MANIFEST) as stream:
            text = stream.read(LARGEST_MANIFEST)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.NOT_FOUND:
            raise CourseError(
                "kit-other-answer",
                f"{kit.address} answers with HTTP {error.code} instead of a kit's {MANIFEST}.",
                "A proxy may stand in between, or the server be busy: set NO_PROXY to the kit's address, "
                "and run this again.",
            ) from None
        raise _no_kit(kit) from None
    except (FileNotFoundError, NotADirectoryError):
        raise _no_kit(kit) from None
    except ValueError:  # a host that nobody can have
        raise _no_address(address) from None
    except PermissionError:
        raise CourseError(
            "kit-not-readable",
            f"The kit {kit.address} is there, and you may not read it.",
            "Ask its owner to run: chmod -R a+rX on that folder.",
        ) from None
    except BROKEN as error:
        raise CourseError(
            "kit-no-answer",
            f"The kit {kit.address} has no answer: {reason(error)}.",
            "Check the address, that `kit serve` runs there, and that this machine is in the same "
            "network; or take the kit on a stick and set COURSE_KIT to its folder.",
        ) from None
    return Kit(kit.address, _manifest(text, kit.address, complete))


def _no_kit(kit):
    return CourseError(
        "kit-absent",
        f"{kit.address} is no kit: it has no {MANIFEST}.",
        "Name what `kit serve` printed, such as http://192.168.1.5:8750, or the folder that "
        "`kit build` filled.",
    )


def _no_address(address):
    shown = re.sub("//.*@", "//", address)  # a password stays unsaid
    return CourseError(
        "kit-address",
        f"{shown} is no address that a kit is read from.",
        "Set COURSE_KIT to a URL such as http://192.168.1.5:8750, without a name or a password, or to a "
        "folder.",
    )


def local_address(url: str) -> bool:
    """Tell whether a URL is in this room rather than behind a proxy: such an address is asked directly."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(".local")


@dataclass(frozen=True)
class Kit:
    """A kit that can be read."""

    address: str  # a URL without a slash at its end, or a folder
    manifest: dict  # what manifest.json says; its key `files` has each file's size and sha256

    @property
    def is_url(self) -> bool:
        """Whether it is read over HTTP."""
        return self.address.startswith(("http://", "https://"))

    @property
    def files(self) -> dict[str, dict]:
        """Each file's ``{"size": bytes, "sha256": text}`` by its relative path with forward slashes."""
        return self.manifest["files"]

    def place(self, name: str) -> str:
        """Return the URL or the path of a file, as pip and a reader want it."""
        return f"{self.address}/{quote(name)}" if self.is_url else str(Path(self.address) / name)

    def open(self, name: str) -> contextlib.AbstractContextManager:
        """Open a file for reading: return its binary stream."""
        if not self.is_url:
            return Path(self.place(name)).open("rb")
        proxies = [urllib.request.ProxyHandler({})] if local_address(self.address) else []
        return urllib.request.build_opener(*proxies).open(self.place(name), timeout=TIMEOUT)

    def models(self) -> list[str]:
        """Return the names of the models that it has, sorted."""
        return sorted({name.split("/")[1] for name in self.files if name.startswith("models/")})

    def receipt(self, name: str, track: str) -> dict | None:
        """Return the receipt of one track's folder of a model; None where the kit does not have it.

        Raises CourseError where it is not the one that the manifest has, or lists other files than
        the kit has.
        """
        path, prefix = f"models/{name}/{track}.receipt.json", f"models/{name}/{track}/"
        if path not in self.files:
            return None
        try:
            with self.open(path) as stream:
                text = stream.read(self.files[path]["size"] + 1)
        except BROKEN as error:
            raise self.unread(path, reason(error)) from None
        try:
            receipt = json.loads(text)
            # Names that the manifest has lead nowhere out of a folder.
            whole = (
                hashlib.sha256(text).hexdigest() == self.files[path]["sha256"]
                and {prefix + file for file in receipt["files"]}
                == {file for file in self.files if file.startswith(prefix)}
                and isinstance(receipt["recipe"], dict)
                and isinstance(receipt.setdefault("facts", {}), dict)
            )
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise self.changed(path)
        return receipt

    def fetch(self, name: str, track: str, folder: Path, finished: Path) -> dict[str, str]:
        """Bring one track's folder of a model into ``folder``, and return the sha256 of each file by its name.

        What is whole in ``folder`` or in ``finished`` does not come again, and half a file is
        completed. Raises CourseError where the kit has stopped answering, or has a file that is not
        as it was built.
        """
        prefix = f"models/{name}/{track}/"
        files = {
            file.removeprefix(prefix): [self.place(file), entry["size"], entry["sha256"]]
            for file, entry in self.files.items()
            if file.startswith(prefix)
        }
        order = {
            "kit": self.address,
            "prefix": prefix,
            "files": files,
            "folder": str(folder),
            "finished": str(finished),
        }
        # "*": that process asks this kit and nobody else.
        direct = {"NO_PROXY": "*", "no_proxy": "*"} if local_address(self.address) else {}
        return ask(
            f"Fetching {name} ({track}) from the kit", "helpers.models.download", order, direct
        )

    def problems(self, hashes: bool = True) -> Iterator[str]:
        """Yield a line for each file that is not as it was built; without ``hashes``, sizes alone are compared."""
        total = sum(entry["size"] for entry in self.files.values())
        root = None if self.is_url else Path(self.address).resolve()
        with progress_bar("Checking the kit", total) if hashes else contextlib.nullcontext() as bar:
            for name, entry in self.files.items():
                try:
                    if root and not (root / name).resolve().is_relative_to(root):
                        yield f"{name} lies outside of the kit's folder, behind a link."
                        continue
                    size, digest = (
                        self._measure(name, bar, entry["size"])
                        if hashes
                        else ((root / name).stat().st_size, entry["sha256"])
                    )
                except (FileNotFoundError, NotADirectoryError):
                    yield f"{name} is missing."
                except urllib.error.HTTPError as error:
                    yield f"{name} is missing: the server answers {error.code}."
                except BROKEN as error:
                    yield f"{name} could not be read: {reason(error)}."
                else:
                    if size != entry["size"]:
                        yield f"{name} has {size:,} bytes, and {entry['size']:,} were built."
                    elif digest != entry["sha256"]:
                        yield f"{name} has been changed: its sha256 is another."

    def _measure(self, name, bar, expected):
        """Return the size and the sha256 of a file; of one that does not end where it should, a little more."""
        size, digest = 0, hashlib.sha256()
        with self.open(name) as stream:
            while size <= expected and (block := stream.read(BLOCK)):
                digest.update(block)
                size += len(block)
                bar.update(len(block))
        return size, digest.hexdigest()

    def unknown(self) -> list[str]:
        """Return the files in the kit's folder that are none of its own, sorted."""
        if self.is_url:
            return []
        root, own = Path(self.address), {MANIFEST, ".lock", *self.files}
        return sorted(
            {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()}
            - own
        )

    def unread(self, path: str, why: str) -> CourseError:
        """Return the error for a file that could not be read."""
        return CourseError(
            "kit-unread",
            f"{path} of the kit {self.address} could not be read: {why}.",
            "Check that the kit is still there (`kit serve` runs, or the stick is in) and that "
            "`python -m helpers kit check` finds it whole, and run this again; what is here stays.",
        )

    def changed(self, path: str) -> CourseError:
        """Return the error for a file whose content is another."""
        return CourseError(
            "kit-changed",
            f"{path} of the kit {self.address} is not as it was built, and was not used.",
            "Build or copy the kit again; `python -m helpers kit check` names every such file.",
        )


def as_word(path: object) -> str:
    """Return a path as one word of a command for a terminal, which takes some letters for its own."""
    return (
        shlex.quote(str(path))
        if os.name == "posix" and re.search(r'["$`\\!]', str(path))
        else f'"{path}"'
    )


def build_command(kit: Kit, platforms: tuple[str, ...] = (), pythons: tuple[str, ...] = ()) -> str:
    """Return the command that builds this kit again, with more platforms and Pythons where they are named."""
    words = ["python -m helpers kit build", "DIR" if kit.is_url else as_word(kit.address)]
    for option, key, more in (
        ("--model", "models", ()),
        ("--platform", "platforms", platforms),
        ("--python", "pythons", pythons),
    ):
        names = dict.fromkeys([*kit.manifest[key], *more])
        # A platform that `kit build` does not know is left out; without any, the machine that
        # builds is meant.
        known = [name for name in names if key != "platforms" or name in PLATFORM_NAMES.values()]
        words += [option, *known] if known else []
    return " ".join(words)


def _place(address):
    """Return a URL without what a browser's address line has behind it, or an absolute folder."""
    try:
        if "://" not in address:
            # A folder's name may end in a space.
            folder = (ROOT / Path(address).expanduser()).resolve()
            return str(
                folder if folder.exists() else (ROOT / Path(address.strip()).expanduser()).resolve()
            )
        parts = urlsplit(re.sub(rf"/({INDEX}|{MANIFEST})?([?#].*)?$", "", address.strip()))
        if (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and parts.username is None
        ):
            return parts.geturl()
    except (ValueError, RuntimeError):  # RuntimeError: ~somebody who is not here
        pass
    raise _no_address(address)


def _manifest(text, address, complete):
    """Return the manifest in ``text``, or raise CourseError where it is none that can be trusted to name files."""
    if text.lstrip()[:1] == b"<":
        raise CourseError(
            "kit-other-answer",
            f"{address} answers with a web page instead of a kit's {MANIFEST}.",
            "A proxy or the network's sign-in page may stand in between: sign in, or set NO_PROXY "
            "to the kit's address.",
        )
    try:
        manifest = json.loads(text)
        sound = (
            type(manifest["format"]) is int
            and type(manifest["complete"]) is bool
            and all(
                is_plain(name) and _is_entry(entry) for name, entry in manifest["files"].items()
            )
            # They come back as words of a command in an error.
            and all(
                re.fullmatch(r"[\w.:/@ -]+", word, re.ASCII)
                for key in ("models", "platforms", "pythons")
                for word in manifest[key]
            )
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CourseError(
            "kit-broken",
            f"The {MANIFEST} of the kit {address} is broken.",
            "Build or copy the kit again.",
        )
    if manifest["format"] > FORMAT:
        raise CourseError(
            "kit-newer",
            f"The kit {address} was built by a newer version of the course.",
            f"Take the course from it, too: {COURSE} lies beside its {MANIFEST}.",
        )
    if complete and not manifest["complete"]:
        raise CourseError(
            "kit-incomplete",
            f"The kit {address} is not finished.",
            "Run `kit build` with the same folder again: it goes on where it stopped.",
        )
    return manifest


def _is_entry(entry):
    return (
        type(entry["size"]) is int
        and 0 <= entry["size"] < 1 << 60
        and bool(re.fullmatch("[0-9a-f]{64}", entry["sha256"]))
    )


def reason(error: Exception) -> str:
    """Return why reading failed, without a path or an address."""
    why = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return str(getattr(why, "strerror", None) or why)
