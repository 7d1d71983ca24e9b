"""What MLflow itself does with the course: `mlflow run`, in a fresh environment too, its server, its flavor.

Run: python -m helpers nightly tests/nightly/test_projects.py
"""

import shutil
import sys
import tempfile
from pathlib import Path

import httpx
import mlflow
import pytest
import transformers
from huggingface_hub import ModelCard
from support import run_python
from support.executed import Executed, assert_clean, execute_once
from support.projects import activated, project

from helpers.operations.programs import start_program
from helpers.tracking import tracking_store


@pytest.fixture(scope="module")
def executed() -> Executed:
    return execute_once("operations-project")


def test_mlflow_run_runs_operations_on_the_other_track_with_its_exercises_open(executed):
    assert_clean(executed)
    assert "Not yet: write your own" in executed.file(".ipynb").read_text(encoding="utf-8")
    aliases = mlflow.MlflowClient(executed.store).get_registered_model("slm-transformers").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {
        "champion": 1,
        "challenger": 2,
    }


def test_mlflow_run_serves_until_a_signal_comes(executed, tmp_path, monkeypatch):
    # MLflow sets it, and another test's store may be meant.
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    command = [
        sys.executable,
        *map(str, project("serve", model="models:/slm-transformers@champion", port=0)),
    ]
    program = start_program(
        command,
        r"Serving slm-transformers, version 1, at (http://\S+)/v1",
        tmp_path / "log",
        **activated(tmp_path) | {"COURSE_TRACKING_URI": executed.store},
    )
    try:
        reply = httpx.post(
            f"{program.address}/v1/chat/completions",
            trust_env=False,
            timeout=60,
            json={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
        )
        assert reply.json()["usage"]["completion_tokens"] == 2, reply.text
    finally:
        program.stop()
    assert not program.running


def test_mlflow_run_makes_a_fresh_environment_from_which_the_course_finds_its_own(
    executed, tmp_path
):
    words = project("serve", local=False, model="models:/nobody@champion", port=0)
    # MLflow puts the environment's path into a shell's line as it is, so it may have no space, as a
    # checkout's may.
    with tempfile.TemporaryDirectory() as environments:
        result = run_python(
            tmp_path,
            *words,
            cwd=tmp_path,
            MLFLOW_ENV_ROOT=environments,
            **activated(tmp_path) | {"COURSE_TRACKING_URI": executed.store},
        )
        assert result.returncode == 1 and list(Path(environments).iterdir()), result.stderr
    assert "names no version at models:/nobody@champion" in result.stderr, result.stderr


def test_two_pages_at_the_same_moment_on_a_fresh_server_leave_their_models_there():
    both = execute_once("two-on-a-server")
    assert both.returncode == 0, both.stdout + both.stderr
    client = mlflow.MlflowClient(both.store)
    for name in ("slm-transformers", "slm-onnx-prompt"):
        source = client.get_model_version_by_alias(name, "champion").source
        assert list(Path(both.folder).rglob(f"{source.rpartition('/')[2]}/artifacts/MLmodel"))
    temporary = Path(both.folder) / "temporary"
    assert [
        path for path in temporary.rglob("*") if path.is_file() and path.stat().st_size > 1000
    ] == []


def test_the_chat_model_needs_its_old_folder_for_stop_and_for_nothing_else(store, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.transformers_dir, folder)
    mlflow.set_tracking_uri(store)
    mlflow.create_experiment("stop", artifact_location=tracking_store(store).artifact_location)
    mlflow.set_experiment("stop")
    info = mlflow.transformers.log_model(
        transformers.pipeline("text-generation", model=str(folder)),
        name="chat",
        task="llm/v1/chat",
        model_config={"max_new_tokens": 4, "do_sample": False},
        pip_requirements=["mlflow", "transformers"],
        model_card=ModelCard.load(folder / "README.md"),
    )
    shutil.rmtree(folder)
    model = mlflow.pyfunc.load_model(info.model_uri)
    request = {"messages": [{"role": "user", "content": "Hi"}]}
    assert model.predict(request)[0]["usage"]["completion_tokens"] <= 4
    with pytest.raises(OSError, match="Repo id must be"):
        model.predict(request | {"stop": ["a"]})
