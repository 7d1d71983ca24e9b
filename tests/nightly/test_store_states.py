"""What the UI, the client and the command line of MLflow can do to a store under a page, and what its cells say then.

Run: python -m helpers nightly tests/nightly/test_store_states.py
"""

import math
import re
import shutil
import sqlite3
import subprocess
import sys

import mlflow
import pytest
from mlflow.entities import Metric
from support import NAMES, PAGES, find_cell, refuses
from support.small_model import make_stand, mend

from course.execute import (
    EXECUTION_TAG,
    Execution,
    _find_run,
    print_answers,
    print_page,
    read_answers,
)
from helpers.exercises import find_hint

# A word of each cell, and the cells that it needs to have run.
CELLS = {
    "ask": ("load_model(model_info.model_uri)", ()),
    "figures": ('answers.csv"', ()),
    "side by side": ("pages = {}", ("figures",)),
    "register": ("mlflow.register_model(", ()),
    "load": ('show_table(f"The {alias}"', ("register",)),
    "addresses": ("ui_addresses(store", ("figures", "side by side", "register")),
}


def register(stand, tags, alias="champion", **logged):
    """Register a version by hand, and let it bear an alias."""
    info = stand.log(**logged) if logged else stand.names["model_info"]
    version = mlflow.register_model(info.model_uri, stand.name, tags=tags)
    stand.client.set_registered_model_alias(stand.name, alias, version.version)
    return version.version


def change(stand, sql):
    """Write to the database as no client can."""
    with sqlite3.connect(stand.client.tracking_uri.removeprefix("sqlite:///")) as connection:
        connection.execute(sql)
    connection.close()


def collect(stand):
    """Remove what was deleted, as `mlflow gc` does."""
    uri = stand.client.tracking_uri
    subprocess.run(
        [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri, "--tracking-uri", uri],
        check=True,
        capture_output=True,
    )


def log_by_hand(stand, **metrics):
    """Leave a newer run of somebody else's in the page's experiment."""
    with mlflow.start_run():
        mlflow.log_param("model", stand.names["model"])
        mlflow.log_metrics(metrics)


