"""A conversation goes in, a chat completion comes out: an ONNX model for many callers at once.

MLflow logs this file itself (models from code). It imports nothing of the course, and it is one file on
purpose: MLflow loads it under a new name for each model, so two versions in one process share no code.

From top to bottom: the contract (what a request may hold), the folder (what a model's files say), the template
(messages become a prompt), the prompt (where text stays text), the answer (text, bound to a schema or not), the
scheduler (which rows start now, together), the engine (rows in batches, on one thread), the model (what MLflow calls).
"""

import functools
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import threading
import time
import uuid
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jinja2.ext
import joblib
import mlflow
import numpy as np
import onnxruntime_genai as og
import pandas as pd
import psutil
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE, INVALID_STATE, RESOURCE_EXHAUSTED
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, Property, Schema
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, create_model
from tokenizers import Tokenizer

# --- the contract ---------------------------------------------------------------------------


def _whole(value):
    """Take 4.0 for 4: where a row of a table lacks a number, pandas makes the others floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]
Text = Annotated[str, Field(pattern=r"\A[^\x00]*\z")]
Nothing = Annotated[list | dict, Field(max_length=0)]
FROM_1, UP_TO_CONTEXT = "a whole number from 1", "a whole number from 1 up to what the context leaves"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Settings(_Strict):
    """What ``model_config=`` may set when the model is logged, and change when it is loaded."""

    model: str = Field("slm-onnx", description="the name that answers carry, a text")
    max_tokens: int = Field(256, ge=1, description=FROM_1)  # where a request does not say
    temperature: float = Field(0.0, ge=0, le=2, description="a number from 0 to 2")  # the same
    max_tokens_limit: int = Field(2048, ge=1, description=FROM_1)  # the most that a request may ask
    max_rows: int = Field(256, ge=1, description=FROM_1)  # answers that one call may ask for
    max_waiting: int = Field(512, ge=1, description=FROM_1)  # answers that may wait for their turn
    # Conversations whose prompts stay in memory. All of them together take as much cache as one context, at most.
    kept_conversations: int = Field(4, ge=0, description="a whole number from 0, which keeps none")
    threads: int | None = Field(None, ge=1, description=f"{FROM_1}, or null for one on each core")
    provider: Literal["cpu", "cuda", "dml"] = Field("cpu", description="cpu, cuda or dml")


SETTINGS = Settings().model_dump()


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"] = Field(description="text")
    text: Text = Field(description="text, without NUL and without half a surrogate pair")


class Message(_Strict):
    """One turn of a conversation. ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant")
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1000)] = Field(
        description="text, or 1 to 1000 parts of text, without NUL and without half a surrogate pair")
    # The template gets a name, and may read it. The others are in answers that clients send back, and empty.
    name: Text = Field("", description="text, without NUL and without half a surrogate pair")
    tool_calls: Nothing | None = Field(None, description="empty or left out: this model calls no tools")
    annotations: Nothing | None = Field(None, description="empty or left out")


class StreamOptions(_Strict):
    """What a stream adds to its text. Obfuscation is not added."""

    include_usage: bool = Field(False, description="true or false")
    include_obfuscation: bool = Field(False, description="true or false")


class JsonSchema(_Strict):
    """A schema that the answer has to fit. It is kept, ``strict`` or not; the other words are not read."""

    name: str = Field("", max_length=64, description="a text of up to 64 characters")
    description: str = Field("", description="a text")
    strict: bool = Field(True, description="true or false")
    definition: dict = Field(alias="schema", description="an object: a JSON schema")


class ResponseFormat(_Strict):
    """What an answer may be: any text, a JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="text, json_object or json_schema")
    json_schema: JsonSchema | None = Field(None, description="an object with name and schema")


ClientHabits = create_model("ClientHabits", __base__=_Strict, **{
    name: (kind | None, Field(None, description=allowed)) for names, kind, allowed in (
        ("model user safety_identifier service_tier prompt_cache_key", str, "a text"),
        ("metadata prediction", dict, "an object"),
        ("store parallel_tool_calls", bool, "true or false"),
        ("logprobs", Literal[False], "false or left out"),
        ("top_logprobs", Literal[0], "0 or left out"),
        ("tools functions logit_bias", Nothing, "empty or left out"),
        ("tool_choice function_call", Literal["none", "auto"], "none, auto or left out"),
        ("modalities", list[Literal["text"]], "a list of text, and of nothing else"),
    ) for name in names.split()})


class ChatRequest(ClientHabits):
    """The fields of ``llm/v1/chat``, those that the engine serves, and more that OpenAI's clients send.

    A field that is null counts as not given. ``description`` is what an error says of the allowed range. What clients
    send by habit is taken where it changes no answer, and refused by name where it would:

    ============================================  ================================  ==========================
    field                                         with OpenAI                       here
    ============================================  ================================  ==========================
    model                                         which model answers               any text: a server's matter
    user, safety_identifier                       who asks                          any text: not read
    service_tier, prompt_cache_key, prediction    get it sooner or cheaper          not read
    metadata, store                               keep the answer, with labels      not kept
    logprobs, top_logprobs                        show the likeliest tokens         false, 0
    logit_bias                                    favour tokens                     empty
    tools, functions, tool_choice, function_call  call functions                    empty; none or auto
    parallel_tool_calls                           call several at once              not read: there are none
    modalities                                    answer in text or sound           text
    max_completion_tokens                         ``max_tokens``, by its new name   the same
    developer, as a role                          ``system``, by its new name       the same
    content in parts                              texts, images, sounds, files      texts, each on a new line
    ============================================  ================================  ==========================
    """

    messages: Annotated[list[Message], FailFast()] = Field(
        min_length=1, max_length=1000, description="a list of 1 to 1000 messages, role and content each")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    max_tokens: Whole | None = Field(None, ge=1, description=UP_TO_CONTEXT)
    max_completion_tokens: Whole | None = Field(None, ge=1, description=UP_TO_CONTEXT)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = Field(
        [], description="up to 4 texts of 1 to 100 characters")
    n: Whole = Field(1, ge=1, le=8, description="a whole number from 1 to 8")
    stream: bool | None = Field(None, description="true, for predict_stream alone, false or left out")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, up to 1")
    top_k: Whole | None = Field(None, ge=1, description=FROM_1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    seed: Whole | None = Field(None, ge=0, lt=2**53, description="a whole number from 0 to 2**53 - 1")
    response_format: ResponseFormat | None = Field(
        None, description="an object with the type text, json_object or json_schema")
    stream_options: StreamOptions | None = Field(None, description="include_usage: true or false, for a stream")


SERVED = [name for name in ChatRequest.model_fields if name not in ClientHabits.model_fields]
_OBJECTS = {"messages": Message, "content": TextPart, "stream_options": StreamOptions,
            "response_format": ResponseFormat, "json_schema": JsonSchema}  # what has fields of its own
# MLflow checks types before the model sees a request: it refuses a temperature of 2 where a double is due, a
# column of whole numbers with a gap, and quotes the whole request in its error. So to MLflow every field is
# optional and of any type, and the checks are those of ChatRequest. One field has to be an object: without one,
# MLflow makes a row of each message. For what MLflow still refuses by itself (a stream_options that is no object,
# a list with something else between the requests), a server sets MLFLOW_DISABLE_SCHEMA_DETAILS=true.
_TYPES = {"stream_options": Object([Property(name, AnyType(), required=False) for name in StreamOptions.model_fields])}
_MESSAGE = Object([Property("role", DataType.string), Property("content", DataType.string)])
_CHOICE = Object([Property("index", DataType.long), Property("message", _MESSAGE),
                  Property("finish_reason", DataType.string)])
_USAGE = Object([Property(f"{kind}_tokens", DataType.long) for kind in ("prompt", "completion", "total")])
_ANSWER = {"id": DataType.string, "object": DataType.string, "created": DataType.long, "model": DataType.string,
           "choices": Array(_CHOICE), "usage": _USAGE}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(_TYPES.get(name, AnyType()), name, required=False)
                   for name in (*SERVED, *ClientHabits.model_fields)]),
    outputs=Schema([ColSpec(kind, name) for name, kind in _ANSWER.items()]))


class Refusal(MlflowException):
    """An error made of parts, for a server that passes it on: ``field``, ``code`` and ``allowed``.

    The code is invalid_value, unknown_field, context_length_exceeded, busy, closed, failed or unusable_model. Field and
    allowed range are None where no field is wrong. MLflow's own server puts the three beside the sentence.
    """

    def __init__(self, sentence: str, code: str, field: str | None = None, allowed: str | None = None,
                 error_code: int = INVALID_PARAMETER_VALUE):
        super().__init__(sentence, error_code, field=field, code=code, allowed=allowed)
        self.field, self.code, self.allowed, self._given = field, code, allowed, (
            sentence, code, field, allowed, error_code)

    def __reduce__(self):
        return type(self), self._given  # so that another process can get it


def invalid(field: str, allowed: str, where: str = "", code: str = "invalid_value") -> Refusal:
    """Return the error that names a field and what it may be, and quotes nothing of the request."""
    return Refusal(f"{where}{field} has to be {allowed}.", code, None if " " in field else field, allowed)


def read_request(values: Any, where: str = "") -> ChatRequest:
    """Check one request, a dict of its fields as they came.

    ``where`` stands in front of an error, such as ``"Row 2: "``. A Refusal with the code INVALID_PARAMETER_VALUE
    says which field is wrong, and its range.
    """
    if not isinstance(values, dict):
        raise invalid("A request", "an object with messages", where)
    if len(values) > 100:  # each unknown field would get an error of its own
        raise _unknown("The request", SERVED, where)
    try:
        request = ChatRequest.model_validate(_without_nulls(_plain(values)))
    except ValidationError as error:
        problem = error.errors()[0]  # only its place and its kind are used: the rest of it quotes the request
        raise _explain(problem["loc"], problem["type"], where) from None
    request.stop = [request.stop] if isinstance(request.stop, str) else request.stop
    if request.messages[-1].role == "assistant":
        raise invalid("The last message's role", "user or system: the assistant speaks next", where)
    if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
        raise invalid("max_completion_tokens", "left out beside another max_tokens", where)
    shape = request.response_format
    if shape and shape.type == "json_schema" and shape.json_schema is None:
        raise invalid("response_format.json_schema", ResponseFormat.model_fields["json_schema"].description, where)
    if shape and shape.type != "text" and request.stop:
        raise invalid("stop", "left out where response_format asks for JSON, which it would cut", where)
    request.max_tokens = request.max_tokens or request.max_completion_tokens
    for message in request.messages:
        message.role = "system" if message.role == "developer" else message.role
        if isinstance(message.content, list):
            message.content = "\n".join(part.text for part in message.content)
    return request


def _without_nulls(value, name="request"):
    """Leave out the fields that are null, also those of the objects inside, such as ``refusal`` in a message."""
    if isinstance(value, list):
        return [_without_nulls(item, name) for item in value] if name in ("messages", "content") else value
    if isinstance(value, dict) and (name == "request" or name in _OBJECTS):
        # Of too many fields, some are unknown. Each would get an error of its own.
        return {inner: _without_nulls(item, inner)
                for inner, item in itertools.islice(value.items(), 100 if name == "request" else 20)
                if item is not None}
    return value


def _explain(place, kind, where):
    """Turn the place of a validation error into the field's name and its description."""
    name, fields, allowed = "", ChatRequest.model_fields, None  # None: the place is no field of ours
    for step in place:
        if name == "messages" and isinstance(step, int):
            name, fields, allowed = f"messages[{step}]", Message.model_fields, "an object with role and content"
        elif found := next((field for inner, field in fields.items() if step == (field.alias or inner)), None):
            name, allowed = f"{name}.{step}".lstrip("."), found.description
            fields = _OBJECTS[step].model_fields if step in _OBJECTS and step != "content" else {}
    if kind in ("extra_forbidden", "invalid_key") or allowed is None:
        return _unknown(name or "The request", fields if name else SERVED, where)
    return invalid(name, allowed, where)


