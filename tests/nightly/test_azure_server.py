"""The scoring script under the server that Azure uses, in the environment that its deployment makes.

Run: python -m helpers test tests/nightly/test_azure_server.py
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import mlflow
import psutil
import pytest
import yaml
from support.chat import AS_SHOWN, SECRET, chat_model_for, contents, user
from support.score import load_score
from support.service import wait_for

from course.azure import YAML_FOLDER, copy_code, write_conda
from helpers import pinned
from serving import score

# What the chat page logs, by the names that its cell has.
LOGGED = (
    "jinja2",
    "joblib",
    "llguidance",
    "mlflow",
    "numpy",
    "onnxruntime-genai",
    "pandas",
    "psutil",
    "pydantic",
    "tokenizers",
)


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Save the chat model on the toy model as the chat page logs it; return the folder that stands around it."""
    folder = tmp_path_factory.mktemp("registered")
    mlflow.pyfunc.save_model(
        folder / "model",
        **chat_model_for(tiny)
        | {"pip_requirements": pinned(*LOGGED), "input_example": AS_SHOWN | {"max_tokens": 16}},
    )
    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    """Let init() load the chat model, as Azure does."""
    with load_score(saved) as model:
        yield model


# Eight callers have to be in it at once; then it answers when a file of the test's is there.
MEETING = """
import pathlib, threading, time
import mlflow

FOLDER = pathlib.Path("FOLDER")

class Meeting(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.all = threading.Barrier(8, (FOLDER / "met").touch)

    def predict(self, context, model_input, params=None):
        raise NotImplementedError("It streams, so that several callers may ask at once.")

    def predict_stream(self, context, model_input, params=None):
        self.all.wait(60)
        while not (FOLDER / "go").exists():
            time.sleep(0.01)
        yield {"choices": [{"index": 0, "delta": {"content": "met"}, "finish_reason": "stop"}]}

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
        raise NotImplementedError("It streams.")

    def predict_stream(self, context, model_input, params=None):
        choices = [{"index": 0, "delta": {}, "finish_reason": None}]
        if not model_input["stream"]:
            self.asked.set()
        yield {"choices": choices, "id": "first"}
        assert self.asked.wait(60)
        yield {"choices": choices, "id": "last"}

mlflow.models.set_model(Waiting())
"""
# The server's own start, on a port that the system chooses: its command line takes none of these,
# and every network.
START = """
import os
from azureml_inference_server_http.amlserver_linux import run
run("127.0.0.1", 0, int(os.environ["WORKER_COUNT"]))
"""


def save_code(folder, code):
    """Save a model of this code; return the folder that stands around it."""
    (folder / "model_code.py").write_text(code, encoding="utf-8")
    mlflow.pyfunc.save_model(
        folder / "registered" / "model",
        python_model=str(folder / "model_code.py"),
        pip_requirements=["mlflow"],
    )
    return folder / "registered"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Make an environment of what conda.yaml has the service install; return its Python."""
    folder = tmp_path_factory.mktemp("service")
    uv = [sys.executable, "-m", "uv"]
    shutil.copyfile(YAML_FOLDER / "conda.yaml", folder / "conda.yaml")
    (folder / "logged.txt").write_text("\n".join(pinned(*LOGGED)), encoding="utf-8")
    write_conda(folder / "conda.yaml", platform.python_version(), folder / "logged.txt")
    version, _, pip = yaml.safe_load((folder / "conda.yaml").read_text(encoding="utf-8"))[
        "dependencies"
    ]
    (folder / "requirements.txt").write_text("\n".join(pip["pip"]), encoding="utf-8")
    subprocess.run(
        [*uv, "venv", "--quiet", "--python", version.removeprefix("python="), folder / "venv"],
        check=True,
    )
    python = folder / "venv" / "bin" / "python"
    subprocess.run(
        [
            *uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            python,
            "--requirement",
            folder / "requirements.txt",
        ],
        check=True,
    )
    return python


@pytest.fixture
def serve(environment, tmp_path):
    """Return a function that serves a model's folder as the deployment would, and returns the address."""
    started = []

    def start(folder):
        code = tmp_path / "code"
        copy_code(code)  # without the course, as it is uploaded
        settings = yaml.safe_load(
            (YAML_FOLDER / "online-deployment.yaml").read_text(encoding="utf-8")
        )
        variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        variables |= settings["environment_variables"] | {
            "AZUREML_MODEL_DIR": str(folder),
            "AZUREML_ENTRY_SCRIPT": str(code / "score.py"),
            "AML_APP_ROOT": str(code),
            "AML_APP_INSIGHTS_ENABLED": "false",
        }
        log = (tmp_path / "server.log").open("w+")
        process = subprocess.Popen(
            [environment, "-c", START], cwd=code, env=variables, stdout=log, stderr=log
        )
        started.append((process, log))

        def listeners():
            assert process.poll() is None, (tmp_path / "server.log").read_text(encoding="utf-8")[
                -3000:
            ]
            return [
                place.laddr.port
                for place in psutil.Process(process.pid).net_connections()
                if place.status == "LISTEN"
            ]

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


