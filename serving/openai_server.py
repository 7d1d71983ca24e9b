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
import collections
import contextlib
import errno
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import h11
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
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
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
    timeout: float = 120.0  # seconds from a request's head to its answer's end
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
    if isinstance(error, MlflowException) and error.message.startswith("Failed to apply chat template"):
        return ServiceError(400, "messages has to be a conversation that the model's chat template takes.",
                            "invalid_value", "messages")
    if isinstance(error, MlflowException) and error.get_http_status_code() == 400:
        _logger.info("MLflow refused a request:\n%s", frames)
        return ServiceError(400, "The model's signature does not allow this request.", "invalid_value")
    _logger.error("The model raised %s:\n%s", type(error).__name__, frames)
    return ServiceError(500, "The model failed on this request.", "failed")


# --- the request ----------------------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant")
STREAM_OPTIONS = ("include_usage", "include_obfuscation")  # obfuscation is not added
LEVELS = 200  # of a body's lists and objects in each other; MLflow and others follow them by recursion
TEXT = "text, without NUL and without half a surrogate pair"


def _whole(value):
    """Take 4.0 for 4, which JSON does not tell apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


From1 = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class ChatMessage(_Checked):
    """One turn of a conversation."""

    role: Literal[ROLES] = Field(description="system, developer, user or assistant")
    content: Text | Annotated[list[dict], Field(min_length=1)] = Field(description=f"{TEXT}, or a list of parts")


class ChatCompletionRequest(_Checked):
    """What the service itself checks: what would make any model stumble. All else is the model's to refuse."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1, max_length=1000, description="a list of 1 to 1000 messages, role and content each")
    model: str | None = Field(None, description="a text")
    max_tokens: From1 | None = Field(None, description="a whole number from 1")
    max_completion_tokens: From1 | None = Field(None, description="a whole number from 1")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    n: Annotated[int, Field(ge=1, le=8), BeforeValidator(_whole)] | None = Field(
        None, description="a whole number from 1 to 8")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="up to 4 texts of 1 to 100 characters")
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
    inside = [values]
    for _ in range(LEVELS):
        inside = [item for outer in inside for item in (outer.values() if isinstance(outer, dict) else outer)
                  if isinstance(item, dict | list)]
        if not inside:
            break
    else:
        raise ServiceError(400, f"The body may be nested {LEVELS} levels deep.", "invalid_json")
    return {name: value for name, value in values.items() if value is not None}


def check_request(values: dict, limits: Limits) -> None:
    """Raise a ServiceError that names the field and its range, unless the service can pass a request on."""
    def refuse(name, allowed):
        if name in bounded and allowed == bounded[name].description:
            allowed += f" to {limits.max_tokens}"
        raise ServiceError(400, f"{name} has to be {allowed}.", "invalid_value", name) from None

    bounded = {name: ChatCompletionRequest.model_fields[name] for name in ("max_tokens", "max_completion_tokens")}
    try:
        asked = ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        refuse(*_place(error.errors(include_input=False, include_url=False)[0]["loc"]))
    for name, field in bounded.items():
        if (getattr(asked, name) or 0) > limits.max_tokens:
            refuse(name, field.description)
    if asked.max_tokens and asked.max_completion_tokens not in (None, asked.max_tokens):
        refuse("max_completion_tokens", "left out beside another max_tokens")
    if asked.stream_options is not None and not asked.stream:
        refuse("stream_options", "left out where the answer comes whole")
    for name, value in (asked.stream_options or {}).items():
        if name not in STREAM_OPTIONS and value is not None:
            raise ServiceError(400, "stream_options holds a field that is not served. The fields are: "
                               f"{', '.join(STREAM_OPTIONS)}.", "unknown_field", "stream_options")
        if type(value) not in (bool, type(None)):
            refuse(f"stream_options.{name}", "true or false")