def _unknown(name, fields, where):
    if isinstance(fields, dict):
        fields = [field.alias or inner for inner, field in fields.items()]
    return Refusal(f"{where}{name} holds a field that is not served. The fields are: {', '.join(fields)}.",
                   "unknown_field", None if name == "The request" else name)


def _plain(value, depth=5):
    """Return a value as Python's own type: Spark gives arrays, pandas gives numpy's numbers.

    A request is five levels deep: itself, its messages, each of them, its parts, each of them. Of what lies deeper,
    only a schema is read, and that has to be JSON.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if depth and isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return {name: _plain(item, depth - 1) for name, item in value.items()}
    return value


def read_table(table: pd.DataFrame) -> list[dict]:
    """Return the requests of a table, one in each row, without what pandas fills in.

    MLflow makes such a table of a dict and of a list of dicts, too. Without a column, or with two of one name, it
    is refused with INVALID_PARAMETER_VALUE.
    """
    if table.columns.empty:  # what MLflow makes of {}
        raise invalid("messages", ChatRequest.model_fields["messages"].description)
    if not table.columns.is_unique:
        raise invalid("A table", "of one column for each field")
    rows = [{name: None if _is_gap(value) else value for name, value in row.items()}
            for row in table.to_dict("records")]
    return _several(rows[0]) if len(rows) == 1 else rows


def _several(row):
    """Return the requests of a row with a list of conversations: MLflow's server makes one of ``instances``."""
    given = {name: value for name, value in row.items() if value is not None}
    conversations = _plain(given.get("messages"), 2)
    if not isinstance(conversations, list) or not all(isinstance(one, list) for one in conversations or [None]):
        return [row]
    if any(not isinstance(value, list | np.ndarray) or len(value) != len(conversations) for value in given.values()):
        raise Refusal("Of a field that not all instances have, MLflow's server does not say whose it is. Send inputs "
                      "in place of instances, or the same fields with each.", "invalid_value")
    return [{name: value[place] for name, value in given.items()} for place in range(len(conversations))]


def _is_gap(value):
    """Tell whether pandas says "no value here"; it says so with NaN where a column holds numbers."""
    return value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))


# --- the folder -----------------------------------------------------------------------------

CHUNK = 128  # tokens of a lone row's prompt that are read in one step, at most
# In its graph, a model with two sets of rotary factors compares the length with the most that the short ones take.
_ROPE_SWITCH = re.compile(rb"/model/constants/[^\x00-\x1f]*/(\d+)\x12.{1,3}/model/rope_caches_subgraph/Greater", re.S)


@dataclass(frozen=True)
class Config:
    """What a model's files say of it: token ids, and numbers of tokens.

    Up to ``rope_switch`` tokens the model reads with short rotary factors, and beyond with long ones, from the first
    token on. Where there is one set, ``rope_switch`` is ``context_length``. ``block`` is for `cut_points`. Layers with
    a window of ``ring`` tokens have a cache that the engine fills in turns: it takes one row at a time, and keeps none.
    """

    context_length: int
    rope_switch: int
    end_tokens: tuple[int, ...]
    pad: int
    vocab_size: int
    block: int
    ring: int


def _unusable(reason):
    return Refusal(f"This folder is no model that can be served: {reason}.", "unusable_model",
                   error_code=INVALID_STATE)


def _read_json(path, needed=True):
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if needed or path.exists() else {}
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _unusable(f"{path.name} is missing, or not an object in JSON")
    return value


