"""Answers requests on Azure Machine Learning: the scoring script of its deployments.

An online deployment calls `init` once and `run` with each HTTP request. A batch deployment calls
`run` with the names of files that hold a request in each line. The model is any MLflow model of the
chat contract. Azure gets this file with the package `serving` beside it, and the model's folder.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from flask import Request, Response

from serving.errors import ServiceError, to_service_error
from serving.events import LAST_EVENT, STREAM_HEADERS, to_event, to_events, to_json
from serving.request import check_request, read_json
from serving.served_model import ServedModel

try:
    from azureml_inference_server_http.api.aml_request import rawhttp
except ImportError:  # a batch deployment has no server

    def rawhttp(function):
        """Leave a function as it is."""
        return function


MAX_BODY = 1 << 20  # bytes of a request
LINES_AT_ONCE = 32  # lines of a batch that a streaming model answers at once

_model: ServedModel | None = None
_one_caller = threading.Lock()


def init() -> None:
    """Load the model, once for each worker of the server."""
    global _model
    # MLflow's own errors would quote the request.
    os.environ.setdefault("MLFLOW_DISABLE_SCHEMA_DETAILS", "true")
    folder = find_model(Path(os.environ["AZUREML_MODEL_DIR"]))
    _model = ServedModel(mlflow.pyfunc.load_model(str(folder)))


def find_model(folder: Path) -> Path:
    """Return the folder of the MLflow model in ``folder``, where Azure puts it under the model's name."""
    found = sorted(folder.rglob("MLmodel"), key=lambda path: len(path.parts))
    if not found:
        raise FileNotFoundError(
            "AZUREML_MODEL_DIR holds no MLmodel: register the whole folder of the MLflow model."
        )
    return found[0].parent


@rawhttp
def run(request: Request | list[str]) -> Response | pd.DataFrame:
    """Answer one HTTP request, whole or as server-sent events, or each line of a batch's files."""
    if isinstance(request, list):
        return answer_files(request)
    try:
        values = read_request(request.stream.read(MAX_BODY + 1))
        if values.get("stream"):
            return Response(start_stream(values), headers=STREAM_HEADERS)
        return _to_response(answer(values), 200)
    except Exception as error:
        error = to_service_error(error)
        return _to_response(error.body(), error.status, error.headers())


def _to_response(value, status, headers=None):
    return Response(to_json(value), status, headers, content_type="application/json")


def read_request(body: bytes) -> dict:
    """Return the fields of a request. Raises a ServiceError if no model could answer them."""
    if len(body) > MAX_BODY:
        message = f"The body may have at most {MAX_BODY} bytes. Send less."
        raise ServiceError(413, message, "request_too_large")
    values = read_json(body)
    check_request(values)
    return values


def answer(values: dict) -> dict:
    """Return the chat completion for a request."""
    request = _model.adapt(values)
    if _model.streams:
        return _model.complete(request)
    with _one_caller:  # this model may not be safe to call from several threads
        return _model.complete(request)


def start_stream(values: dict) -> Iterator[bytes]:
    """Return the events of a stream, after its first chunk: from then on no refusal is possible."""
    if not _model.streams:
        raise ServiceError(
            400,
            "stream has to be false or left out: this model cannot stream.",
            "invalid_value",
            "stream",
        )
    chunks = _model.chunks(_model.adapt(values), streamed=True)
    events = to_events(chunks, values)
    return _finish_stream(next(events), events, chunks)


def _finish_stream(first, events, chunks):
    """Yield the events. If the caller disconnects, close the chunks: that ends the model's work."""
    with contextlib.closing(chunks):
        yield first
        try:
            yield from events
            yield LAST_EVENT
        except Exception as error:
            yield to_event(to_service_error(error).body())


def answer_files(names: list[str]) -> pd.DataFrame:
    """Answer each line of some files. A line that can't be answered changes no other row.

    Returns
    -------
    pandas.DataFrame
        The columns ``file``, ``line``, ``status`` (``ok`` or ``error``) and ``answer``: the chat
        completion as JSON, or the reason why there is none.
    """
    lines = [
        (Path(name).name, number, line)
        for name in names
        for number, line in enumerate(Path(name).read_bytes().splitlines(), 1)
        if line.strip()
    ]
    with ThreadPoolExecutor(LINES_AT_ONCE) as pool:
        answers = list(pool.map(_answer_line, (line for _, _, line in lines)))
    rows = [(name, number, *found) for (name, number, _), found in zip(lines, answers, strict=True)]
    return pd.DataFrame(rows, columns=["file", "line", "status", "answer"])


def _answer_line(line: bytes) -> tuple[str, Any]:
    try:
        return "ok", json.dumps(answer(read_request(line)), ensure_ascii=False)
    except Exception as error:
        return "error", to_service_error(error).message
