"""A model's address goes in, an HTTP service comes out that OpenAI's clients can talk to.

The model is any MLflow model of the chat contract, ``llm/v1/chat``: ``predict``, and ``predict_stream`` where it has
one. This is one file that imports nothing of the course, so it travels with the model alone:
``MLFLOW_TRACKING_URI=... python openai_server.py --model models:/slm-onnx@champion``.

From top to bottom: the limits, the errors (what a caller may read), the request (what is checked before the model is
asked), the turns (who may ask it now), the figures (what /metrics tells), the model (one version, and the change to
the next), the answer (one request on its way), the application, the connection (what uvicorn leaves unbounded), and
the program.
"""

import argparse
import asyncio
import contextlib
import errno
import hmac
import ipaddress
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import mlflow
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from mlflow.entities import SpanType
from mlflow.exceptions import MlflowException
from mlflow.tracing.constant import SpanAttributeKey
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

_logger = logging.getLogger("openai_server")
TOKEN = "SERVE_TOKEN"  # the name of the variable that holds it

# --- the limits -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a caller may take of the service. Each is an option of the program, with the same name."""

    concurrent: int | None = None  # requests in the model at once; None: 64, or 1 where it has no predict_stream
    waiting: int = 256  # requests that may wait for their turn
    max_body: int = 1 << 20  # bytes of a request
    max_tokens: int = 2048  # tokens that a request may ask for
    timeout: float = 120.0  # seconds from a request's last byte to its answer's
    drain: float = 30.0  # seconds that requests in the making get after SIGTERM
    poll: float = 5.0  # seconds between two looks at where the alias points


HEAD_SECONDS = 10.0  # for a request's head, from its first byte
HEAD_BYTES = 1 << 16

# --- the errors -----------------------------------------------------------------------------


class ServiceError(Exception):
    """What a caller reads: OpenAI's error object, and the status that goes with it."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None,
                 retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict:
        """Return OpenAI's error object."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "code": self.code, "param": self.param}}

    def response(self) -> JSONResponse:
        """Return it as a response. What took too long here would take too long again: a client need not retry."""
        headers = {"retry-after": str(self.retry_after)} if self.retry_after else {}
        if self.code == "timeout":
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


STATUS = {"busy": 429, "closed": 503, "failed": 500, "unusable_model": 500}  # of a model's refusals; others: 400


def explain(error: BaseException) -> ServiceError:
    """Return what a caller may read of an error that a model raised.

    A refusal with parts, ``code`` and ``field``, says in its own words what is wrong. What MLflow or a library says may
    quote the request, or show a path: of that only the kind is told, and the place is logged.
    """
    if isinstance(error, ServiceError):
        return error
    code = getattr(error, "code", None)
    if isinstance(error, MlflowException) and isinstance(code, str) and hasattr(error, "field"):
        status = STATUS.get(code, 400)
        return ServiceError(status, error.message, code, error.field, 1 if status == 429 else None)
    frames = "".join(traceback.format_tb(error.__traceback__)[-3:])
    if isinstance(error, MlflowException) and error.get_http_status_code() == 400:
        _logger.info("MLflow refused a request:\n%s", frames)
        return ServiceError(400, "The model's signature does not allow this request.", "invalid_value")
    _logger.error("The model raised %s:\n%s", type(error).__name__, frames)
    return ServiceError(500, "The model failed on this request.", "failed")


# --- the request ----------------------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant")


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class ChatMessage(_Checked):
    """One turn of a conversation."""

    role: Literal[ROLES] = Field(description="system, developer, user or assistant")
    content: str | Annotated[list[dict], Field(min_length=1)] = Field(description="text, or a list of parts")