def read_config(folder: Path) -> Config:
    """Read ``genai_config.json``, and the graph for its rotary factors. A Refusal says what can't be served.

    Builders differ: one end token or a list; a pad token, none or -1; the model's context length, or the search's.
    """
    def whole(value, least=0):
        value = _whole(value)
        return value if type(value) is int and least <= value < 2**31 else None

    text = _read_json(folder / "genai_config.json")
    model, search = ({} if not isinstance(text.get(name), dict) else text[name] for name in ("model", "search"))
    decoder = model.get("decoder")
    if not isinstance(decoder, dict) or not {"encoder", "vision", "speech", "embedding"}.isdisjoint(model):
        raise _unusable("genai_config.json describes something else than a decoder of text")
    if "custom_ops_library" in json.dumps(text):
        raise _unusable("genai_config.json asks for a library of its own, which is code")
    context_length = whole(model.get("context_length"), 2) or whole(search.get("max_length"), 2)
    ends = model.get("eos_token_id")
    ends = tuple(token for token in (ends if isinstance(ends, list) else [ends]) if whole(token) is not None)
    vocab_size = whole(model.get("vocab_size"), 1)
    if not (context_length and ends and vocab_size and max(ends) < vocab_size):
        raise _unusable("genai_config.json lacks a context_length, eos_token_id or vocab_size that can be")
    window = decoder.get("sliding_window") if isinstance(decoder.get("sliding_window"), dict) else {}
    window, in_layers = whole(window.get("window_size"), 1) or context_length, bool(window.get("layers"))
    if not in_layers:
        # So exported, each layer sees all tokens; the model was made to see a window. Up to its size they are equal.
        context_length = min(context_length, window)
    name = decoder.get("filename")
    if not isinstance(name, str) or not re.fullmatch(r"(\w[\w.-]{0,100}/){0,3}\w[\w.-]{0,100}\.onnx", name) or not (
            folder / name).is_file():
        raise _unusable("genai_config.json names no ONNX file in its folder")
    try:
        og.Config(str(folder))
    except Exception:  # the engine raises nothing narrower
        raise _unusable("onnxruntime-genai can't read its genai_config.json") from None
    found, pad = _ROPE_SWITCH.search((folder / name).read_bytes()), whole(model.get("pad_token_id"))
    return Config(context_length, min(int(found[1]), context_length) if found else context_length, ends,
                  pad if pad is not None and pad < vocab_size else ends[0], vocab_size,
                  2 * (whole(decoder.get("head_size"), 1) or CHUNK // 2),
                  min(window, context_length) if in_layers else 0)


# --- the template ---------------------------------------------------------------------------

MAX_TEXT, MAX_TOTAL, MAX_SECONDS = 10**7, 3 * 10**8, 5.0  # characters of a text, of all texts; the time
# What makes a text or list as often as another says.
GROWING = {"*", "**", "replace", "join", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "indent",
           "wordwrap", "batch", "slice", "tojson"}


class TooMuch(Exception):  # noqa: N818 - it says what a template asks for
    """A template asks for more than a prompt can be."""


class _Code(CodeGenerator):
    """Makes a template ask, in each turn of a loop, whether it may go on, and have weighed what it puts together."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - jinja2 calls these by their names
        node.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("weigh"), [], [], None, None)))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.visit(nodes.Call(nodes.EnvironmentAttribute("concat"), [nodes.List(node.nodes)], [], None, None), frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._weighed(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._weighed(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._weighed(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _weighed(self, visit, node, frame):
        self.write("environment.weigh(")
        visit(node, frame)
        self.write(")")


class _Generation(jinja2.ext.Extension):
    """Reads ``{% generation %}``, with which some templates mark a training's text, as what stands inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Read from the tag to its end."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class Template(ImmutableSandboxedEnvironment):
    """A chat template, set up as transformers does it, and bounded in time and size: it may come from anybody.

    Source of the set-up: ``transformers.utils.chat_template_utils``. Jinja2's own sandbox lets a template run for ever
    and fill the memory. So whatever repeats, calls or puts together has to be weighed here first.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code

    def __init__(self, source: str):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols],
                         finalize=self.weigh)
        self.filters |= {"tojson": self.tojson}
        self.filters = {name: self._watch(function) for name, function in self.filters.items()}
        self.globals |= {"raise_exception": self._refuse, "strftime_now": lambda text: datetime.now().strftime(text)}
        del self.globals["lipsum"]
        self._local = threading.local()
        self._begin()
        try:
            self._template = self.from_string(source if len(source) < MAX_TEXT // 10 else "{%")
        except Exception:  # constants are worked out here, with whatever they raise
            raise _unusable("its chat template is no template that can be read") from None

    @staticmethod
    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple | None = None,
               sort_keys: bool = False) -> str:
        """Write JSON: jinja2's own also writes <, > and & in another way."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    @staticmethod
    def _refuse(message):
        raise jinja2.TemplateError(message)

    def _begin(self):
        self._local.deadline, self._local.left = time.thread_time() + MAX_SECONDS, MAX_TOTAL

    def _watch(self, function):
        @functools.wraps(function)  # with what jinja2 notes on a filter: which arguments it passes
        def watched(*values, **named):
            self._weigh_call(function.__name__.removeprefix("do_"), [*values, *named.values()])
            return function(*values, **named)
        return watched

    def _weigh_call(self, name, values):
        """Weigh what a call could make of its values: one as often as another says, or the sum of them."""
        sizes = sorted(map(_size, values))
        if name in ("format", "format_map") and re.search(r"\d{5}|\*", str(values[0])):
            raise TooMuch
        self._spend(math.prod(size or 1 for size in sizes[-2:]) if name in GROWING else sum(sizes))

    def _spend(self, size):
        self._local.left -= size
        if size > MAX_TEXT or self._local.left < 0 or time.thread_time() > self._local.deadline:
            raise TooMuch

    def weigh(self, value: Any = None) -> Any:
        """Return a value, unless it is too much."""
        self._spend(_size(value))
        return value

    def concat(self, parts: Iterable) -> str:
        """Join texts, for ``~`` and, since jinja2 knows this name, for macros."""
        return "".join(self.weigh(list(map(str, parts))))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Work out an operator that can make much."""
        self._weigh_call("format" if operator == "%" and isinstance(left, str) else operator, [left, right])
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *values: Any, **named: Any) -> Any:
        """Call what a template calls."""
        plain = getattr(function, "__wrapped__", function)
        owner = getattr(plain, "__self__", None)
        if isinstance(owner, str | list | tuple | dict):  # jinja2 adds variables of loops, which begin with _
            given = [value for name, value in named.items() if not name.startswith("_")]
            self._weigh_call(plain.__name__, [owner, *values, *given])
        self.weigh()
        return super().call(context, function, *values, **named)

    def render(self, variables: dict) -> str:
        """Return the text. What a template raises, and ``TooMuch``, goes to the caller."""
        self._begin()
        return self.concat(self._template.generate(variables))


def _size(value):
    """Count the characters and items of a value, those inside too, up to where it is too much. A number is itself."""
    if isinstance(value, int):
        return abs(value)
    if isinstance(value, str):
        return len(value)
    size = 0
    items = [*value, *value.values()] if isinstance(value, dict) else value
    for item in items if isinstance(items, list | tuple) else ():
        size += 1 if isinstance(item, int) else 1 + _size(item)
        if size > MAX_TEXT:
            break
    return size


def _read_template(folder):
    """Return a folder's template and the special tokens that it may name, from where transformers reads them."""
    config = _read_json(folder / "tokenizer_config.json", needed=False)
    source, file = config.get("chat_template"), folder / "chat_template.jinja"
    if isinstance(source, list):
        source = next((entry.get("template") for entry in source
                       if isinstance(entry, dict) and entry.get("name") == "default"), None)
    if file.is_file():
        source = file.read_text(encoding="utf-8", errors="replace")
    if not isinstance(source, str):
        raise _unusable("it has no chat template, so it was not made for conversations")
    named = {name: token.get("content") if isinstance(token, dict) else token
             for name, token in (config | _read_json(folder / "special_tokens_map.json", needed=False)).items()
             if name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")}
    return Template(source), {name: token for name, token in named.items() if isinstance(token, str)}


# --- the prompt -----------------------------------------------------------------------------


class PromptEncoder:
    """Turns messages into tokens by the chat template in a model's folder. Text of a message stays text.

    A tokenizer takes ``<|end|>`` for markup wherever it stands. So here are two. ``tokenizer`` is the folder's, and
    reads answers. In the other, all markup has another name, with a mark in front that nobody can guess: what the
    template writes gets that mark, and what stands in a message does not. An assistant's turn may hold what the
    assistant itself writes, such as ``<think>``; templates look for it. A Refusal says why a folder can't be served.
    """

    def __init__(self, folder: Path):
        data = _read_json(folder / "tokenizer.json")
        # A training may have left in it that prompts are cut, or filled up, or read with some chance in it.
        data |= {"truncation": None, "padding": None}
        self._template, self._special = _read_template(folder)
        # Unicode gives these characters no meaning: a template does not look for them, and a tokenizer leaves them.
        self._mark, self._cut = ("".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(8)) for _ in range(2))
        try:
            data["model"] |= {"dropout": None} if "dropout" in data["model"] else {}
            self.tokenizer = Tokenizer.from_str(json.dumps(data))
            added = [token for token in data["added_tokens"] if token["content"].strip()]
            special = _first_of(token["content"] for token in added if token["special"])
            every = _first_of(token["content"] for token in added)
            self._marked = self._mark_markup(data, added)
        except Exception:  # tokenizers raises nothing narrower
            raise _unusable("tokenizer.json is no tokenizer that can be read") from None
        self._to_cut = {"user": every, "system": every, "assistant": special}
        # The longest first, as the tokenizer finds it.
        markup = sorted((token["content"][len(self._mark):] for token in added), key=len, reverse=True)
        self._markup = re.compile("|".join(map(re.escape, markup)) or "(?!)")
        self._longest = max(map(len, self.tokenizer.get_vocab()))
        try:
            self.render([{"role": "user", "content": "Hello"}])  # what fails now, fails for every conversation
        except Refusal:
            raise _unusable("its chat template takes no conversation") from None

    def _mark_markup(self, data, added):
        """Rename the markup in a tokenizer's data, and return that tokenizer."""
        named, model = {token["content"]: self._mark + token["content"] for token in added}, data["model"]
        vocabulary = model["vocab"]
        model["vocab"] = ({named.get(token, token): number for token, number in vocabulary.items()}
                          if isinstance(vocabulary, dict) else
                          [[named.get(token, token), score] for token, score in vocabulary])
        if model.get("unk_token") in named:
            model["unk_token"] = named[model["unk_token"]]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])]
        if pairs:  # but those by which plain text would grow together to markup
            model["merges"] = [pair for pair in pairs if named.keys().isdisjoint([*pair, "".join(pair)])]
        for token in added:
            token["content"] = named[token["content"]]
        marked = Tokenizer.from_str(json.dumps(data))
        if any(marked.encode(token["content"], add_special_tokens=False).ids != [token["id"]] for token in added):
            raise ValueError("This tokenizer changes the names of markup.")
        return marked

    def render(self, turns: list[dict]) -> str:
        """Return the prompt of a conversation, ready for the assistant's answer, as transformers makes it."""
        try:
            prompt = self._template.render({"messages": turns, "tools": None, "documents": None,
                                            "add_generation_prompt": True} | self._special)
            return prompt.encode().decode()  # half a surrogate pair is no text
        except Exception:  # a template may raise anything
            raise invalid("messages", "in an order that the model's chat template takes") from None

    def encode(self, messages: list[Message], context_length: int, where: str = "") -> list[int]:
        """Return the tokens of a conversation, ready for the assistant's answer.

        A Refusal says that the messages are too long, or that the template refuses their order.
        """
        if sum(len(message.content) for message in messages) > context_length * self._longest:
            raise invalid("messages", f"short enough for the model's context of {context_length} tokens", where,
                          "context_length_exceeded")
        turns = [{"role": message.role} | {
            name: self._to_cut[message.role].sub(lambda found: found[0] + self._cut, text)
            for name, text in (("content", message.content), ("name", message.name)) if text or name == "content"}
            for message in messages]
        try:
            prompt = self.render(turns)
        except Refusal as refusal:
            raise invalid(refusal.field, refusal.allowed, where) from None
        # Markup that the template wrote is whole, and what was in a message is cut behind its first character.
        prompt = self._markup.sub(lambda found: self._mark + found[0], prompt).replace(self._cut, "")
        return self._marked.encode(prompt, add_special_tokens=False).ids


