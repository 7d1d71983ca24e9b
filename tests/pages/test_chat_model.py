"""ChatModel, executed as a project with extreme parameters, and what it registers, served and asked.

Run: python -m helpers test tests/pages/test_chat_model.py
"""

import json
import re
import subprocess
import sys

import mlflow
import psutil
import pytest
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA
from support import user_environment
from support.executed import (
    EXTREME,
    Executed,
    ask_in_fresh_process,
    assert_clean,
    execute_once,
    output_of,
)

from helpers.operations.programs import free_port
from helpers.show.signatures import find_signature
from serving.chat.contract import UnusedFields

HELLO = {"messages": [{"role": "user", "content": "What colour is the sky?"}], "max_tokens": 12}


@pytest.fixture(scope="module")
def project() -> Executed:
    return execute_once("project")


def test_mlflow_run_takes_extreme_parameters_and_asks_nothing_of_the_network(project):
    assert_clean(project)
    assert f"Q  {EXTREME['question']}" in project.stdout
    mlflow.set_tracking_uri(project.store)
    (run,) = mlflow.search_runs(experiment_names=["ChatModel"], output_format="list")
    assert (run.data.params["question"], run.data.params["max_tokens"]) == (
        EXTREME["question"],
        "4000",
    )
    counts = re.findall(r"'completion_tokens': (\d+)", "\n".join(map(output_of, project.cells)))
    assert counts
    assert all(int(count) <= 4000 for count in counts)


def test_the_signature_is_the_chat_contract_and_what_clients_send_beside_it(project):
    mlflow.set_tracking_uri(project.store)
    onnx = find_signature("models:/slm-onnx@champion")
    served = set(CHAT_MODEL_INPUT_SCHEMA.input_names()) - {"tools", "custom_inputs"}
    assert set(onnx.inputs.input_names()) == served | set(UnusedFields.model_fields) | {
        "seed",
        "stream_options",
        "max_completion_tokens",
        "response_format",
    }


def test_a_fresh_process_loads_the_champion_and_gets_a_completion(python, project):
    (completion,) = ask_in_fresh_process(python, project.store, "slm-onnx", HELLO)
    (choice,) = completion["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert isinstance(choice["message"]["content"], str)
    usage = completion["usage"]
    assert 0 < usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.skipif(sys.platform == "win32", reason="the page prints other lines there")
def test_the_lines_for_two_terminals_serve_the_model_and_ask_it(project, tmp_path):
    # One page for all: the lines differ in the model's name only. The port may be taken on this
    # machine.
    (printed,) = [output_of(cell) for cell in project.cells if '"serve"' in cell.source]
    serve, ask = printed.replace("5001", str(free_port())).strip().split("\n\n")
    environment = {
        name: value for name, value in user_environment().items() if not name.startswith("MLFLOW_")
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ["sh", "-c", serve], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        ask = ask.replace("curl ", "curl --silent --retry 90 --retry-delay 1 --retry-connrefused ")
        asked = subprocess.run(["sh", "-c", ask], cwd=tmp_path, capture_output=True, text=True)
        assert server.poll() is None, (tmp_path / "log").read_text()
    finally:
        for process in (*psutil.Process(server.pid).children(recursive=True), server):
            process.terminate()
        server.wait()
    (completion,) = json.loads(asked.stdout)
    assert completion["choices"][0]["message"]["content"], completion