def _place(loc):
    """Return the name of the field at a place, such as ``messages[0].role``, and what it may be."""
    name, allowed, fields = "", None, ChatCompletionRequest.model_fields
    for step in loc:
        if name == "messages" and isinstance(step, int):
            name, allowed, fields = f"messages[{step}]", "an object with role and content", ChatMessage.model_fields
        elif step in fields:
            name, allowed, fields = f"{name}.{step}".lstrip("."), fields[step].description, {}
    return name, allowed


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
    return _for_flavor(kept) if taken in TAKEN_BY_FLAVOR.values() else kept


def _for_flavor(values):
    """Return a request in the types of a flavor's signature, which takes no parts, no 4.0 and no text for a list."""
    values = values | {"messages": [_plain_message(*numbered) for numbered in enumerate(values["messages"])]}
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    if "max_tokens" in values:
        values["max_tokens"] = int(values["max_tokens"])
    if "temperature" in values:  # a pipeline that samples can't divide by 0
        values["temperature"] = max(float(values["temperature"]), 0.001)
    return values


def _is_text(value):
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def _plain_message(number, message):
    """Return a message of role, text and name. A ServiceError names what else there is, unless it is empty."""
    content, name = message["content"], f"messages[{number}]"
    if isinstance(content, list):
        if len(content) > 1000 or not all(part.get("type") == "text" and _is_text(part.get("text"))
                                          for part in content):
            raise ServiceError(400, f"{name}.content has to be {TEXT}, or 1 to 1000 parts of text.", "invalid_value",
                               f"{name}.content")
        content = "\n".join(part["text"] for part in content)
    if not _is_text(message.get("name") or ""):
        raise ServiceError(400, f"{name}.name has to be {TEXT}.", "invalid_value", f"{name}.name")
    if any(value for field, value in message.items() if field not in ("role", "content", "name")):
        raise ServiceError(400, f"{name} holds a field that this model does not take. The fields are: role, content, "
                           "name.", "unknown_field", name)
    # Few templates know a developer; the others would leave it out without a word.
    plain = {"role": "system" if message["role"] == "developer" else message["role"], "content": content}
    return plain | ({"name": message["name"]} if message.get("name") else {})


# --- the turns ------------------------------------------------------------------------------


def admit(running: int, waiting: int, concurrent: int, most_waiting: int) -> bool:
    """Say whether a request may come in, to run at once or to wait, while others run and wait."""
    return running < concurrent or waiting < most_waiting


def retry_after(waiting: int, concurrent: int, seconds: float) -> int:
    """Return in how many whole seconds a place may be free, where a request takes so many ``seconds``: 1 to 60."""
    return min(max(math.ceil(waiting / concurrent * seconds), 1), 60)


class Turns:
    """Lets so many requests into the model at once, and the others wait in the order in which they came."""

    def __init__(self, concurrent: Callable[[], int], most_waiting: int):
        self._concurrent, self._most_waiting = concurrent, most_waiting
        self.running, self._line = 0, collections.deque()
        self._seconds = 1.0  # that a request takes, as the last ones did

    @property
    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._line)

    async def take(self) -> None:
        """Wait for a turn. A ServiceError says that too many wait."""
        if not admit(self.running, self.waiting, self._concurrent(), self._most_waiting):
            raise ServiceError(429, f"The service is busy: {self.waiting} requests wait. Try again later.", "busy",
                               retry_after=retry_after(self.waiting, self._concurrent(), self._seconds))
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        self._begin()
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._line:
                self._line.remove(turn)
            elif not turn.cancelled():  # its turn came in the moment in which the caller left: the next one gets it
                self.give()
            raise

    def give(self, seconds: float | None = None) -> None:
        """Give a turn back, after so many seconds, and let the next ones begin."""
        if seconds is not None:
            self._seconds += (seconds - self._seconds) / 8
        self.running -= 1
        self._begin()

    def _begin(self):
        while self._line and self.running < self._concurrent():
            turn = self._line.popleft()
            if not turn.done():  # its caller may have left in this moment
                turn.set_result(None)
                self.running += 1


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