def _first_of(texts):
    """Return what finds the first character of each of these texts, overlapping ones too."""
    return re.compile("|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in texts) or "(?!)")


# --- the answer -----------------------------------------------------------------------------

MAX_SCHEMA = 65_536  # characters of a schema as JSON
# Words of JSON Schema that llguidance refuses, which a sentence may quote.
UNKEPT = ("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains", "dependentRequired",
          "dependentSchemas", "propertyNames", "unevaluatedItems", "unevaluatedProperties")


def find_costly(schema: Any, meeting: bool = False) -> str | None:
    """Return the word of a schema that takes seconds to compile, or lets an answer through that does not fit.

    llguidance bounds neither. Where patterns meet, in ``allOf`` or beside ``$ref``, its work doubles with each. It
    counts a name that comes twice as two properties.
    """
    if isinstance(schema, list):
        return next(filter(None, (find_costly(item, meeting) for item in schema)), None)
    if not isinstance(schema, dict):
        return None
    step, named = schema.get("multipleOf", 1), schema.get("patternProperties")
    least, required = schema.get("minProperties", 0), schema.get("required")
    meets = meeting or "allOf" in schema or "$ref" in schema
    met = json.dumps(schema) if meets and not meeting else ""  # it has all that meets further inside
    found = [
        ("multipleOf", isinstance(step, int | float) and step > 10_000 and math.log10(step) % 1),
        ("minProperties", isinstance(least, int) and least > 1 + len(required if isinstance(required, list) else [])),
        ("patternProperties", isinstance(named, dict) and len(named) > (5 if meets else 100)),
        *((name, met.count(f'"{name}"') > most)
          for name, most in (("pattern", 10), ("patternProperties", 10), ("multipleOf", 4))),
        *((name, isinstance(schema.get(name), list) and len(schema[name]) > 200) for name in ("anyOf", "oneOf")),
    ]
    return next((name for name, costly in found if costly), None) or next(
        filter(None, (find_costly(item, meets) for item in schema.values())), None)


class SchemaReader:
    """Binds answers to JSON: an ``LLMatcher`` of llguidance knows which tokens may come next.

    onnxruntime-genai has the same library inside (``set_guidance``). There a whole batch has one schema, and the
    engine's thread compiles it while every caller waits. Here each row has its own. Its caller's thread compiles it,
    one caller at a time, without Python's lock and within llguidance's bounds on work and memory.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config):
        self._tokenizer, self._config, self._lock, self._tokens = tokenizer, config, threading.Lock(), None

    def bind(self, shape: ResponseFormat | None, where: str = "") -> LLMatcher | None:
        """Return what knows the answers of this shape, None for any text. A Refusal says what can't be kept."""
        if shape is None or shape.type == "text":
            return None
        by_schema = shape.type == "json_schema"
        field = "response_format.json_schema.schema" if by_schema else "response_format"
        try:
            schema = shape.json_schema.definition if by_schema else {"type": "object"}
            text = json.dumps(schema, allow_nan=False)
            costly = find_costly(schema) if len(text) <= MAX_SCHEMA else "more characters"
            # Blanks as Python's json writes them: left free, a small model writes line ends for ever. A letter has one
            # way to be written: by another, a name would not be that of its property.
            grammar = LLMatcher.grammar_from_json_schema(text, overrides={
                "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ",
                "json_allowed_escapes": '"\\bfnrt'})
        except (TypeError, ValueError, RecursionError):
            raise invalid(field, "a JSON schema that is JSON, and not too deep", where) from None
        if costly or re.search(r'"x-guidance"|\\u00[01]|\x7f', text):
            raise invalid(field, f"a JSON schema of up to {MAX_SCHEMA} characters, without control characters and "
                          f"x-guidance, {f'and with less or no {costly}' if costly else ''}".rstrip(", "), where)
        with self._lock:
            # Half a second's work, and many a model is never asked for JSON.
            self._tokens = self._tokens or LLTokenizer(
                self._tokenizer.to_str(), n_vocab=self._config.vocab_size, eos_token=list(self._config.end_tokens))
            matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits(max_items_in_row=20_000))
            matcher.compute_bitmask()
        if matcher.is_error():
            unkept = " or ".join(name for name in re.findall(r'"(\w+)"', matcher.get_error()) if name in UNKEPT)
            raise invalid(field, "a JSON schema that can be kept while the answer is written"
                          + (f", without {unkept}" if unkept else ""), where)
        return matcher


