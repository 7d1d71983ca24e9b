"""The tracking store: where it is, and what is no store.

Run: python -m helpers test tests/unit/helpers/test_tracking.py
"""

import base64
import contextlib
import http.server
import json
import os
import shutil
import socket
import sqlite3
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import mlflow
import pytest
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from sqlalchemy import event
from sqlalchemy.engine import Engine
from support import ROOT, refuses

from helpers import tracking_store
from helpers.stores import database
from helpers.stores.database import database_path
from helpers.tracking import TrackingStore


def test_a_relative_path_starts_at_the_courses_folder_whatever_the_kernels_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert database_path("sqlite:///build/x/mlflow.db") == ROOT / "build" / "x" / "mlflow.db"


def test_an_empty_uri_is_the_courses_own_store(store, monkeypatch):
    monkeypatch.setenv("COURSE_TRACKING_URI", store)
    assert tracking_store().uri == tracking_store("").uri == store


def test_an_odd_path_is_kept_and_has_its_artifacts_beside_it(store):
    assert tracking_store(store).uri == store
    assert tracking_store(store) == tracking_store(store)
    folder = Path(store.removeprefix("sqlite:///")).parent
    assert tracking_store(store).artifact_location == (folder / "mlartifacts").as_uri()


def copy_tables(file, connection):
    """Fill a database with the tables of another one: MLflow takes seconds to make them."""
    with contextlib.closing(sqlite3.connect(file)) as source:
        source.backup(connection)


@pytest.fixture
def old_store(tmp_path, empty_database):
    """Return the URI of a store that has a database, and the folder that it is in."""
    uri = f"sqlite:///{(tmp_path / 'old' / 'mlflow.db').as_posix()}"
    (tmp_path / "old").mkdir()
    shutil.copy(empty_database, tmp_path / "old")
    tracking_store(uri)
    return uri, tmp_path / "old"


def test_a_store_that_was_moved_is_refused_with_the_place_of_its_models(old_store, tmp_path):
    _, folder = old_store
    folder.rename(tmp_path / "new")
    with refuses("store-moved") as refusal:
        tracking_store(f"sqlite:///{(tmp_path / 'new' / 'mlflow.db').as_posix()}")
    assert (folder / "mlartifacts").as_uri() in refusal.value.what


def test_a_note_that_outlives_its_database_is_written_anew(
    old_store, tmp_path, empty_database, monkeypatch
):
    _, folder = old_store
    monkeypatch.setattr(
        database,
        "_make_tables",
        lambda connection, artifacts: copy_tables(empty_database, connection),
    )
    folder.rename(tmp_path / "new")
    (tmp_path / "new" / "mlflow.db").unlink()
    store = tracking_store(f"sqlite:///{(tmp_path / 'new' / 'mlflow.db').as_posix()}")
    note = tmp_path / "new" / "mlflow.db.artifacts"
    assert (
        note.read_text(encoding="utf-8")
        == store.artifact_location
        == (tmp_path / "new" / "mlartifacts").as_uri()
    )


def test_a_database_that_has_lost_its_note_is_taken_to_be_where_it_was_made(old_store, tmp_path):
    uri, folder = old_store
    (folder / "mlflow.db.artifacts").unlink()
    assert tracking_store(uri).uri == uri
    assert (folder / "mlflow.db.artifacts").read_text(encoding="utf-8") == (
        folder / "mlartifacts"
    ).as_uri()


@pytest.mark.parametrize(
    "uri", ["nonsense", "file:///tmp/mlruns", "sqlite:///", "./mlruns", "ftp://x"]
)
def test_what_is_no_store_is_refused(uri):
    with refuses("store-kind") as refusal:
        tracking_store(uri)
    assert repr(uri) in refusal.value.what