async def in_thread(function: Callable, *arguments: Any) -> Any:
    """Call a function on a thread of its own. The end of the program does not wait for it, as for asyncio.to_thread."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def call():
        try:
            ended = function(*arguments), None
        except Exception as error:
            ended = None, error
        except BaseException as error:  # a model's sys.exit() ends nothing but the thread
            ended = None, RuntimeError(type(error).__name__)
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for it any more
            loop.call_soon_threadsafe(lambda: done.cancelled() or done.set_result(ended))

    threading.Thread(target=call, daemon=True).start()
    value, error = await done
    if error:
        raise error
    return value


class ServedModel:
    """One version of a model, loaded."""

    def __init__(self, model: mlflow.pyfunc.PyFuncModel, name: str, version: str, copy: Path | None = None):
        self.name, self.version, self._model, self._copy = name, version, model, copy
        self.borrowed = 1  # by the desk, which has it until another takes over, and by how many requests
        schema, flavor = model.metadata.get_input_schema(), model.loader_module
        names = set(schema.input_names()) if schema and schema.has_input_names() else None
        self.taken = TAKEN_BY_FLAVOR.get(flavor) or names
        self.streams = getattr(model, "_predict_stream_fn", None) is not None  # MLflow has no public word for it
        self._tells_usage = self.streams and (names is None or "stream_options" in names)
        self._ends_whole = self._tells_usage  # a whole answer can be ended, because a stream makes it
        self._python_model = None
        self._pipeline = model.get_raw_model() if flavor == "mlflow.transformers" else None
        with contextlib.suppress(MlflowException, AttributeError):  # a flavor's model has no Python model in it
            self._python_model = model.unwrap_python_model()

    def rows(self) -> int:
        """Return how many answers its engine makes now; 0 for a model that does not tell."""
        stats = getattr(self._python_model, "stats", None)
        return stats()["running"] if stats else 0

    def try_once(self) -> None:
        """Ask it for one token; it raises what the model raises, and where the answer is no chat completion."""
        asked = {"messages": [{"role": "user", "content": "Hello"}]}
        if self.taken is None or "max_tokens" in self.taken:
            asked["max_tokens"] = 1
        for streamed in (True, False):
            try:
                answer = join(self.chunks(asked, streamed))
            except MlflowException:
                if streamed or not self._ends_whole:
                    raise
                self._ends_whole = False  # it knows no stream that nobody reads along
                answer = join(self.chunks(asked, streamed))
            if not answer["choices"]:
                raise ServiceError(500, "The model's answer is no chat completion.", "unusable_model")

    def chunks(self, values: dict, streamed: bool) -> Iterator[dict]:
        """Yield the chunks of an answer. Closing the iterator ends the work of a model that streams.

        A model that streams is asked for a stream even where the answer goes out whole, if its stream tells the usage:
        only a stream can be ended. ``"stream": False`` then tells it that nobody reads along. Of any other model, the
        whole answer comes as one chunk.
        """
        if not (self.streams if streamed else self._ends_whole):
            self._check_length(values)
            yield from _as_chunks(self._model.predict(values))
            return
        if self._tells_usage:
            values = values | {"stream": streamed, "stream_options": {"include_usage": True}}
        with contextlib.closing(self._model.predict_stream(values)) as chunks:
            yield from chunks

    def _check_length(self, values):
        """Refuse what a pipeline's model cannot read: the pipeline itself would try, for minutes and gigabytes."""
        if self._pipeline is None:
            return
        longest = self._pipeline.model.config.max_position_embeddings
        try:
            prompt = self._pipeline.tokenizer.apply_chat_template(values["messages"], tokenize=False)
        except Exception:  # whatever a template raises, it will raise it again for MLflow, which has a word for it
            return
        if len(self._pipeline.tokenizer(prompt)["input_ids"]) >= longest:
            raise ServiceError(400, f"messages has to be fewer than {longest} tokens, the model's context.",
                               "context_length_exceeded", "messages")

    def close(self) -> None:
        """Free its memory, and remove the copy of its folder that was made for this service."""
        close = getattr(self._python_model, "close", None)
        try:
            if close:
                close()
        finally:
            self._model = self._python_model = self._pipeline = None
            if self._copy:
                shutil.rmtree(self._copy, ignore_errors=True)


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