CHANGES = {
    "nothing": lambda stand: None,
    "run deleted": lambda stand: stand.client.delete_run(stand.run_id),
    "run deleted and collected": lambda stand: [
        stand.client.delete_run(stand.run_id),
        collect(stand),
    ],
    "run renamed": lambda stand: stand.client.update_run(stand.run_id, name="other"),
    "run failed": lambda stand: stand.client.set_terminated(stand.run_id, "FAILED"),
    "run running": lambda stand: stand.client.update_run(stand.run_id, status="RUNNING"),
    "answers deleted": lambda stand: shutil.rmtree(stand.artifacts / stand.run_id),
    "experiment deleted": lambda stand: stand.client.delete_experiment(
        stand.names["experiment"].experiment_id
    ),
    "experiment renamed": lambda stand: stand.client.rename_experiment(
        stand.names["experiment"].experiment_id, "x"
    ),
    "experiment restored": lambda stand: [
        CHANGES["experiment deleted"](stand),
        stand.client.restore_experiment(stand.names["experiment"].experiment_id),
    ],
    "foreign run without figures": log_by_hand,
    "foreign run of another schema": lambda stand: log_by_hand(stand, disk_bytes=1.0, accuracy=0.5),
    "figures that are none": lambda stand: stand.client.log_batch(
        stand.run_id,
        [
            Metric(name, value, 1, 1)
            for name, value in (
                ("load_seconds", math.nan),
                ("first_token_seconds", math.inf),
                ("peak_memory_bytes", -math.inf),
            )
        ],
    ),
    "logged model deleted": lambda stand: stand.client.delete_logged_model(
        stand.names["model_info"].model_id
    ),
    "files deleted": lambda stand: shutil.rmtree(stand.artifacts),
    "MLmodel deleted": lambda stand: next(stand.artifacts.rglob("MLmodel")).unlink(),
    "weights deleted": lambda stand: next(stand.artifacts.rglob("weights.bin")).unlink(),
    "weights cut off": lambda stand: next(stand.artifacts.rglob("weights.bin")).write_bytes(b"w"),
    "database deleted": lambda stand: [
        stand.artifacts.with_name(name).unlink() for name in ("mlflow.db", "mlflow.db.artifacts")
    ],
    "name of a prompt": lambda stand: mlflow.genai.register_prompt(stand.name, "Hello, {{name}}"),
    "name without versions": lambda stand: stand.client.create_registered_model(stand.name),
    "champion without tag": lambda stand: register(stand, {}),
    "champion with an empty tag": lambda stand: register(stand, {"model": ""}),
    "champion that is in no catalogue": lambda stand: register(stand, {"model": "gone-9b"}),
    "champion of this model": lambda stand: register(stand, {"model": stand.names["model"]}),
    "champion of other fields": lambda stand: register(stand, {"model": "x"}, field="text"),
    "champion deleted": lambda stand: stand.client.delete_model_version(
        stand.name, register(stand, {"model": "x"})
    ),
    "champion archived": lambda stand: [
        register(stand, {"model": "x"}),
        change(stand, "UPDATE model_versions SET current_stage = 'Archived'"),
    ],
    "champion failed": lambda stand: [
        register(stand, {"model": "x"}),
        change(stand, "UPDATE model_versions SET status = 'FAILED_REGISTRATION'"),
    ],
    "alias removed": lambda stand: stand.client.delete_registered_model_alias(
        stand.name, "champion"
    ),
    "alias moved": lambda stand: register(stand, {}, field=""),
    "version deleted": lambda stand: stand.client.delete_model_version(stand.name, "1"),
    "tag deleted": lambda stand: stand.client.delete_model_version_tag(stand.name, "1", "model"),
    "name deleted": lambda stand: stand.client.delete_registered_model(stand.name),
    "name changed": lambda stand: stand.client.rename_registered_model(stand.name, "x"),
}
# What was changed, the cell that runs then, and what it refuses with, or what it says.
STATES = [
    ("nothing", "ask", ""),
    ("files deleted", "ask", "model-gone"),
    ("database deleted", "ask", "store-gone"),
    ("nothing", "figures", ""),
    ("run deleted", "figures", "run-deleted"),
    ("experiment deleted", "figures", "experiment-deleted"),
    ("experiment renamed", "figures", ""),
    ("run deleted", "side by side", "No finished run on .*{page}"),
    ("experiment renamed", "side by side", "No finished run on .*{page}"),
    ("foreign run of another schema", "side by side", "on disk"),
    ("figures that are none", "side by side", r"10\.0 tokens per second"),
    ("nothing", "register", "nobody +alias +champion"),
    ("name of a prompt", "register", "name-taken"),
    ("name without versions", "register", "nobody +alias +champion"),
    ("logged model deleted", "register", "model-gone"),
    ("weights deleted", "register", "model-not-whole"),
    ("champion without tag", "register", "an unknown model +alias +challenger"),
    ("champion deleted", "register", "nobody +alias +champion"),
    ("nothing", "load", "version +1 .*Madrid"),
    ("alias removed", "load", "model-gone"),
    ("alias moved", "load", "version +2 .*Madrid"),
    ("champion of other fields", "load", "model-other-contract"),
    ("name deleted", "load", "model-gone"),
    ("files deleted", "load", "model-gone"),
    ("nothing", "addresses", "compare|this run"),
    ("run deleted", "addresses", "run-deleted"),
    ("logged model deleted", "ask", "model-gone"),
    ("weights cut off", "ask", "model-not-whole"),
    ("experiment restored", "figures", ""),
    ("run renamed", "figures", ""),
    ("run failed", "figures", ""),
    ("run running", "figures", ""),
    ("logged model deleted", "figures", ""),
    ("nothing", "side by side", r"1\.00 s"),
    ("run failed", "side by side", "No finished run on .*{page}"),
    ("run running", "side by side", "No finished run on .*{page}"),
    ("experiment deleted", "side by side", "No finished run on .*{page}"),
    ("foreign run without figures", "side by side", r"1\.00 s"),
    ("answers deleted", "side by side", r"1\.00 s"),
    ("files deleted", "register", "model-gone"),
    ("MLmodel deleted", "register", "model-gone"),
    ("run deleted", "register", "nobody +alias +champion"),
    ("champion with an empty tag", "register", "an unknown model +alias +challenger"),
    ("champion that is in no catalogue", "register", "gone-9b +alias +challenger"),
    ("champion of this model", "register", "smollm2-135m +alias +champion"),
    ("champion of other fields", "register", "x +alias +challenger"),
    ("champion archived", "register", "x +alias +challenger"),
    ("champion failed", "register", "x +alias +challenger"),
    ("version deleted", "load", "model-gone"),
    ("tag deleted", "load", "version +1 "),
    ("name changed", "load", "model-gone"),
    ("weights deleted", "load", "model-not-whole"),
    ("database deleted", "load", "store-gone"),
    ("experiment deleted", "addresses", "experiment-deleted"),
]
SLOW = [
    ("run deleted and collected", cell, expected)
    for cell, expected in (
        ("figures", "run-gone"),
        ("side by side", "No finished run on .*{page}"),
        ("addresses", "run-gone"),
    )
]