class ChatCompletionRequest(_Checked):
    """What the service itself checks: what would make any model stumble. All else is the model's to refuse."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1, max_length=1000, description="a list of 1 to 1000 messages, role and content each")
    model: str | None = Field(None, description="a text")
    max_tokens: int | float | None = Field(None, ge=1, description="a whole number from 1")
    max_completion_tokens: int | float | None = Field(None, ge=1, description="a whole number from 1")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    n: int | float | None = Field(None, ge=1, description="a whole number from 1 to 8")
    stop: str | list[str] | None = Field(None, description="up to 4 texts of 1 to 100 characters")
    stream: bool | None = Field(None, description="true, false or left out")
    stream_options: dict | None = Field(None, description="include_usage: true or false, for a stream")


# What asks for nothing, and clients send it by habit. Where a model's signature lacks the field, it is left out.
NEUTRAL = {"n": [1], "top_p": [1], "frequency_penalty": [0], "presence_penalty": [0], "logprobs": [False],
           "top_logprobs": [0], "tools": [[]], "functions": [[]], "logit_bias": [{}], "tool_choice": ["none", "auto"],
           "function_call": ["none", "auto"], "response_format": [{"type": "text"}], "modalities": [["text"]]}
# The same, whatever stands in them.
UNREAD = {"parallel_tool_calls", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
          "prediction"}
# MLflow's transformers flavor has more in its signature than its pipeline takes.
TAKEN_BY_FLAVOR = {"mlflow.transformers": {"messages", "max_tokens", "temperature", "stop"}}


def read_json(body: bytes) -> dict:
    """Return the object in a request's body; a ServiceError says what is wrong with it, and quotes none of it."""
    def refuse(constant):
        raise ValueError(constant)

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        raise ServiceError(400, "The body has to be JSON, in UTF-8.", "invalid_json") from None
    if not isinstance(values, dict):
        raise ServiceError(400, "The body has to be a JSON object with messages.", "invalid_json")
    return {name: value for name, value in values.items() if value is not None}


def check_request(values: dict, limits: Limits) -> None:
    """Raise a ServiceError that names the field and its range, unless the service can pass a request on."""
    try:
        ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        param, message = _place(error.errors(include_input=False, include_url=False)[0]["loc"])
        raise ServiceError(400, message, "invalid_value", param) from None
    for name in ("max_tokens", "max_completion_tokens"):
        if values.get(name, 0) > limits.max_tokens:
            raise ServiceError(400, f"{name} has to be a whole number from 1 to {limits.max_tokens}.", "invalid_value",
                               name)
    if "stream_options" in values and not values.get("stream"):
        raise ServiceError(400, "stream_options has to be left out where the answer comes whole.", "invalid_value",
                           "stream_options")


def _place(loc):
    """Return the name of a field, such as ``messages[0].role``, and the sentence about it."""
    field = ChatCompletionRequest.model_fields[loc[0]]
    name, allowed = loc[0], field.description
    if loc[0] == "messages" and len(loc) > 1:
        inner = ChatMessage.model_fields.get(loc[2]) if len(loc) > 2 else None
        name = f"messages[{loc[1]}]" + (f".{loc[2]}" if inner else "")
        allowed = inner.description if inner else "an object with role and content"
    return name, f"{name} has to be {allowed}."


def adapt(values: dict, taken: set[str] | None) -> dict:
    """Return the fields of a request that a model takes, ``None`` where it does not say which.

    A ServiceError names a field that is not taken and would change the answer.
    """
    values = {name: value for name, value in values.items() if name not in ("model", "stream", "stream_options")}
    if taken is None:
        return values
    if "max_completion_tokens" in values and "max_completion_tokens" not in taken:
        values.setdefault("max_tokens", values.pop("max_completion_tokens"))
    kept = {name: value for name, value in values.items()
            if name in taken or not (name in UNREAD or value in NEUTRAL.get(name, []))}
    if unknown := [name for name in kept if name not in taken]:
        known = unknown[0] if unknown[0] in NEUTRAL or unknown[0] in ("seed", "top_k") else None
        raise ServiceError(400, "The request holds a field that this model does not take. The fields are: "
                           f"{', '.join(sorted(taken))}.", "unknown_field", known)
    return kept


# --- the turns ------------------------------------------------------------------------------


def admit(running: int, waiting: int, concurrent: int, most_waiting: int) -> Literal["run", "wait", "refuse"]:
    """Say what a request may do that comes while others run and wait."""
    if running < concurrent and not waiting:
        return "run"
    return "wait" if waiting < most_waiting else "refuse"


def retry_after(waiting: int, concurrent: int, seconds: float) -> int:
    """Return in how many whole seconds a place may be free, where a request takes so many ``seconds``: 1 to 60."""
    return min(max(math.ceil(waiting / concurrent * seconds), 1), 60)


