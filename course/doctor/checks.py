"""Says what this machine can run: one line per check, with the fix beside it.

It prepares tiny-phi3 to try both tracks on it, and changes nothing else. Before set-up it runs on
the standard library alone, and does the checks that need no more. A check returns or yields
``(level, what, fix)`` with a level of OK, WARN or FAIL; ``fix`` is empty for OK.
"""

import contextlib
import csv
import getpass
import importlib.metadata
import os
import platform
import queue
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import unicodedata
import webbrowser
from pathlib import Path
from urllib.parse import quote, unquote

from course.doctor import network
from course.doctor.smoke import smoke
from course.environment import differing_packages, is_set_up, pins, project
from helpers.errors import CourseError
from helpers.files import is_writable
from helpers.models.catalogue import find_entry, read_catalogue
from helpers.models.kit import kit_address
from helpers.models.space import existing, free_disk, free_memory
from helpers.paths import BUILD, ROOT, model_cache

# Megabytes (10**6 bytes): what set-up takes, and what a run writes beside its copies of the model.
SETUP_MEGABYTES, PAGES_MEGABYTES = 4000, 100
# A run logs track A's folder once and track B's twice: this times what the model has on disk.
COPIES = 1.3
# Where the browser tests find a browser.
CHROMIUM = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    os.path.expandvars(r"%ProgramFiles%\Google\Chrome\Application\chrome.exe"),
)


def doctor() -> int:
    """Check the machine, print a line per check, and return the exit code: 1 if anything failed."""
    described = ""
    if (ROOT / ".git").exists() and shutil.which("git"):
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        ).stdout.strip()
    print(
        _public(
            f"The course {project()['version']}" + (f", commit {described}" if described else "")
        ),
        flush=True,
    )
    levels = []
    for level, what, fix in _checks():
        levels.append(level)
        print(_public(f"{level:<4}  {what}" + (f"\n      {fix}" if fix else "")), flush=True)
    failed, warnings = levels.count("FAIL"), levels.count("WARN")
    print(
        (f"{failed} of {len(levels)} checks failed" if failed else "Fit: no check failed")
        + f", {warnings} warning{'' if warnings == 1 else 's'}."
    )
    return int(failed > 0)


def _public(text):
    """Return a line for a report that strangers read: places by what they are for, and nobody's names and passwords.

    Of a path that the course does not know, its last part is left.
    """
    text = re.sub(r"://[^\s'\"]*@", "://***@", text)
    text = re.sub(SECRETS, r"\1***", text)
    for place, role in sorted(_places(), key=lambda known: -len(known[0])):
        text = re.sub(
            _forms(place) + r"(?!\w)", lambda _, role=role: role, text, flags=re.IGNORECASE
        )
    text = text.replace("the course's folder/", "").replace("the course's folder\\", "")
    text = re.sub(r"file:/+[^\s'\"]*", lambda uri: _last_part(unquote(uri[0])), text)
    for path in PATHS:
        text = re.sub(path, lambda found: _last_part(found[0]), text)
    for name in sorted(_names(), key=len, reverse=True):
        # As Windows shortens it: JANEDO~1.
        short = re.sub(r"[^a-z0-9]", "", name, flags=re.IGNORECASE)[:6]
        forms = [
            re.escape(form)
            for spelt in (name, unicodedata.normalize("NFD", name))
            for form in (spelt, quote(spelt))
        ] + ([rf"{short}~\d"] if short else [])
        text = re.sub(
            rf"(?<![^\W_])({'|'.join(forms)})(?![^\W_])", "***", text, flags=re.IGNORECASE
        )
    return text