def run(stand, cell):
    """Run a cell after those that it needs which have not run."""
    text, needed = CELLS[cell]
    done = stand.names.setdefault("done", [])
    for other in needed:
        if other not in done:
            run(stand, other)
    done.append(cell)
    return stand.cell(text)


def see(page, state, cell, expected, store, tmp_path, capsys):
    """Run the cells before one, change the store, and see what that one says."""
    stand = make_stand(page, store, tmp_path)
    for other in CELLS[cell][1]:
        run(stand, other)
    capsys.readouterr()
    CHANGES[state](stand)
    if re.fullmatch("[a-z]+(-[a-z]+)+", expected):
        with refuses(expected) as refusal:
            run(stand, cell)
        return stand, refusal.value
    said = re.sub(r"\s+", " ", f"{run(stand, cell)!r}")
    said = f"{said} {capsys.readouterr().out}"
    assert re.search(expected.format(page=page), said), said
    return stand, None


@pytest.mark.parametrize(
    ("number", "state", "cell", "expected"),
    [pytest.param(number, *row, id=f"{row[0]}, {row[1]}") for number, row in enumerate(STATES)],
)
def test_a_cell_says_what_somebody_changed(number, state, cell, expected, store, tmp_path, capsys):
    page = PAGES[number % 3]  # the cells of the three are alike: a test below says so
    stand, refusal = see(page, state, cell, expected, store, tmp_path, capsys)
    if refusal:  # what the page had loaded stays with it
        assert stand.names["chat" if page == "ChatModel" else "loaded"] is not None


@pytest.mark.parametrize(("state", "cell", "expected"), SLOW)
@pytest.mark.parametrize("page", PAGES)
def test_a_cell_says_what_the_command_line_removed(
    page, state, cell, expected, store, tmp_path, capsys
):
    see(page, state, cell, expected, store, tmp_path, capsys)


@pytest.mark.parametrize("cell", CELLS)
def test_the_pages_ask_the_store_alike(cell):
    # The lines that call MLflow's store are the same on each page, but for the model's name.
    lines = [
        [
            re.sub("  # .*", "", line)
            .replace(f'"{NAMES[page]}"', "NAME")
            .replace(f"{NAMES[page]}@", "NAME@")
            for line in find_cell(page, CELLS[cell][0]).splitlines()
            if re.search(
                r"check_\w+\(|search|client\.(get|set)|register|start_run|missing|status", line
            )
        ]
        for page in PAGES
    ]
    assert lines[0] == lines[1] == lines[2] != []


@pytest.mark.parametrize(
    ("state", "cell", "expected"),
    [
        ("run deleted", "figures", "run-deleted"),
        ("experiment deleted", "figures", "experiment-deleted"),
        ("name of a prompt", "register", "name-taken"),
    ],
)
def test_the_command_that_a_refusal_names_mends_it(state, cell, expected, store, tmp_path, capsys):
    stand, refusal = see("ChatModel", state, cell, expected, store, tmp_path, capsys)
    mend(refusal)
    run(stand, cell)


