"""Says where MLflow keeps what the course logs. The notebooks make the MLflow calls themselves."""

from dataclasses import dataclass
from pathlib import Path

from helpers.paths import tracking_uri as course_tracking_uri


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


def tracking_store(uri=""):
    """Return the store to log to, and make its folder.

    Parameters
    ----------
    uri : str, optional
        A tracking URI; empty for the course's own store under ``build/``.

    Returns
    -------
    TrackingStore
        A local database keeps its artifacts in ``mlartifacts`` beside it: MLflow's own default
        is the folder that a notebook happens to run in.
    """
    uri = uri or course_tracking_uri()
    if not uri.startswith("sqlite:///"):
        return TrackingStore(uri, None)
    folder = Path(uri.removeprefix("sqlite:///")).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    return TrackingStore(uri, (folder / "mlartifacts").as_uri())
