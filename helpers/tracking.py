"""Says where MLflow keeps what the course logs, and where to look at it: a URI comes in, the store goes out."""

import json
import socket
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from helpers.errors import CourseError
from helpers.paths import ROOT
from helpers.paths import tracking_uri as course_tracking_uri

SQLITE = "sqlite:///"
SERVER_SECONDS = 10
UI = "http://127.0.0.1:5000"  # where `python -m helpers ui` listens unless it is told otherwise


@dataclass(frozen=True)
class TrackingStore:
    """A tracking URI and, for a local database, the place of the artifacts beside it.

    Attributes
    ----------
    uri : str
    artifact_location : str or None
        None where a tracking server decides.
    """

    uri: str
    artifact_location: str | None


def tracking_store(uri: str = "") -> TrackingStore:
    """Return the store to log to, and make its folder.

    ``uri`` is ``sqlite:///`` with a path, which starts at the course's folder when it is relative, or the ``http``
    address of a tracking server; empty for the course's own store under ``build/``.

    A local database keeps its artifacts in ``mlartifacts`` beside it: MLflow's own default is the folder that a
    notebook happens to run in.

    Raises
    ------
    CourseError
        Another kind of URI, a folder that cannot be written, a database that was moved here from
        another folder, or a server that does not answer.
    """
    uri = uri or course_tracking_uri()
    if uri.startswith(("http://", "https://")):
        _check_server(uri)
        return TrackingStore(uri, None)
    if not uri.startswith(SQLITE) or not uri.removeprefix(SQLITE):
        raise CourseError("store-kind", f"tracking_uri is {uri!r}, which is no store that the course can use.",
                          "Give sqlite:/// with a path, or the http address of a tracking server.")
    database = (ROOT / uri.removeprefix(SQLITE)).resolve()
    artifacts = (database.parent / "mlartifacts").as_uri()
    _check_folder(database, artifacts)
    return TrackingStore(SQLITE + database.as_posix(), artifacts)


def ui_addresses(store: TrackingStore, runs: list, registered: str) -> dict[str, str]:
    """Return the addresses in the MLflow UI of a run, of its comparison with the others, and of a registered model.

    ``runs`` are ``mlflow.entities.Run``, the one to show first; one that comes twice counts once.
    """
    ui = f"{store.uri if store.artifact_location is None else UI}/#"
    first, unique = runs[0].info, {run.info.run_id: run.info.experiment_id for run in runs}
    addresses = {"this run": f"{ui}/experiments/{first.experiment_id}/runs/{first.run_id}"}
    if len(unique) > 1:
        ids, experiments = (quote(json.dumps(list(dict.fromkeys(values)))) for values in (unique, unique.values()))
        addresses["side by side"] = f"{ui}/compare-runs?runs={ids}&experiments={experiments}"
    return addresses | {"the registered model": f"{ui}/models/{registered}"}


def _check_folder(database, artifacts):
    """Make the database's folder, and note in it where its artifacts are: the database holds their full path."""
    note = database.with_name(database.name + ".artifacts")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        if not database.exists() or not note.exists():
            note.write_text(artifacts, encoding="utf-8")
    except OSError as error:
        raise CourseError("store-not-writable",
                          f"The folder of the tracking store, {database.parent}, cannot be written.",
                          "Choose another tracking_uri, or make the folder yours.") from error
    noted = note.read_text(encoding="utf-8")
    if noted != artifacts:
        raise CourseError(
            "store-moved",
            f"The tracking store {database} was made elsewhere, and its models are still in {noted}.",
            "Move it back, choose another tracking_uri, or start anew: make clean.")


def _check_server(uri):
    """Ask once whether somebody listens: MLflow itself would try for minutes."""
    try:
        socket.create_connection(server_address(uri), timeout=SERVER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise CourseError("store-no-answer", f"No tracking server answers at {uri}.",
                          "Start it, correct tracking_uri, or leave tracking_uri empty for the course's own store.",
                          ) from error


def server_address(uri: str) -> tuple[str | None, int]:
    """Return the host and the port of an ``http`` or ``https`` URI; ValueError where the port is no port."""
    parts = urlsplit(uri)
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
