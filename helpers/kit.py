"""Reads an offline kit, from a folder or over HTTP: what it holds, whole files of it, whether it is as it was built.

COURSE_KIT names the kit. ``kit_build`` makes one and ``kit_serve`` offers it to a room. Set-up reads a kit on a
bare Python: standard library only, and tqdm where there is a bar to show.
"""

import contextlib
import errno
import hashlib
import http.client
import ipaddress
import json
import os
import platform
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit

from helpers.errors import CourseError
from helpers.paths import ROOT

MANIFEST, INDEX, WHEELS_INDEX, COURSE = "manifest.json", "index.html", "wheels/index.html", "course.zip"
# One more where an older reader would misread what `kit build` writes.
FORMAT = 1
# What `kit build --platform` calls the systems and processors that `platform` names.
PLATFORM_NAMES = {("Windows", "AMD64"): "windows", ("Darwin", "arm64"): "macos", ("Linux", "x86_64"): "linux"}
PYTHONS = ("3.11", "3.12", "3.13")
BLOCK = 1 << 20
LARGEST_MANIFEST = 64 << 20
TIMEOUT = 30  # seconds without a byte
TRIES = 5  # in a row, without a byte gained
# What the disk of the participant refuses, which is no fault of the kit.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def kit_address():
    """Return what COURSE_KIT says, empty where it is not set."""
    return (os.environ.get("COURSE_KIT") or "").strip()


def open_kit():
    """Return the kit that COURSE_KIT names.

    Returns
    -------
    Kit or None
        None where COURSE_KIT is not set.

    Raises
    ------
    CourseError
        It has no answer, is no kit, or is not finished.
    """
    return read_kit(kit_address()) if kit_address() else None


def read_kit(address, complete=True):
    """Read the manifest of a kit.

    Parameters
    ----------
    address : str
        An ``http`` or ``https`` URL, or a folder. A relative folder starts at the course's folder.
    complete : bool, optional
        Whether a kit that is still being built is refused.

    Returns
    -------
    Kit

    Raises
    ------
    CourseError
        It has no answer, is no kit, or is not finished.
    """
    kit = Kit(_normal(address), {})
    try:
        with contextlib.closing(kit.open(MANIFEST)[0]) as stream:
            text = stream.read(LARGEST_MANIFEST)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.NOT_FOUND:
            raise CourseError(f"{kit.address} answers with HTTP {error.code} instead of a kit's {MANIFEST}.",
                              "A proxy may stand in between, or the server be busy: set NO_PROXY to the kit's address, "
                              "and run this again.") from None
        raise _no_kit(kit) from None
    except (FileNotFoundError, NotADirectoryError):
        raise _no_kit(kit) from None
    except ValueError:
        raise _no_address(address) from None
    except (*BROKEN, OSError) as error:
        raise CourseError(f"The kit {kit.address} has no answer: {_reason(error)}.",
                          "Check the address, that `kit serve` runs there, and that this machine is in the same "
                          "network; or take the kit on a stick and set COURSE_KIT to its folder.") from None
    return Kit(kit.address, _manifest(text, kit.address, complete))


def _no_kit(kit):
    return CourseError(f"{kit.address} is no kit: it has no {MANIFEST}.",
                       "Name what `kit serve` printed, such as http://192.168.1.5:8750, or the folder that "
                       "`kit build` filled.")


def _no_address(address):
    shown = re.sub("//.*@", "//", address)  # a password stays unsaid
    return CourseError(f"{shown} is no address that a kit is read from.",
                       "Set COURSE_KIT to a URL such as http://192.168.1.5:8750, without a name or a password, or to a "
                       "folder.")