def join(chunks: Iterable[dict]) -> dict:
    """Return the whole chat completion that a stream's chunks make."""
    head, usage, choices = {}, None, {}
    for chunk in chunks:
        head, usage = head or chunk, chunk.get("usage") or usage
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], {
                "index": choice["index"], "message": {"role": "assistant", "content": ""}, "logprobs": None,
                "finish_reason": None})
            whole["message"]["content"] += choice["delta"].get("content") or ""
            whole["finish_reason"] = choice["finish_reason"] or whole["finish_reason"]
    kept = {name: head[name] for name in ("id", "created", "model", "system_fingerprint") if name in head}
    return kept | {"object": "chat.completion", "choices": [choices[index] for index in sorted(choices)],
                   "usage": usage}


class Address:
    """Where a model is: a name in the registry with an alias or a version, or any other address of MLflow's.

    ``copies`` is a folder for this service alone: what MLflow copies to there is removed with the version it was for.
    """

    def __init__(self, uri: str, copies: Path | None = None):
        self.uri, self._copies = uri, copies
        place = uri.removeprefix("models:/") if uri.startswith("models:/") and not uri.startswith("models:/m-") else ""
        self._name, self.moves, self._alias = place.partition("@")
        self._name, _, self._number = self._name.partition("/")
        self.name = self._name or "model"

    def find_version(self) -> str:
        """Return the number of the version that it points to now; what MLflow raises tells that there is none."""
        if self.moves:
            return str(mlflow.MlflowClient().get_model_version_by_alias(self._name, self._alias).version)
        return self._number or "1"

    def fetch(self, version: str) -> Path:
        """Return the folder of a version: the store's own, or a copy where the store is behind a server."""
        uri = f"models:/{self._name}/{version}" if self.moves else self.uri
        return Path(mlflow.artifacts.download_artifacts(uri))

    def load(self, version: str, folder: Path) -> ServedModel:
        """Load a version from its folder; it raises what the model raises."""
        copy = folder if self._copies and folder.is_relative_to(self._copies) else None
        try:
            return ServedModel(mlflow.pyfunc.load_model(str(folder)), self.name, version, copy)
        except BaseException:
            if copy:
                shutil.rmtree(copy, ignore_errors=True)
            raise