class TextWriter:
    """Turns an answer's tokens into text as they come: no half characters, nothing of a stop string.

    The answer ends before the stop string that is complete first. After ``write``, ``stopped`` says so.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens, self._start, self._written = [], 0, 0  # the text of tokens[:written] has been returned
        self._held = ""  # or is kept here, because a stop string may begin with it
        self.stopped = False

    def write(self, token: int) -> str:
        """Add a token; return the text that is certain by now."""
        self._tokens.append(token)
        return self._release(self._decode(last=False))

    def close(self) -> str:
        """Return what was held back: the answer has ended."""
        return self._release(self._decode(last=True)) + self._held

    def _decode(self, last):
        # The tokens of the last piece are decoded again: some tokenizers write a space only between two tokens.
        before = self._tokenizer.decode(self._tokens[self._start:self._written])
        text = self._tokenizer.decode(self._tokens[self._start:])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not last):
            return ""
        self._start, self._written = self._written, len(self._tokens)
        return text[len(before):]

    def _release(self, text):
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)[1]]  # the first to be complete, however the tokens are cut
        # The end of the text may be the beginning of a stop string.
        hold = max((size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
                   default=0)
        self._held = text[len(text) - hold:]
        return text[:len(text) - hold]


# --- the scheduler --------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheduler:
    """Decides which of the waiting rows start now, as one batch. It reads no clock and touches no tensor.

    onnxruntime-genai has a scheduler of its own, in ``og.Engine``. Of a model exported for the CPU it makes static
    batches only. These take no seed and no stop string, and have no frequency or presence penalty. With two threads
    they were 1.2 (answers of mixed length) to 1.7 times (of one length) slower than the batches chosen here.
    """

    # Tokens of a conversation. All rows of a batch together may reserve as many: no more than the longest one does.
    context_length: int
    # Tokens beyond which the model reads in another way: a batch stays on one side.
    rope_switch: int | None = None
    # Tokens of a row's prompt that a kept conversation has, from which on it starts alone: a batch reads them anew.
    worth_reusing: int = 256
    max_contexts: int = 2  # of cache, for all batches together: a second one can start beside a full one
    max_batch: int = 16  # rows: more make each step longer and hardly any token cheaper
    max_batches: int = 16  # that run in turns: each makes every other one slower
    # Running batches with which every row waits for another `patience` seconds, so that streams, too, get company.
    eager_batches: int = 8
    # Tokens of prompt, padding included, of a batch. It reads them in one call, and no other thread runs meanwhile.
    max_prefill: int = 512
    # Seconds that a row waits, at the most, for the running batches to end before it starts beside them: about as long
    # as 16 answers of 100 tokens take. A row that waits shares the next batch, which costs less.
    patience: float = 3.0
    # Rows that run beside the first one when a newcomer waits for all of `patience`. Beside fewer it waits for a part
    # of it, beside a lone row not at all: there it costs little.
    crowd: int = 8
    max_overtaking: float = 30.0  # seconds that smaller rows start before one for which the cache has no space yet
    # Seconds, for each row of the last batch and up to 5 of them, that an idle engine waits for company. Callers that
    # were answered together ask again at about the same time; a lone caller loses next to nothing.
    linger_per_row: float = 0.003
    max_linger_rows: int = 5
    max_compared: int = 64  # rows of which a batch is chosen: that takes 0.4 ms, for which the running rows wait
    # What a step costs beside its rows, counted in rows: reading the weights. On two cores 5.8 ms, and 1.6 ms a row.
    step_cost: float = 3.6

    def due(self, row: "Row", place: int, now: float) -> float:
        """Return when a row's turn comes; its patience begins then. ``place`` is its number in its call, from 0.

        A call of many rows takes its turns like many calls, one after the other. An urgent row's patience is over.
        """
        return now - self.patience if row.urgent else now + place // self.max_batch * self.patience

    def linger_time(self, waiting: Collection["Row"], last_size: int) -> float:
        """Return the seconds without a newcomer after which an idle engine starts a batch.

        ``last_size`` is the number of rows in the batch before.
        """
        return 0.0 if len(waiting) >= self.max_batch else self.linger_per_row * min(last_size, self.max_linger_rows)

    def next(self, waiting: Collection["Row"], running: Collection["Batch"], now: float) -> list["Row"]:
        """Return the rows that start now, as one batch beside those that run; none where it is better to wait.

        ``now`` and the rows' ``due`` are seconds of one clock.
        """
        waiting = sorted((row for row in waiting if not row.ended), key=lambda row: row.due)[:self.max_compared]
        if not waiting or len(running) >= self.max_batches:
            return []
        first = waiting[0]
        waited = now - first.due
        if running:
            beside_first = sum(len(batch.rows) for batch in running) - 1
            patience = self.patience * (min(1, beside_first / self.crowd) + (len(running) >= self.eager_batches))
            if waited < patience:
                return []
        cache_tokens = min(self.context_length, self.free_tokens(running))
        alone = first.kept >= self.worth_reusing
        rows = self.choose([first] if alone else waiting, cache_tokens,
                           first if running or waited >= self.patience else None)
        if not rows and waited < self.max_overtaking:
            rows = self.choose(waiting, cache_tokens)
        return rows

    def free_tokens(self, running: Collection["Batch"]) -> int:
        """Return the tokens of cache that another batch may reserve."""
        return self.max_contexts * self.context_length - sum(batch.cache_tokens for batch in running)

    def choose(self, waiting: list["Row"], cache_tokens: int, must: "Row | None" = None) -> list["Row"]:
        """Choose the rows that make the best batch: the most wanted tokens for the work.

        Rows of a batch are padded to its longest prompt and run to its longest answer, so rows of similar length
        belong together. The batch has ``must`` in it, where that is given, and fits in ``cache_tokens``; no rows are
        returned where none do.
        """
        rows = sorted(waiting, key=lambda row: (row.max_tokens, len(row.prompt)))
        best, best_rate = [], 0.0
        for start in range(len(rows)):
            width = wanted = 0
            for stop in range(start, min(start + self.max_batch, len(rows))):
                row, count = rows[stop], stop - start + 1
                width, new = max(width, len(row.prompt)), row.max_tokens
                wanted += len(row.prompt) + new
                if count * (width + new) > cache_tokens or (count > 1 and (
                        count * width > self.max_prefill or width + new > (self.rope_switch or cache_tokens))):
                    break
                rate = wanted / (count * width + new * (count + self.step_cost))
                if rate > best_rate and (must is None or must in rows[start:stop + 1]):
                    best, best_rate = rows[start:stop + 1], rate
        return best


# --- the engine -----------------------------------------------------------------------------

# The builds of onnxruntime-genai by provider. Helpers know them too, but this file travels without them.
GPU_BUILDS = {"cuda": ("onnxruntime-genai-cuda", og.is_cuda_available),
              "dml": ("onnxruntime-genai-directml", og.is_dml_available)}


def cut_points(start: int, stop: int, block: int, least: int = 0) -> tuple[int, list[int]]:
    """Return where to begin to read a prompt up to ``stop``, at ``start`` or just before, and where to cut it.

    The engine's attention takes ``block`` new tokens at a time. Where one alone is left, it is rounded in another way,
    and an answer would depend on what its prompt was read with. So no step leaves one, where that can be had. Cuts are
    at multiples of ``CHUNK``, or of a smaller block, or close before; the first is at ``least`` or behind.
    """
    step = min(CHUNK, block)
    for back, shift in itertools.product(range(3), repeat=2):
        begin = max(start - back, 0)
        cuts = [cut - shift for cut in range(step, stop, step) if cut - shift >= max(begin + 2, least)]
        if all(size % block != 1 for size in np.diff([begin, *cuts, stop])):
            return begin, cuts
    return start, []


class Sampler:
    """Chooses a row's next token from its logits: penalties first, then temperature, top_k and top_p.

    An ``og.Generator`` has one set of search options for its whole batch. Here each row has its own. At temperature
    0 the likeliest token wins, whatever top_k and top_p say. ``index`` says which of the request's ``n`` answers
    this is; each draws its own numbers from the seed. Where a ``matcher`` binds the answer, only its tokens count.
    """

    def __init__(self, request: ChatRequest, index: int, matcher: LLMatcher | None = None):
        self._request, self._matcher = request, matcher
        self._random = np.random.default_rng(None if request.seed is None else [request.seed, index])
        self._counts = {}

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token, given the logits of shape (vocabulary,)."""
        logits = logits.astype(np.float64)
        if self._matcher:
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            logits[np.unpackbits(mask, bitorder="little")[:len(logits)] == 0] = -np.inf
        token = self._choose(logits)
        if self._matcher and (self._matcher.is_error() or not self._matcher.consume_token(token)):
            raise invalid("response_format.json_schema.schema", "simpler: it grew too much for this answer")
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    @property
    def complete(self) -> bool:
        """Tell whether the answer has all that its schema lets it have."""
        return bool(self._matcher and self._matcher.is_stopped())

    def _choose(self, logits):
        request = self._request
        if self._counts and (request.frequency_penalty or request.presence_penalty):
            seen = np.fromiter(self._counts, dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float64)
            logits[seen] -= request.frequency_penalty * counts + request.presence_penalty
        if request.temperature == 0:
            return int(logits.argmax())
        # The highest logit becomes 0 first. Divided by a temperature near 0, the others are minus infinity at worst.
        with np.errstate(over="ignore"):
            weights = np.exp((logits - logits.max()) / request.temperature)
        if request.top_k or request.top_p < 1:
            _keep_likeliest(weights, request.top_k or len(weights), request.top_p)
        sums = weights.cumsum()
        return int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))


