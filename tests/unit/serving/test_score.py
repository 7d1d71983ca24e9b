"""The scoring script of Azure Machine Learning: its answers and refusals, alone and under the server that Azure uses.

Run: python -m helpers test tests/unit/serving/test_score.py
"""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import mlflow
import pandas as pd
import psutil
import pytest
import yaml
from mlflow.exceptions import MlflowException
from support import ROOT, stand_ins
from support.chat import AS_SHOWN, BAD, SECRET, chat_model_for, contents, deltas, user
from support.service import wait_for
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from course.azure import TEMPLATES, fill, service_requirements
from helpers import pinned
from serving import score
from serving.chat_model import Refusal

SIGNATURE = "The model's signature does not allow this request."
# What the chat page logs, by the names that its cell has.
LOGGED = ("jinja2", "joblib", "llguidance", "mlflow", "numpy", "onnxruntime-genai", "pandas", "psutil", "pydantic",
          "tokenizers")


@pytest.fixture(autouse=True, scope="module")
def init_sets_nothing_for_others():
    """Take back the variable that init() sets, for which other tests' errors would lack their details."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_SCHEMA_DETAILS", "")
        patch.delenv("MLFLOW_DISABLE_SCHEMA_DETAILS")
        yield


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Save the chat model on the toy model as the chat page logs it; return the folder that stands around it."""
    folder = tmp_path_factory.mktemp("registered")
    mlflow.pyfunc.save_model(folder / "model", **chat_model_for(tiny) | {
        "pip_requirements": pinned(*LOGGED), "input_example": AS_SHOWN | {"max_tokens": 16}})
    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    """Let init() load the chat model, as Azure does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZUREML_MODEL_DIR", str(saved))
        score.init()
        yield score._model
        score._model.unwrap_python_model().close()


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return a function that lets init() load a stand-in."""
    def load(kind):
        monkeypatch.setenv("AZUREML_MODEL_DIR", str(stand_ins.save(tmp_path / kind, kind)))
        monkeypatch.setattr(score, "_model", None)
        score.init()
        return score._model.unwrap_python_model()

    return load


