"""Converts errors of huggingface_hub to CourseErrors; finds where the user's token is stored."""

import json
import os
import re
import ssl
from collections.abc import Mapping
from datetime import datetime

import httpx
from huggingface_hub import constants, errors, get_token

from helpers.errors import CourseError

WEB = "https://huggingface.co"
BUSY = (408, 429, 500, 502, 503, 504)


def token_place(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return where huggingface_hub takes the user's token from, and how to replace or remove that token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # in huggingface_hub's order
        if environment.get(name, "").strip():
            return name, f"Unset {name}, or set it to a read token from {WEB}/settings/tokens."
    places = {
        "HF_TOKEN_PATH": "the file that HF_TOKEN_PATH names",
        "HF_HOME": "$HF_HOME/token",
        "XDG_CACHE_HOME": "$XDG_CACHE_HOME/huggingface/token",
    }
    place = next(
        (place for name, place in places.items() if name in environment),
        "~/.cache/huggingface/token",
    )
    return (
        place,
        "Run `hf auth login` to store a new one, or `hf auth logout` to work without one.",
    )


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of an answer that huggingface_hub raised as an error; None for other errors."""
    return error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None


def _has_token():
    try:
        return bool(get_token())
    except (OSError, UnicodeError):  # there is one that cannot be read
        return True


def certificate_problem(error: BaseException | None) -> str | None:
    """Return why OpenSSL refused the server's certificate; None if that is not what went wrong."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def is_size_mismatch(error: Exception) -> bool:
    """Tell whether a file had another size than the Hub lists: for this huggingface_hub raises a plain OSError."""
    return type(error) is OSError and "Consistency check failed" in str(error)


# Rows of error types or a function, a code and two sentences. The first row that fits is used.
CASES = (
    (
        errors.GatedRepoError,
        "hub-gated",
        "{repo} is gated: its owner wants you to accept a licence first.",
        "Accept it on {web}/{repo}, make a read token on {web}/settings/tokens, set HF_TOKEN to it, "
        "and run this again.",
    ),
    (
        (errors.RepositoryNotFoundError, errors.HFValidationError),
        "hub-no-repository",
        "The Hub has no repository called {repo}, or it is private.",
        "Look it up on {web} and write it as there, such as hub:microsoft/Phi-3-mini-4k-instruct; "
        "for a private one, set HF_TOKEN.",
    ),
    (
        errors.RevisionNotFoundError,
        "hub-no-revision",
        "{repo} has no such revision.",
        "Choose a branch, tag or commit of {web}/{repo}/tree/main, or leave @REVISION out.",
    ),
    (
        errors.RemoteEntryNotFoundError,
        "hub-no-file",
        "The Hub lists {file} of {repo}, but does not have it.",
        "Run this again later, or choose another revision: hub:{repo}@REVISION.",
    ),
    (
        lambda error: status_of(error) in (401, 403) and _has_token(),
        "hub-token",
        "The Hub does not give {repo} to the token in {token}.",
        "{token_fix}",
    ),
    (
        lambda error: status_of(error) in (401, 403),
        "hub-status",
        "The Hub, or a proxy before it, does not give {repo}: it answers {status}.",
        "Check the proxy (HTTPS_PROXY); if the repository is private, set HF_TOKEN.",
    ),
    (
        lambda error: status_of(error) in BUSY,
        "hub-busy",
        "The Hub is busy: it answers {status} for {repo}.",
        "Run this again later; finished and half-finished files stay.",
    ),
    (
        errors.HfHubHTTPError,
        "hub-status",
        "The Hub answers {status} for {repo}.",
        "Run this again later; finished and half-finished files stay.",
    ),
    (
        certificate_problem,
        "hub-certificate",
        "The certificate of {endpoint} is not accepted: {certificate}; this machine's clock says {now:%Y-%m-%d %H:%M}.",
        "Set the clock if it is wrong; if it is right, a proxy opens the connection: set "
        "SSL_CERT_FILE to the certificate that its owner gives you.",
    ),
    (
        httpx.ProxyError,
        "hub-proxy",
        "The proxy did not connect to {endpoint}: {error}.",
        "Correct HTTPS_PROXY, or unset it where no proxy is needed.",
    ),
    (
        httpx.TransportError,
        "hub-no-answer",
        "The network or the Hub, {endpoint}, does not answer.",
        "Check the network and the proxy (HTTPS_PROXY), and run this again; finished and "
        "half-finished files stay.",
    ),
    (
        lambda error: (
            isinstance(error, json.JSONDecodeError | UnicodeDecodeError) or is_size_mismatch(error)
        ),
        "hub-other-answer",
        "Something between you and {endpoint} answers in its place, such as a proxy's login page.",
        "Log in to the network in a browser, or set HTTPS_PROXY, and run this again.",
    ),
    (
        (httpx.RequestError, httpx.InvalidURL, OSError, UnicodeError, ValueError),
        "hub-settings",
        "{endpoint} cannot be reached with these settings: {kind}: {error:.200}.",
        "Look at HF_ENDPOINT, HTTPS_PROXY, SSL_CERT_FILE and HF_TOKEN: unset what you do not need.",
    ),
    (
        Exception,
        "hub-unreadable",
        "The Hub describes {repo} in a way that huggingface_hub cannot read: {kind}.",
        "Choose another repository or revision, and report it if it was one of the course's.",
    ),
)


def hub_error(error: Exception, repo: str) -> CourseError:
    """Return the CourseError for whatever stopped a download of ``repo``."""
    code, *sentences = next(
        row
        for fits, *row in CASES
        if (isinstance(error, fits) if isinstance(fits, type | tuple) else fits(error))
    )
    token, token_fix = token_place(os.environ)
    match = re.search(r"/resolve/[^/]+/(\S+?)\.?$", str(error), re.MULTILINE)
    values = {
        "repo": repo,
        "web": WEB,
        "endpoint": constants.ENDPOINT,
        "file": match[1] if match else "a file",
        "status": status_of(error),
        "token": token,
        "token_fix": token_fix,
        "certificate": certificate_problem(error),
        "now": datetime.now(),
        "kind": type(error).__name__,
        "error": str(error),
    }
    return CourseError(code, *(sentence.format(**values) for sentence in sentences))