def _keep_likeliest(weights, top_k, top_p):
    """Set to 0 all but the ``top_k`` largest weights, and of these all but the fewest that make up ``top_p``."""
    ordered = np.sort(weights)[::-1][:top_k]
    sums = ordered.cumsum()
    count = min(int(np.searchsorted(sums, top_p * sums[-1])) + 1, len(ordered))
    least = ordered[count - 1]
    ties = count - np.count_nonzero(weights > least)  # of the tokens with the least weight, so many are kept
    weights[weights < least] = 0
    weights[np.flatnonzero(weights == least)[ties:]] = 0


class Row:
    """One answer in the making.

    Without a ``sampler`` it takes the likeliest token. ``events`` gets ``(row, text)`` for each token of a stream,
    and ``(row, None)`` at the end. A stream is urgent, and does not wait for company, unless it is ``patient``.
    """

    def __init__(self, prompt: list[int], max_tokens: int, writer: TextWriter, sampler: Sampler | None,
                 events: queue.SimpleQueue, stream: bool, patient: bool = False):
        self.prompt, self.max_tokens, self.writer, self.sampler = prompt, max_tokens, writer, sampler
        self.events, self.stream, self.urgent = events, stream, stream and not patient
        self.text, self.tokens, self.finish_reason, self.error, self.ended, self.due = "", 0, None, None, False, 0.0
        self.kept = None  # tokens of the prompt that a kept conversation has; None: not known
        self.reused = 0  # tokens that it did not read again
        self.times = {"submitted": time.time_ns()}  # nanoseconds

    def take(self, token: int, end_tokens: Collection[int]) -> None:
        """Add the next token, and end where it ends the answer."""
        if token in end_tokens:
            self._finish("stop")
            return
        if not self.tokens:
            self.times["first"] = time.time_ns()
        self.tokens += 1
        self._write(self.writer.write(token))
        if self.sampler and self.sampler.complete:
            self._finish("stop")
        elif self.writer.stopped or self.tokens == self.max_tokens:
            self._finish("length")

    def _write(self, text):
        self.text += text
        if self.stream:
            self.events.put((self, text))

    def _finish(self, reason):  # a stop string is the reason where there is one
        if not self.writer.stopped:
            self._write(self.writer.close())
        self.finish_reason = "stop" if self.writer.stopped else reason
        self.end()

    def end(self, error: MlflowException | None = None) -> None:
        """End the row, whatever it has: its caller got all, went away, or gets an error."""
        if not self.ended:
            self.error, self.ended, self.times["ended"] = error, True, time.time_ns()
            self.events.put((self, None))


class Kept(NamedTuple):
    """A generator that has read a prompt, and has room for so many tokens in all."""

    prompt: list[int]
    generator: og.Generator
    room: int


class KeptConversations:
    """The prompts that stay in memory, so that the next turn of a conversation reads only what is new.

    A prompt shares with a kept one what both begin with, token for token, and nothing behind the first difference. Of
    an answer nothing is kept: tokens that the engine wrote have another rounding than tokens that it reads. At most
    ``most`` are kept, with ``max_tokens`` of cache in all. The least recently used goes first.
    """

    MIN_COMMON = 32  # tokens: to read fewer takes no time

    def __init__(self, most: int, max_tokens: int, rope_switch: int):
        self.most, self._max_tokens, self._rope_switch, self.all = most, max_tokens, rope_switch, []

    @property
    def tokens(self) -> int:
        """Return the tokens of cache that they hold."""
        return sum(kept.room for kept in self.all)

    def find(self, prompt: list[int]) -> tuple[int, Kept | None]:
        """Return the tokens that a prompt has in common with the kept one that saves most, and that one."""
        return max(((self._common(kept, prompt), kept) for kept in self.all), default=(0, None), key=lambda one: one[0])

    def take(self, prompt: list[int]) -> tuple[int, Kept | None]:
        """Hand out what ``find`` finds, for one row alone."""
        common, kept = self.find(prompt)
        if not common:
            return 0, None
        self.all = [other for other in self.all if other is not kept]
        return common, kept

    def put(self, kept: Kept) -> None:
        """Keep a conversation."""
        if self.most and len(kept.prompt) >= self.MIN_COMMON and kept.room <= self._max_tokens:
            self.all.append(kept)
            while len(self.all) > self.most or self.tokens > self._max_tokens:
                del self.all[0]

    def _common(self, kept, prompt):
        """Count the tokens that both begin with; 0 where a prompt would end another conversation for little."""
        if kept.prompt[:self.MIN_COMMON] != prompt[:self.MIN_COMMON] or (
                (len(kept.prompt) > self._rope_switch) != (len(prompt) > self._rope_switch)):
            return 0
        common = next((place for place, (one, other) in enumerate(zip(kept.prompt, prompt, strict=False))
                       if one != other), min(len(kept.prompt), len(prompt)))
        return common if 2 * common >= len(kept.prompt) else 0


class Batch:
    """Rows that one ``og.Generator`` runs side by side, to the longest one's end.

    ``cache_tokens`` is what the batch reserves, in tokens: for each row as many as its longest prompt and its longest
    answer have; a lone row takes twice as many where ``most_tokens`` leaves them, for the turns that may follow.
    ``kept`` is a conversation that a lone row goes on with, of which it has ``common`` tokens.
    """

    def __init__(self, model: og.Model, rows: list[Row], config: Config, most_tokens: int = 0,
                 common: int = 0, kept: Kept | None = None):
        self.rows, self._model, self._config = rows, model, config
        self._width = max(len(row.prompt) for row in rows)
        self._width += len(rows) > 1 and self._width % config.block == 1  # as in `cut_points`
        self._max_length = max(self._width + max(row.max_tokens for row in rows), config.ring)
        self._generator, self._unread, self._cuts = None, None, []
        if len(rows) == 1:
            self._max_length = max(self._max_length, min(2 * self._max_length, most_tokens))
            if kept and kept.room >= self._width + rows[0].max_tokens:
                self._max_length, self._generator = kept.room, kept.generator
                rows[0].reused = min(common, self._width - 2)
            # Beyond a switch of the rotary factors, the first step has to reach beyond it, too.
            least = config.rope_switch + 1 if self._width > config.rope_switch else 0
            rows[0].reused, self._cuts = cut_points(rows[0].reused, self._width, config.block, least)
        self.cache_tokens = len(rows) * self._max_length
        for row in rows:
            row.times["started"] = time.time_ns()

    def _open(self):
        if self._generator:
            self._generator.rewind_to(self.rows[0].reused)
        else:
            options = og.GeneratorParams(self._model)
            options.set_search_options(
                batch_size=len(self.rows), max_length=self._max_length, min_length=0, do_sample=False, num_beams=1,
                num_return_sequences=1, repetition_penalty=1.0, no_repeat_ngram_size=0)
            self._generator = og.Generator(self._model, options)
        prompts = np.full((len(self.rows), self._width), self._config.pad, dtype=np.int32)
        for place, row in enumerate(self.rows):
            prompts[place, :len(row.prompt)] = row.prompt
        # A batch takes its prompts in one call. That call keeps every other thread of this process waiting (it holds
        # Python's lock), so a long prompt runs alone and comes in steps.
        self._unread = np.split(prompts, [self.rows[0].reused, *self._cuts], axis=1)[1:]

    def keep(self) -> Kept | None:
        """Return the conversation of a lone row that has read its prompt, to go on with it later."""
        if len(self.rows) > 1 or self._unread is None or self._unread:
            return None
        return Kept(self.rows[0].prompt, self._generator, self._max_length)

    @property
    def opened(self) -> bool:
        """Tell whether the batch has begun."""
        return self._unread is not None

    @property
    def alive(self) -> bool:
        """Tell whether any row still wants a token."""
        return not all(row.ended for row in self.rows)

    def end(self, error: MlflowException) -> None:
        """End every row that has not ended; nothing of the batch is kept."""
        self._generator = self._unread = None
        for row in self.rows:
            row.end(error)

    def step(self) -> bool:
        """Read a part of the prompt, or give each row its next token. Tell whether all of the prompt is read now."""
        if not self.opened:
            self._open()
        if self._unread:
            self._generator.append_tokens(self._unread.pop(0))
            return not self._unread
        sampling = [(place, row.sampler) for place, row in enumerate(self.rows) if row.sampler and not row.ended]
        if sampling:
            logits = self._generator.get_logits()
            for place, sampler in sampling:
                try:
                    token = sampler.choose(logits[place].reshape(-1))
                except Refusal as refusal:
                    self.rows[place].end(refusal)
                    continue
                logits[place] = 0
                logits[place, ..., token] = 1  # now the likeliest, whatever the others are
            self._generator.set_logits(logits)
        self._generator.generate_next_token()
        for row, token in zip(self.rows, self._generator.get_next_tokens().tolist(), strict=True):
            if not row.ended:
                row.take(token, self._config.end_tokens)
        return False