class Turns:
    """Lets so many requests into the model at once, and the others wait in the order in which they came."""

    def __init__(self, concurrent: Callable[[], int], most_waiting: int):
        self._concurrent, self._most_waiting = concurrent, most_waiting
        self.running, self._line = 0, []
        self._seconds = 1.0  # that a request takes, as the last ones did

    @property
    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._line)

    async def take(self) -> None:
        """Wait for a turn. A ServiceError says that too many wait."""
        allowed = admit(self.running, self.waiting, self._concurrent(), self._most_waiting)
        if allowed == "refuse":
            raise ServiceError(429, f"The service is busy: {self.waiting} requests wait. Try again later.", "busy",
                               retry_after=retry_after(self.waiting, self._concurrent(), self._seconds))
        if allowed == "wait":
            turn = asyncio.get_running_loop().create_future()
            self._line.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():  # its turn came in the same moment: the next one gets it
                    self.give(None)
                else:
                    self._line.remove(turn)
                raise
        else:
            self.running += 1

    def give(self, seconds: float | None) -> None:
        """Give a turn back, after so many seconds, and let the next one begin."""
        if seconds is not None:
            self._seconds += (seconds - self._seconds) / 8
        if self._line and self.running <= self._concurrent():
            self._line.pop(0).set_result(None)  # the count stays: one ends, one begins
        else:
            self.running -= 1


# --- the figures ----------------------------------------------------------------------------


class Figures:
    """What ``/metrics`` tells. A registry of its own, so that two applications in one process do not mix."""

    def __init__(self):
        self.registry = CollectorRegistry()
        within = {"registry": self.registry}
        seconds = (.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 60, 120)
        self.requests = Counter("slm_requests", "Requests that ended, by how: ok or an error's code.", ["outcome"],
                                **within)
        self.prompt_tokens = Counter("slm_prompt_tokens", "Tokens of prompts.", **within)
        self.completion_tokens = Counter("slm_completion_tokens", "Tokens of answers.", **within)
        self.first_token = Histogram("slm_first_token_seconds", "From a request to the first text of its answer.",
                                     buckets=seconds, **within)
        self.duration = Histogram("slm_request_seconds", "From a request to the end of its answer.", buckets=seconds,
                                  **within)
        self.answer_tokens = Histogram("slm_answer_tokens", "Tokens of an answer.",
                                       buckets=[2 ** power for power in range(13)], **within)
        self.running = Gauge("slm_requests_running", "Requests that the model works on.", **within)
        self.waiting = Gauge("slm_requests_waiting", "Requests that wait for their turn.", **within)
        self.rows = Gauge("slm_rows_running", "Answers that the model's engine makes now, if it tells.", **within)
        self.version = Gauge("slm_model_version", "1 for the version that serves.", ["model", "version"], **within)
        self.failed_version = Gauge("slm_model_failed_version", "The alias's version if it did not load, else 0.",
                                    **within)
        self.load_failures = Counter("slm_model_load_failures", "Versions that did not load.", **within)
        ProcessCollector(**within)


# --- the model ------------------------------------------------------------------------------


class StartError(Exception):
    """Why the service cannot begin: one sentence on what happened, and one on what to do."""

    def __init__(self, what: str, fix: str):
        super().__init__(what, fix)
        self.what, self.fix = what, fix


