"""The tracking store: where it is, and what is no store.

Run: python -m helpers test tests/helpers/test_tracking.py
"""

import shutil
import socket
from pathlib import Path
from uuid import uuid4

import pytest
from support import ROOT, refuses

from helpers import tracking_store
from helpers.tracking import server_address


def test_a_relative_path_starts_at_the_courses_folder_whatever_the_kernels_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / "build" / f"store-{uuid4().hex}"
    try:
        store = tracking_store(f"sqlite:///build/{folder.name}/mlflow.db")
        assert folder.is_dir()
        assert store.uri == "sqlite:///" + (folder / "mlflow.db").as_posix()
        assert store.artifact_location == (folder / "mlartifacts").as_uri()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_folder_of_a_store_is_made_with_all_above_it(tmp_path):
    tracking_store(f"sqlite:///{(tmp_path / 'a' / 'b' / 'mlflow.db').as_posix()}")
    assert (tmp_path / "a" / "b").is_dir()


def test_an_empty_uri_is_the_courses_own_store(store, monkeypatch):
    monkeypatch.setenv("COURSE_TRACKING_URI", store)
    assert tracking_store().uri == tracking_store("").uri == store


def test_an_odd_path_is_kept_and_has_its_artifacts_beside_it(store):
    assert tracking_store(store).uri == store
    assert tracking_store(store) == tracking_store(store)
    folder = Path(store.removeprefix("sqlite:///")).parent
    assert tracking_store(store).artifact_location == (folder / "mlartifacts").as_uri()


def old_store(tmp_path):
    """Return the URI of a store that has a database, and the folder that it is in."""
    uri = f"sqlite:///{(tmp_path / 'old' / 'mlflow.db').as_posix()}"
    tracking_store(uri)
    (tmp_path / "old" / "mlflow.db").touch()
    return uri, tmp_path / "old"


def test_a_store_that_was_moved_is_refused_with_the_place_of_its_models(tmp_path):
    _, folder = old_store(tmp_path)
    folder.rename(tmp_path / "new")
    with refuses("store-moved") as refusal:
        tracking_store(f"sqlite:///{(tmp_path / 'new' / 'mlflow.db').as_posix()}")
    assert (folder / "mlartifacts").as_uri() in refusal.value.what


def test_a_note_that_outlives_its_database_is_written_anew(tmp_path):
    _, folder = old_store(tmp_path)
    folder.rename(tmp_path / "new")
    (tmp_path / "new" / "mlflow.db").unlink()
    store = tracking_store(f"sqlite:///{(tmp_path / 'new' / 'mlflow.db').as_posix()}")
    note = tmp_path / "new" / "mlflow.db.artifacts"
    assert note.read_text(encoding="utf-8") == store.artifact_location == (tmp_path / "new" / "mlartifacts").as_uri()


def test_a_database_that_has_lost_its_note_is_taken_to_be_where_it_was_made(tmp_path):
    uri, folder = old_store(tmp_path)
    (folder / "mlflow.db.artifacts").unlink()
    assert tracking_store(uri).uri == uri
    assert (folder / "mlflow.db.artifacts").read_text(encoding="utf-8") == (folder / "mlartifacts").as_uri()


@pytest.mark.parametrize("uri", ["nonsense", "file:///tmp/mlruns", "sqlite:///", "./mlruns", "ftp://x"])
def test_what_is_no_store_is_refused(uri):
    with refuses("store-kind") as refusal:
        tracking_store(uri)
    assert repr(uri) in refusal.value.what


@pytest.mark.parametrize(("uri", "address"), [
    ("http://127.0.0.1:5000", ("127.0.0.1", 5000)),
    ("http://mlflow.example", ("mlflow.example", 80)),
    ("https://mlflow.example", ("mlflow.example", 443)),
    ("https://mlflow.example:8443/path", ("mlflow.example", 8443)),
    ("https://ann:sesame@mlflow.example/", ("mlflow.example", 443)),
    ("http://[::1]:5001", ("::1", 5001)),
])
def test_a_server_is_asked_at_the_port_of_its_scheme(uri, address):
    assert server_address(uri) == address


def test_a_server_that_answers_is_a_store_that_decides_where_artifacts_are():
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        store = tracking_store(uri)
    assert (store.uri, store.artifact_location) == (uri, None)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "https://127.0.0.1:9", "http://127.0.0.1:99999"])
def test_a_server_that_does_not_answer_is_named(uri):
    with refuses("store-no-answer") as refusal:
        tracking_store(uri)
    assert uri in refusal.value.what


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with refuses("store-not-writable") as refusal:
        tracking_store(f"sqlite:///{(tmp_path / 'file' / 'mlflow.db').as_posix()}")
    assert str(tmp_path / "file") in refusal.value.what
