"""Makes a tracking server ready to log to: an address comes in, its experiment goes out, or why it is no store."""

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
# The first row that fits the name of what was raised, MLflow's code or the HTTP status says why a
# server is no store.
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
        "The tracking server {0} is older than MLflow 3, and keeps no models of their own.",
        "Ask whoever runs it for MLflow 3, or leave tracking_uri empty for the course's own store.",
    ),
    (
        "RetryError|\\b5\\d\\d\\b",
        "out-of-order",
        "The tracking server {0} reports an error of its own.",
        "Ask whoever runs it, or run this again later.",
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
    """Return an address without the name and the password in it, which go to MLflow's variables for them."""
    found = re.fullmatch(r"(https?://)([^/?#]*)@(.*)", uri)
    if not found:
        return uri
    name, _, password = found[2].partition(":")
    os.environ.update(
        MLFLOW_TRACKING_USERNAME=unquote(name), MLFLOW_TRACKING_PASSWORD=unquote(password)
    )
    return found[1] + found[3]


def ask_server(uri: str, experiment: str) -> object:
    """Ask a server once for an experiment, as MLflow does; return the ``mlflow.entities.Experiment`` or None.

    Proxies and logins are MLflow's. It would go on asking for minutes; here an answer that is none
    is a CourseError.
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
            said = " ".join(
                [
                    type(error.__cause__ or error.__context__).__name__,
                    status[1] if status else "",
                    "is_store" if is_store else getattr(error, "error_code", "Invalid"),
                ]
            )
            _, code, what, fix = next(row for row in REFUSALS if re.search(row[0], said))
            # Not `from error`: what it quotes may be secret.
            host = re.match(r"https?://(\[.*?\]|[^:/]*)", uri)[1]
            raise CourseError(f"store-{code}", what.format(uri), fix.format(uri, host)) from None
    return found


@contextlib.contextmanager
def _once():
    """Let MLflow ask no server twice, and wait no longer than SERVER_SECONDS or than the user's own variable says."""
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
    """Let MLflow's copies of a server's models go to a folder of this process, and remove those of dead ones."""
    import psutil

    folder = BUILD / f"kernel-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a course's folder that others own: then beside the other temporary files
        folder = Path(tempfile.mkdtemp(prefix="kernel-"))
    for other in BUILD.glob("kernel-*"):
        number = other.name.removeprefix("kernel-")
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(other, ignore_errors=True)
    if tempfile.tempdir != str(folder):
        tempfile.tempdir = str(folder)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