class ServedModel:
    """One version of a model: loaded, tried with one request, and closed after its last one."""

    def __init__(self, model: mlflow.pyfunc.PyFuncModel, name: str, version: str, folder: Path | None = None):
        self.name, self.version, self._model, self._folder = name, version, model, folder
        self._asked, self._retired, self._lock = 0, False, threading.Lock()
        schema, flavor = model.metadata.get_input_schema(), model.loader_module
        names = set(schema.input_names()) if schema and schema.has_input_names() else None
        self.taken = TAKEN_BY_FLAVOR.get(flavor) or names
        self.streams = getattr(model, "_predict_stream_fn", None) is not None  # MLflow has no public word for it
        self._tells_usage = self.streams and (names is None or "stream_options" in names)
        with contextlib.suppress(MlflowException, AttributeError):  # a flavor's model has no Python model in it
            self._python_model = model.unwrap_python_model()

    def rows(self) -> int:
        """Return how many answers its engine makes now; 0 for a model that does not tell."""
        stats = getattr(getattr(self, "_python_model", None), "stats", None)
        return stats()["running"] if stats else 0

    def try_once(self) -> None:
        """Ask it for one token; it raises what the model raises."""
        for _ in self.chunks({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}, True):
            pass

    def chunks(self, values: dict, streamed: bool) -> Iterator[dict]:
        """Yield the chunks of an answer. Closing the iterator ends the work of a model that streams.

        A model that streams is asked for a stream even where the answer goes out whole, if its stream tells the usage:
        only a stream can be ended. Of any other model, the whole answer comes as one chunk.
        """
        with self._lock:
            self._asked += 1
        try:
            if self._tells_usage or (self.streams and streamed):
                if self._tells_usage:
                    values = values | {"stream_options": {"include_usage": True}}
                with contextlib.closing(self._model.predict_stream(values)) as chunks:
                    yield from chunks
            else:
                yield from _as_chunks(self._model.predict(values))
        finally:
            with self._lock:
                self._asked -= 1
            self._close_if_idle()

    def retire(self) -> None:
        """Close it once nobody asks it any more."""
        self._retired = True
        self._close_if_idle()

    def _close_if_idle(self):
        with self._lock:
            if not self._retired or self._asked or self._model is None:
                return
            self._model = None
        self.close()

    def close(self) -> None:
        """Free its memory, and remove the copy of its folder that was made for this service."""
        close = getattr(getattr(self, "_python_model", None), "close", None)
        if close:
            close()
        self._python_model = None
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def _as_chunks(result):
    """Yield a whole chat completion, or MLflow's list with one, as a stream of one chunk of text."""
    answer = result[0] if isinstance(result, list) and len(result) == 1 else result
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ServiceError(500, "The model's answer is no chat completion.", "unusable_model")
    head = {"id": answer.get("id") or f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion.chunk",
            "created": answer.get("created") or int(time.time())}
    yield head | {"choices": [{"index": choice["index"], "finish_reason": None,
                               "delta": {"role": "assistant", "content": choice["message"]["content"]}}
                              for choice in answer["choices"]]}
    yield head | {"choices": [{"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
                              for choice in answer["choices"]]}
    yield head | {"choices": [], "usage": answer.get("usage")}


class Address:
    """Where a model is: a name in the registry with an alias or a version, or any other address of MLflow's."""

    def __init__(self, uri: str):
        self.uri, self._client = uri, mlflow.MlflowClient()
        place = uri.removeprefix("models:/") if uri.startswith("models:/") and not uri.startswith("models:/m-") else ""
        self._name, _, self._alias = place.partition("@")
        self._number = None
        if place and not self._alias:
            self._name, _, self._number = place.partition("/")
        self.name = self._name or "model"
        self.moves = bool(self._alias)

    def find_version(self) -> str:
        """Return the number of the version that it points to now; what MLflow raises tells that there is none."""
        if self._alias:
            return str(self._client.get_model_version_by_alias(self._name, self._alias).version)
        return self._number or "1"

    def load(self, version: str) -> ServedModel:
        """Load a version and try it with one request; it raises what the model raises."""
        uri = f"models:/{self._name}/{version}" if self._name else self.uri
        folder, copy = mlflow.artifacts.download_artifacts(uri), None
        if Path(folder).is_relative_to(tempfile.gettempdir()):  # a tracking server's: MLflow made a copy, and left it
            copy = Path(folder)
        try:
            served = ServedModel(mlflow.pyfunc.load_model(folder), self.name, version, copy)
            served.try_once()
        except BaseException:
            if copy:
                shutil.rmtree(copy, ignore_errors=True)
            raise
        return served


class Desk:
    """Holds the version that serves, and changes it when the alias moves: the next one is loaded beside it first."""

    def __init__(self, address: Address, figures: Figures):
        self.address, self._figures = address, figures
        self.current: ServedModel | None = None
        self.failed: str | None = None

    def serve(self, served: ServedModel) -> None:
        """Let a version take over; the one before ends what it has begun."""
        before, self.current = self.current, served
        self._figures.version.clear()
        self._figures.version.labels(served.name, served.version).set(1)
        self._figures.rows.set_function(served.rows)
        if before:
            before.retire()

    async def look(self) -> None:
        """Look once where the alias points, and change the version where it has moved."""
        try:
            version = await asyncio.to_thread(self.address.find_version)
        except Exception as error:  # the registry is locked or away, or the alias is: what serves goes on
            _logger.warning("The registry does not tell where %s points: %s.", self.address.uri, type(error).__name__)
            return
        if version == self.current.version:
            self._tell_failed(None)
        elif version != self.failed:
            try:
                served = await asyncio.to_thread(self.address.load, version)
            except Exception as error:  # whatever it is: this version does not load, and the one before serves on
                _logger.error("Version %s did not load (%s); version %s serves on.", version, type(error).__name__,
                              self.current.version)
                self._figures.load_failures.inc()
                self._tell_failed(version)
                return
            self._tell_failed(None)
            self.serve(served)
            _logger.warning("Version %s serves now.", version)

    def _tell_failed(self, version):
        self.failed = version
        self._figures.failed_version.set(int(version) if version else 0)

    async def watch(self, seconds: float) -> None:
        """Look again and again, with so many seconds between two looks."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()


# --- the answer -----------------------------------------------------------------------------


class ClientLeftError(Exception):
    """The caller has closed the connection."""


@contextlib.asynccontextmanager
async def ends_with_client(request: Request) -> AsyncIterator[None]:
    """End what is awaited inside as soon as the caller leaves, by ClientLeftError."""
    task = asyncio.current_task()

    async def wait():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    waiting = asyncio.create_task(wait())
    try:
        yield
    except asyncio.CancelledError:
        if waiting.done() and not waiting.cancelled():
            task.uncancel()
            raise ClientLeftError from None
        raise
    finally:
        waiting.cancel()


class Answer(Response):
    """One request on its way: it waits for its turn, a thread asks the model, and what comes goes out."""

    def __init__(self, service: "Service", request: Request, values: dict):
        self._service, self._request, self._values = service, request, values
        self._streamed = bool(values.get("stream"))
        self._asks_usage = bool((values.get("stream_options") or {}).get("include_usage"))
        self._came, self._begun = time.perf_counter(), False
        self._first, self._usage = None, None
        self.background = None

    async def __call__(self, scope, receive, send):
        """Answer, as an ASGI application does."""
        outcome = "ok"
        try:
            async with (ends_with_client(self._request), asyncio.timeout(self._service.limits.timeout),
                        contextlib.aclosing(self._chunks()) as chunks):
                if self._streamed:
                    await self._send_stream(chunks, send)
                else:
                    await self._send_whole(chunks, scope, receive, send)
        except ClientLeftError:
            outcome = "cancelled"
        except BaseException as error:
            error = self._read_end(error)
            outcome = error.code
            await self._send_error(error, scope, receive, send)
        finally:
            self._count(outcome)

    def _read_end(self, error):
        """Return what a caller reads of the exception that ended an answer."""
        if isinstance(error, TimeoutError):
            return ServiceError(504, f"The answer took longer than {self._service.limits.timeout:g} seconds.",
                                "timeout")
        if isinstance(error, asyncio.CancelledError):  # uvicorn's: the time to finish is over
            return ServiceError(503, "The service is closing.", "closed")
        return explain(error)

    async def _chunks(self):
        """Yield the model's chunks, made ready for OpenAI's clients."""
        service = self._service
        await service.turns.take()
        began, handed_over = time.perf_counter(), False
        stop, loop, events = threading.Event(), asyncio.get_running_loop(), asyncio.Queue()
        try:
            served = service.desk.current  # only now: it may have changed while this request waited
            values = adapt(self._values, served.taken)

            def tell(kind, value=None):
                with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for it any more
                    loop.call_soon_threadsafe(receive, kind, value)

            def receive(kind, value):
                if kind == "end":
                    service.turns.give(time.perf_counter() - began)
                events.put_nowait((kind, value))

            threading.Thread(target=self._ask, args=(served, values, stop, tell), daemon=True).start()
            handed_over = True  # from here on the thread gives the turn back: it may work on after the caller left
            while True:
                kind, value = await events.get()
                if kind == "end":
                    return
                if kind == "error":
                    raise value
                yield value | {"model": served.name, "system_fingerprint": f"{served.name}/{served.version}"}
        finally:
            stop.set()
            if not handed_over:
                service.turns.give(None)

    def _ask(self, served, values, stop, tell):
        """Ask the model, on a thread of its own: MLflow's iterator has to be read by the thread that made it."""
        try:
            with (self._service.trace(served, values) as trace,
                  contextlib.closing(served.chunks(values, self._streamed)) as chunks):
                for chunk in chunks:
                    if stop.is_set():
                        break
                    trace.see(chunk)
                    tell("chunk", chunk)
        except BaseException as error:  # whatever it is, the caller is waiting for it
            tell("error", error)
        finally:
            tell("end")

    def _see(self, chunk):
        """Note when the first text came, and what the usage was."""
        if self._first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
            self._first = time.perf_counter() - self._came
        self._usage = chunk.get("usage") or self._usage

    async def _send_stream(self, chunks, send):
        async for chunk in chunks:
            self._see(chunk)
            if not chunk["choices"] and not self._asks_usage:
                continue
            if self._asks_usage:
                chunk = {"usage": None} | chunk
            await self._send_event(send, json.dumps(chunk, ensure_ascii=False))
        await self._send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_event(self, send, text):
        """Send one server-sent event. The first one makes the answer a success that can't be taken back."""
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]})
        await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

    async def _send_whole(self, chunks, scope, receive, send):
        head, texts, reasons = {}, {}, {}
        async for chunk in chunks:
            self._see(chunk)
            head = head or chunk
            for choice in chunk["choices"]:
                texts.setdefault(choice["index"], []).append(choice["delta"].get("content") or "")
                reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
        answer = {name: head[name] for name in ("id", "created", "model", "system_fingerprint") if name in head}
        answer |= {"object": "chat.completion", "usage": self._usage, "choices": [
            {"index": index, "message": {"role": "assistant", "content": "".join(texts[index])},
             "logprobs": None, "finish_reason": reasons[index]} for index in sorted(texts)]}
        self._begun = True
        await JSONResponse(answer)(scope, receive, send)

    async def _send_error(self, error, scope, receive, send):
        if not self._begun:
            await error.response()(scope, receive, send)
        elif self._streamed:
            await self._send_event(send, json.dumps(error.body()))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _count(self, outcome):
        figures = self._service.figures
        figures.requests.labels(outcome).inc()
        if outcome == "ok":
            figures.duration.observe(time.perf_counter() - self._came)
        if self._first is not None:
            figures.first_token.observe(self._first)
        if self._usage:
            figures.prompt_tokens.inc(self._usage["prompt_tokens"])
            figures.completion_tokens.inc(self._usage["completion_tokens"])
            figures.answer_tokens.observe(self._usage["completion_tokens"])


