"""A tracking store that is made by several processes at once, or by one that ends in the middle.

Run: python -m helpers test tests/nightly/test_tracking.py
"""

import subprocess
import sys

import mlflow
from mlflow import MlflowClient
from support import PAGES, ROOT, find_cell

from helpers import tracking_store


def test_a_making_that_was_interrupted_leaves_no_half_of_a_database(tmp_path, python):
    # It ends where MLflow has changed a table and not yet noted which version of it that makes.
    uri = f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}"
    result = python(
        "-c",
        f"""
import os
from sqlalchemy import event
from sqlalchemy.engine import Engine

versions = []

@event.listens_for(Engine, "before_cursor_execute")
def end(connection, cursor, statement, *rest):
    versions.extend(["one more"] if "UPDATE alembic_version" in statement else [])
    if len(versions) == 5:
        print("in the middle", flush=True)
        os._exit(9)

from helpers import tracking_store
tracking_store({uri!r})
""",
    )
    assert (result.returncode, result.stdout) == (9, "in the middle\n")
    assert MlflowClient(tracking_store(uri).uri).search_experiments()


def test_a_class_that_opens_the_pages_in_the_same_moment_finds_one_store(tmp_path):
    # The pages' own cell, as Run All reaches it, in six kernels.
    uri = f"sqlite:///{(tmp_path / 'new' / 'mlflow.db').as_posix()}"
    first_cell = (
        "import sys\nimport mlflow\nfrom helpers.page import open_store\n"
        "tracking_uri = sys.argv[1]\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    )
    run = "\nmlflow.start_run()"
    begun = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                first_cell + find_cell(page, "mlflow.set_experiment(") + run,
                uri,
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for page in [*PAGES, *PAGES]
    ]
    for process in begun:
        assert process.stdout.readline() == "ready\n"
    for process in begun:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in begun:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    store = tracking_store(uri)
    made = {
        experiment.name: experiment.artifact_location
        for experiment in MlflowClient(uri).search_experiments()
    }
    assert made.keys() == {*PAGES, "Default"}
    assert {made[page] for page in PAGES} == {store.artifact_location}
    mlflow.set_tracking_uri(uri)
    assert len(mlflow.search_runs(experiment_names=list(PAGES), output_format="list")) == len(begun)