class Desk:
    """Holds the version that serves, and changes it when the alias moves: the next one is loaded beside it first.

    ``patience`` is for how many seconds a version may think about its first token. All but the loading happens on the
    event loop's thread, so there are no locks.
    """

    def __init__(self, address: Address, figures: Figures, patience: float):
        self.address, self._figures, self._patience = address, figures, patience
        self.current: ServedModel | None = None
        self.failed: str | None = None  # the version that the alias points to, if it does not load
        self._given_up: str | None = None

    def serving(self) -> ServedModel:
        """Return the version that serves now. A ServiceError says that there is none yet."""
        if self.current is None:
            raise ServiceError(503, "The model is not loaded yet.", "loading", retry_after=1)
        return self.current

    def borrow(self) -> ServedModel:
        """Return the version that serves now. It is not closed until it is given back."""
        self.current.borrowed += 1
        return self.current

    def give_back(self, served: ServedModel) -> None:
        """Take a version back, and close it if nobody else has it."""
        served.borrowed -= 1
        if not served.borrowed:
            threading.Thread(target=served.close, daemon=True).start()

    async def begin(self) -> None:
        """Let the first version serve. A StartError says why there is none."""
        try:
            version = await in_thread(self.address.find_version)
        except Exception as error:  # MLflow's, or its database's
            store = without_password(mlflow.get_tracking_uri())
            raise StartError(f"The store {store} names no version at {self.address.uri}: {first_line(error)}.",
                             "Register a version under that name and alias, or name another one: --model.") from None
        try:
            await self._bring(version, await in_thread(self.address.fetch, version))
        except Exception as error:  # whatever a model raises while it is loaded
            raise StartError(f"The model at {self.address.uri} does not load: {first_line(error)}.",
                             "Name another one: --model.") from None

    async def look(self) -> None:
        """Look once where the alias points, and change the version where it has moved."""
        try:
            version = await in_thread(self.address.find_version)
        except Exception as error:  # the registry is locked or away, or the alias is: what serves goes on
            _logger.warning("The registry does not tell where %s points: %s.", self.address.uri, type(error).__name__)
            return
        failed = None
        if version == self._given_up:
            return
        self._given_up = None
        if version != self.current.version:
            try:
                folder = await in_thread(self.address.fetch, version)
                self._given_up = version  # a version that comes and does not load would not load the next time either
                await self._bring(version, folder)
                self._given_up = None
                _logger.warning("Version %s serves now.", version)
            except Exception as error:  # whatever it is: the version before serves on
                failed = version
                if version != self.failed:
                    self._figures.load_failures.inc()
                    _logger.error("Version %s did not load (%s); version %s serves on.", version,
                                  type(error).__name__, self.current.version)
        self.failed = failed
        self._figures.failed_version.set(int(failed or 0))

    async def watch(self, seconds: float) -> None:
        """Look again and again, with so many seconds between two looks."""
        while True:
            await asyncio.sleep(seconds)
            await self.look()

    async def _bring(self, version, folder):
        """Load a version, try it with one request, and let it take over; the one before ends what it has begun."""
        served = await in_thread(self.address.load, version, folder)
        try:
            await asyncio.wait_for(in_thread(served.try_once), self._patience)
        except BaseException:
            self.give_back(served)
            raise
        before, self.current = self.current, served
        self._figures.version.clear()
        self._figures.version.labels(served.name, served.version).set(1)
        self._figures.rows.set_function(served.rows)
        if before:
            self.give_back(before)


def first_line(error: Exception) -> str:
    """Return what an exception says, in one line without its full stop, for whoever starts the service."""
    said = without_password((getattr(error, "message", None) or str(error)).strip())
    return f"{type(error).__name__}: {said.splitlines()[0].rstrip('.')}" if said else type(error).__name__