class Trace:
    """One request in MLflow's tracing: sizes and times, and texts only where that was asked for."""

    def __init__(self, texts: bool, span: Any = None):
        self._span, self._texts = span, texts
        self._began, self._first, self._said = time.perf_counter(), None, []

    def see(self, chunk: dict) -> None:
        """Note what a chunk tells."""
        if not self._span:
            return
        said = [choice["delta"].get("content") or "" for choice in chunk["choices"]]
        if self._first is None and any(said):
            self._first = time.perf_counter() - self._began
            self._span.set_attribute("first_token_seconds", self._first)
        self._said += said if self._texts else []
        for choice in chunk["choices"]:
            if choice["finish_reason"]:
                self._span.set_attribute("finish_reason", choice["finish_reason"])
        if usage := chunk.get("usage"):
            self._span.set_attribute(SpanAttributeKey.CHAT_USAGE, {
                "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"]})

    def end(self) -> None:
        """Add the answer's text, where that was asked for."""
        if self._span and self._texts:
            self._span.set_outputs("".join(self._said))


# --- the application ------------------------------------------------------------------------


class Service:
    """What all requests share."""

    def __init__(self, desk: Desk, limits: Limits, figures: Figures, traces: str | None = None,
                 trace_texts: bool = False):
        self.desk, self.limits, self.figures = desk, limits, figures
        # A model without predict_stream may not be made for several callers: nothing says that it is.
        self.turns = Turns(lambda: limits.concurrent or (64 if desk.current.streams else 1), limits.waiting)
        self._traces, self._trace_texts = traces, trace_texts
        figures.running.set_function(lambda: self.turns.running)
        figures.waiting.set_function(lambda: self.turns.waiting)

    @contextlib.contextmanager
    def trace(self, served: ServedModel, values: dict) -> Iterator[Trace]:
        """Open a trace for one request, if the service makes any; the chat model adds its own spans to it."""
        if not self._traces:
            yield Trace(False)
            return
        with mlflow.start_span("chat_completion", SpanType.CHAT_MODEL, attributes={
                "model": served.name, "version": served.version, "messages": len(values["messages"])}) as span:
            if self._trace_texts:
                span.set_inputs(values)
            trace = Trace(self._trace_texts, span)
            try:
                yield trace
            except Exception as error:
                # MLflow would write down what the exception says, and that may quote the request.
                span.set_attribute("error", explain(error).code)
                span.set_status("ERROR")
                failed = error
            else:
                failed = None
            trace.end()
        if failed:
            raise failed


