"""CustomPythonWrapper, executed in a checkout with an odd name from a hostile shell, and what it registers.

Run: python -m helpers test tests/pages/test_custom_python_wrapper.py
"""

import sqlite3
from pathlib import Path

import mlflow
import pytest
from support.executed import Executed, ask_in_fresh_process, assert_clean, checks, execute_once

from helpers.show.signatures import find_signature

PAGE = "CustomPythonWrapper"


@pytest.fixture(scope="module")
def odd() -> Executed:
    return execute_once("odd-folder")


def rows(odd, query):
    with sqlite3.connect(odd.database) as connection:
        return connection.execute(query).fetchall()


def test_the_page_runs_clean_with_its_exercises_open(odd):
    assert_clean(odd)
    assert len(checks(odd)) == 3
    assert all(said.startswith("Not yet: ") for said in checks(odd)), checks(odd)
    assert f"page: {odd.file('.html')}" in odd.stdout


def test_nothing_lies_beside_the_folders_that_were_named(odd):
    checkout = Path(odd.extra["checkout"])
    assert odd.extra["beside"] == []
    assert Path(odd.database).stat().st_size > 0
    assert list((checkout / "build" / "mlartifacts").rglob("MLmodel"))
    assert not (checkout / "notebooks" / "mlruns").exists()
    assert not (checkout / "notebooks" / "mlflow.db").exists()


def test_the_run_is_in_the_pages_own_experiment_whatever_the_shell_holds(odd):
    assert {name for (name,) in rows(odd, "SELECT name FROM experiments")} == {"Default", PAGE}
    ((run, status),) = rows(odd, "SELECT run_uuid, status FROM runs")
    assert status == "FINISHED"
    assert rows(odd, "SELECT value FROM tags WHERE key = 'team'") == [("a",)]
    ((model, logged),) = rows(odd, "SELECT name, model_id FROM logged_models")
    assert rows(odd, "SELECT name, run_id FROM model_versions") == [(model, run)]
    assert rows(odd, "SELECT alias FROM registered_model_aliases") == [("champion",)]
    assert set(rows(odd, "SELECT model_id FROM logged_model_metrics")) <= {(logged,)}
    files = {
        path.name for path in (Path(odd.extra["checkout"]) / "build" / "mlartifacts").rglob("*")
    }
    assert {"MLmodel", "answers.csv"} <= files


def test_the_signature_is_the_prompt_contract(odd):
    mlflow.set_tracking_uri(odd.store)
    prompt = find_signature("models:/slm-onnx-prompt@champion")
    assert str(prompt.inputs) == "['prompt': Any (required)]"
    assert str(prompt.outputs) == "[string (required)]"
    assert {param.name: param.dtype.name for param in prompt.params} == {
        "max_tokens": "long",
        "temperature": "double",
    }


def test_a_fresh_process_loads_the_champion_and_gets_a_text_for_each_row(python, odd):
    prompts = [f"<|user|>\nName a {thing}.<|end|>\n<|assistant|>\n" for thing in ("fruit", "city")]
    answers = ask_in_fresh_process(
        python,
        odd.store,
        "slm-onnx-prompt",
        {"prompt": prompts},
        {"max_tokens": 12, "temperature": 0.0},
    )
    assert len(answers) == 2
    assert all(isinstance(answer, str) and answer for answer in answers)
    assert answers[0] != answers[1]