def post(content):
    """Ask run() as the inference server does: with a request of Flask's kind."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return score.run(Request(EnvironBuilder(method="POST", input_stream=io.BytesIO(body),
                                            content_length=len(body)).get_environ()))


def read(response):
    return json.loads(response.get_data())


# --- answers --------------------------------------------------------------------------------


def test_the_sample_request_gets_what_the_model_itself_answers(loaded, saved, chat):
    sample = json.loads((saved / "model" / "serving_input_example.json").read_text(encoding="utf-8"))
    response = post(sample)
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert contents(read(response)) == contents(chat.predict(None, AS_SHOWN)[0])


def test_a_stream_has_the_same_text_as_a_whole_answer_and_its_usage(loaded):
    whole = read(post(AS_SHOWN | {"max_tokens": 16}))
    response = post(AS_SHOWN | {"max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}})
    assert response.content_type == "text/event-stream" and response.is_streamed
    *events, done = [line.removeprefix("data: ") for line in response.get_data(as_text=True).split("\n\n") if line]
    assert done == "[DONE]"
    *chunks, last = [json.loads(event) for event in events]
    assert "".join(text for text, _ in deltas([*chunks, last])) == contents(whole)[0]
    assert last["usage"] == whole["usage"]


@pytest.mark.parametrize("read_events", [0, 1])
def test_a_caller_that_leaves_a_stream_ends_the_models_work(read_events, stand_in):
    model = stand_in("Streams")
    model.gate.release(1)
    response = post({"messages": user("gated 5"), "stream": True})
    assert model.running == 1
    for _ in range(read_events):
        assert next(response.response).startswith("data: ")
    response.close()
    assert (model.running, model.steps) == (0, 1)


def test_a_stream_that_is_left_is_closed_also_where_somebody_still_holds_it(stand_in, monkeypatch):
    model = stand_in("Streams")
    model.gate.release(1)
    ask, held = score._model.predict_stream, []
    monkeypatch.setattr(score._model, "predict_stream", lambda values: held.append(ask(values)) or held[0])
    response = post({"messages": user("gated 5"), "stream": True})
    next(response.response)
    response.close()
    assert (model.running, model.steps) == (0, 1)


def test_a_stream_that_fails_on_its_way_ends_with_an_error_and_no_word_of_the_request(stand_in, monkeypatch):
    stand_in("Streams")
    chunks = iter([{"choices": []}])

    def fail():
        yield from chunks
        raise ValueError(SECRET)

    monkeypatch.setattr(score._model, "predict_stream", lambda values: fail())
    said = post({"messages": user(SECRET), "stream": True}).get_data(as_text=True)
    assert json.loads(said.split("\n\n")[1].removeprefix("data: "))["error"]["code"] == "failed"
    assert SECRET not in said and "[DONE]" not in said


def test_a_model_without_a_stream_says_so(stand_in):
    stand_in("Plain")
    response = post({"messages": user("words 1"), "stream": True})
    assert response.status_code == 400 and read(response)["error"]["param"] == "stream"
    assert read(post({"messages": user("words 1")}))["choices"][0]["message"]["content"] == "word "


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(("body", "status", "code"), [
    (b"", 400, "invalid_json"),
    (b"{", 400, "invalid_json"),
    (f'"{SECRET}"'.encode(), 400, "invalid_json"),
    (f'["{SECRET}"]'.encode(), 400, "invalid_json"),
    (SECRET.encode("utf-16"), 400, "invalid_json"),
    (b'{"temperature": NaN}', 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", 400, "invalid_json"),
    (b" " * (score.MAX_BODY + 1), 413, "request_too_large"),
])
def test_a_body_that_is_no_request_is_refused(body, status, code, loaded):
    response = post(body)
    error = read(response)["error"]
    assert (response.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
    assert SECRET not in error["message"]


@pytest.mark.parametrize(("fields", "says"), BAD, ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "")
def test_what_the_model_refuses_is_a_400_in_its_own_words(fields, says, loaded, caplog):
    request = fields if "messages" in fields or not fields else {"messages": user(SECRET)} | fields
    response = post(request)
    error = read(response)["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert SECRET not in response.get_data(as_text=True) and SECRET not in caplog.text
    if len(json.dumps(request)) > score.MAX_BODY:
        assert response.status_code == 413
        return
    assert response.status_code == 400
    infinite = fields.get("temperature") == math.inf  # which JSON does not have
    assert error["message"] in ("The body has to be JSON, in UTF-8." if infinite else says, SIGNATURE)


def test_most_refusals_name_their_field(loaded):
    assert read(post({"messages": user("a"), "max_tokens": 0}))["error"] == {
        "message": "max_tokens has to be a whole number from 1 up to what the context leaves.",
        "type": "invalid_request_error", "code": "invalid_value", "param": "max_tokens"}


@pytest.mark.parametrize(("error", "status", "code"), [
    (Refusal("Too many wait.", "busy"), 429, "busy"),
    (Refusal("It was closed.", "closed"), 503, "closed"),
    (Refusal("It broke.", "unusable_model"), 500, "unusable_model"),
    (Refusal("n has to be 1.", "invalid_value", "n"), 400, "invalid_value"),
    (Refusal("Too long.", "context_length_exceeded", "messages"), 400, "context_length_exceeded"),
    (MlflowException(SECRET, error_code=1000), 400, "invalid_value"),
    (MlflowException(SECRET), 500, "failed"),
    (ValueError(SECRET), 500, "failed"),
    (RecursionError(SECRET), 500, "failed"),
])
def test_an_error_becomes_a_status_and_a_sentence(error, status, code):
    found = score.explain(error)
    assert (found.status, found.code) == (status, code) and SECRET not in found.message
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    assert found.body()["error"]["type"] == kind


def test_what_a_model_raises_is_told_in_one_sentence_and_logged_without_the_request(stand_in, caplog):
    stand_in("Plain")
    response = post({"messages": user(f"raise {SECRET}")})
    assert (response.status_code, read(response)["error"]["code"]) == (500, "failed")
    said = response.get_data(as_text=True)
    assert SECRET not in said and "Traceback" not in said and str(ROOT) not in said
    assert "ValueError" in caplog.text and SECRET not in caplog.text


def test_an_answer_that_is_no_chat_completion_is_an_error(stand_in):
    stand_in("NoChat")
    assert read(post({"messages": user("a")}))["error"]["code"] == "unusable_model"


def test_a_folder_without_a_model_says_what_to_register(tmp_path, monkeypatch):
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="register the whole folder"):
        score.init()


# --- batches --------------------------------------------------------------------------------


def test_each_line_of_a_batch_gets_a_row_and_a_bad_one_changes_no_other(loaded, tmp_path):
    good = [{"messages": user(text), "max_tokens": 6} for text in ("one", "two", "three")]
    lines = [json.dumps(good[0]), "", "{", json.dumps(good[1] | {"n": 0}), json.dumps(good[1]), "  ", f'"{SECRET}"']
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(lines), encoding="utf-8")
    second.write_bytes(json.dumps(good[2]).encode() + b"\r\n\xff\r\n")
    table = score.run([str(first), str(second)])
    assert isinstance(table, pd.DataFrame)
    assert [tuple(row) for row in table[["file", "line", "status"]].to_numpy()] == [
        ("first.jsonl", 1, "ok"), ("first.jsonl", 3, "error"), ("first.jsonl", 4, "error"), ("first.jsonl", 5, "ok"),
        ("first.jsonl", 7, "error"), ("second.jsonl", 1, "ok"), ("second.jsonl", 2, "error")]
    answers = [contents(json.loads(text)) for text in table["answer"][table["status"] == "ok"]]
    assert answers == [contents(score.answer(request)) for request in good]
    assert table["answer"][2] == "n has to be a whole number from 1 to 8."
    assert SECRET not in " ".join(table["answer"])


def test_an_empty_batch_is_an_empty_table(loaded, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert list(score.run([str(tmp_path / "empty.jsonl")])) == ["file", "line", "status", "answer"]


# --- under Azure's server -------------------------------------------------------------------

# Eight callers have to be in it at once; then it answers when a file of the test's is there.
MEETING = """
import pathlib, threading, time
import mlflow