def without_password(text: str) -> str:
    """Return a text with addresses, such as a store's, without the user and the password in them."""
    return re.sub("//[^/@\\s]*@", "//", text)


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

    background = None  # a Response has it, and FastAPI looks

    def __init__(self, service: "Service", request: Request, values: dict, deadline: float):
        self._service, self._request, self._values, self._deadline = service, request, values, deadline
        self._streamed = bool(values.get("stream"))
        self._asks_usage = bool((values.get("stream_options") or {}).get("include_usage"))
        self._came, self._over = time.perf_counter(), threading.Event()
        self._begun = self._counted = False
        self._first, self._usage, self._reason, self._texts = None, None, None, []

    async def __call__(self, scope, receive, send):
        """Answer, as an ASGI application does."""
        try:
            async with ends_with_client(self._request), asyncio.timeout_at(self._deadline):
                try:
                    await self._answer(scope, receive, send)
                finally:
                    self._over.set()
        except ClientLeftError:
            self._count("cancelled")
        except BaseException as error:
            error = self._explain(error)
            self._count(error.code)
            await self._refuse(error, scope, receive, send)

    def _explain(self, error):
        """Return what a caller reads of the exception that ended an answer."""
        if isinstance(error, TimeoutError):
            return ServiceError(504, f"The answer took longer than {self._service.limits.timeout:g} seconds.",
                                "timeout")
        if isinstance(error, asyncio.CancelledError):  # uvicorn's: the time to finish is over
            return ServiceError(503, "The service is closing.", "closed")
        return explain(error)

    async def _answer(self, scope, receive, send):
        turns, desk = self._service.turns, self._service.desk
        await turns.take()
        began, served = time.perf_counter(), desk.borrow()  # only now: it may have changed while this request waited
        loop, parts = asyncio.get_running_loop(), asyncio.Queue()

        def put(part):
            if not isinstance(part, bytes):  # the model is free again, and no sooner: it works on after a caller left
                turns.give(time.perf_counter() - began)
                desk.give_back(served)
            parts.put_nowait(part)

        def tell(part):
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for it any more
                loop.call_soon_threadsafe(put, part)

        try:
            # MLflow's iterator has to be read by the thread that made it.
            threading.Thread(target=self._ask, args=(served, tell), daemon=True).start()
        except RuntimeError as error:  # the system gives no more threads
            put(explain(error))
        whole = b""
        while isinstance(part := await parts.get(), bytes):
            if self._streamed:
                await self._send(send, part)
            else:
                whole = part
        if part:
            raise part
        self._count("ok")
        if self._streamed:
            await self._send(send, b"data: [DONE]\n\n", last=True)
        else:
            self._begun = True
            await Response(whole, media_type="application/json")(scope, receive, send)

    async def _send(self, send, events, last=False):
        """Send server-sent events. The first ones make the answer a success that can't be taken back."""
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]})
        await send({"type": "http.response.body", "body": events, "more_body": not last})

    async def _refuse(self, error, scope, receive, send):
        if not self._begun:
            await error.response()(scope, receive, send)
        elif self._streamed:
            await self._send(send, _event(error.body()), last=True)

    def _ask(self, served, tell):
        """Ask the model, on a thread of its own: tell each part of the answer; at last a ServiceError, or None."""
        try:
            with self._service.span(served, len(self._values["messages"])) as span:
                # Nothing is raised in here: MLflow would write down what it says, and that may quote the request.
                failed = self._make(served, tell)
                if span:
                    self._describe(span, failed)
        except Exception as error:  # tracing's own
            failed = explain(error)
        tell(failed)

    def _make(self, served, tell):
        """Tell each part of the answer. Return the ServiceError that it ended with, if it did."""
        try:
            values = adapt(self._values, served.taken)
            with contextlib.closing(served.chunks(values, self._streamed)) as chunks:
                chunks = self._watch(chunks, {"model": served.name,
                                              "system_fingerprint": f"{served.name}/{served.version}"})
                if not self._streamed:
                    tell(_json(join(chunks)))
                    return None
                for chunk in chunks:
                    if chunk["choices"] or self._asks_usage:
                        tell(_event({"usage": None} | chunk if self._asks_usage else chunk))
        except BaseException as error:  # whatever it is, the caller is waiting for it
            return explain(error)
        return None

    def _watch(self, chunks, names):
        """Yield the model's chunks with its names, until the answer is over, and note what they tell."""
        for chunk in chunks:
            if self._over.is_set():
                return
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    self._first = self._first or time.perf_counter() - self._came
                    if self._service.trace_texts:
                        self._texts.append(text)
                self._reason = choice["finish_reason"] or self._reason
            self._usage = chunk.get("usage") or self._usage
            yield chunk | names

    def _describe(self, span, failed):
        """Add to a trace how the answer went: sizes and times, and its text only where that was asked for."""
        span.set_attribute("outcome", failed.code if failed else "cancelled" if self._over.is_set() else "ok")
        if failed:
            span.set_status("ERROR")
        if self._first is not None:
            span.set_attributes({"first_token_seconds": self._first, "finish_reason": self._reason})
        if self._usage:
            span.set_attribute(SpanAttributeKey.CHAT_USAGE, {
                "input_tokens": self._usage["prompt_tokens"], "output_tokens": self._usage["completion_tokens"],
                "total_tokens": self._usage["total_tokens"]})
        if self._service.trace_texts:
            span.set_inputs(self._values)
            span.set_outputs("".join(self._texts))

    def _count(self, outcome):
        """Count the request, once, before its end goes out: who has an answer finds it in the figures."""
        if self._counted:
            return
        self._counted, figures = True, self._service.figures
        figures.requests.labels(outcome).inc()
        if outcome == "ok":
            figures.duration.observe(time.perf_counter() - self._came)
        if self._first is not None:
            figures.first_token.observe(self._first)
        if self._usage:
            figures.prompt_tokens.inc(self._usage["prompt_tokens"])
            figures.completion_tokens.inc(self._usage["completion_tokens"])
            figures.answer_tokens.observe(self._usage["completion_tokens"])


