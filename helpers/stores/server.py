"""Asks a tracking server for an experiment; raises CourseError if the course cannot log there."""

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote

from helpers.errors import CourseError
from helpers.paths import BUILD

SERVER_SECONDS = 10
# The first row whose pattern fits the exception's name, the HTTP status or MLflow's code decides why a
# server cannot be used.
REFUSALS = (
    (
        "ProxyError|407",
        "proxy",
        "The proxy on the way to {0} does not let it through.",
        "Correct HTTP_PROXY and HTTPS_PROXY, or add {1} to NO_PROXY where it needs no proxy.",
    ),
    (
        "SSLError",
        "certificate",
        "The certificate of the tracking server {0} is not accepted.",
        "Set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate that its owner gives you.",
    ),
    (
        "UNAUTHENTICATED|CUSTOMER_UNAUTHORIZED|PERMISSION_DENIED|401|403",
        "login",
        "The tracking server {0} does not let you in.",
        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, as its owner told you.",
    ),
    (
        "is_store",
        "old-server",
        "The tracking server {0} is older than MLflow 3, which the course's models need.",
        "Ask its administrator for MLflow 3, or leave tracking_uri empty for the course's own store.",
    ),
    (
        "RetryError|\\b5\\d\\d\\b",
        "out-of-order",
        "The tracking server {0} has an internal error.",
        "Ask its administrator, or run this again later.",
    ),
    (
        "Connection|Timeout|Invalid|LocationParse",
        "no-answer",
        "No tracking server answers at {0}.",
        "Start it, correct tracking_uri, or leave tracking_uri empty for the course's own store.",
    ),
    (
        "",
        "other-answer",
        "What answers at {0} is no MLflow tracking server.",
        "Correct tracking_uri, or leave it empty for the course's own store.",
    ),
)


def without_password(uri: str) -> str:
    """Return an address without name and password; put these into MLflow's environment variables."""
    found = re.fullmatch(r"(https?://)([^/?#]*)@(.*)", uri)
    if not found:
        return uri
    name, _, password = found[2].partition(":")
    os.environ.update(
        MLFLOW_TRACKING_USERNAME=unquote(name), MLFLOW_TRACKING_PASSWORD=unquote(password)
    )
    return found[1] + found[3]


def ask_server(uri: str, experiment: str) -> object:
    """Ask a server once for an experiment through MLflow; return the ``mlflow.entities.Experiment`` or None.

    MLflow handles proxies and logins. By itself it would try again for minutes; here the first
    failure is a CourseError.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    is_store = False
    with _once():
        try:
            found = MlflowClient(uri).get_experiment_by_name(experiment or "Default")
            is_store = True
            MlflowClient(uri).search_logged_models(
                [found.experiment_id if found else "0"], max_results=1
            )
        except (MlflowException, ValueError) as error:
            if is_store and getattr(error, "error_code", "") != "ENDPOINT_NOT_FOUND":
                return found
            status = re.search(r"failed with error code (\d+)", str(error))
            description = " ".join(
                [
                    type(error.__cause__ or error.__context__).__name__,
                    status[1] if status else "",
                    "is_store" if is_store else getattr(error, "error_code", "Invalid"),
                ]
            )
            _, code, what, fix = next(row for row in REFUSALS if re.search(row[0], description))
            # Not `from error`: its text may contain secrets.
            host = re.match(r"https?://(\[.*?\]|[^:/]*)", uri)[1]
            raise CourseError(f"store-{code}", what.format(uri), fix.format(uri, host)) from None
    return found


@contextlib.contextmanager
def _once():
    """Let MLflow ask once, and wait for SERVER_SECONDS or for the user's MLFLOW_HTTP_REQUEST_TIMEOUT."""
    before = {
        name: os.environ.get(name)
        for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    }
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(SERVER_SECONDS))
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def remove_copies_at_exit() -> None:
    """Keep MLflow's copies of a server's models in a folder that is deleted when this process ends.

    Folders of processes that have ended without that are deleted, too.
    """
    import psutil

    folder = BUILD / f"kernel-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # the course's folder belongs to another user
        folder = Path(tempfile.mkdtemp(prefix="kernel-"))
    for other in BUILD.glob("kernel-*"):
        number = other.name.removeprefix("kernel-")
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(other, ignore_errors=True)
    if tempfile.tempdir != str(folder):
        tempfile.tempdir = str(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
