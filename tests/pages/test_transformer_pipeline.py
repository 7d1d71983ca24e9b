"""TransformerPipeline, executed on a tracking server with a login, and by papermill and nbmake in a hostile shell.

Run: python -m helpers test tests/pages/test_transformer_pipeline.py
"""

from pathlib import Path

import mlflow
import nbformat
import psutil
import pytest
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from support import NAMES
from support.executed import OTHER, Executed, assert_clean, checks, execute_once

from helpers.paths import BUILD

PAGE = "TransformerPipeline"


@pytest.fixture(scope="module")
def on_server() -> Executed:
    return execute_once("tracking-server")


@pytest.fixture(scope="module")
def by_tools() -> Executed:
    return execute_once("other-tools")


def test_the_page_runs_clean_on_a_tracking_server(on_server):
    assert_clean(on_server)
    assert f"Q  {OTHER['question']}" in on_server.stdout
    # Those of the project that the page runs stay in the page.
    assert on_server.stdout.count("  Q  ") == 2


def test_each_solution_of_an_exercise_passes(on_server):
    assert len(checks(on_server)) == 4
    assert all(said.startswith("PASS\n") for said in checks(on_server)), checks(on_server)


def test_the_run_holds_parameters_and_figures_and_the_champion_is_its_model(on_server):
    client = mlflow.MlflowClient(on_server.store)
    champion = client.get_model_version_by_alias(NAMES[PAGE], "champion")
    run = client.get_run(champion.run_id)
    parameters = {name: str(value) for name, value in OTHER.items()} | {"model": "tiny-phi3"}
    assert run.info.status == "FINISHED"
    assert parameters.items() <= run.data.params.items()  # MLflow's flavor adds its model_config
    assert {"load_seconds", "first_token_seconds", "disk_bytes", "peak_memory_bytes"} <= set(
        run.data.metrics
    )
    assert all(value > 0 for value in run.data.metrics.values())
    assert run.info.run_name == (
        "tiny-phi3: question=What is the capital of France?, system_prompt=Answer in one "
        "sentence., max_tokens=24, temperature=0.3"
    )
    assert champion.tags["model"] == "tiny-phi3"


def test_the_server_has_the_model_and_nothing_is_left_here(on_server):
    client = mlflow.MlflowClient(on_server.store)
    champion = client.get_model_version_by_alias(NAMES[PAGE], "champion")
    model = champion.source.rpartition("/")[2]
    folder = Path(on_server.folder)
    kept = {path.name for path in folder.glob(f"artifacts/**/{model}/artifacts/*")}
    assert {"MLmodel", "requirements.txt"} <= kept
    assert [
        path
        for path in (folder / "temporary").rglob("*")
        if path.is_file() and path.stat().st_size > 1000
    ] == []
    # Other pages may run at this moment: what is theirs belongs to a process that is alive.
    assert [
        path
        for path in BUILD.glob("kernel-*")
        if not psutil.pid_exists(int(path.name.removeprefix("kernel-")))
    ] == []


def test_no_file_and_no_output_shows_the_password(on_server):
    written = "".join(
        on_server.file(ending).read_text("utf-8") for ending in (".ipynb", ".html", ".log")
    )
    assert on_server.extra["host"] in written
    for text in (written, on_server.stdout, on_server.stderr):
        assert "ses%40me" not in text and "ses@me" not in text


def test_the_html_page_carries_its_images(on_server):
    html = on_server.file(".html").read_text(encoding="utf-8")
    assert "data:image/svg+xml;base64," in html
    assert 'src="images/' not in html


def test_the_signature_is_the_chat_contract(by_tools):
    version = mlflow.MlflowClient(by_tools.store).get_model_version_by_alias(
        NAMES[PAGE], "champion"
    )
    mlflow.set_tracking_uri(by_tools.store)
    signature = mlflow.models.get_model_info(f"models:/{NAMES[PAGE]}/{version.version}").signature
    assert (signature.inputs, signature.outputs) == (
        CHAT_MODEL_INPUT_SCHEMA,
        CHAT_MODEL_OUTPUT_SCHEMA,
    )


def test_papermill_and_nbmake_run_the_page_with_parameters_and_open_exercises(by_tools):
    assert_clean(by_tools)
    assert "1 passed" in by_tools.stdout
    (run,) = mlflow.MlflowClient(by_tools.store).search_runs(
        [mlflow.MlflowClient(by_tools.store).get_experiment_by_name(PAGE).experiment_id]
    )
    assert (run.data.params["max_tokens"], run.data.params["model"]) == ("8", "tiny-phi3")
    assert len(checks(by_tools)) == 4
    assert all(said.startswith("Not yet: ") for said in checks(by_tools)), checks(by_tools)
    notebook = nbformat.read(by_tools.file(".ipynb"), as_version=4)
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