# What a program may print of a secret: after the name of one, or in a shape that shows what it is.
SECRETS = (
    r"(?i)(\b(?:bearer|basic) +|\b[\w-]*(?:token|passw(?:or)?d|secret|api_?key|signature)[\"']?\s*[=:]\s*[\"']?"
    r"|[?&][^=&\s]+=)[^\s&'\"]+|\b(?-i:hf_)\w{8,}"
)
# Folders that hold others by their owners' names.
OF_PEOPLE = (
    "home",
    "users",
    "media",
    "volumes",
    "mnt",
    "scratch",
    "profiles",
    "documents and settings",
    "net",
)
_PART = r"[^\s/\\:*?\"'<>|,;](?:[^/\\:*?\"'<>|,;\n]*[^\s/\\:*?\"'<>|,;])?"
# A last part ends at a space, unless a capital letter follows, as in Jane Doe.
_LAST = r"[^\s/\\:*?\"'<>|,;)]*(?: [A-Z\u00c0-\u00de][^\s/\\:*?\"'<>|,;)]*)*"
# Absolute paths: in quotes to their end; of Windows, of a share, and of other systems, where a list
# has colons.
PATHS = (
    r"(?<=')(?:/|[A-Za-z]:[\\/]|\\\\)[^'\n]*(?=')",
    r'(?<=")(?:/|[A-Za-z]:[\\/]|\\\\)[^"\n]*(?=")',
    rf"(?<![\w/])(?:[A-Za-z]:[\\/]+|\\{{2,}})(?:{_PART}[\\/]+)*{_LAST}",
    rf"(?<![\w/~.…-])/(?!/)(?:{_PART}/+)+{_LAST}",
)
# A user may be called what the doctor has to say.
OWN_WORDS = (
    "python",
    "java",
    "make",
    "course",
    "helpers",
    "model",
    "models",
    "cache",
    "http",
    "https",
    "ok",
    "warn",
    "fail",
    "localhost",
    "linux",
    "windows",
    "darwin",
)


def _last_part(path):
    """Return what tells a file from others, and not whose it is."""
    parts = [part for part in re.split(r"[/\\]+", path.removeprefix("file:").rstrip("/\\")) if part]
    return "a folder" if len(parts) < 3 or parts[-2].lower() in OF_PEOPLE else f"…/{parts[-1]}"


def _places():
    """Yield the folders that a line may name, each with what it is for."""
    with contextlib.suppress(CourseError):
        if os.environ.get("COURSE_CACHE"):
            yield str(model_cache()), "COURSE_CACHE"
    for name in ("COURSE_CACHE", "COURSE_KIT", "JAVA_HOME"):
        if re.match(r"/|[A-Za-z]:[\\/]|\\\\", os.environ.get(name, "")):
            yield os.environ[name], name
    folders = [
        (str(ROOT), "the course's folder"),
        (sys.prefix, "this Python's folder"),
        (sys.base_prefix, "this Python's folder"),
        (_home(), "~"),
    ]
    with contextlib.suppress(OSError):
        folders.append((tempfile.gettempdir(), "the temporary folder"))
    for folder, role in folders:
        for spelt in {folder, os.path.realpath(folder)}:
            if len(Path(spelt).parts) > 1:  # the home folder of a container's user may be /
                yield spelt.rstrip("/\\"), role


def _home():
    return os.path.expanduser("~")  # noqa: PTH111, as Path.home() raises where there is none


def _forms(place):
    """Return a pattern for a folder as it is written: with either slash, one or two, or as the path of a URI."""
    parts = [
        f"(?:{re.escape(part)}|{re.escape(quote(part))})" for part in re.split(r"[/\\]+", place)
    ]
    return r"(?:file:/{1,3}(?=/|[A-Za-z]:))?" + r"[/\\]{1,4}".join(parts)


def _names():
    """Return what the user and the machine are called."""
    names = {
        os.environ.get(name, "")
        for name in (
            "USER",
            "USERNAME",
            "LOGNAME",
            "SUDO_USER",
            "COMPUTERNAME",
            "USERDOMAIN",
            "HOSTNAME",
        )
    }
    with contextlib.suppress(ImportError, KeyError, OSError):
        names.add(getpass.getuser())
    names |= {Path(_home()).name, platform.node(), platform.node().split(".")[0]}
    names |= {part for name in names for part in re.split(r"[\\@]", name)}
    return {
        name
        for name in names
        if len(name) > 1 and name.lower() not in OWN_WORDS and not name.isdigit()
    }


def port_is_taken(port: int) -> bool:
    """Tell whether somebody listens on this machine's ``port``."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def find_chromium() -> str | None:
    """Return the path of the browser that the tests drive, None where there is none."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def _checks():
    yield _platform(sysconfig.get_platform(), platform.machine(), sys.maxsize)
    differing, gone = differing_packages(), list(_files_gone())
    yield from _packages(differing, gone)
    ready = not gone and all(installed for _, installed in differing.values())
    begun, clocks = time.monotonic(), []
    asked = {"the package index": network.in_background(network.index)}
    if ready:
        asked["the Hugging Face Hub"] = network.in_background(network.hub)
    if kit_address():
        asked["the kit of COURSE_KIT"] = network.in_background(network.kit)

    yield _cores()
    yield _writable(BUILD)
    yield _disk(ready)
    if ready:
        yield _memory()
        yield from _models()
    for port, use in ((8888, "JupyterLab"), (5000, "the MLflow UI")):
        yield (
            (
                "WARN",
                f"port {port} is taken: {use} starts on it",
                "JupyterLab takes the next one by itself; for the other: python -m helpers ui --port 5001",
            )
            if port_is_taken(port)
            else ("OK", f"port {port} is free for {use}", "")
        )
    yield _java()
    yield from _browsers()
    yield from network.proxy()
    if ready:
        yield from smoke()

    for name, answers in asked.items():
        try:
            line, ahead = answers.get(
                timeout=max(network.PATIENCE - (time.monotonic() - begun), 0.1)
            )
        except queue.Empty:  # looking up a name has no time limit of its own
            line, ahead = (
                (
                    "FAIL" if "kit" in name else "WARN",
                    f"{name} does not answer in {network.PATIENCE} s",
                    "Check the network, HTTPS_PROXY and that address.",
                ),
                None,
            )
        yield line
        clocks += [] if ahead is None else [ahead]
    yield network.clock(min(clocks, key=abs, default=None))