FOLDER = pathlib.Path("FOLDER")

class Meeting(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.all = threading.Barrier(8, (FOLDER / "met").touch)

    def predict(self, context, model_input, params=None):
        self.all.wait(60)
        while not (FOLDER / "go").exists():
            time.sleep(0.01)
        return {"choices": [{"index": 0, "message": {"role": "assistant", "content": "met"}, "finish_reason": "stop"}]}

mlflow.models.set_model(Meeting())
"""
# Its stream goes on when somebody asks it for a whole answer.
WAITING = """
import threading
import mlflow

class Waiting(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.asked = threading.Event()

    def predict(self, context, model_input, params=None):
        self.asked.set()
        return {"choices": []}

    def predict_stream(self, context, model_input, params=None):
        yield {"choices": [], "id": "first"}
        assert self.asked.wait(60)
        yield {"choices": [], "id": "last"}

mlflow.models.set_model(Waiting())
"""
# The server's own start, on a port that the system chooses: its command line takes none of these, and every network.
START = """
import os
from azureml_inference_server_http.amlserver_linux import run
run("127.0.0.1", 0, int(os.environ["WORKER_COUNT"]))
"""


def save_code(folder, code):
    """Save a model of this code; return the folder that stands around it."""
    (folder / "model_code.py").write_text(code, encoding="utf-8")
    mlflow.pyfunc.save_model(folder / "registered" / "model", python_model=str(folder / "model_code.py"),
                             pip_requirements=["mlflow"])
    return folder / "registered"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Make an environment of what conda.yaml has the service install; return its Python."""
    folder, uv = tmp_path_factory.mktemp("service"), [sys.executable, "-m", "uv"]
    conda = yaml.safe_load(fill((TEMPLATES / "conda.yaml").read_text(encoding="utf-8"), {
        "python": f"python={sys.version_info.major}.{sys.version_info.minor}",
        "requirements": service_requirements(pinned(*LOGGED))}))
    version, (_, _, pip) = conda["dependencies"][0], conda["dependencies"]
    (folder / "requirements.txt").write_text("\n".join(pip["pip"]), encoding="utf-8")
    subprocess.run([*uv, "venv", "--quiet", "--python", version.removeprefix("python="), folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, "--requirement",
                    folder / "requirements.txt"], check=True)
    return python


@pytest.fixture
def serve(environment, tmp_path):
    """Return a function that serves a model's folder as the deployment would, and returns the address."""
    started = []

    def start(folder):
        code = tmp_path / "code"
        code.mkdir()
        shutil.copyfile(ROOT / "serving" / "score.py", code / "score.py")  # alone, as it is uploaded
        settings = yaml.safe_load((TEMPLATES / "online-deployment.yaml").read_text(encoding="utf-8"))
        variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        variables |= settings["environment_variables"] | {
            "AZUREML_MODEL_DIR": str(folder), "AZUREML_ENTRY_SCRIPT": str(code / "score.py"), "AML_APP_ROOT": str(code),
            "AML_APP_INSIGHTS_ENABLED": "false"}
        log = (tmp_path / "server.log").open("w+")
        process = subprocess.Popen([environment, "-c", START], cwd=code, env=variables, stdout=log, stderr=log)
        started.append((process, log))

        def listeners():
            assert process.poll() is None, (tmp_path / "server.log").read_text(encoding="utf-8")[-3000:]
            return [place.laddr.port for place in psutil.Process(process.pid).net_connections()
                    if place.status == "LISTEN"]

        def healthy():
            try:
                return httpx.get(f"{address}/", timeout=5, trust_env=False).text == "Healthy"
            except httpx.TransportError:
                return False

        wait_for(listeners, "the listener", 120)
        address = f"http://127.0.0.1:{listeners()[0]}"
        wait_for(healthy, "the model", 120)
        return address

    yield start
    for process, log in started:
        process.terminate()
        process.wait(60)
        log.close()


@pytest.mark.slow
@pytest.mark.index
def test_the_server_answers_streams_and_refuses_as_the_script_does(serve, saved, loaded):
    sample = json.loads((saved / "model" / "serving_input_example.json").read_text(encoding="utf-8"))
    with httpx.Client(base_url=serve(saved), timeout=120, trust_env=False) as client:
        whole = client.post("/score", json=sample)
        assert whole.status_code == 200, whole.text
        # The same words as in the course's environment, and the same from eight at once as from one.
        assert contents(whole.json()) == contents(score.answer(sample))
        with ThreadPoolExecutor(8) as pool:
            requests = [sample | {"messages": user(f"Question {number}")} for number in range(8)]
            answers = list(pool.map(lambda request: client.post("/score", json=request), requests))
        assert [contents(one.json()) for one in answers] == [contents(score.answer(one)) for one in requests]
        with client.stream("POST", "/score", json=sample | {"stream": True}) as stream:
            assert stream.headers["content-type"] == "text/event-stream"
            assert stream.headers["transfer-encoding"] == "chunked"
            text = "".join(stream.iter_text())
        assert text.endswith("data: [DONE]\n\n") and text.count("data: ") > 3
        for body, status in ((b"{", 400), (b'{"messages": []}', 400), (b" " * (score.MAX_BODY + 1), 413),
                             (json.dumps({"messages": user(SECRET), "top_p": SECRET}).encode(), 400)):
            refused = client.post("/score", content=body)
            assert refused.status_code == status and refused.json()["error"]["type"] == "invalid_request_error"
            assert SECRET not in refused.text and "Traceback" not in refused.text and "/" not in refused.text


@pytest.mark.slow
@pytest.mark.index
def test_eight_callers_are_in_the_model_at_once_and_the_server_still_says_that_it_lives(serve, tmp_path):
    address = serve(save_code(tmp_path, MEETING.replace('"FOLDER"', repr(str(tmp_path)))))

    def ask(_):
        return httpx.post(f"{address}/score", json={"messages": user("a")}, timeout=120, trust_env=False)

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(ask, number) for number in range(8)]
        try:
            wait_for((tmp_path / "met").exists, "eight callers")
            # A liveness probe does not wait behind them.
            assert httpx.get(f"{address}/", timeout=30, trust_env=False).text == "Healthy"
            assert not any(caller.done() for caller in callers)
        finally:
            (tmp_path / "go").touch()
        assert {contents(caller.result().json())[0] for caller in callers} == {"met"}


@pytest.mark.slow
@pytest.mark.index
def test_what_a_stream_has_by_now_is_sent_by_now(serve, tmp_path):
    """The model ends its stream when the caller, who has read the beginning, asks for something else."""
    address = serve(save_code(tmp_path, WAITING))
    with httpx.stream("POST", f"{address}/score", json={"messages": user("a"), "stream": True}, timeout=120,
                      trust_env=False) as stream:
        parts = stream.iter_text()
        assert "first" in next(parts)
        assert httpx.post(f"{address}/score", json={"messages": user("a")}, timeout=60,
                          trust_env=False).status_code == 200
        assert "last" in "".join(parts)
