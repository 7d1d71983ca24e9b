"""Opens a local MLflow database, or makes one; raises CourseError if the course cannot log to it."""

import contextlib
import re
import sqlite3
import tempfile
from pathlib import Path
from urllib.parse import unquote

from helpers.errors import CourseError
from helpers.files import FULL
from helpers.models.space import disk_full
from helpers.paths import ROOT
from helpers.paths import tracking_uri as course_tracking_uri

# The prefix of a plain path, and of a path that is quoted because SQLAlchemy reads `%` and `?` in it.
# With the second prefix, MLflow does not make a folder of the quoted name.
SQLITE = "sqlite:///"
QUOTED_SQLITE = "sqlite+pysqlite:///"
BUSY_SECONDS = 30
START_ANEW = "choose another tracking_uri, or start with an empty store: make clean"


def database_path(uri: str = "") -> Path | None:
    """Return the file of a local store, which may not exist yet; None for a server. CourseError for other URIs."""
    uri = uri or course_tracking_uri()
    if uri.startswith(("http://", "https://")):
        return None
    scheme, _, path = uri.partition(":///")
    if scheme + ":///" not in (SQLITE, QUOTED_SQLITE) or not path or "\0" in path:
        shown = re.sub("://.*@", "://***@", uri)
        raise CourseError(
            "store-kind",
            f"tracking_uri is {shown!r}, which is no store that the course can use.",
            "Give sqlite:/// with a path, or the http address of a tracking server.",
        )
    database = (ROOT / (path if scheme + ":///" == SQLITE else unquote(path))).resolve()
    if quoted := re.search("%[0-9A-Fa-f]{2}", str(database)):
        raise CourseError(
            "store-path",
            f"MLflow would not find a model in {database.parent} again: it reads {quoted[0]} as another letter.",
            "Rename that folder, or set tracking_uri to sqlite:/// with a path without such a name.",
        )
    return database


def sqlite_uri(database: Path) -> str:
    """Return the URI from which SQLAlchemy and MLflow read a database's path as it is."""
    path = database.as_posix()
    quoted = path.replace("%", "%25").replace("?", "%3F")
    return SQLITE + path if quoted == path else QUOTED_SQLITE + quoted


def open_database(database: Path, artifacts: str, experiment: str) -> object:
    """Make the database if it does not exist, and return the ``mlflow.entities.Experiment`` of that name or None.

    ``artifacts`` is the URI of its artifacts' folder. A file beside the database keeps that URI.

    Raises
    ------
    CourseError
        A folder that cannot be written; a database that was moved here from another folder, that
        another program has locked, or that this MLflow cannot use.
    """
    from alembic.util import CommandError
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    note = database.with_name(database.name + ".artifacts")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # A whole class may open the page at the same moment, and MLflow makes its tables without a lock.
        with FileLock(database.with_name(database.name + ".lock")):
            if not database.exists() or not note.exists():
                note.write_text(artifacts, encoding="utf-8")
            noted = note.read_text(encoding="utf-8")
            if noted != artifacts:  # the database contains the full path of its artifacts
                raise CourseError(
                    "store-moved",
                    f"The tracking store {database} was made in another folder, and its models are still in {noted}.",
                    f"Move it back, {START_ANEW}.",
                )
            with contextlib.closing(sqlite3.connect(database, timeout=BUSY_SECONDS)) as connection:
                # A locked database fails here; MLflow would try again for minutes.
                connection.execute("BEGIN IMMEDIATE")
                tables = [
                    name
                    for (name,) in connection.execute(
                        "SELECT name FROM sqlite_master WHERE type = 'table'"
                    )
                ]
                connection.rollback()
                if not tables:
                    _make_tables(connection, artifacts)
                elif (
                    "alembic_version" not in tables
                ):  # in which MLflow keeps the version of its tables
                    raise sqlite3.DatabaseError("it has other tables than MLflow's")
        return MlflowClient(sqlite_uri(database)).get_experiment_by_name(experiment)
    except OSError as error:
        raise (_full(database) if error.errno in FULL else _not_writable(database)) from error
    except sqlite3.Error as error:
        if "readonly" in str(error):
            raise _not_writable(database) from error
        if "full" in str(error):
            raise _full(database) from error
        if "locked" in str(error):
            raise CourseError(
                "store-busy",
                f"Another program has locked the tracking store {database}.",
                "Close what writes to it, and run this again.",
            ) from error
        raise _unreadable(database, error) from error
    except (MlflowException, SQLAlchemyError, CommandError) as error:
        if not re.search("schema|revision", str(error)):
            raise _unreadable(database, str(error).splitlines()[0]) from error
        raise CourseError(
            "store-other-version",
            f"The tracking store {database} was made by another version of MLflow.",
            f'If by an older one, copy it and run python -m mlflow db upgrade "{sqlite_uri(database)}"; '
            f"otherwise {START_ANEW}.",
        ) from error


def _unreadable(database, why):
    return CourseError(
        "store-unreadable",
        f"{database} is no intact database of MLflow: {why}.",
        f"Remove it, {START_ANEW}.",
    )


def _full(database):
    return disk_full("The tracking store", None, database.parent, "COURSE_TRACKING_URI to a path")


def _not_writable(database):
    return CourseError(
        "store-not-writable",
        f"The folder of the tracking store, {database.parent}, cannot be written.",
        "Choose another tracking_uri, or make the folder yours.",
    )


def _make_tables(connection, artifacts):
    """Make MLflow's tables in an empty database at once: MLflow itself never completes half a set of tables."""
    from mlflow import MlflowClient

    # MLflow writes the working directory into a line of SQL, which fails if its name has both kinds of
    # quotes.
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        contextlib.chdir(folder),
    ):
        made = Path(folder, "new.db")
        MlflowClient(sqlite_uri(made)).search_experiments(max_results=1)
        with contextlib.closing(sqlite3.connect(made)) as source:
            # MLflow has written another place for the artifacts of the experiment Default.
            source.execute("UPDATE experiments SET artifact_location = ?", [f"{artifacts}/0"])
            source.commit()
            source.backup(connection)