# --- Python and its packages ----------------------------------------------------------------


def _platform(built_for, machine, largest):
    """Return the line on this Python: ``sysconfig.get_platform()``, ``platform.machine()``, ``sys.maxsize``."""
    # course.__main__ has refused a version that is too old or too new.
    what = f"Python {platform.python_version()} on {platform.system()} {platform.release()}, {built_for}"
    if largest <= 2**32:
        return (
            "FAIL",
            f"{what}: a 32-bit Python",
            "Install the 64-bit Python: the packages have no other builds.",
        )
    # What torch has builds of; for win-arm64 and Intel's Macs it has none.
    if built_for == "win-arm64":
        return (
            "WARN",
            f"{what}: torch has no build for it",
            "Install Python for x64, which Windows runs here, too.",
        )
    if built_for.startswith("macosx") and machine == "x86_64":
        return (
            "WARN",
            f"{what}: torch has no build for a Mac with Intel's processor",
            "On a Mac with Apple's processor, install a Python for arm64; otherwise, use another machine.",
        )
    return "OK", what, ""


def _packages(differing, gone):
    """Yield the lines on the packages: what differs from the pins, and ``(package, file)`` for what is gone."""
    # Set-up does nothing in an environment that it has finished.
    fix = f"{'Delete .venv and run' if is_set_up() else 'Run'}: python -m helpers setup"
    if sum(installed is None for _, installed in differing.values()) > len(pins()) / 2:
        yield "FAIL", "the course's packages are not installed", fix
        return
    for name, (pinned, installed) in differing.items():
        yield "FAIL", f"{name} is {installed or 'not installed'}, and {pinned} is pinned", fix
    for name in dict(gone):
        files = [file for package, file in gone if package == name]
        yield (
            "FAIL",
            f"{name} lacks {len(files)} of its files, such as {files[0]}",
            f"If an antivirus took it, tell it to leave .venv alone. {fix}",
        )
    if not differing and not gone:
        yield "OK", "packages are as pinned, and whole", ""
    for name, (pinned, installed) in differing_packages(("dev",)).items():
        if installed and name not in differing:
            yield "WARN", f"{name} is {installed}, and {pinned} is pinned, for the tests", fix


def _files_gone():
    """Yield package and file for each file that pip has installed and that is not there any more."""
    for package in importlib.metadata.distributions():
        # conda's own packages list files that conda leaves out.
        if (package.read_text("INSTALLER") or "").strip() in ("pip", "uv"):
            for file, *_ in csv.reader((package.read_text("RECORD") or "").splitlines()):
                if not file.endswith(".pyc") and not Path(package.locate_file(file)).exists():
                    yield package.metadata["Name"], file


# --- the machine ----------------------------------------------------------------------------


def _cores():
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return (
        ("OK", f"{cores} cores", "")
        if cores > 1
        else ("WARN", "1 core", "The course runs, at less than half the speed.")
    )


def _disk(ready):
    """Return the line on the disk of the course's folder."""
    needed, free = PAGES_MEGABYTES if ready else SETUP_MEGABYTES, free_disk(ROOT)
    what = f"{free:,.0f} MB are free on the disk of the course's folder"
    return (
        ("OK", what, "")
        if free >= needed
        else (
            "FAIL",
            f"{what}, and {'a run' if ready else 'set-up'} needs {needed:,} MB",
            "Free some space.",
        )
    )


def _memory():
    import psutil

    least = min(entry.memory for entry in read_catalogue().values())
    free = free_memory()
    what = f"{free:,.0f} MB of memory are free, of {psutil.virtual_memory().total / 1e6:,.0f} MB"
    return (
        ("OK", what, "")
        if free >= least
        else (
            "FAIL",
            f"{what}, and the smallest model needs {least:,} MB",
            "Close programs, or give the container more memory.",
        )
    )