def build_app(service: Service, token: str | None, hosts: set[str]) -> FastAPI:
    """Return the ASGI application. ``token`` is what callers have to bring; ``hosts`` are the names it answers to."""
    app = FastAPI(title="A chat model", version="1", docs_url=None, redoc_url=None)

    async def check_caller(request: Request) -> None:
        if host_name(request.headers.get("host", "")) not in hosts:
            raise ServiceError(421, "This service does not answer for this host.", "unknown_host")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and not hmac.compare_digest(given.encode(), token.encode()):
            raise ServiceError(401, "This service wants a token: Authorization: Bearer TOKEN.", "invalid_api_key")

    checked = [Depends(check_caller)]
    errors = {"default": {"model": ErrorBody, "description": "What went wrong"}}
    schema = ChatCompletionRequest.model_json_schema()
    schema["properties"]["messages"]["items"] = schema.pop("$defs")["ChatMessage"]
    request_body = {"required": True, "content": {"application/json": {"schema": schema}}}

    @app.post("/v1/chat/completions", dependencies=checked, responses=errors, openapi_extra={
        "requestBody": request_body})
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        try:
            values = read_json(await read_body(request, service.limits.max_body))
            check_request(values, service.limits)
            if service.desk.current is None:
                raise ServiceError(503, "The model is not loaded yet.", "loading", retry_after=1)
            if values.get("model", service.desk.address.name) not in names(service.desk.address):
                raise ServiceError(404, "This service has no model of that name: /v1/models has the list.",
                                   "model_not_found", "model")
        except ServiceError as error:
            service.figures.requests.labels(error.code).inc()
            raise
        return Answer(service, request, values)

    @app.get("/v1/models", dependencies=checked, responses=errors)
    async def models() -> dict:
        """List the one model that is served."""
        return {"object": "list", "data": [{"id": service.desk.address.name, "object": "model", "created": 0,
                                            "owned_by": "mlflow"}]}

    @app.get("/health")
    async def health() -> dict:
        """Say that the program is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses=errors)
    async def ready() -> dict:
        """Say whether a model is loaded, which, and whether its successor failed to load."""
        current = service.desk.current
        if current is None:
            raise ServiceError(503, "The model is not loaded yet.", "loading", retry_after=1)
        return {"status": "ready", "model": current.name, "version": current.version,
                "failed_version": service.desk.failed}

    @app.get("/metrics", dependencies=checked, responses=errors)
    async def metrics() -> Response:
        """Tell the figures, as Prometheus reads them."""
        return Response(generate_latest(service.figures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ServiceError)
    async def refuse(request: Request, error: ServiceError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        response = ServiceError(error.status_code, f"{error.detail}.", code).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return ServiceError(500, "The service failed on this request.", "failed").response()

    return app


class ErrorDetail(BaseModel):
    """OpenAI's words for what went wrong."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