def _json(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _event(value):
    """Return one server-sent event."""
    return b"data: " + _json(value) + b"\n\n"


# --- the application ------------------------------------------------------------------------


class Service:
    """What all requests share."""

    def __init__(self, address: Address, limits: Limits, traces: str | None = None, trace_texts: bool = False):
        self.limits, self.figures, self.traces, self.trace_texts = limits, Figures(), traces, trace_texts
        self.desk = Desk(address, self.figures, limits.timeout)
        # A model without predict_stream may not be made for several callers: nothing says that it is.
        self.turns = Turns(lambda: limits.concurrent or (64 if self.desk.current.streams else 1), limits.waiting)
        self.figures.running.set_function(lambda: self.turns.running)
        self.figures.waiting.set_function(lambda: self.turns.waiting)

    async def begin(self) -> None:
        """Get ready for the first request. A StartError says why it can't."""
        if self.traces:
            try:
                await in_thread(mlflow.set_experiment, self.traces)
            except Exception as error:  # MLflow's, or its database's
                raise StartError(f"No traces can be written to {self.traces}: {first_line(error)}.",
                                 "Name another experiment: --traces.") from None
        await self.desk.begin()

    def span(self, served: ServedModel, messages: int) -> contextlib.AbstractContextManager:
        """Open a trace for one request, if the service makes any; the chat model adds its own spans to it."""
        if not self.traces:
            return contextlib.nullcontext()
        return mlflow.start_span("chat_completion", SpanType.CHAT_MODEL, attributes={
            "model": served.name, "version": served.version, "messages": messages})


def build_app(service: Service, token: str | None, hosts: set[str]) -> FastAPI:
    """Return the ASGI application. ``token`` is what callers have to bring; ``hosts`` are the names it answers to."""
    app = FastAPI(title="A chat model", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)

    async def check_caller(request: Request) -> None:
        if host_name(request.headers.get("host", "")) not in hosts:
            raise ServiceError(421, "This service does not answer for this host.", "unknown_host")
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = hmac.compare_digest(given.encode("latin-1"), (token or "").encode()) and scheme.lower() == "bearer"
        if token and not known:
            raise ServiceError(401, "This service wants a token: Authorization: Bearer TOKEN.", "invalid_api_key")

    checked = [Depends(check_caller)]
    errors = {"default": {"model": ErrorBody, "description": "What went wrong"}}
    schema = ChatCompletionRequest.model_json_schema()
    schema["properties"]["messages"]["items"] = schema.pop("$defs")["ChatMessage"]
    request_body = {"required": True, "content": {"application/json": {"schema": schema}}}

    def described(media_type: str) -> dict:
        """Return what the application's description says of an answer that is text of this type."""
        return {200: {"content": {media_type: {"schema": {"type": "string"}}}}}

    @app.post("/v1/chat/completions", dependencies=checked, responses=errors | described("text/event-stream"),
              openapi_extra={"requestBody": request_body})
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        deadline = asyncio.get_running_loop().time() + service.limits.timeout
        try:
            values = read_json(await read_body(request, service.limits.max_body, deadline))
            check_request(values, service.limits)
            service.desk.serving()
            if values.get("model", service.desk.address.name) not in names(service.desk.address):
                raise ServiceError(404, "This service has no model of that name: /v1/models has the list.",
                                   "model_not_found", "model")
        except ServiceError as error:
            service.figures.requests.labels(error.code).inc()
            raise
        return Answer(service, request, values, deadline)

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
        current = service.desk.serving()
        return {"status": "ready", "model": current.name, "version": current.version,
                "failed_version": service.desk.failed}

    @app.get("/metrics", dependencies=checked, responses=errors | described("text/plain"), response_class=Response)
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
        return explain(error).response()

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


async def read_body(request: Request, most: int, deadline: float) -> bytes:
    """Return a request's body; a ServiceError says that it is longer than it may be, before all of it has come."""
    too_large = ServiceError(413, f"The body may have {most} bytes.", "request_too_large")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise ServiceError(408, "The body took too long to come.", "timeout") from None
    except ClientDisconnect:
        raise ServiceError(400, "The body did not come to its end.", "cancelled") from None
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
            # asyncio does so itself only where the listening socket named its protocol. Without it, the end of each
            # answer waits 40 ms for the caller to confirm the beginning.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._set(HEAD_SECONDS)

        def data_received(self, data):
            if self.clock is None:
                self._set(HEAD_SECONDS)
            super().data_received(data)

        def handle_events(self):
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._set(seconds)

        def on_response_complete(self):
            self._set(None)
            super().on_response_complete()

        def connection_lost(self, exc):
            self._set(None)
            super().connection_lost(exc)

        def send_400_response(self, msg):
            """Refuse what is no HTTP. uvicorn does so in plain text, and fails where the answer has begun."""
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()
                return
            refusal = ServiceError(400, msg, "invalid_request").response()
            for event in (h11.Response(status_code=400, headers=[*refusal.raw_headers, (b"connection", b"close")]),
                          h11.Data(data=refusal.body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
            self.transport.close()

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


class Server(uvicorn.Server):
    """A uvicorn server that listens first, loads its model then, and says one line when it is ready."""

    failure: StartError | None = None

    def __init__(self, service: Service, listener: socket.socket, token: str | None, hosts: set[str]):
        limits, (host, port, *_) = service.limits, listener.getsockname()
        super().__init__(uvicorn.Config(
            build_app(service, token, hosts), http=connection(limits.timeout + 5), ws="none", lifespan="off",
            log_config=None, log_level="critical", access_log=False, proxy_headers=False, server_header=False,
            h11_max_incomplete_event_size=HEAD_BYTES, timeout_graceful_shutdown=math.ceil(limits.drain)))
        self._service, self._listener = service, listener
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until a signal comes. A StartError says why it could not begin."""
        super().run([self._listener])
        if self.failure:
            raise self.failure

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
        if current := self._service.desk.current:
            with contextlib.suppress(TimeoutError):  # a model that does not end does not hold up the program
                await asyncio.wait_for(in_thread(current.close), 5)

    async def _begin(self):
        try:
            await self._service.begin()
        except StartError as error:
            self.failure, self.should_exit = error, True
            return
        desk = self._service.desk
        print(f"Serving {desk.address.name}, version {desk.current.version}, at {self.address}/v1", flush=True)
        if desk.address.moves:
            await desk.watch(self._service.limits.poll)


def main(words: list[str]) -> int:
    """Serve until a signal comes. Return the exit code."""
    options = read_options(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # uvicorn finishes what has begun, and then raises the signal again: for this program, that is its good end.
    for name in ("SIGTERM", "SIGBREAK"):  # the second one is Windows'
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: sys.exit(0))
    try:
        # What MLflow copies goes to a folder of this program's own, which ends with it.
        with tempfile.TemporaryDirectory(prefix="openai-server-", ignore_cleanup_errors=True) as tempfile.tempdir:
            hosts = check_reach(options.host, token := os.environ.get(TOKEN) or None, options.allowed_host)
            limits = Limits(**{field.name: getattr(options, field.name) for field in fields(Limits)})
            service = Service(Address(options.model, Path(tempfile.tempdir)), limits, options.traces,
                              options.trace_texts)
            Server(service, listen(options.host, options.port), token, hosts).run()
    except StartError as error:
        print(f"error: {error.what}\n       {error.fix}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
