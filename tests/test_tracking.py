"""The tracking store: where it is, and what is no store.

Run: python -m helpers test tests/test_tracking.py
"""

import shutil

import pytest
from conftest import ROOT

from helpers import CourseError, tracking_store


def test_a_relative_path_starts_at_the_courses_folder_whatever_the_kernels_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = tracking_store("sqlite:///build/pytest-store/mlflow.db")
    assert store.uri == "sqlite:///" + (ROOT / "build" / "pytest-store" / "mlflow.db").as_posix()
    assert store.artifact_location == (ROOT / "build" / "pytest-store" / "mlartifacts").as_uri()
    shutil.rmtree(ROOT / "build" / "pytest-store")


def test_an_odd_path_is_kept(store, tmp_path):
    assert tracking_store(store).uri == store
    assert tracking_store(store) == tracking_store(store)


def test_a_store_that_was_moved_is_refused_with_the_place_of_its_models(tmp_path):
    tracking_store(f"sqlite:///{(tmp_path / 'old' / 'mlflow.db').as_posix()}")
    (tmp_path / "old" / "mlflow.db").touch()
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(CourseError, match=r"was made elsewhere, and its models are still in file:.*old/mlartifacts"):
        tracking_store(f"sqlite:///{(tmp_path / 'new' / 'mlflow.db').as_posix()}")


@pytest.mark.parametrize("uri", ["nonsense", "file:///tmp/mlruns", "sqlite:///", "./mlruns", "ftp://x"])
def test_what_is_no_store_is_refused(uri):
    with pytest.raises(CourseError, match="is no store that the course can use"):
        tracking_store(uri)


def test_a_server_that_does_not_answer_is_named():
    with pytest.raises(CourseError, match=r"No tracking server answers at http://127\.0\.0\.1:9\."):
        tracking_store("http://127.0.0.1:9")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CourseError, match="cannot be written"):
        tracking_store(f"sqlite:///{(tmp_path / 'file' / 'mlflow.db').as_posix()}")
