"""The first three pages on the real model, solved and with other parameters: what they show and what they register.

Run: python -m helpers nightly tests/nightly/test_pages.py
"""

import io
import warnings

import mlflow
import pandas as pd
import pytest
from support import NAMES, PAGES, TRACKS
from support.executed import (
    OTHER,
    Executed,
    ask_in_fresh_process,
    assert_clean,
    checks,
    execute_once,
)

from helpers.tracking import tracking_store

METRICS = {
    "load_seconds",
    "first_token_seconds",
    "tokens_per_second",
    "disk_bytes",
    "peak_memory_bytes",
}


@pytest.fixture(scope="module", params=PAGES)
def executed(request, smol) -> Executed:
    return execute_once(f"real-{request.param}")


@pytest.fixture
def run(executed):
    """Return the only run on the real model: the page runs itself once more as a project, on the tiny one."""
    mlflow.set_tracking_uri(executed.store)
    (run,) = mlflow.search_runs(
        experiment_names=[executed.page],
        output_format="list",
        filter_string="params.model = 'smollm2-135m'",
    )
    return run


def test_the_page_runs_clean_and_each_solution_passes(executed):
    assert_clean(executed)
    assert f"Q  {OTHER['question']}" in executed.stdout
    assert checks(executed)
    assert all(said.startswith("PASS\n") for said in checks(executed)), checks(executed)
    html = executed.file(".html").read_text(encoding="utf-8")
    assert ("data:image/svg+xml;base64," in html) is (executed.page in TRACKS)
    assert 'src="images/' not in html


def test_the_run_holds_its_parameters_measurements_and_answers(executed, run):
    assert run.info.status == "FINISHED"
    parameters = {name: str(value) for name, value in OTHER.items()} | {"model": "smollm2-135m"}
    assert parameters.items() <= run.data.params.items()  # MLflow's flavor adds its model_config
    assert set(run.data.metrics) == METRICS
    assert all(value > 0 for value in run.data.metrics.values())
    assert run.data.metrics["peak_memory_bytes"] < 4e9
    champion = mlflow.MlflowClient().get_model_version_by_alias(NAMES[executed.page], "champion")
    assert (champion.run_id, champion.tags["model"]) == (run.info.run_id, "smollm2-135m")

    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/answers.csv")
    table = pd.read_csv(io.StringIO(text), keep_default_na=False)
    assert list(table["question"]) == [OTHER["question"], "Who are you?"]
    assert all(isinstance(answer, str) and answer.strip() for answer in table["answer"])
    assert not [answer for answer in table["answer"] if "<|" in answer]
    if "Paris" not in table["answer"][0]:
        warnings.warn(
            f"{executed.page} says of the capital of France: {table['answer'][0]!r}", stacklevel=1
        )


def test_nothing_is_logged_outside_the_store(executed, run):
    artifacts = tracking_store(executed.store).artifact_location
    assert run.info.artifact_uri.startswith(artifacts)
    models = [mlflow.get_logged_model(output.model_id) for output in run.outputs.model_outputs]
    assert [model.name for model in models] == [NAMES[executed.page]]
    assert all(model.artifact_location.startswith(artifacts) for model in models)


def test_a_fresh_process_loads_the_champion_and_gets_answers(python, executed):
    name = NAMES[executed.page]
    if name == "slm-onnx-prompt":
        prompts = [
            f"<|im_start|>user\nName a {thing}.<|im_end|>\n<|im_start|>assistant\n"
            for thing in ("fruit", "city")
        ]
        answers = ask_in_fresh_process(
            python, executed.store, name, {"prompt": prompts}, {"max_tokens": 12}
        )
    else:
        messages = [
            {"role": "system", "content": "Answer in one short sentence."},
            {"role": "user", "content": "What colour is the sky?"},
        ]
        completions = ask_in_fresh_process(
            python, executed.store, name, {"messages": messages, "max_tokens": 12}
        )
        answers = [completion["choices"][0]["message"]["content"] for completion in completions]
    assert all(
        isinstance(answer, str) and answer.strip() and "<|" not in answer for answer in answers
    )