def local_address(url):
    """Tell whether a URL is in this room rather than behind a proxy: such an address is asked directly."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(".local")


@dataclass(frozen=True)
class Kit:
    """A kit that can be read.

    Attributes
    ----------
    address : str
        URL without a slash at its end, or folder.
    manifest : dict
        What ``manifest.json`` says; its key ``files`` has each file's size and sha256.
    """

    address: str
    manifest: dict

    @property
    def is_url(self):
        """Whether it is read over HTTP."""
        return self.address.startswith(("http://", "https://"))

    @property
    def files(self):
        """Each file's ``{"size": bytes, "sha256": text}`` by its relative path with forward slashes."""
        return self.manifest["files"]

    def place(self, name):
        """Return the URL or the path of a file, as pip and a reader want it."""
        return f"{self.address}/{quote(name)}" if self.is_url else str(Path(self.address) / name)

    def open(self, name, start=0):
        """Open a file for reading.

        Parameters
        ----------
        name : str
            Relative path with forward slashes.
        start : int, optional
            The first byte that is wanted.

        Returns
        -------
        tuple
            The binary stream, and where it starts: 0 from a server that knows no ranges.
        """
        if not self.is_url:
            stream = Path(self.place(name)).open("rb")  # noqa: SIM115 - the caller closes it
            stream.seek(start)
            return stream, start
        url = self.place(name)
        proxies = [urllib.request.ProxyHandler({})] if local_address(url) else []
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        answer = urllib.request.build_opener(*proxies).open(request, timeout=TIMEOUT)
        return answer, start if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0

    def models(self):
        """Return the names of the models that it has, sorted."""
        return sorted({name.split("/")[1] for name in self.files if name.startswith("models/")})

    def receipt(self, name, part):
        """Return the receipt of one part of a model.

        Parameters
        ----------
        name : str
            A model of ``models()``.
        part : str
            ``"transformers"`` or ``"onnx"``.

        Returns
        -------
        dict or None
            With the keys ``recipe`` and ``files``; None where the kit does not have that part.

        Raises
        ------
        CourseError
            The receipt is not the one that the manifest has, or names other files than the kit has.
        """
        path = f"models/{name}/{part}.receipt.json"
        if path not in self.files:
            return None
        try:
            with contextlib.closing(self.open(path)[0]) as stream:
                text = stream.read(self.files[path]["size"] + 1)
        except (*BROKEN, OSError) as error:
            raise self._unread(path, error) from None
        if hashlib.sha256(text).hexdigest() != self.files[path]["sha256"]:
            raise self._changed(path)
        try:
            receipt = json.loads(text)
            # Names that the manifest has lead nowhere out of a folder.
            whole = {f"models/{name}/{part}/{file}" for file in receipt["files"]} == set(self._part(name, part)) \
                and isinstance(receipt["recipe"], dict) and isinstance(receipt.setdefault("facts", {}), dict)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise self._changed(path)
        return receipt

    def fetch(self, name, part, folder, finished=None):
        """Bring every file of one part of a model into a folder, check each one's sha256, and return these by file.

        What is whole in ``folder`` stays, and half a file, with ``.part`` behind its name, is completed.

        Parameters
        ----------
        name : str
            A model of ``models()``.
        part : str
            ``"transformers"`` or ``"onnx"``.
        folder : pathlib.Path
            It exists.
        finished : pathlib.Path, optional
            A folder that may have some of the files already: these are left out.

        Returns
        -------
        dict of str to str
            The sha256 of every file of the part.

        Raises
        ------
        CourseError
            The kit lacks that part, stopped answering, or has a file that is not as it was built.
        """
        wanted = self._part(name, part)
        if not wanted:
            raise CourseError(f"The kit {self.address} does not have {name} ({part}).",
                              f"It has {', '.join(self.models()) or 'no model'}; build it with: "
                              f"python -m helpers kit build DIR --model {name}")
        done = 0
        with progress_bar(f"Fetching {name} ({part}) from the kit",
                          sum(entry["size"] for entry in wanted.values())) as bar:
            for path, entry in wanted.items():
                short = path.removeprefix(f"models/{name}/{part}/")
                if not any(is_size(place / short, entry["size"]) and sha256(place / short) == entry["sha256"]
                           for place in filter(None, (folder, finished))):
                    (folder / short).parent.mkdir(parents=True, exist_ok=True)
                    self._fetch_file(path, folder / short, bar, done)
                done += entry["size"]
                bar.update(done - bar.n)
        return {path.removeprefix(f"models/{name}/{part}/"): entry["sha256"] for path, entry in wanted.items()}

    def size(self, name, part):
        """Return the bytes of one part of a model."""
        return sum(entry["size"] for entry in self._part(name, part).values())

    def problems(self, hashes=True):
        """Yield a line for each file that is not as it was built.

        Parameters
        ----------
        hashes : bool, optional
            Whether to read every file; without, the sizes are compared.
        """
        total = sum(entry["size"] for entry in self.files.values())
        root = None if self.is_url else Path(self.address).resolve()
        with progress_bar("Checking the kit", total) if hashes else contextlib.nullcontext() as bar:
            for name, entry in self.files.items():
                if root and not (root / name).resolve().is_relative_to(root):
                    yield f"{name} lies outside of the kit's folder, behind a link."
                    continue
                try:
                    if hashes:
                        size, digest = self._measure(name, bar, entry["size"])
                    else:
                        size, digest = Path(self.place(name)).stat().st_size, entry["sha256"]
                except (FileNotFoundError, NotADirectoryError):
                    yield f"{name} is missing."
                except urllib.error.HTTPError as error:
                    yield f"{name} is missing: the server answers {error.code}."
                except (*BROKEN, OSError) as error:
                    yield f"{name} could not be read: {_reason(error)}."
                else:
                    if size != entry["size"]:
                        yield f"{name} has {size:,} bytes, and {entry['size']:,} were built."
                    elif digest != entry["sha256"]:
                        yield f"{name} has been changed: its sha256 is another."

    def unknown(self):
        """Return the files in the kit's folder that are none of its own, sorted."""
        if self.is_url:
            return []
        root, own = Path(self.address), {MANIFEST, ".lock", *self.files}
        there = (path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())
        return sorted(name for name in there if name not in own)

    def _part(self, name, part):
        prefix = f"models/{name}/{part}/"
        return {path: entry for path, entry in self.files.items() if path.startswith(prefix)}

    def _measure(self, name, bar, expected):
        """Return the size and the sha256 of a file; of one that does not end where it should, a little more."""
        size, digest = 0, hashlib.sha256()
        with contextlib.closing(self.open(name)[0]) as stream:
            while size <= expected and (block := stream.read(BLOCK)):
                digest.update(block)
                size += len(block)
                bar.update(len(block))
        return size, digest.hexdigest()

    def _fetch_file(self, path, target, bar, done):
        """Bring one file, from where an earlier try stopped; ``done`` is what the bar stood at before it."""
        entry = self.files[path]
        partial = target.with_name(target.name + ".part")
        resumed = partial.exists()
        self._complete(path, partial, bar, done)
        if sha256(partial) != entry["sha256"]:
            partial.unlink()
            if not resumed:
                raise self._changed(path)
            # The half that was there may be of an older kit; the whole file gets a try.
            self._fetch_file(path, target, bar, done)
            return
        partial.replace(target)

    def _complete(self, path, partial, bar, done):
        """Append to ``partial`` until it has the size of the file, through dropped connections."""
        size, failures = self.files[path]["size"], 0
        partial.touch()
        while (have := partial.stat().st_size) != size:
            error = None
            try:
                stream, start = self.open(path, have if have < size else 0)
                with contextlib.closing(stream), partial.open("ab") as file:
                    file.truncate(start)
                    while start < size and (block := stream.read(min(BLOCK, size - start))):
                        file.write(block)
                        start += len(block)
                        bar.update(done + start - bar.n)
            except urllib.error.HTTPError as refused:
                raise self._unread(path, refused) from None
            except BROKEN as broken:
                error = broken
            except OSError as broken:
                if broken.errno in UNWRITABLE:
                    raise
                error = broken
            failures = 0 if partial.stat().st_size > have else failures + 1
            if failures == TRIES:
                raise self._unread(path, error)
            time.sleep(failures / 2)

    def _unread(self, path, error):
        reason = _reason(error) if error else "it is shorter than it was built"
        return CourseError(f"{path} of the kit {self.address} could not be read: {reason}.",
                           "Check that the kit is still there (`kit serve` runs, or the stick is in) and that "
                           "`python -m helpers kit check` finds it whole, and run this again; what is here stays.")

    def _changed(self, path):
        return CourseError(f"{path} of the kit {self.address} is not as it was built, and was not used.",
                           "Build or copy the kit again; `python -m helpers kit check` names every such file.")


