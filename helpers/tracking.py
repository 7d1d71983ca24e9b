"""Opens the tracking store that the course logs to, and returns addresses in the MLflow UI."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from helpers.errors import CourseError
from helpers.files import folder_bytes
from helpers.models.space import check_disk
from helpers.paths import tracking_uri as course_tracking_uri
from helpers.stores.database import database_path, open_database, sqlite_uri
from helpers.stores.server import ask_server, remove_copies_at_exit, without_password

UI = "http://127.0.0.1:5000"  # the default address of `python -m helpers ui`


@dataclass(frozen=True)
class TrackingStore:
    """A tracking URI and, for a local database, the folder of its artifacts.

    Attributes
    ----------
    uri : str
        Has no password: a page prints and logs it.
    artifact_location : str or None
        None for a tracking server, which decides that itself.
    """

    uri: str
    artifact_location: str | None

    def check_disk_space(self, folder: Path) -> None:
        """Raise CourseError unless the disks have space for the copies of ``folder`` that a page logs and loads."""
        size = folder_bytes(folder) / 1e6
        if self.artifact_location is None:
            # One copy goes to the server, and three loads by a name download one each.
            needed = [("This page", 4 * size, Path(tempfile.gettempdir()), "the course up")]
        else:
            needed = [
                (
                    "The logged model",
                    size,
                    database_path(self.uri).parent,
                    "COURSE_TRACKING_URI to a path",
                ),
                ("Logging it", size, Path(tempfile.gettempdir()), "TMPDIR to a folder"),
            ]
        for title, megabytes, folder, setting in needed:
            check_disk(title, megabytes, folder, setting)


def tracking_store(uri: str = "", experiment: str = "") -> TrackingStore:
    """Return the store to log to; make its folder and its database if they do not exist.

    Parameters
    ----------
    uri : str, optional
        ``sqlite:///`` with a path (a relative one starts at the course's folder), or the ``http``
        address of a tracking server; empty for the course's own store under ``build/``. A name and a
        password in an address are moved to MLflow's environment variables.
    experiment : str, optional
        The name of an experiment; CourseError if it exists and takes no runs.

    A local database keeps its artifacts in ``mlartifacts`` beside it; MLflow's own default is the
    folder in which a notebook runs. MLflow loads copies of a server's models and never deletes
    them: they go to ``build/`` and are deleted when this process ends.

    Raises
    ------
    CourseError
        Another kind of URI; a folder that cannot be written; a database that was moved here from
        another folder, or that MLflow cannot use; a server that does not answer as one; a deleted
        experiment.
    """
    uri = uri or course_tracking_uri()
    if uri.startswith(("http://", "https://")):
        store = TrackingStore(without_password(uri), None)
        found = ask_server(store.uri, experiment)
        remove_copies_at_exit()
    else:
        database = database_path(uri)
        store = TrackingStore(sqlite_uri(database), (database.parent / "mlartifacts").as_uri())
        found = open_database(database, store.artifact_location, experiment)
    if experiment and found and found.lifecycle_stage == "deleted":
        raise CourseError(
            "experiment-deleted",
            f"The experiment {experiment} was deleted from the store {store.uri}.",
            f'Restore it: mlflow.MlflowClient({store.uri!r}).restore_experiment("{found.experiment_id}").',
        )
    if (
        found
        and store.artifact_location
        and found.artifact_location.startswith("mlflow-artifacts:")
    ):
        raise CourseError(
            "experiment-elsewhere",
            f"The experiment {experiment} was made in the MLflow UI, and only a running server can write "
            "its artifacts.",
            "Rename it in the UI, and run this again.",
        )
    return store


def ui_addresses(store: TrackingStore, runs: list, registered: str) -> dict[str, str]:
    """Return addresses in the MLflow UI: of the first run, of its comparison with the others, of a registered model.

    ``runs`` are of the type ``mlflow.entities.Run``; a run that is listed twice counts once.
    """
    ui = f"{store.uri if store.artifact_location is None else UI}/#"
    first = runs[0].info
    unique = {run.info.run_id: run.info.experiment_id for run in runs}
    addresses = {"this run": f"{ui}/experiments/{first.experiment_id}/runs/{first.run_id}"}
    if len(unique) > 1:
        ids, experiments = (
            quote(json.dumps(list(dict.fromkeys(values)))) for values in (unique, unique.values())
        )
        addresses["side by side"] = f"{ui}/compare-runs?runs={ids}&experiments={experiments}"
    return addresses | {"the registered model": f"{ui}/models/{registered}"}