@pytest.mark.parametrize(
    ("state", "code"), [("name of a prompt", "name-taken"), ("weights deleted", "model-not-whole")]
)
def test_what_is_refused_leaves_the_registry_as_it_was(state, code, store, tmp_path, capsys):
    stand, _ = see("CustomPythonWrapper", state, "register", code, store, tmp_path, capsys)
    assert "alias" not in stand.names
    assert stand.client.search_registered_models() == []
    if state == "name of a prompt":
        with pytest.raises(mlflow.MlflowException):
            stand.client.get_model_version(stand.name, "2")


@pytest.mark.parametrize("code", ["experiment-deleted"])
@pytest.mark.parametrize("page", PAGES[:2])
@pytest.mark.parametrize("which", [0, 1])
def test_a_project_is_not_begun_where_its_experiment_is_deleted(page, which, code, store, tmp_path):
    stand = make_stand(page, store, tmp_path)
    stand.client.create_experiment("Projects")
    stand.client.delete_experiment(
        stand.client.get_experiment_by_name(("Projects", page)[which]).experiment_id
    )
    with refuses(code):
        stand.cell("mlflow.projects.run(")


def test_the_exercise_says_what_the_registry_lacks(store, tmp_path):
    stand = make_stand("TransformerPipeline", store, tmp_path)
    run(stand, "register")
    version, client = stand.names["version"], stand.client
    answers = {"my_uri": f"models:/{stand.name}@mine", "version": version, "client": client}
    assert "has no alias mine in the registry" in find_hint("alias", answers)
    client.set_registered_model_alias(stand.name, "mine", version.version)
    assert find_hint("alias", answers) is None
    register(stand, {}, "mine", field="")
    assert "is on version 2" in find_hint("alias", answers)
    client.delete_registered_model(stand.name)
    assert "was deleted. Run this page's cells from Register it on" in find_hint("alias", answers)


# --- a page that `python -m helpers notebook` has run ---------------------------------------------


@pytest.fixture
def executed(store, tmp_path):
    """Return a stand whose run has the tag of an execution, its figures and its answers."""
    stand = make_stand("CustomPythonWrapper", store, tmp_path)
    stand.client.set_tag(stand.run_id, EXECUTION_TAG, "mine")
    run(stand, "figures")
    log_by_hand(stand, disk_bytes=1.0)  # newer, and no page's
    return stand


def printed(stand, capsys):
    capsys.readouterr()
    found = _find_run("mine", stand.client.tracking_uri)
    answers = read_answers(found)
    print_answers(answers or [])
    print_page(Execution(stand.page, "page.html", found, answers))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (
            "nothing",
            "Q  Where?\n  A  Madrid\n  Q  Who?\n  A  I\n  10 tokens per second; page: page.html",
        ),
        ("experiment renamed", "A  Madrid"),
        ("experiment deleted", "A  Madrid"),
        ("run deleted", "A  Madrid"),
        ("run renamed", "A  Madrid"),
        ("answers deleted", "no answers.csv"),
    ],
)
def test_a_command_prints_its_own_pages_answers_whatever_became_of_the_run(
    state, says, executed, capsys
):
    CHANGES[state](executed)
    said = printed(executed, capsys)
    assert says in said
    assert "page.html" in said


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        (
            "DELETE FROM latest_metrics WHERE key = 'tokens_per_second'",
            "too short to measure a speed",
        ),
        ("DELETE FROM tags WHERE key = 'course.execution'", "not in the store"),
    ],
)
def test_a_command_stands_a_run_that_was_edited(sql, says, executed, capsys):
    change(executed, sql)
    said = printed(executed, capsys)
    assert says in said
    assert "page.html" in said


def test_answers_that_are_numbers_are_printed_as_they_stand(executed, capsys):
    executed.client.log_text(executed.run_id, "question,answer\n1,042\n2,7\n", "answers.csv")
    assert "  Q  1\n  A  042\n" in printed(executed, capsys)