def check(address):
    """Check every file of a kit, print a line for each problem and a summary.

    Parameters
    ----------
    address : str
        URL or folder.

    Returns
    -------
    int
        The exit code: 1 if anything is not as it was built.
    """
    kit = read_kit(address)
    problems = list(kit.problems())
    for name in kit.unknown():
        print(f"unknown: {name} is no part of the kit, and is not served.")
    for problem in problems:
        print(f"FAIL  {problem}")
    megabytes = sum(entry["size"] for entry in kit.files.values()) / 1e6
    if problems:
        again = "Tell whoever serves it" if kit.is_url else f"Build it again: {build_command(kit)}"
        print(f"{len(problems)} of {len(kit.files)} files are not as they were built. {again}")
    else:
        print(f"{len(kit.files)} files, {megabytes:,.0f} MB: as they were built.")
    return int(bool(problems))


def build_command(kit, platforms=(), pythons=()):
    """Return the command that builds this kit again, with more platforms and Pythons where they are named."""
    words = ["python -m helpers kit build", "DIR" if kit.is_url else f'"{kit.address}"']
    manifest = kit.manifest
    for option, names, more in (("--model", manifest["models"], ()), ("--platform", manifest["platforms"], platforms),
                                ("--python", manifest["pythons"], pythons)):
        known = [name for name in dict.fromkeys([*names, *more]) if option != "--platform" or name in
                 PLATFORM_NAMES.values()]  # left out, it means the machine that builds
        words += [option, *known] if known else []
    return " ".join(words)


