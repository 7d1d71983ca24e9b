"""The form that asks logged models, in a real kernel and on a model of MLflow's transformers flavor.

Run: python -m helpers test tests/nightly/test_playground.py
"""

import importlib
import shutil
from types import SimpleNamespace

import mlflow
import pytest
import transformers
from jupyter_client.manager import start_new_kernel
from support import ROOT

from helpers.show.playground import kind_of, show_playground

MODULE = importlib.import_module("helpers.show.playground")
VIEW = "application/vnd.jupyter.widget-view+json"


def test_an_answer_is_what_predict_gives_for_a_model_of_the_transformers_flavor(
    tiny, tmp_path, empty_database, monkeypatch
):
    shutil.copy(empty_database, tmp_path)
    mlflow.set_tracking_uri("sqlite:///" + (tmp_path / "mlflow.db").as_posix())
    mlflow.create_experiment("playground", artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment("playground")
    pipeline = transformers.pipeline(
        "text-generation", model=str(tiny.transformers_dir), device="cpu"
    )
    uri = mlflow.transformers.log_model(
        pipeline,
        name="messages",
        task="llm/v1/chat",
        model_config={"do_sample": False, "max_new_tokens": 16},
        pip_requirements=["transformers"],
    ).model_uri
    monkeypatch.setattr(
        MODULE, "get_ipython", lambda: SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=True))
    )
    form = show_playground(
        {"m": uri}, question="The sky is", system_prompt="Be brief.", max_tokens=16, temperature=0.0
    )
    form.generate.click()
    form.thread.join()
    model = mlflow.pyfunc.load_model(uri)
    assert kind_of(model) == "messages"
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "The sky is"},
    ]
    (completion,) = model.predict({"messages": messages, "max_tokens": 16, "temperature": 0.0})
    assert form.answer.value == completion["choices"][0]["message"]["content"] != ""
    assert f"{completion['usage']['completion_tokens']} tokens in " in form.status.value
    MODULE._drop()


@pytest.mark.parametrize("somebody", [False, True])
def test_a_kernel_says_whether_somebody_is_there(somebody):
    code = (
        "from helpers.show.playground import show_playground\n"
        "show_playground({'m': 'models:/m/1'}, question='', system_prompt='', max_tokens=1, temperature=0.0)"
    )
    messages, (manager, client) = [], start_new_kernel(cwd=str(ROOT))
    try:
        client.execute_interactive(code, allow_stdin=somebody, output_hook=messages.append)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    (shown,) = [
        message["content"]["data"]
        for message in messages
        if message["msg_type"] == "execute_result"
    ]
    assert (VIEW in shown, any(message["msg_type"] == "comm_open" for message in messages)) == (
        somebody,
        somebody,
    )
    assert "make lab" in shown["text/html"] and "make lab" in shown["text/plain"]