def names(address: Address) -> set[str]:
    """Return the names by which a request may call the model."""
    return {address.name, address.uri, address.uri.removeprefix("models:/")}


async def read_body(request: Request, most: int) -> bytes:
    """Return a request's body; a ServiceError says that it is longer than it may be, before all of it has come."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise ServiceError(413, f"The body may have {most} bytes.", "request_too_large")
    return bytes(body)


def host_name(header: str) -> str:
    """Return the name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().rstrip(".")


# --- the connection -------------------------------------------------------------------------


def connection(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's connection with two clocks: one for a request's head, one from there to its answer's end.

    uvicorn waits forever for a caller that sends one byte now and then, or that does not read its answer.
    """
    class Connection(H11Protocol):
        clock = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._set(HEAD_SECONDS)

        def data_received(self, data):
            if self.clock is None:
                self._set(HEAD_SECONDS)
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before:
                self._set(seconds)

        def on_response_complete(self):
            self._set(None)
            super().on_response_complete()

        def connection_lost(self, exc):
            self._set(None)
            super().connection_lost(exc)

        def _set(self, limit):
            if self.clock:
                self.clock.cancel()
            self.clock = self.loop.call_later(limit, self.transport.abort) if limit else None

    return Connection


# --- the program ----------------------------------------------------------------------------


def read_options(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="serve", description="Serve an MLflow chat model to OpenAI's clients.",
                                     allow_abbrev=False)
    parser.add_argument("--model", default="models:/slm-onnx@champion",
                        help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--host", default="127.0.0.1", help=f"others than this machine need a token in {TOKEN}")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--allowed-host", action="append", default=[], metavar="NAME",
                        help="a name that callers may use for this service; as often as you like")
    helps = {"concurrent": "requests in the model at once; left out: 64, or 1 for a model without predict_stream",
             "waiting": "requests that may wait for their turn", "max_body": "bytes of a request",
             "max_tokens": "tokens that a request may ask for", "timeout": "seconds for an answer",
             "drain": "seconds to finish after SIGTERM", "poll": "seconds between two looks at the alias"}
    for field in fields(Limits):
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=helps[field.name],
                            type=_positive(float if field.type is float else int))
    parser.add_argument("--traces", metavar="EXPERIMENT", help="write a trace of each request, without its texts")
    parser.add_argument("--trace-texts", action="store_true", help="with its texts")
    return parser.parse_args(words)


def _positive(kind):
    def number(text):
        if not 0 < (value := kind(text)) < 2**31:
            raise ValueError
        return value
    return number


def check_reach(host: str, token: str | None, allowed: list[str]) -> set[str]:
    """Return the host names that the service answers to. A StartError says what a service for others lacks."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not token:
        raise StartError(f"{host} is more than this machine, and the service has no token.",
                         f"Set the variable {TOKEN} to a long random text that its callers know.")
    if not loopback and not allowed:
        raise StartError("The service does not know by what names its callers know it.",
                         "Say so: --allowed-host NAME, as often as there are names.")
    return {name.lower() for name in allowed} | ({"127.0.0.1", "localhost", "::1"} if loopback else set())


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens. A StartError says why it can't."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise StartError(f"Port {port} is taken.", f"Choose another one: --port {port + 1}.") from None
        raise StartError(f"Nothing can listen at {host}, port {port}: {error}.",
                         "Choose another --host or --port.") from None


def load_first(address: Address) -> ServedModel:
    """Load the version to begin with. A StartError says why there is none."""
    try:
        version = address.find_version()
    except MlflowException as error:
        raise StartError(f"The store {mlflow.get_tracking_uri()} has nothing at {address.uri}: "
                         f"{error.message.splitlines()[0].rstrip('.')}.",
                         "Register a version under that name and alias, or name another one: --model.") from None
    try:
        return address.load(version)
    except Exception as error:  # whatever a model raises while it is loaded
        said = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no reason given"
        raise StartError(f"The model at {address.uri} does not load: {type(error).__name__}: {said}.",
                         "Name another one: --model.") from None


class Server(uvicorn.Server):
    """A uvicorn server that listens first, loads its model then, and says one line when it is ready."""

    failure: StartError | None = None

    def __init__(self, config: uvicorn.Config, service: Service, place: str):
        super().__init__(config)
        self._service, self._place = service, place

    async def main_loop(self):
        """Load the model, and run until a signal comes."""
        loading = asyncio.create_task(self._begin())
        try:
            await super().main_loop()
        finally:
            loading.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what has begun, for a bounded time, and close the model."""
        await super().shutdown(sockets)
        if self._service.desk.current:
            self._service.desk.current.close()

    async def _begin(self):
        desk = self._service.desk
        try:
            served = await asyncio.to_thread(load_first, desk.address)
        except StartError as error:
            self.failure, self.should_exit = error, True
            return
        desk.serve(served)
        print(f"Serving {served.name}, version {served.version}, at {self._place}/v1", flush=True)
        if desk.address.moves:
            await desk.watch(self._service.limits.poll)


def main(words: list[str]) -> int:
    """Serve until a signal comes. Return the exit code."""
    options = read_options(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # uvicorn finishes what has begun, and then raises the signal again: for this program, that is its good end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        # What MLflow copies goes to a folder of this program's own, which ends with it.
        with tempfile.TemporaryDirectory(prefix="openai-server-") as tempfile.tempdir:
            serve(options, os.environ.get(TOKEN) or None)
    except StartError as error:
        print(f"error: {error.what}\n       {error.fix}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def serve(options: argparse.Namespace, token: str | None) -> None:
    """Listen, load and serve. A StartError says why it can't begin."""
    hosts = check_reach(options.host, token, options.allowed_host)
    listener = listen(options.host, options.port)
    limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
    figures = Figures()
    service = Service(Desk(Address(options.model), figures), limits, figures, options.traces, options.trace_texts)
    if options.traces:
        mlflow.set_experiment(options.traces)
    config = uvicorn.Config(
        build_app(service, token, hosts), http=connection(limits.timeout + 5), ws="none", lifespan="off",
        log_config=None, log_level="critical", access_log=False, proxy_headers=False, server_header=False,
        h11_max_incomplete_event_size=HEAD_BYTES, timeout_graceful_shutdown=math.ceil(limits.drain))
    shown = f"[{options.host}]" if ":" in options.host else options.host
    server = Server(config, service, f"http://{shown}:{listener.getsockname()[1]}")
    server.run(sockets=[listener])
    if server.failure:
        raise server.failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