def test_the_server_answers_streams_and_refuses_as_the_script_does(serve, saved, loaded):
    sample = json.loads(
        (saved / "model" / "serving_input_example.json").read_text(encoding="utf-8")
    )
    with httpx.Client(base_url=serve(saved), timeout=120, trust_env=False) as client:
        whole = client.post("/score", json=sample)
        assert whole.status_code == 200, whole.text
        # The same words as in the course's environment, and the same from eight at once as from
        # one.
        assert contents(whole.json()) == contents(score.answer(sample))
        with ThreadPoolExecutor(8) as pool:
            requests = [sample | {"messages": user(f"Question {number}")} for number in range(8)]
            answers = list(pool.map(lambda request: client.post("/score", json=request), requests))
        assert [contents(one.json()) for one in answers] == [
            contents(score.answer(one)) for one in requests
        ]
        with client.stream("POST", "/score", json=sample | {"stream": True}) as stream:
            assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert stream.headers["transfer-encoding"] == "chunked"
            text = "".join(stream.iter_text())
        assert text.endswith("data: [DONE]\n\n") and text.count("data: ") > 3
        for body, status in (
            (b"{", 400),
            (b'{"messages": []}', 400),
            (b" " * (score.MAX_BODY + 1), 413),
            (json.dumps({"messages": user(SECRET), "top_p": SECRET}).encode(), 400),
        ):
            refused = client.post("/score", content=body)
            assert (
                refused.status_code == status
                and refused.json()["error"]["type"] == "invalid_request_error"
            )
            assert (
                SECRET not in refused.text
                and "Traceback" not in refused.text
                and "/" not in refused.text
            )


def test_eight_callers_are_in_the_model_at_once_and_the_server_still_says_that_it_lives(
    serve, tmp_path
):
    address = serve(save_code(tmp_path, MEETING.replace('"FOLDER"', repr(str(tmp_path)))))

    def ask(_):
        return httpx.post(
            f"{address}/score", json={"messages": user("a")}, timeout=120, trust_env=False
        )

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


def test_what_a_stream_has_by_now_is_sent_by_now(serve, tmp_path):
    # The model ends its stream when the caller, who has read the beginning, asks for something
    # else.
    address = serve(save_code(tmp_path, WAITING))
    with httpx.stream(
        "POST",
        f"{address}/score",
        json={"messages": user("a"), "stream": True},
        timeout=120,
        trust_env=False,
    ) as stream:
        parts = stream.iter_text()
        assert "first" in next(parts)
        assert (
            httpx.post(
                f"{address}/score", json={"messages": user("a")}, timeout=60, trust_env=False
            ).status_code
            == 200
        )
        assert "last" in "".join(parts)
