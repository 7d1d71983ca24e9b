"""Single cells of the pages, each run by itself on a small stand of real things: what a learner's mistakes lead to.

Run: python -m helpers test tests/unit/notebooks/test_cells.py
"""

import inspect
import json
from types import SimpleNamespace

import mlflow
import pytest
from mlflow.models import infer_signature
from support import NAMES, PAGES, find_cell

from helpers import check_model, check_name, check_run, name_run, pinned, show_table
from helpers.parameters import DEFAULTS
from helpers.tracking import tracking_store
from serving import chat_model


@pytest.fixture
def here(store):
    """Make a store the active one; return what a page has bound when it logs."""
    mlflow.set_tracking_uri(store)
    mlflow.create_experiment("cells", artifact_location=tracking_store(store).artifact_location)
    mlflow.set_experiment("cells")
    return {"mlflow": mlflow, "parameters": DEFAULTS, "name_run": name_run, "pinned": pinned, "show_table": show_table,
            "client": mlflow.MlflowClient(), "MlflowException": mlflow.MlflowException,
            "tracking_store": tracking_store, "tracking_uri": store, "check_model": check_model,
            "check_name": check_name, "check_run": check_run}


@pytest.mark.parametrize("page", PAGES)
def test_a_run_that_fails_is_marked_so_and_takes_no_later_cells_figures(page, here, tmp_path):
    former = {"run": "the former run", "model_info": "the former model"}
    # A pipeline that is none, and a folder that is not there: logging fails as it does for a learner.
    broken = {"pipeline": object(), "model_config": {}, "model_card": None, "messages": [], "device": "cpu",
              "prompt": "Hi", "max_tokens": 8, "temperature": 0.0, "provider": "cpu", "model": "tiny-phi3",
              "wrapper_file": tmp_path / "none.py", "chat_model": chat_model, "inspect": inspect,
              "entry": SimpleNamespace(context_length=8),
              "prepared": SimpleNamespace(sources=dict.fromkeys(("transformers", "onnx"), "x"),
                                          onnx_dir=tmp_path / "none", transformers_dir=tmp_path / "none")}
    names = here | broken | former
    with pytest.raises((mlflow.MlflowException, OSError)):
        exec(find_cell(page, "start_run(run_name="), names)
    assert former.items() <= names.items()
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FAILED"
    assert run.info.run_name == "smollm2-135m"
    assert mlflow.active_run() is None


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """Return a file of code that is a model in three lines."""
    file = tmp_path_factory.mktemp("small") / "model.py"
    file.write_text("import mlflow\nclass Small(mlflow.pyfunc.PythonModel):\n    def predict(self, context, "
                    "model_input: list[str]):\n        return model_input\nmlflow.models.set_model(Small())\n")
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_champion_stays_with_another_model_unless_its_weights_are_random(page, here, small_model):
    info = mlflow.pyfunc.log_model(name="small", python_model=small_model, pip_requirements=["mlflow"],
                                   signature=infer_signature(["a"], ["a"]))
    cell, client = find_cell(page, "mlflow.register_model("), here["client"]
    # The model of a run after the other, and who is champion after it.
    champions = []
    for model in ("tiny-phi3", "tiny-phi3", "smollm2-135m", "tiny-phi3", "phi-3-mini-4k", "smollm2-135m"):
        names = here | {"model_info": info, "model": model}
        exec(cell, names)
        champion = client.get_model_version_by_alias(NAMES[page], "champion")
        assert client.get_model_version_by_alias(NAMES[page], names["alias"]).version == names["version"].version
        champions.append((names["alias"], champion.tags["model"], int(champion.version)))
    assert champions == [
        ("champion", "tiny-phi3", 1), ("champion", "tiny-phi3", 2), ("champion", "smollm2-135m", 3),
        ("challenger", "smollm2-135m", 3), ("challenger", "smollm2-135m", 3), ("champion", "smollm2-135m", 6)]


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["helpers", "mlflow"])
@pytest.mark.parametrize("page", PAGES)
def test_another_python_is_told_which_kernel_to_choose(page, missing, python):
    cell = find_cell(page, "from helpers import")
    code = f"import sys, json; sys.modules[{missing!r}] = None; exec(json.loads(sys.argv[1]), dict.fromkeys('x'))"
    said = python("-c", code, json.dumps(cell)).stderr.splitlines()[-1]
    assert said.startswith(f"ImportError: The Python that runs this page has no {missing}")
    assert "Choose another kernel" in said
    assert ".venv" in said


@pytest.mark.parametrize("page", PAGES)
def test_figures_can_be_logged_twice_and_answers_stand_once(page, here):
    with mlflow.start_run() as run:
        pass
    names = here | {"run": run, "figures": {"load_seconds": 1.0}, "question": "Who?", "answer": "I, \"x\"\n",
                    "pirate": [{"content": "And you?"}], "pirate_answer": "",
                    "messages": [], "chat": SimpleNamespace(predict=lambda rows: [
                        {"choices": [{"message": {"content": text}}]} for text in ("I, \"x\"\n", "")])}
    cell = find_cell(page, "answers.csv")
    exec(cell, names)
    exec(cell, names)
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/answers.csv")
    assert text == 'question,answer\nWho?,"I, ""x""\n"\nAnd you?,""\n'.replace(',""\n', ",\n")
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"