def _models():
    """Yield a line for each model of the catalogue, and for each other one in the cache."""
    from helpers.models.prepare import cache_state, cached_models

    entries, memory = read_catalogue(), free_memory()
    try:
        states = {name: cache_state(name) for name in dict.fromkeys([*entries, *cached_models()])}
    except OSError as error:
        yield (
            "FAIL",
            f"the cache of models cannot be read: {error.strerror}",
            "Set COURSE_CACHE to a folder that is yours.",
        )
        return
    lacks = {name: _lacks(entry, states[name], memory) for name, entry in entries.items()}
    for name, state in states.items():
        if state == "damaged":
            yield (
                "WARN",
                f"{name}: files in its folder {find_entry(name).folder} are not as they were written",
                f"Get them anew: python -m helpers prepare --model {name}",
            )
        elif lacks.get(name):
            smaller = [
                other
                for other in entries
                if not lacks[other] and entries[other].memory < entries[name].memory
            ]
            fits = max(smaller, key=lambda other: entries[other].memory, default=None)
            what, fix = lacks[name]
            yield (
                "WARN",
                f"{name}: {state}; a run needs {what}",
                fix + (f", or choose a smaller model: MODEL={fits}." if fits else "."),
            )
        else:
            yield (
                "OK",
                f"{name}: {state}"
                + (", with memory and disk for a run" if name in entries else ""),
                "",
            )


def _lacks(entry, state, memory):
    """Return what a run of a model lacks here, and what to do about it; None where it lacks nothing."""
    if memory < entry.memory:
        return f"{entry.memory:,} MB of memory, and {memory:,.0f} MB are free", "Close programs"
    cache, needed = model_cache(), {ROOT: round(entry.disk * COPIES) + PAGES_MEGABYTES}
    if state == "not prepared":
        place = ROOT if existing(cache).stat().st_dev == ROOT.stat().st_dev else cache
        needed[place] = needed.get(place, 0) + entry.disk
    for folder, megabytes in needed.items():
        if free_disk(folder) < megabytes:
            where = "the course" if folder == ROOT else "the cache of models"
            return (
                f"{megabytes:,} MB of disk for {where}, and {free_disk(folder):,.0f} MB are free",
                "Free some space, or set COURSE_CACHE to a folder on another disk",
            )
    return None


def _writable(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = is_writable(folder)
    except OSError:
        writable = False
    return (
        ("OK", "the course's folder can be written", "")
        if writable
        else (
            "FAIL",
            "the course's folder cannot be written",
            "Move the course to a folder that is yours.",
        )
    )


def _java():
    """Return the line on Java, looked for where Spark looks."""
    fix = "For the section on Spark alone: install Java 17, from https://adoptium.net or your system's packages."
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=Path(home, "bin") if home else None)
    if home and not java:
        return (
            "WARN",
            "JAVA_HOME is set, and there is no Java in it",
            f"Correct JAVA_HOME or unset it. {fix}",
        )
    try:
        said = subprocess.run(
            [java or "", "-version"], capture_output=True, text=True, errors="replace", timeout=20
        )
        version = re.search(r'version "((?:1\.)?(\d+)[^"]*)"', said.stderr + said.stdout)
    except (OSError, subprocess.TimeoutExpired):
        version = None
    if version is None:  # a Mac has a `java` that only says where to get one
        return "WARN", "there is no Java", fix
    return (
        ("OK", f"Java {version[1]}", "")
        if int(version[2]) >= 17
        else ("WARN", f"Java is {version[1]}", fix)
    )


def _browsers():
    try:
        browser = _file_name(getattr(webbrowser.get(), "name", ""))
        yield "OK", f"JupyterLab opens the browser {browser}".strip(), ""
    except webbrowser.Error:
        yield (
            "WARN",
            "JupyterLab finds no browser to open",
            "Open the address that it prints in a browser, on this machine or through a tunnel.",
        )
    if not any(installed is None for _, installed in differing_packages(("dev",)).values()):
        chromium = find_chromium()
        yield (
            ("OK", f"the browser tests drive {_file_name(chromium)}", "")
            if chromium
            else (
                "WARN",
                "the browser tests find neither Chromium nor Chrome, and are skipped",
                "Only for `make test`: install Google Chrome, or Chromium, on the PATH.",
            )
        )


def _file_name(program):
    """Return a program's name without its folder; BROWSER names them in any system's way."""
    return re.split(r"[/\\]", program)[-1]
