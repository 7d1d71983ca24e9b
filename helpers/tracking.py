"""Says where MLflow keeps what the course logs, and where to look at it: a URI comes in, the store goes out."""

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

UI = "http://127.0.0.1:5000"  # where `python -m helpers ui` listens unless it is told otherwise


@dataclass(frozen=True)
class TrackingStore:
    """A tracking URI and, for a local database, the place of the artifacts beside it.

    Attributes
    ----------
    uri : str
        Without a password: a page prints and logs it.
    artifact_location : str or None
        None where a tracking server decides.
    """

    uri: str
    artifact_location: str | None

    def check_room(self, folder: Path) -> None:
        """Raise CourseError unless the disks have room for the copies of ``folder`` that a page logs and loads."""
        size = folder_bytes(folder) / 1e6
        if self.artifact_location is None:
            # One on its way to the server, and what three loads by a name bring back.
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
    """Return the store to log to; make its folder and its database, where they are not there.

    Parameters
    ----------
    uri : str, optional
        ``sqlite:///`` with a path, which starts at the course's folder when it is relative, or the
        ``http`` address of a tracking server; empty for the course's own store under ``build/``. A
        name and a password in an address go to the variables from which MLflow takes them.
    experiment : str, optional
        A name; one that is there and takes no runs is refused.

    A local database keeps its artifacts in ``mlartifacts`` beside it: MLflow's own default is the
    folder that a notebook happens to run in. Of a server's models MLflow loads copies, and leaves
    them: they go to ``build/``, and away with this process.

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
            f"The experiment {experiment} was made in the MLflow UI, and keeps its artifacts "
            "where only a running server can write.",
            "Rename it in the UI, and run this again.",
        )
    return store


def ui_addresses(store: TrackingStore, runs: list, registered: str) -> dict[str, str]:
    """Return the addresses in the MLflow UI of a run, of its comparison with the others, and of a registered model.

    ``runs`` are ``mlflow.entities.Run``, the one to show first; one that comes twice counts once.
    """
    ui = f"{store.uri if store.artifact_location is None else UI}/#"
    first, unique = runs[0].info, {run.info.run_id: run.info.experiment_id for run in runs}
    addresses = {"this run": f"{ui}/experiments/{first.experiment_id}/runs/{first.run_id}"}
    if len(unique) > 1:
        ids, experiments = (
            quote(json.dumps(list(dict.fromkeys(values)))) for values in (unique, unique.values())
        )
        addresses["side by side"] = f"{ui}/compare-runs?runs={ids}&experiments={experiments}"
    return addresses | {"the registered model": f"{ui}/models/{registered}"}