_logger = logging.getLogger("chat_model")
_engines, _models_of_parents = weakref.WeakSet(), []


def _after_fork():
    for engine in list(_engines):
        engine.leave_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _closed(sentence="The model was closed before it had answered."):
    return Refusal(sentence, "closed", error_code=INVALID_STATE)


class Engine:
    """Answers rows of tokens for callers on any thread; one thread of its own runs them in batches.

    Its thread starts with the first row, and ends with ``close``. After a fork, the child loads the model anew with
    its first row. Such a child has to end as those of multiprocessing do, with ``os._exit``: onnxruntime-genai waits
    for the parent's threads at a normal exit. ``folder`` has an ONNX model; the rest is of ``Settings``.
    """

    def __init__(self, folder: Path, max_waiting: int, threads: int | None = None, provider: str = "cpu",
                 kept_conversations: int = 0):
        self._folder, self._max_waiting, self._provider = folder, max_waiting, provider
        # Left alone, onnxruntime-genai takes half of what the machine has, as if each core ran two threads.
        self._threads = threads or _cores()
        self.config = read_config(folder)
        self.context_length = self.config.context_length
        self._scheduler = Scheduler(self.context_length, self.config.rope_switch,
                                    **{"max_batch": 1} if self.config.ring else {})
        self._kept_conversations, self._closed = 0 if self.config.ring else kept_conversations, False
        self._begin()
        self._model = self._load()
        _engines.add(self)

    def _begin(self):
        self._changed = threading.Condition()
        self._waiting, self._batches, self._thread, self._last_size = [], [], None, 1
        self._kept = KeptConversations(self._kept_conversations, self.context_length, self.config.rope_switch)
        self._done = dict.fromkeys(("answers", "prompt_tokens", "reused_prompt_tokens", "completion_tokens"), 0)
        self._since = time.time()

    def _load(self):
        config = og.Config(str(self._folder))
        config.overlay(json.dumps({
            # Of the types phi3 and phimoe, the engine reads all anew at 4,097 tokens, and forgets a choice made here.
            "model": {"type": "llama", "decoder": {"session_options": {"intra_op_num_threads": self._threads}}},
            "search": {"chunk_size": 0}}))  # prompts are cut here
        config.clear_providers()
        if self._provider != "cpu":
            package, is_available = GPU_BUILDS[self._provider]
            if not is_available():
                raise Refusal(
                    f"The provider is {self._provider}, and the onnxruntime-genai that is installed runs without it. "
                    f"Install {package} in its place, or load with the provider cpu.", "failed",
                    error_code=INVALID_STATE)
            config.append_provider(self._provider)
        return og.Model(config)

    def leave_parent(self) -> None:
        """Start anew in a child process: a fork takes the memory along and leaves the threads behind."""
        # Freeing the parent's model would wait for its threads, which are not here.
        _models_of_parents.append((self._model, self._kept, self._batches))
        self._model = None
        self._begin()

    def submit(self, rows: list[Row]) -> None:
        """Queue all of ``rows``, or none: then the error says why."""
        with self._changed:
            if self._closed:
                raise _closed("This model is closed. Load it again.")
            self._waiting = [row for row in self._waiting if not row.ended]
            if len(self._waiting) + len(rows) > self._max_waiting:
                raise Refusal(f"The model is busy: {len(self._waiting)} answers wait, and {self._max_waiting} may. "
                              "Try again later.", "busy", error_code=RESOURCE_EXHAUSTED)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="chat-model-engine", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    raise Refusal("The system has no thread left for the model. Try again later.", "busy",
                                  error_code=RESOURCE_EXHAUSTED) from None
                self._thread = thread
            now = time.monotonic()
            for place, row in enumerate(rows):
                row.due = self._scheduler.due(row, place, now)
            self._waiting += rows
            self._changed.notify()

    def check(self, process: int) -> None:
        """Raise the error of a caller who waits, since the process of this id, for what can't come any more."""
        if process != os.getpid():
            raise _closed("This answer is the parent process's. Ask again.")
        if self._closed and not (self._thread and self._thread.is_alive()):
            raise _closed()

    def close(self) -> None:
        """End the thread, and every answer in the making with an error. A closed engine stays closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(timeout=60)  # a bound, for a signal that came while this thread was in `submit`
        self._model = None

    def stats(self) -> dict:
        """Return what waits and runs now, and what was done since when: counts, tokens, seconds since 1970."""
        with self._changed:
            waiting = sum(not row.ended for row in self._waiting)
            batches, done = self._batches, dict(self._done)
        running = [row for batch in batches for row in batch.rows]
        for name, count in _count(running).items():
            done[name] += count
        return {"since": self._since, "waiting": waiting, "running": sum(not row.ended for row in running)} | done | {
            "cache_tokens": sum(batch.cache_tokens for batch in batches) + self._kept.tokens,
            "kept_conversations": len(self._kept.all)}

    def _run(self):
        try:
            self._model = self._model or self._load()
            while self._turn():
                pass
        except Exception:
            _logger.exception("The engine ended.")
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
        for row in left:
            row.end(_closed())
        self._kept.all = []

    def _turn(self):
        """Let each batch make a step, and new rows begin. Tell whether the engine goes on."""
        rows = self._next_rows(self._batches)
        if rows is None:
            for batch in self._batches:
                batch.end(_closed())
            self._batches = []
            return False
        if rows:
            self._batches = [*self._batches, self._start(rows)]
        for batch in self._batches:
            try:
                if batch.step():
                    batch.step()  # a first token does not wait for the others' turns
            except Exception:  # whatever it is, the other batches go on
                if not batch.opened and self._kept.all:
                    self._kept.all = []  # memory may be short: it tries again, without what was kept
                    continue
                _logger.exception("A batch of %d rows failed.", len(batch.rows))
                batch.end(Refusal("The engine failed on this request.", "failed", error_code=INTERNAL_ERROR))
        with self._changed:
            for batch in self._batches:
                if not batch.alive:
                    self._end(batch)
            self._batches = [batch for batch in self._batches if batch.alive]
        return True

    def _start(self, rows):
        """Return a batch; a lone row goes on with a conversation that was kept, if one begins as it does."""
        common, kept = self._kept.take(rows[0].prompt) if len(rows) == 1 else (0, None)
        most = min(self.context_length, self._scheduler.free_tokens(self._batches)) if self._kept.most else 0
        return Batch(self._model, rows, self.config, most, common, kept)

    def _end(self, batch):
        for name, count in _count(batch.rows).items():
            self._done[name] += count
        if kept := batch.keep():
            self._kept.put(kept)
            for row in self._waiting:
                row.kept = None

    def _next_rows(self, batches):
        """Return the rows that start now, none of them where there is nothing to start, None at the end."""
        with self._changed:
            while not (self._waiting or batches or self._closed):
                self._changed.wait()
            # Each newcomer makes an idle engine wait anew.
            while not (batches or self._closed) and self._changed.wait(
                    self._scheduler.linger_time(self._waiting, self._last_size)):
                pass
            if self._closed:
                return None
            for row in self._waiting:
                row.kept = self._kept.find(row.prompt)[0] if row.kept is None else row.kept
            rows = self._scheduler.next(self._waiting, batches, time.monotonic())
            self._waiting = [row for row in self._waiting if not (row.ended or row in rows)]
            self._last_size = len(rows) or self._last_size
            return rows


def _count(rows):
    return {"answers": sum(row.ended for row in rows), "prompt_tokens": sum(len(row.prompt) for row in rows),
            "reused_prompt_tokens": sum(row.reused for row in rows),
            "completion_tokens": sum(row.tokens for row in rows)}


def _cores():
    """Return the number of cores that this process may use: its affinity and its container's quota count."""
    cores = joblib.cpu_count()
    return min(cores, psutil.cpu_count(logical=False) or cores)  # some boards and containers tell no physical cores


