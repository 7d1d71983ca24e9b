"""What the UI and the client of MLflow can do to a store under a page, and what its checks say then.

tests/nightly/test_store_states.py runs the cells of the pages on each of these states and on many
more.

Run: python -m helpers test tests/unit/notebooks/test_store_states.py
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from support import refuses
from support.small_model import make_stand, mend

from course.execute import (
    EXECUTION_TAG,
    Execution,
    _find_run,
    print_answers,
    print_page,
    read_answers,
)
from helpers import compare_figures
from helpers.states import check_model, check_name, check_run


@pytest.fixture
def stand(store, tmp_path):
    return make_stand("ChatModel", store, tmp_path)


def test_a_run_that_was_deleted_is_restored_by_what_its_refusal_names(stand):
    run, client = stand.names["run"], stand.client
    assert check_run(run) is None
    with refuses("run-gone"):
        check_run(SimpleNamespace(info=SimpleNamespace(run_id="0" * 32, run_name="gone")))
    client.delete_run(stand.run_id)
    with refuses("run-deleted") as refusal:
        check_run(run)
    mend(refusal.value)
    assert check_run(run) is None
    client.delete_experiment(run.info.experiment_id)
    with refuses("experiment-deleted") as refusal:
        check_run(run)
    mend(refusal.value)
    assert check_run(run) is None


def test_a_model_is_there_whole_and_takes_this_pages_fields(stand):
    info, client = stand.names["model_info"], stand.client
    version = mlflow.register_model(info.model_uri, stand.name).version
    champion = f"models:/{stand.name}@champion"
    with refuses("model-gone"):
        check_model(champion, info)
    client.set_registered_model_alias(stand.name, "champion", version)
    for uri in (info.model_uri, champion, f"models:/{stand.name}/1"):
        assert check_model(uri, info) is None
    other = mlflow.register_model(stand.log(field="text").model_uri, stand.name).version
    client.set_registered_model_alias(stand.name, "champion", other)
    with refuses("model-other-contract"):
        check_model(champion, info)
    weights = next(Path(mlflow.artifacts.download_artifacts(info.model_uri)).rglob("weights.bin"))
    weights.write_bytes(b"w")
    with refuses("model-not-whole"):
        check_model(info.model_uri)
    client.delete_logged_model(info.model_id)
    with refuses("model-gone"):
        check_model(info.model_uri)


def test_a_name_may_be_a_models_and_not_a_prompts_and_the_store_has_to_be_there(stand):
    assert check_name(stand.name) is None
    mlflow.genai.register_prompt(stand.name, "Hello, {{name}}")
    with refuses("name-taken") as refusal:
        check_name(stand.name)
    mend(refusal.value)
    assert check_name(stand.name) is None
    Path(stand.client.tracking_uri.removeprefix("sqlite:///")).unlink()
    with refuses("store-gone"):
        check_name(stand.name)


def test_a_command_prints_its_own_pages_answers_whatever_became_of_the_run(stand, capsys):
    client, experiment = stand.client, stand.names["experiment"].experiment_id

    def printed():
        capsys.readouterr()
        run = _find_run("mine", client.tracking_uri)
        answers = read_answers(run)
        print_answers(answers or [])
        print_page(Execution(stand.page, "page.html", run, answers))
        return capsys.readouterr().out

    assert "not in the store any more; page: page.html" in printed()
    client.set_tag(stand.run_id, EXECUTION_TAG, "mine")
    assert printed() == (
        "  The run of this page has no answers.csv with questions and answers.\n"
        "  the answer was too short to measure a speed; page: page.html\n"
    )
    client.log_text(stand.run_id, "question,answer\n1,042\nWho?,I and\n", "answers.csv")
    client.log_metric(stand.run_id, "tokens_per_second", 10.4)
    stand.log()  # newer, and no page's
    client.rename_experiment(experiment, "other")
    client.delete_run(
        client.search_runs([experiment], f"tags.`{EXECUTION_TAG}` = 'mine'")[0].info.run_id
    )
    client.delete_experiment(experiment)
    assert (
        printed()
        == "  Q  1\n  A  042\n  Q  Who?\n  A  I and\n  10 tokens per second; page: page.html\n"
    )
    assert read_answers(_find_run("mine", client.tracking_uri))[0] == {
        "question": "1",
        "answer": "042",
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, sys.float_info.max])
def test_a_figure_that_is_none_has_no_row(value):
    shown = compare_figures(
        {"A": {"load_seconds": value, "disk_bytes": 1e6}, "B": {"load_seconds": 1.0}}
    )
    assert [row[1] for row in shown.rows] == ["B", "A"]
    assert max(map(len, repr(shown).splitlines())) < 120


def test_a_page_without_a_speed_is_compared_by_what_it_has():
    shown = compare_figures(
        {"A": {"load_seconds": 1.0}, "B": {"load_seconds": 2.0, "tokens_per_second": 5.0}}
    )
    assert [row[1] for row in shown.rows] == ["A", "B", "B"]
