"""Single cells of the pages, each run by itself on a small stand of real things: what a learner's mistakes lead to.

Run: python -m helpers test tests/pages/test_cells.py
"""

import inspect
from types import SimpleNamespace

import mlflow
import pytest
from support import PAGES, find_cell
from support.small_model import use_store

from course.execute import read_answers
from serving import chat as chat_model


@pytest.fixture
def here(store):
    return use_store(store)


@pytest.mark.parametrize("page", PAGES)
def test_a_run_that_fails_is_marked_so_and_takes_no_later_cells_figures(page, here, tmp_path):
    former = {"run": "the former run", "model_info": "the former model"}
    # A pipeline that is none, and a folder that is not there: logging fails as it does for a
    # learner.
    broken = {
        "pipeline": object(),
        "model_config": {},
        "model_card": None,
        "messages": [],
        "device": "cpu",
        "prompt": "Hi",
        "max_tokens": 8,
        "temperature": 0.0,
        "provider": "cpu",
        "model": "tiny-phi3",
        "wrapper_file": tmp_path / "none.py",
        "BUILD": tmp_path,
        "chat_model": chat_model,
        "inspect": inspect,
        "entry": SimpleNamespace(context_length=8),
        "prepared": SimpleNamespace(
            sources=dict.fromkeys(("transformers", "onnx"), "x"),
            onnx_dir=tmp_path / "none",
            transformers_dir=tmp_path / "none",
        ),
    }
    names = here | broken | former
    with pytest.raises((mlflow.MlflowException, OSError)):
        exec(find_cell(page, "start_run(run_name="), names)
    assert former.items() <= names.items()
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FAILED"
    assert run.info.run_name == "smollm2-135m"
    assert mlflow.active_run() is None


@pytest.mark.parametrize("page", PAGES)
def test_figures_can_be_logged_twice_and_answers_stand_once(page, here):
    with mlflow.start_run() as run:
        pass
    names = here | {
        "run": run,
        "figures": {"load_seconds": 1.0},
        "question": "Who?",
        "answer": 'I, "x"\n',
        "pirate": [{"content": "And you?"}],
        "pirate_answer": "a\rb",
        "messages": [],
        "chat": SimpleNamespace(
            predict=lambda rows: [
                {"choices": [{"message": {"content": text}}]} for text in ('I, "x"\n', "a\rb")
            ]
        ),
    }
    cell = find_cell(page, "answers.csv")
    exec(cell, names)
    exec(cell, names)
    # MLflow reads a carriage return as the end of a line, which in quotes ends no row.
    assert read_answers(run) == [
        {"question": "Who?", "answer": 'I, "x"\n'},
        {"question": "And you?", "answer": "a\nb"},
    ]
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"