# --- the model ------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raise a Refusal that says why a folder can't be served, before it is logged."""
    read_config(folder)
    PromptEncoder(folder)


class ChatModel(mlflow.pyfunc.PythonModel):
    """The chat contract of ``llm/v1/chat`` on an ONNX model. One instance serves any number of threads."""

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        """Load the artifact ``model``, a folder for onnxruntime-genai."""
        folder = Path(context.artifacts["model"])
        try:
            self._settings = Settings.model_validate(SETTINGS | (context.model_config or {}))
        except ValidationError as error:
            name = str(error.errors()[0]["loc"][0])
            field = Settings.model_fields.get(name)
            raise invalid(f"model_config's {name}", field.description if field else
                          f"left out: the settings are {', '.join(SETTINGS)}") from None
        if hasattr(self, "_engine"):
            self._engine.close()
        self._encoder = PromptEncoder(folder)
        self._engine = Engine(folder, self._settings.max_waiting, self._settings.threads, self._settings.provider,
                              self._settings.kept_conversations)
        self._schemas = SchemaReader(self._encoder.tokenizer, self._engine.config)
        # The engine's thread knows nothing of this object, so that it can be forgotten, and the thread then ends.
        weakref.finalize(self, self._engine.close)
        mlflow.models.set_model(ChatModel())  # MLflow holds on to the last one it was given: not to this one

    def predict(self, context: mlflow.pyfunc.PythonModelContext, model_input: pd.DataFrame,
                params: dict | None = None) -> list[dict]:
        """Answer each conversation with a chat completion, in order.

        ``model_input`` is a table, a dict or a list of dicts: the fields of ``ChatRequest``, and each row may have
        its own. ``params`` is not used, because every setting is a field of the request.

        A Refusal names a wrong field before any row runs, or says, as RESOURCE_EXHAUSTED, that too many answers wait.
        """
        called = time.time_ns()
        if isinstance(model_input, pd.DataFrame):
            requests = read_table(model_input)
        else:
            requests = model_input if isinstance(model_input, list) else [model_input]
        most = min(self._settings.max_rows, self._settings.max_waiting)
        if len(requests) > most:
            raise _too_many(len(requests), most)
        named = {number: f"Row {number}: " if len(requests) > 1 else "" for number in range(len(requests))}
        read = [self._read(values, named[number]) for number, values in enumerate(requests)]
        for number, request in enumerate(read):
            if request.stream:
                raise invalid("stream", ChatRequest.model_fields["stream"].description, named[number])
            if request.stream_options:
                raise invalid("stream_options", "left out where the answer comes whole", named[number])
        if (total := sum(request.n for request in read)) > most:
            raise _too_many(total, most)
        events = queue.SimpleQueue()
        jobs = [self._rows(request, events, named[number]) for number, request in enumerate(read)]
        rows = [row for job in jobs for row in job]
        for _ in self._answers(rows, events, called):
            pass
        return [self._head("chat.completion") | {
            "choices": [{"index": index, "message": {"role": "assistant", "content": row.text},
                         "finish_reason": row.finish_reason} for index, row in enumerate(job)],
            "usage": usage(job),
        } for job in jobs]

    def predict_stream(self, context: mlflow.pyfunc.PythonModelContext, model_input: Any,
                       params: dict | None = None) -> Iterator[dict]:
        """Answer one conversation, a dict or a table of one row, in chunks as the tokens come.

        Of each choice come its role, then text, then its finish reason. Closing the iterator ends the work. With
        ``"stream": False`` nobody reads along: the chunks are the same, and the answer waits for company as those of
        ``predict`` do. So a server can end an answer that it sends whole. Errors are those of ``predict``.
        """
        called = time.time_ns()
        if isinstance(model_input, pd.DataFrame):
            model_input = read_table(model_input)
        if isinstance(model_input, list):
            if len(model_input) != 1:
                raise Refusal("A stream answers exactly one conversation.", "invalid_value")
            (model_input,) = model_input
        request = self._read(model_input)
        events = queue.SimpleQueue()
        rows = self._rows(request, events, stream=True, patient=request.stream is False)
        return self._chunks(request, rows, events, called)

    def _chunks(self, request, rows, events, called):
        head, begun = self._head("chat.completion.chunk"), set()

        def chunk(row, delta, finish_reason=None):
            return head | {"choices": [{"index": rows.index(row), "delta": delta, "finish_reason": finish_reason}]}

        for row, text in self._answers(rows, events, called):
            if row not in begun:
                begun.add(row)
                yield chunk(row, {"role": "assistant", "content": ""})
            if text:
                yield chunk(row, {"content": text})
            if text is None:
                yield chunk(row, {}, row.finish_reason)
        if request.stream_options and request.stream_options.include_usage:
            yield head | {"choices": [], "usage": usage(rows)}

    def stats(self) -> dict:
        """Return what waits, runs and is kept now, and what was done since the model was loaded.

        ``since`` is in seconds since 1970. ``reused_prompt_tokens`` are those of ``prompt_tokens`` that a kept
        conversation had; ``cache_tokens`` are reserved now, by answers in the making and by kept conversations.
        """
        return self._engine.stats()

    def close(self) -> None:
        """Free the engine and its thread. Answers in the making end with an error."""
        self._engine.close()

    def _read(self, values, where=""):
        request = read_request(values, where)
        if request.temperature is None:
            request.temperature = self._settings.temperature
        return request

    def _rows(self, request, events, where="", stream=False, patient=False):
        """Return a row for each of the request's ``n`` answers."""
        context_length, switch = self._engine.context_length, self._engine.config.rope_switch
        prompt = self._encoder.encode(request.messages, context_length, where)
        if len(prompt) >= context_length:
            raise invalid("messages", f"fewer than {context_length} tokens, the model's context", where,
                          "context_length_exceeded")
        # An answer ends at the switch: beyond, the model would have to read everything anew.
        # The last token of an answer is not read, so there is always one.
        most = min(max((switch if len(prompt) <= switch else context_length) - len(prompt), 1),
                   self._settings.max_tokens_limit)
        max_tokens = request.max_tokens or min(self._settings.max_tokens, most)
        if max_tokens > most:
            raise invalid("max_tokens", f"a whole number from 1 to {most} after these messages", where)
        matcher = self._schemas.bind(request.response_format, where)
        greedy = not (request.temperature or request.frequency_penalty or request.presence_penalty or matcher)
        return [Row(prompt, max_tokens, TextWriter(self._encoder.tokenizer, request.stop),
                    None if greedy else Sampler(request, index, matcher and matcher.deep_copy()), events, stream,
                    patient)
                for index in range(request.n)]

    def _answers(self, rows, events, called):
        """Submit rows; yield ``(row, text)`` as it comes and ``(row, None)`` at a row's end."""
        process, left = os.getpid(), len(rows)
        caller = mlflow.get_current_active_span()
        try:
            if rows:
                self._engine.submit(rows)
            while left:
                try:
                    row, text = events.get(timeout=1)  # Windows takes Ctrl-C only between two waits
                except queue.Empty:
                    self._engine.check(process)
                    continue
                if row.error:
                    error, row.error = row.error, None  # a raised error holds its frames, and these the row
                    raise error
                left -= text is None
                yield row, text
        finally:
            for row in rows:
                row.end()  # whoever goes away wants no more tokens
            if caller:
                _trace(caller, rows, called)

    def _head(self, kind):
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
                "model": self._settings.model}


def _too_many(asked, most):
    return Refusal(f"This call asks for {asked} answers, and one call may ask for {most}.", "invalid_value")


def _trace(caller, rows, called):
    """Add to a caller's span of MLflow's tracing what each row spent its time on: sizes and times, and no text."""
    for row in rows:
        spans = [("read", "submitted", {}), ("wait", "started", {}),
                 ("prefill", "first", {"prompt_tokens": len(row.prompt), "reused_prompt_tokens": row.reused}),
                 ("decode", "ended", {"completion_tokens": row.tokens, "finish_reason": row.finish_reason})]
        began = called
        for name, end, sizes in spans:
            ended = row.times.get(end, row.times["ended"])
            mlflow.start_span_no_context(
                name, parent_span=caller, attributes=sizes, start_time_ns=began).end(end_time_ns=ended)
            began = ended


def usage(rows: list[Row]) -> dict[str, int]:
    """Count the tokens of a request's prompt and of its answers, end tokens left out."""
    prompt, completion = len(rows[0].prompt), sum(row.tokens for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


mlflow.models.set_model(ChatModel())