def this_machine():
    """Return the running Python and system, such as ``"Python 3.12 on Windows AMD64"``."""
    return "Python {}.{} on {} {}".format(*sys.version_info[:2], platform.system(), platform.machine())


def progress_bar(title, total):
    """Return a bar on stdout: a notebook paints stderr red. It is painted twice a second, not at every byte."""
    from tqdm import tqdm

    return tqdm(desc=title, total=total, file=sys.stdout, mininterval=0.5,
                bar_format="{desc}: {percentage:3.0f}%|{bar:30}| {elapsed}")


def sha256(path):
    """Return the sha256 of a file as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_size(path, size):
    """Tell whether ``path`` is a file of that many bytes."""
    return path.is_file() and path.stat().st_size == size


def _normal(address):
    """Return a URL without what a browser's address line has behind it, or an absolute folder."""
    address = address.strip()
    if re.match(r"https?://", address, re.IGNORECASE):
        url = re.sub(rf"/({INDEX}|{MANIFEST})?([?#].*)?$", "", address)
        scheme, _, rest = url.partition("://")
        try:
            parts = urlsplit(url)
            whole = parts.hostname and (parts.port is None or parts.port > 0) and parts.username is None
        except ValueError:
            whole = False
        if not whole:
            raise _no_address(address)
        return f"{scheme.lower()}://{rest}"
    if "://" in address:
        raise _no_address(address)
    try:
        return str((ROOT / Path(address).expanduser()).resolve())
    except RuntimeError:  # ~somebody who is not here
        raise _no_address(address) from None


def _manifest(text, address, complete):
    """Return the manifest in ``text``, or raise CourseError where it is none that can be trusted to name files."""
    if text.lstrip()[:1] == b"<":
        raise CourseError(f"{address} answers with a web page instead of a kit's {MANIFEST}.",
                          "A proxy or the network's sign-in page may stand in between: sign in, or set NO_PROXY "
                          "to the kit's address.")
    try:
        manifest = json.loads(text)
        sound = (type(manifest["format"]) is int and type(manifest["complete"]) is bool
                 and all(is_plain(name) and _is_entry(entry) for name, entry in manifest["files"].items())
                 # They come back as words of a command in an error.
                 and all(re.fullmatch(r"[\w.:/@ -]+", word, re.ASCII)
                         for key in ("models", "platforms", "pythons") for word in manifest[key]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise CourseError(f"The {MANIFEST} of the kit {address} is broken.",
                          "Build or copy the kit again.")
    if manifest["format"] > FORMAT:
        raise CourseError(f"The kit {address} was built by a newer version of the course.",
                          f"Take the course from it, too: {COURSE} lies beside its {MANIFEST}.")
    if complete and not manifest["complete"]:
        raise CourseError(f"The kit {address} is not finished.",
                          "Run `kit build` with the same folder again: it goes on where it stopped.")
    return manifest


def _is_entry(entry):
    return type(entry["size"]) is int and 0 <= entry["size"] < 1 << 60 \
        and bool(re.fullmatch("[0-9a-f]{64}", entry["sha256"]))


def is_plain(name):
    """Tell whether a name stays inside the kit, on every system: no drive, no stream, no way up."""
    return name.isprintable() and not re.search(r"[\\:]", name) and str(PurePosixPath(name)) == name \
        and name not in (".", "") and not name.startswith("/") and ".." not in name.split("/")


def _reason(error):
    """Return why reading failed, without a path or an address."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
    return str(getattr(reason, "strerror", None) or reason)
