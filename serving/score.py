"""A request comes in from Azure Machine Learning, the answer of an MLflow chat model goes out: a scoring script.

An online deployment calls ``init()`` once and ``run()`` with each HTTP request; a batch deployment calls ``run()`` with
the names of files that hold a request in each line. The model is any MLflow model of the chat contract.
This is one file that imports nothing of the course: it is uploaded alone, and the model's folder beside it.
"""

import contextlib
import itertools
import json
import logging
import os
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from flask import Request, Response
from mlflow.exceptions import MlflowException

try:
    from azureml_inference_server_http.api.aml_request import rawhttp
except ImportError:  # a batch deployment has no server

    def rawhttp(function):
        """Leave a function as it is."""
        return function


_logger = logging.getLogger("score")
_model: mlflow.pyfunc.PyFuncModel | None = None
MAX_BODY = 1 << 20  # bytes of a request
LEVELS = 200  # of a body's lists and objects in each other; MLflow and others follow them by recursion
LINES_AT_ONCE = 32  # lines of a batch that the model works on together
STATUS = {"busy": 429, "closed": 503, "failed": 500, "unusable_model": 500}  # of a model's refusals; others: 400


class ScoreError(Exception):
    """What a caller reads: OpenAI's error object, and the status that goes with it."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict:
        """Return OpenAI's error object."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}


def init() -> None:
    """Load the model, once for each worker of the server."""
    global _model
    os.environ.setdefault("MLFLOW_DISABLE_SCHEMA_DETAILS", "true")  # MLflow's own refusals would quote the request
    _model = mlflow.pyfunc.load_model(str(find_model(Path(os.environ["AZUREML_MODEL_DIR"]))))


def find_model(folder: Path) -> Path:
    """Return the folder of the MLflow model in ``folder``: a registered folder keeps its name below it."""
    found = sorted(folder.rglob("MLmodel"), key=lambda path: len(path.parts))
    if not found:
        raise FileNotFoundError("AZUREML_MODEL_DIR holds no MLmodel: register the whole folder of the MLflow model.")
    return found[0].parent


@rawhttp
def run(request: Request | list[str]) -> Response | pd.DataFrame:
    """Answer one HTTP request, whole or as server-sent events; or each line of a batch's files."""
    if isinstance(request, list):
        return answer_files(request)
    try:
        values = read_json(request.stream.read(MAX_BODY + 1))
        if values.get("stream") is True:
            return Response(start_stream(values), content_type="text/event-stream",
                            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        return _json_response(answer(values), 200)
    except Exception as error:
        refused = explain(error)
        return _json_response(refused.body(), refused.status)


def _json_response(value, status):
    return Response(json.dumps(value, ensure_ascii=False), status, content_type="application/json")


def read_json(body: bytes) -> dict:
    """Return the object in a request's body; a ScoreError says what is wrong with it, and quotes none of it."""
    def refuse(constant):
        raise ValueError(constant)

    if len(body) > MAX_BODY:
        raise ScoreError(413, f"The body may have {MAX_BODY} bytes.", "request_too_large")
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ScoreError(400, "The body has to be JSON, in UTF-8.", "invalid_json") from None
    if not isinstance(values, dict):
        raise ScoreError(400, "The body has to be a JSON object with messages.", "invalid_json")
    inside = [values]
    for _ in range(LEVELS):
        inside = [item for outer in inside for item in (outer.values() if isinstance(outer, dict) else outer)
                  if isinstance(item, dict | list)]
        if not inside:
            return values
    raise ScoreError(400, f"The body may be nested {LEVELS} levels deep.", "invalid_json")


def answer(values: dict) -> dict:
    """Return the chat completion for a request; what the model raises goes through ``explain``."""
    answers = _model.predict(values)
    found = answers[0] if isinstance(answers, list) and len(answers) == 1 else answers
    if not isinstance(found, dict) or not isinstance(found.get("choices"), list):
        raise ScoreError(500, "The model's answer is no chat completion.", "unusable_model")
    return found


def start_stream(values: dict) -> Iterator[str]:
    """Return the events of a stream, once its first chunk is there: a refusal comes before a status is sent."""
    if getattr(_model, "_predict_stream_fn", None) is None:  # MLflow has no public word for it
        raise ScoreError(400, "stream has to be false or left out: this model answers whole.", "invalid_value",
                         "stream")
    chunks = _model.predict_stream(values)
    return _events(next(chunks), chunks)


def _events(first, chunks):
    """Yield server-sent events. A caller that leaves closes this generator, and that ends the model's work."""
    with contextlib.closing(chunks):
        try:
            for chunk in itertools.chain([first], chunks):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield f"data: {json.dumps(explain(error).body(), ensure_ascii=False)}\n\n"


def explain(error: Exception) -> ScoreError:
    """Return what a caller may read of an error.

    A refusal with parts, ``code`` and ``field``, says in its own words what is wrong. What MLflow or a library says may
    quote the request, or show a path: of that only the kind is told, and the place is logged.
    """
    if isinstance(error, ScoreError):
        return error
    code = getattr(error, "code", None)
    if isinstance(error, MlflowException) and isinstance(code, str) and hasattr(error, "field"):
        return ScoreError(STATUS.get(code, 400), error.message, code, error.field)
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:])
    if isinstance(error, MlflowException) and error.get_http_status_code() == 400:
        _logger.warning("MLflow refused a request:\n%s", frames)
        return ScoreError(400, "The model's signature does not allow this request.", "invalid_value")
    _logger.error("The model raised %s:\n%s", type(error).__name__, frames)
    return ScoreError(500, "The model failed on this request.", "failed")


def answer_files(names: list[str]) -> pd.DataFrame:
    """Answer each line of some files: a row with file, line, ``ok`` or ``error``, and the answer or the reason.

    A line that cannot be answered changes no other row. Several lines are asked at once, so the model can batch them.
    """
    lines = [(Path(name).name, number, line) for name in names
             for number, line in enumerate(Path(name).read_bytes().splitlines(), 1) if line.strip()]
    with ThreadPoolExecutor(LINES_AT_ONCE) as pool:
        answers = list(pool.map(_answer_line, (line for _, _, line in lines)))
    return pd.DataFrame([(name, number, *found) for (name, number, _), found in zip(lines, answers, strict=True)],
                        columns=["file", "line", "status", "answer"])


def _answer_line(line: bytes) -> tuple[str, Any]:
    try:
        return "ok", json.dumps(answer(read_json(line)), ensure_ascii=False)
    except Exception as error:
        return "error", explain(error).message