# --- a database in its states ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "100%",
        "a?x=1",
        "%(here)s",
        "a#b;c&d=e {x} [y] $HOME",
        'it\'s "hi"',
        "~",
        "@x",
        "\N{LATIN SMALL LETTER E}\N{COMBINING ACUTE ACCENT}",
    ],
)
def test_a_store_is_in_the_folder_of_that_name_and_nothing_is_beside_it(
    name, tmp_path, empty_database
):
    if os.name == "nt" and set(name) & set('?"'):
        pytest.skip("no name for a folder on Windows")
    (tmp_path / name).mkdir()
    shutil.copy(empty_database, tmp_path / name)
    store = tracking_store(f"sqlite:///{(tmp_path / name / 'mlflow.db').as_posix()}")
    client = MlflowClient(store.uri)
    run = client.create_run(
        client.create_experiment("x", artifact_location=store.artifact_location)
    )
    client.log_text(run.info.run_id, "hello", "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (file,) = (tmp_path / name).rglob("a.txt")
    assert file.parents[3] == tmp_path / name
    # The page gives its store's URI to the project that it runs.
    assert tracking_store(store.uri) == store
    assert database_path(store.uri) == tmp_path / name / "mlflow.db"


@pytest.mark.parametrize("name", ["My%20Repo", "100%25"])
def test_a_folder_whose_models_mlflow_would_not_find_is_refused_before_anything_is_made(
    name, tmp_path
):
    with refuses("store-path") as refusal:
        tracking_store(f"sqlite:///{(tmp_path / name / 'mlflow.db').as_posix()}")
    assert str(tmp_path / name) in refusal.value.what
    assert list(tmp_path.iterdir()) == []


def test_the_models_of_such_a_folder_are_still_not_found_by_mlflow(tmp_path):
    # When this fails, MLflow has been mended, and `store-path` can go.
    (tmp_path / "a%20b").mkdir()
    Model().save(str(tmp_path / "a%20b" / "MLmodel"))
    with pytest.raises(MlflowException, match="No such artifact"):
        Model.load(str(tmp_path / "a%20b" / "MLmodel"))


STATES = {
    "empty": (lambda file: file.touch(), None),
    "text": (
        lambda file: file.write_text(
            "no database, and longer than the head of one, which has 100 bytes" * 9
        ),
        "store-unreadable",
    ),
    "folder": (lambda file: file.mkdir(), "store-unreadable"),
    "of an older MLflow": (
        lambda file: sql(file, "UPDATE alembic_version SET version_num = '451aebb31d03'"),
        "store-other-version",
    ),
    "of a newer MLflow": (
        lambda file: sql(file, "UPDATE alembic_version SET version_num = 'fffffffffff0'"),
        "store-other-version",
    ),
    "half made": (
        lambda file: sql(file, "DROP TABLE alembic_version", "DROP TABLE runs"),
        "store-unreadable",
    ),
    "somebody else's": (
        lambda file: sql(
            file,
            *(f'DROP TABLE "{name}"' for name in tables(file)),
            "CREATE TABLE songs (name TEXT)",
        ),
        "store-unreadable",
    ),
}


def tables(file):
    with contextlib.closing(sqlite3.connect(file)) as opened:
        return [
            name
            for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not name.startswith("sqlite_")
        ]


def sql(file, *statements):
    with contextlib.closing(sqlite3.connect(file)) as opened:
        for statement in statements:
            opened.execute(statement)
        opened.commit()


@pytest.mark.parametrize("state", STATES)
def test_a_file_in_the_databases_place_is_made_a_store_or_refused_in_two_sentences(
    state, tmp_path, empty_database
):
    file, (make, code) = tmp_path / f"{uuid4().hex}.db", STATES[state]
    if state.startswith(("of", "half", "some")):
        shutil.copy(empty_database, file)
    make(file)
    uri = f"sqlite:///{file.as_posix()}"
    if code is None:
        assert MlflowClient(tracking_store(uri).uri).search_experiments()
    else:
        with refuses(code) as refusal:
            tracking_store(uri)
        assert str(file) in refusal.value.what


def test_one_process_alone_makes_a_database(tmp_path, monkeypatch):
    # A class opens the pages in the same moment; tests/nightly/test_tracking.py does so with six
    # processes.
    file = tmp_path / "mlflow.db"

    def make_tables(*arguments):
        with pytest.raises(Timeout):
            FileLock(f"{file}.lock", timeout=0).acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(database, "_make_tables", make_tables)
    with pytest.raises(KeyboardInterrupt):
        tracking_store(f"sqlite:///{file.as_posix()}")


def test_a_making_that_is_interrupted_leaves_no_half_of_a_database(tmp_path):
    file = tmp_path / "mlflow.db"

    def interrupt(connection, cursor, statement, *rest):
        if "alembic_version (version_num)" in statement:  # MLflow has made its first tables
            raise KeyboardInterrupt

    event.listen(Engine, "before_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            tracking_store(f"sqlite:///{file.as_posix()}")
    finally:
        event.remove(Engine, "before_cursor_execute", interrupt)
    assert tables(file) == []


def test_a_database_that_another_program_has_locked_is_said_to_be(store, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    with contextlib.closing(
        sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None)
    ) as other:
        other.execute("BEGIN EXCLUSIVE")
        with refuses("store-busy"):
            tracking_store(store)
    assert tracking_store(store).uri == store


# --- an experiment that takes no runs -------------------------------------------------------------


def test_a_deleted_experiment_is_restored_by_the_line_that_the_refusal_gives(store):
    client = MlflowClient(store)
    number = client.create_experiment("page")
    client.delete_experiment(number)
    with refuses("experiment-deleted") as refusal:
        tracking_store(store, "page")
    assert tracking_store(store, "other") == tracking_store(store)
    exec(refusal.value.fix.removeprefix("Restore it: ").removesuffix("."), {"mlflow": mlflow})
    assert tracking_store(store, "page") == tracking_store(store)


def test_an_experiment_whose_artifacts_only_a_server_can_write_is_refused(store):
    # So the MLflow UI makes one, where a person makes it there by hand.
    MlflowClient(store).create_experiment("page", artifact_location="mlflow-artifacts:/1")
    with refuses("experiment-elsewhere"):
        tracking_store(store, "page")


# --- a server ----------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """Gives every request the server's one answer, and notes who asked for what."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        status, body = (
            self.server.answer if "logged-models" not in self.path else self.server.models
        )
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/json" if body.startswith("{") else "text/html"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_CONNECT = do_GET  # noqa: N815 - the names are http.server's

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering(monkeypatch):
    """Return a function that starts a server with one answer, and gives its address and what it was asked."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in (
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_HTTP_REQUEST_TIMEOUT",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with contextlib.ExitStack() as stack:

        def start(status, body, models=(200, "{}")):
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers))
            server.answer = (status, body)
            server.models = models
            server.asked = []
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
            stack.callback(server.shutdown)
            return f"127.0.0.1:{server.server_port}", server.asked

        yield start


EXPERIMENT = json.dumps(
    {
        "experiment": {
            "experiment_id": "7",
            "name": "page",
            "lifecycle_stage": "active",
            "artifact_location": "mlflow-artifacts:/7",
        }
    }
)
NONE_SUCH = json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"})


@pytest.mark.parametrize(("status", "body"), [(200, EXPERIMENT), (404, NONE_SUCH)])
def test_a_server_that_answers_is_a_store_that_decides_where_artifacts_are(status, body, answering):
    address, asked = answering(status, body)
    store = tracking_store(f"http://{address}", "page")
    assert (store.uri, store.artifact_location) == (f"http://{address}", None)
    assert len(asked) == 2  # for an experiment, and whether it keeps models


def test_a_server_that_keeps_no_logged_models_is_too_old(answering):
    address, _ = answering(200, EXPERIMENT, models=(404, "<html>Not Found</html>"))
    with refuses("store-old-server"):
        tracking_store(f"http://{address}")
    address, _ = answering(200, EXPERIMENT, models=(500, "{}"))  # a trouble of another day
    assert tracking_store(f"http://{address}").uri == f"http://{address}"


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (200, "<html>Welcome to the hotel</html>", "other-answer"),
        (404, "<html>nothing here</html>", "other-answer"),
        (200, "{}", None),
        (500, "{}", "out-of-order"),
        (503, "<html>401</html>", "out-of-order"),
        (404, "<html>failed 401</html>", "other-answer"),
        (302, "<html>log in there</html>", "other-answer"),
        (401, "You are not authenticated.", "login"),
        (407, "log in", "proxy"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "sesame"}', "login"),
    ],
)
def test_a_server_that_is_no_store_is_asked_once_and_refused_without_its_secrets(
    status, body, code, answering
):
    address, asked = answering(status, body)
    if code is None:
        tracking_store(f"http://{address}")
    else:
        with refuses(f"store-{code}") as refusal:
            tracking_store(f"http://ann:sesame@{address}", "page")
        assert "sesame" not in str(refusal.value)
        assert refusal.value.__cause__ is None
        assert f"http://{address}" in refusal.value.what
        assert len(asked) == 1


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:9",
        "https://127.0.0.1:9",
        "http://127.0.0.1:99999",
        "http://ann:sesame@127.0.0.1:9",
        "http://",
        "http://[::1",
        "http://a b/",
    ],
)
def test_an_address_where_nobody_answers_is_named(uri, answering):
    with refuses("store-no-answer") as refusal:
        tracking_store(uri)
    assert uri.replace("ann:sesame@", "") in refusal.value.what


def test_a_server_that_says_nothing_is_waited_for_as_long_as_the_variable_says(
    answering, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent, refuses("store-no-answer"):
        tracking_store(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_name_and_a_password_go_to_mlflows_variables_and_on_to_the_server(answering):
    address, asked = answering(200, EXPERIMENT)
    assert tracking_store(f"http://ann:ses%40me@{address}/").uri == f"http://{address}/"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "ses@me"
    ((_, sent), (_, again)) = asked
    assert sent == again
    assert base64.b64decode(sent.removeprefix("Basic ")) == b"ann:ses@me"


def test_a_server_that_only_a_proxy_reaches_is_a_store(answering, monkeypatch):
    proxy, asked = answering(200, EXPERIMENT)
    monkeypatch.setenv("http_proxy", f"http://{proxy}")
    assert tracking_store("http://mlflow.invalid:5000").uri == "http://mlflow.invalid:5000"
    assert asked[0][0].startswith("http://mlflow.invalid:5000/")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:{}", "https://mlflow.invalid"])
def test_a_dead_proxy_is_named_also_beside_a_server_of_this_machine(uri, answering, monkeypatch):
    address, asked = answering(200, EXPERIMENT)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://ann:sesame@127.0.0.1:9")
    with refuses("store-proxy") as refusal:
        tracking_store(uri.format(address.rpartition(":")[2]))
    assert "sesame" not in str(refusal.value)
    assert urlsplit(uri.format(1)).hostname in refusal.value.fix
    assert asked == []


def test_the_retries_of_whoever_set_them_are_there_again(answering, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    address, _ = answering(200, EXPERIMENT)
    tracking_store(f"http://{address}")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    with refuses("store-no-answer"):
        tracking_store("http://127.0.0.1:9")
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ  # large files take their time


@pytest.mark.parametrize("room", [0.5, 1.5, 2.5, 4.5])
def test_room_is_asked_for_as_many_copies_as_a_page_makes(room, tmp_path, monkeypatch):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "weights").write_bytes(bytes(1_000_000))
    monkeypatch.setattr("helpers.models.space.free_disk", lambda folder: room)
    local = TrackingStore("sqlite:////x/mlflow.db", "file:///x/mlartifacts")
    for store, needed in ((local, 1), (TrackingStore("http://x", None), 4)):
        if room < needed:
            with refuses("disk-full"):
                store.check_disk_space(tmp_path / "model")
        else:
            store.check_disk_space(tmp_path / "model")


@pytest.mark.parametrize(
    "uri", ["postgresql://ann:sesame@127.0.0.1/mlflow", "ftp://ann:sesame@127.0.0.1"]
)
def test_a_password_is_not_printed_where_the_store_is_of_another_kind(uri):
    with refuses("store-kind") as refusal:
        tracking_store(uri)
    assert "sesame" not in str(refusal.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with refuses("store-not-writable") as refusal:
        tracking_store(f"sqlite:///{(tmp_path / 'file' / 'mlflow.db').as_posix()}")
    assert str(tmp_path / "file") in refusal.value.what
