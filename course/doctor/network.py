"""Asks the package index, the Hub and an offline kit whether they answer, for ``course.doctor.checks``.

Each function returns ``(level, what, fix)``, as doctor prints it. It downloads nothing. Before
set-up it runs on the standard library alone.
"""

import email.utils
import json
import os
import queue
import re
import threading
import time
from datetime import timedelta
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, getproxies, proxy_bypass, urlopen

from helpers.errors import CourseError
from helpers.models.catalogue import read_catalogue
from helpers.models.kit import open_kit
from helpers.models.pip import ask_index
from helpers.models.sources import GgufWheel, HubRepository, source_of
from helpers.paths import ROOT

# Seconds, for all that is asked at once.
PATIENCE = 10
CERTIFICATES = (
    "Where a firewall or an antivirus reads along, set PIP_CERT and SSL_CERT_FILE to the file of its "
    "certificate; otherwise check this machine's clock."
)


def proxy():
    """Yield the lines on the proxy: what is set, and whether this machine is left out of it."""
    proxies = getproxies()
    # Whether it has a scheme or not, what stands before an @ is a name and a password.
    shown = [
        name + "_proxy=" + re.sub("^(.*://)?.*@", r"\1***@", value)
        for name, value in sorted(proxies.items())
    ]
    yield "OK", ", ".join(shown) or "no proxy is set", ""
    # requests and httpx, and so MLflow, make no exception for this machine.
    if {"http", "all"} & set(proxies) and not proxy_bypass("127.0.0.1"):
        yield (
            "WARN",
            "what asks a server on this machine (127.0.0.1) asks the proxy instead",
            "Add 127.0.0.1 and localhost to NO_PROXY.",
        )


def in_background(ask):
    """Start ``ask`` on a thread, which nobody waits for at the end, and return the queue of its answer."""
    answers = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(ask()), daemon=True).start()
    return answers


def index() -> tuple[tuple[str, str, str], float | None]:
    """Return the line on the package index, and how far this clock is ahead of the index's: seconds, or None."""
    wheel = next(source for source in _sources() if isinstance(source, GgufWheel))
    name = wheel.requirement.split("==")[0]
    answer = ask_index(name, PATIENCE - 1)
    needed, settings = (
        "Only set-up and a model's first download need it: ",
        "see `pip config list`.",
    )
    status = f": HTTP {answer.status}" if answer.status else ""
    line = {
        "found": ("OK", "the package index answers", ""),
        "no-pip": (
            "WARN",
            "the package index was not asked: this Python has no pip",
            "Set-up brings its own: python -m helpers setup",
        ),
        "certificate": ("WARN", "pip does not trust the package index's certificate", CERTIFICATES),
        "absent": (
            "WARN",
            f"the package index has no {name}",
            f"{needed}ask whoever runs it for that package, or {settings}",
        ),
        "other-page": (
            "WARN",
            "the package index answers with a page that is no index, such as a proxy's log-in page",
            f"{needed}open {answer.site} in a browser and log in, or {settings}",
        ),
        "none": (
            "WARN",
            f"the package index does not answer{status}",
            f"{needed}check the network, HTTPS_PROXY and `pip config list`.",
        ),
    }[answer.kind]
    return line, _ahead(answer.url) if answer.url else None


def _sources():
    """Return the source of track A's folder of each model of the catalogue."""
    return [source_of(entry, "transformers") for entry in read_catalogue().values()]


def hub():
    """Return the line on the Hugging Face Hub, and how far this clock is ahead of its."""
    import httpx  # what the Hub's own client uses: the same proxy, the same certificates

    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    sources = [source for source in _sources() if isinstance(source, HubRepository)]
    names, repo = ", ".join(source.entry.name for source in sources), sources[0].repo
    fix = f"Only {names} and hub: models need it: check the network, HTTPS_PROXY and HF_ENDPOINT."
    try:
        answer = httpx.get(
            f"{endpoint}/{repo}/resolve/main/config.json", follow_redirects=True, timeout=4
        )
        what = f"{endpoint} answers with HTTP {answer.status_code}"
        if answer.status_code == 200:
            answer.json()
            return ("OK", f"{endpoint} answers", ""), _ahead(endpoint)
    except (json.JSONDecodeError, UnicodeDecodeError):
        what = f"{endpoint} answers with a page that is no file, such as a proxy's log-in page"
    except (httpx.HTTPError, httpx.InvalidURL, ImportError, OSError, ValueError) as error:
        if "CERTIFICATE" in str(error):
            return ("WARN", f"the certificate of {endpoint} is not trusted", CERTIFICATES), None
        return ("WARN", f"{endpoint} does not answer", fix), None
    return ("WARN", what, fix), _ahead(endpoint)


def _ahead(url):
    """Return by how many seconds this clock is ahead of the server's at ``url``; None where that one tells no time."""
    try:
        try:
            headers = urlopen(Request(url, method="HEAD"), timeout=4).headers
        except HTTPError as error:
            headers = error.headers
        return time.time() - email.utils.parsedate_to_datetime(headers["date"]).timestamp()
    except (OSError, ValueError, TypeError, HTTPException):
        return None


def clock(ahead):
    """Return the line on the clock: it is so many seconds ahead of a server's, or None where no server answered."""
    against = "a server's on the network"
    if ahead is None:  # the course's own files are from before now, and say no more than that
        against = "the time of the course's own files"
        files = [file for room in ("helpers", "course") for file in (ROOT / room).rglob("*.py")]
        ahead = min(time.time() - max(file.stat().st_mtime for file in files), 0)
    off = timedelta(minutes=round(abs(ahead) / 60))
    if off <= timedelta(minutes=5):
        return "OK", f"the clock agrees with {against}", ""
    # Within a day, certificates hold; and the clock of an archive's files may be that of another
    # time zone.
    return (
        "FAIL" if off > timedelta(days=1) else "WARN",
        f"the clock is {off} {'ahead of' if ahead > 0 else 'behind'} {against}",
        "Set the clock, and let it follow the network's time: certificates are refused at a wrong time.",
    )


def kit():
    """Return the line on the offline kit, and None: its clock may be off as well."""
    try:
        return ("OK", f"the kit {open_kit().address} answers", ""), None
    except CourseError as error:
        return ("FAIL", error.what, error.fix), None
