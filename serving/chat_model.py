"""A conversation goes in, a chat completion comes out: an ONNX model for many callers at once.

MLflow logs this file itself (models from code). It imports nothing of the course, and it is one file on
purpose: MLflow loads it under a new name for each model, so two versions in one process share no code.

From top to bottom: the contract (what a request may hold), the prompt (where text stays text), the scheduler
(which rows start now, together), the engine (rows in batches, on one thread), the model (what MLflow calls).
"""

import itertools
import json
import logging
import math
import os
import queue
import re
import threading
import time
import uuid
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import mlflow
import numpy as np
import onnxruntime_genai as og
import pandas as pd
import psutil
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_STATE, RESOURCE_EXHAUSTED
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, Property, Schema
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from tokenizers import Tokenizer

# --- the contract ---------------------------------------------------------------------------


def _whole(value):
    """Take 4.0 for 4: where a row of a table lacks a number, pandas makes the others floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Settings(_Strict):
    """What ``model_config=`` may set when the model is logged, and change when it is loaded."""

    model: str = Field("slm-onnx", description="the name that answers carry, a text")
    max_tokens: int = Field(256, ge=1, description="a whole number from 1")  # where a request does not say
    temperature: float = Field(0.0, ge=0, le=2, description="a number from 0 to 2")  # the same
    max_tokens_limit: int = Field(2048, ge=1, description="a whole number from 1")  # the most that a request may ask
    max_rows: int = Field(256, ge=1, description="a whole number from 1")  # answers that one call may ask for
    max_waiting: int = Field(512, ge=1, description="a whole number from 1")  # answers that may wait for their turn
    threads: int | None = Field(None, ge=1, description="a whole number from 1, or null for one on each core")
    provider: Literal["cpu", "cuda", "dml"] = Field("cpu", description="cpu, cuda or dml")


SETTINGS = Settings().model_dump()


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="system, user or assistant")
    content: str = Field(pattern=r"\A[^\x00]*\z", description="text, without NUL and without half a surrogate pair")


class StreamOptions(_Strict):
    """What a stream adds to its text."""

    include_usage: bool = Field(False, description="true or false")


class ChatRequest(_Strict):
    """The fields of ``llm/v1/chat``, those that the engine serves, and ``seed`` and ``stream_options``.

    A field that is null counts as not given. ``description`` is what an error says of the allowed range.
    """

    messages: Annotated[list[Message], FailFast()] = Field(
        min_length=1, max_length=1000, description="a list of 1 to 1000 messages, role and content each")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    max_tokens: Whole | None = Field(None, ge=1, description="a whole number from 1 up to what the context leaves")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = Field(
        [], description="up to 4 texts of 1 to 100 characters")
    n: Whole = Field(1, ge=1, le=8, description="a whole number from 1 to 8")
    stream: bool | None = Field(None, description="true for predict_stream, false for predict, or left out")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, up to 1")
    top_k: Whole | None = Field(None, ge=1, description="a whole number from 1")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    seed: Whole | None = Field(None, ge=0, lt=2**53, description="a whole number from 0 to 2**53 - 1")
    stream_options: StreamOptions | None = Field(None, description="include_usage: true or false, for a stream")


# MLflow checks types before the model sees a request: it refuses a temperature of 2 where a double is due, a
# column of whole numbers with a gap, and quotes the whole request in its error. So to MLflow every field is
# optional and of any type, and the checks are those of ChatRequest. One field has to be an object: without one,
# MLflow makes a row of each message. For what MLflow still refuses by itself (a stream_options that is no object,
# a list with something else between the requests), a server sets MLFLOW_DISABLE_SCHEMA_DETAILS=true.
_TYPES = {"stream_options": Object([Property("include_usage", AnyType(), required=False)])}
_MESSAGE = Object([Property("role", DataType.string), Property("content", DataType.string)])
_CHOICE = Object([Property("index", DataType.long), Property("message", _MESSAGE),
                  Property("finish_reason", DataType.string)])
_USAGE = Object([Property(f"{kind}_tokens", DataType.long) for kind in ("prompt", "completion", "total")])
_ANSWER = {"id": DataType.string, "object": DataType.string, "created": DataType.long, "model": DataType.string,
           "choices": Array(_CHOICE), "usage": _USAGE}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(_TYPES.get(name, AnyType()), name, required=False) for name in ChatRequest.model_fields]),
    outputs=Schema([ColSpec(kind, name) for name, kind in _ANSWER.items()]))


def invalid(field: str, allowed: str, where: str = "") -> MlflowException:
    """Return the error that names a field and what it may be, and quotes nothing of the request."""
    return MlflowException.invalid_parameter_value(f"{where}{field} has to be {allowed}.")


def read_request(values: Any, where: str = "") -> ChatRequest:
    """Check one request, a dict of its fields as they came.

    ``where`` stands in front of an error, such as ``"Row 2: "``. An MlflowException with the code
    INVALID_PARAMETER_VALUE says which field is wrong, and its range.
    """
    if not isinstance(values, dict):
        raise invalid("A request", "an object with messages", where)
    if len(values) > 100:  # each unknown field would get an error of its own
        raise _unknown("The request", ChatRequest.model_fields, where)
    try:
        request = ChatRequest.model_validate(_without_nulls(_plain(values)))
    except ValidationError as error:
        problem = error.errors()[0]  # only its place and its kind are used: the rest of it quotes the request
        raise _explain(problem["loc"], problem["type"], where) from None
    request.stop = [request.stop] if isinstance(request.stop, str) else request.stop
    if request.messages[-1].role == "assistant":
        raise invalid("The last message's role", "user or system: the assistant speaks next", where)
    return request


def _without_nulls(values):
    """Leave out the fields that are null, and those of the messages, such as ``refusal`` in an answer sent back."""
    values = {name: value for name, value in values.items() if value is not None}
    if isinstance(values.get("messages"), list):
        values["messages"] = [
            {name: value for name, value in message.items() if value is not None}
            if isinstance(message, dict) else message for message in values["messages"]]
    return values


def _explain(place, kind, where):
    """Turn the place of a validation error into the field's name and its description."""
    name, fields, allowed = "", ChatRequest.model_fields, None  # None: the place is no field of ours
    for step in place:
        if name == "messages" and isinstance(step, int):
            name, fields, allowed = f"messages[{step}]", Message.model_fields, "an object with role and content"
        elif step in fields:
            name, allowed = f"{name}.{step}".lstrip("."), fields[step].description
            fields = StreamOptions.model_fields  # of the other fields, none has fields of its own
    if kind in ("extra_forbidden", "invalid_key") or allowed is None:
        return _unknown(name or "The request", fields, where)
    return invalid(name, allowed, where)


def _unknown(name, fields, where):
    return MlflowException.invalid_parameter_value(
        f"{where}{name} holds a field that is not served. The fields are: {', '.join(fields)}.")


def _plain(value, depth=3):
    """Return a value as Python's own type: Spark gives arrays, pandas gives numpy's numbers.

    A request is three levels deep: itself, its messages, each of them. No field takes what lies deeper.
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
    return [{name: None if _is_gap(value) else value for name, value in row.items()}
            for row in table.to_dict("records")]


def _is_gap(value):
    """Tell whether pandas says "no value here"; it says so with NaN where a column holds numbers."""
    return value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))


# --- the prompt -----------------------------------------------------------------------------

PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))  # Unicode leaves these without a meaning


class PromptEncoder:
    """Turns messages into tokens by the chat template in a model's folder. Text of a message stays text."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template = og.Tokenizer(str(folder))
        added = self.tokenizer.get_added_tokens_decoder().values()
        markup = {token.content for token in added if token.content.strip()}
        # Finds the first character of every piece of markup, overlapping ones too.
        self._markup = re.compile("|".join(
            f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in sorted(markup)) or r"(?!)")
        self._longest = max(map(len, self.tokenizer.get_vocab()))

    def encode(self, messages: list[Message], context_length: int, where: str = "") -> list[int]:
        """Return the tokens of a conversation, ready for the assistant's answer.

        A tokenizer takes ``<|end|>`` for markup wherever it stands. Cut in two pieces, ``<`` and ``|end|>``,
        it is text. So whatever looks like markup inside a message is cut, and the template's own is not.
        An MlflowException says that the messages are too long, or that the template refuses their order.
        """
        text = "".join(message.content for message in messages)
        if len(text) > context_length * self._longest:
            raise invalid("messages", f"short enough for the model's context of {context_length} tokens", where)
        cut = next((mark for mark in map(chr, itertools.chain(*PRIVATE_USE)) if mark not in text), None)
        if cut is None:
            raise invalid("messages", "without one character at least of Unicode's private use", where)
        turns = [{"role": message.role, "content": self._markup.sub(lambda found: found[0] + cut, message.content)}
                 for message in messages]
        try:
            prompt = self._template.apply_chat_template(json.dumps(turns), add_generation_prompt=True)
        except Exception:  # the engine raises nothing narrower
            raise invalid("messages", "in an order that the model's chat template takes", where) from None
        tokens = []
        for piece in prompt.split(cut):
            tokens += self.tokenizer.encode(piece, add_special_tokens=False).ids
        return tokens


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

    # Tokens that the model can have in one conversation. All rows of a batch together may reserve as many, so that
    # a batch takes no more memory for its cache than the longest conversation does.
    context_length: int
    # Contexts of cache that all running batches together may reserve: a second batch can start beside a full one.
    max_contexts: int = 2
    # Rows in a batch. More make each step longer and hardly any token cheaper.
    max_batch: int = 16
    # Batches that run in turns. Each makes every other one slower.
    max_batches: int = 16
    # Running batches with which every row waits for another `patience` seconds, so that streams, too, get company.
    eager_batches: int = 4
    # Tokens of prompt, padding included, that a batch of several rows may have. It reads them in one call, and no
    # other thread of the process runs meanwhile.
    max_prefill: int = 512
    # Seconds that a row waits, at the most, for the running batches to end before it starts beside them: about as long
    # as 16 answers of 100 tokens take. A row that waits shares the next batch, which costs less.
    patience: float = 3.0
    # Rows that run beside the first one when a newcomer waits for all of `patience`. Beside fewer it waits for a part
    # of it, beside a lone row not at all: there it costs little.
    crowd: int = 8
    # Seconds that smaller rows may start before an earlier one for which the cache has no space yet.
    max_overtaking: float = 30.0
    # Seconds, for each row of the last batch, that an idle engine waits for another row before it starts. Callers that
    # were answered together ask again at about the same time; a lone caller loses next to nothing.
    linger_per_row: float = 0.003
    # Rows of the last batch that count for it: nobody is kept waiting for longer than 15 milliseconds.
    max_linger_rows: int = 5
    # Rows, the earliest ones, of which a batch is chosen: comparing 64 takes 0.4 ms, for which the running rows wait.
    max_compared: int = 64
    # What a step costs beside its rows, counted in rows: reading the weights. On two cores 5.8 ms, and 1.6 ms a row.
    step_cost: float = 3.6

    def due(self, row: "Row", place: int, now: float) -> float:
        """Return when a row's turn comes; its patience begins then. ``place`` is its number in its call, from 0.

        A call of many rows takes its turns like many calls, one after the other. A stream's patience is over.
        """
        return now - self.patience if row.stream else now + place // self.max_batch * self.patience

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
        reserved = sum(batch.cache_tokens for batch in running)
        cache_tokens = min(self.context_length, self.max_contexts * self.context_length - reserved)
        rows = self.choose(waiting, cache_tokens, first if running or waited >= self.patience else None)
        if not rows and waited < self.max_overtaking:
            rows = self.choose(waiting, cache_tokens)
        return rows

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
                if count * (width + new) > cache_tokens or (count > 1 and count * width > self.max_prefill):
                    break
                rate = wanted / (count * width + new * (count + self.step_cost))
                if rate > best_rate and (must is None or must in rows[start:stop + 1]):
                    best, best_rate = rows[start:stop + 1], rate
        return best


# --- the engine -----------------------------------------------------------------------------

CHUNK = 128  # tokens of a lone row's prompt that are read in one step
# The builds of onnxruntime-genai by provider. Helpers know them too, but this file travels without them.
GPU_BUILDS = {"cuda": ("onnxruntime-genai-cuda", og.is_cuda_available),
              "dml": ("onnxruntime-genai-directml", og.is_dml_available)}


class Sampler:
    """Chooses a row's next token from its logits: penalties first, then temperature, top_k and top_p.

    An ``og.Generator`` has one set of search options for its whole batch. Here each row has its own. At temperature
    0 the likeliest token wins, whatever top_k and top_p say. ``index`` says which of the request's ``n`` answers
    this is; each draws its own numbers from the seed.
    """

    def __init__(self, request: ChatRequest, index: int):
        self._request = request
        self._random = np.random.default_rng(None if request.seed is None else [request.seed, index])
        self._counts = {}

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token, given the logits of shape (vocabulary,)."""
        token = self._choose(logits.astype(np.float64))
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

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
    and ``(row, None)`` at the end.
    """

    def __init__(self, prompt: list[int], max_tokens: int, writer: TextWriter, sampler: Sampler | None,
                 events: queue.SimpleQueue, stream: bool):
        self.prompt, self.max_tokens, self.writer, self.sampler = prompt, max_tokens, writer, sampler
        self.events, self.stream = events, stream
        self.text, self.tokens, self.finish_reason, self.error, self.ended, self.due = "", 0, None, None, False, 0.0

    def take(self, token: int, end_tokens: set[int]) -> None:
        """Add the next token, and end where it ends the answer."""
        if token in end_tokens:
            self._finish("stop")
            return
        self.tokens += 1
        self._write(self.writer.write(token))
        if self.writer.stopped or self.tokens == self.max_tokens:
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
            self.error, self.ended = error, True
            self.events.put((self, None))


class Batch:
    """Rows that one ``og.Generator`` runs side by side, to the longest one's end.

    ``pad`` and ``end_tokens`` are tokens of the model's ``genai_config.json``. ``cache_tokens`` is what the batch
    reserves, in tokens: for each row as many as its longest prompt and its longest answer have.
    """

    def __init__(self, model: og.Model, rows: list[Row], pad: int, end_tokens: set[int]):
        self.rows, self._model, self._pad, self._end_tokens = rows, model, pad, end_tokens
        self._width = max(len(row.prompt) for row in rows)
        self._max_length = self._width + max(row.max_tokens for row in rows)
        self.cache_tokens = len(rows) * self._max_length
        self._generator = self._unread = None

    def _open(self):
        options = og.GeneratorParams(self._model)
        options.set_search_options(
            batch_size=len(self.rows), max_length=self._max_length, min_length=0, do_sample=False, num_beams=1,
            num_return_sequences=1, repetition_penalty=1.0, no_repeat_ngram_size=0)
        self._generator = og.Generator(self._model, options)
        prompts = np.full((len(self.rows), self._width), self._pad, dtype=np.int32)
        for place, row in enumerate(self.rows):
            prompts[place, :len(row.prompt)] = row.prompt
        # A batch takes its prompts in one call. That call keeps every other thread of this process waiting
        # (it holds Python's lock), so a long prompt runs alone and comes in chunks. A chunk of one token
        # would be computed another way, with another rounding: the last two chunks share.
        alone = len(self.rows) == 1
        cuts = [cut for cut in range(CHUNK, self._width, CHUNK) if self._width - cut > 1] if alone else []
        self._unread = np.split(prompts, cuts, axis=1)

    @property
    def alive(self) -> bool:
        """Tell whether any row still wants a token."""
        return not all(row.ended for row in self.rows)

    def end(self, error: MlflowException) -> None:
        """End every row that has not ended."""
        for row in self.rows:
            row.end(error)

    def step(self) -> None:
        """Read a part of the prompt, or give each row its next token."""
        if self._generator is None:
            self._open()
        if self._unread:
            self._generator.append_tokens(self._unread.pop(0))
            return
        sampling = [(place, row.sampler) for place, row in enumerate(self.rows) if row.sampler and not row.ended]
        if sampling:
            logits = self._generator.get_logits()
            for place, sampler in sampling:
                token = sampler.choose(logits[place].reshape(-1))
                logits[place] = 0
                logits[place, ..., token] = 1  # now the likeliest, whatever the others are
            self._generator.set_logits(logits)
        self._generator.generate_next_token()
        for row, token in zip(self.rows, self._generator.get_next_tokens().tolist(), strict=True):
            if not row.ended:
                row.take(token, self._end_tokens)


_logger = logging.getLogger("chat_model")
_engines, _models_of_parents = weakref.WeakSet(), []


def _after_fork():
    for engine in list(_engines):
        engine.leave_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _error(message, code=INVALID_STATE):
    return MlflowException(message, error_code=code)


def _unanswered():
    return _error("The model was closed before it had answered.")


class Engine:
    """Answers rows of tokens for callers on any thread; one thread of its own runs them in batches.

    Its thread starts with the first row, and ends with ``close``. After a fork, the child loads the model anew with
    its first row. Such a child has to end as those of multiprocessing do, with ``os._exit``: onnxruntime-genai waits
    for the parent's threads at a normal exit.

    Parameters
    ----------
    folder : pathlib.Path
        Of an ONNX model for onnxruntime-genai.
    max_waiting : int
        Rows that may wait for their turn.
    threads : int or None
        None takes one for each core that this process may use.
    provider : str
        ``"cpu"``, ``"cuda"`` or ``"dml"``: what runs the model, where the package that is installed can.
    """

    def __init__(self, folder: Path, max_waiting: int, threads: int | None = None, provider: str = "cpu"):
        self._folder, self._max_waiting, self._provider = folder, max_waiting, provider
        # Left alone, onnxruntime-genai takes half of what the machine has, as if each core ran two threads.
        self._threads = threads or _cores()
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.context_length = config["context_length"]
        self._scheduler = Scheduler(self.context_length)
        ends = config["eos_token_id"]
        self._end_tokens = set(ends if isinstance(ends, list) else [ends])
        self._pad = config["pad_token_id"]
        self._closed = False
        self._begin()
        self._model = self._load()
        _engines.add(self)

    def _begin(self):
        self._changed = threading.Condition()
        self._waiting, self._thread, self._last_size = [], None, 1

    def _load(self):
        config = og.Config(str(self._folder))
        config.overlay(json.dumps(
            {"model": {"decoder": {"session_options": {"intra_op_num_threads": self._threads}}}}))
        if self._provider != "cpu":
            package, is_available = GPU_BUILDS[self._provider]
            if not is_available():
                raise _error(f"The provider is {self._provider}, and the onnxruntime-genai that is installed runs "
                             f"without it. Install {package} in its place, or load with the provider cpu.")
            config.clear_providers()
            config.append_provider(self._provider)
        return og.Model(config)

    def leave_parent(self) -> None:
        """Start anew in a child process: a fork takes the memory along and leaves the threads behind."""
        # Freeing the parent's model would wait for its threads, which are not here.
        _models_of_parents.append(self._model)
        self._model = None
        self._begin()

    def submit(self, rows: list[Row]) -> None:
        """Queue all of ``rows``, or none: then the error says why."""
        with self._changed:
            if self._closed:
                raise _error("This model is closed. Load it again.")
            self._waiting = [row for row in self._waiting if not row.ended]
            if len(self._waiting) + len(rows) > self._max_waiting:
                raise _error(f"The model is busy: {len(self._waiting)} answers wait, and {self._max_waiting} may. "
                             "Try again later.", RESOURCE_EXHAUSTED)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="chat-model-engine", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    raise _error("The system has no thread left for the model. Try again later.",
                                 RESOURCE_EXHAUSTED) from None
                self._thread = thread
            now = time.monotonic()
            for place, row in enumerate(rows):
                row.due = self._scheduler.due(row, place, now)
            self._waiting += rows
            self._changed.notify()

    def check(self, process: int) -> None:
        """Raise the error of a caller who waits, since the process of this id, for what can't come any more."""
        if process != os.getpid():
            raise _error("This answer is the parent process's. Ask again.")
        if self._closed and not (self._thread and self._thread.is_alive()):
            raise _unanswered()

    def close(self) -> None:
        """End the thread, and every answer in the making with an error. A closed engine stays closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(timeout=60)  # a bound, for a signal that came while this thread was in `submit`
        self._model = None

    def _run(self):
        batches = []
        try:
            self._model = self._model or self._load()
            while batches is not None:
                batches = self._turn(batches)
        except Exception:
            _logger.exception("The engine ended.")
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
        for row in left:
            row.end(_unanswered())

    def _turn(self, batches):
        """Let each batch make a step, and new rows begin. Return the batches that go on, None at the end."""
        rows = self._next_rows(batches)
        if rows is None:
            for batch in batches:
                batch.end(_unanswered())
            return None
        if rows:
            batches = [*batches, Batch(self._model, rows, self._pad, self._end_tokens)]
        for batch in batches:
            try:
                batch.step()
            except Exception:  # whatever it is, the other batches go on
                _logger.exception("A batch of %d rows failed.", len(batch.rows))
                batch.end(_error("The engine failed on this request.", INTERNAL_ERROR))
        return [batch for batch in batches if batch.alive]

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
            rows = self._scheduler.next(self._waiting, batches, time.monotonic())
            self._waiting = [row for row in self._waiting if not (row.ended or row in rows)]
            self._last_size = len(rows) or self._last_size
            return rows


def _cores():
    """Return the number of cores that this process may use."""
    cores = psutil.cpu_count(logical=False) or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


# --- the model ------------------------------------------------------------------------------


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
        self._engine = Engine(folder, self._settings.max_waiting, self._settings.threads, self._settings.provider)
        # The engine's thread knows nothing of this object, so that it can be forgotten, and the thread then ends.
        weakref.finalize(self, self._engine.close)
        mlflow.models.set_model(ChatModel())  # MLflow holds on to the last one it was given: not to this one

    def predict(self, context: mlflow.pyfunc.PythonModelContext, model_input: pd.DataFrame,
                params: dict | None = None) -> list[dict]:
        """Answer each conversation with a chat completion, in order.

        ``model_input`` is a table, a dict or a list of dicts: the fields of ``ChatRequest``, and each row may have
        its own. ``params`` is not used, because every setting is a field of the request.

        Raises
        ------
        MlflowException
            INVALID_PARAMETER_VALUE names the field and its range, before any row runs; RESOURCE_EXHAUSTED says
            that too many answers wait.
        """
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
        for _ in self._answers(rows, events):
            pass
        return [self._head("chat.completion") | {
            "choices": [{"index": index, "message": {"role": "assistant", "content": row.text},
                         "finish_reason": row.finish_reason} for index, row in enumerate(job)],
            "usage": usage(job),
        } for job in jobs]

    def predict_stream(self, context: mlflow.pyfunc.PythonModelContext, model_input: Any,
                       params: dict | None = None) -> Iterator[dict]:
        """Answer one conversation, a dict or a table of one row, in chunks as the tokens come.

        Of each choice come its role, then text, then its finish reason. Closing the iterator ends the work. Errors
        are those of ``predict``.
        """
        if isinstance(model_input, pd.DataFrame):
            model_input = read_table(model_input)
        if isinstance(model_input, list):
            if len(model_input) != 1:
                raise MlflowException.invalid_parameter_value("A stream answers exactly one conversation.")
            (model_input,) = model_input
        request = self._read(model_input)
        if request.stream is False:
            raise invalid("stream", ChatRequest.model_fields["stream"].description)
        events = queue.SimpleQueue()
        return self._chunks(request, self._rows(request, events, stream=True), events)

    def _chunks(self, request, rows, events):
        head, begun = self._head("chat.completion.chunk"), set()

        def chunk(row, delta, finish_reason=None):
            return head | {"choices": [{"index": rows.index(row), "delta": delta, "finish_reason": finish_reason}]}

        for row, text in self._answers(rows, events):
            if row not in begun:
                begun.add(row)
                yield chunk(row, {"role": "assistant", "content": ""})
            if text:
                yield chunk(row, {"content": text})
            if text is None:
                yield chunk(row, {}, row.finish_reason)
        if request.stream_options and request.stream_options.include_usage:
            yield head | {"choices": [], "usage": usage(rows)}

    def close(self) -> None:
        """Free the engine and its thread. Answers in the making end with an error."""
        self._engine.close()

    def _read(self, values, where=""):
        request = read_request(values, where)
        if request.temperature is None:
            request.temperature = self._settings.temperature
        return request

    def _rows(self, request, events, where="", stream=False):
        """Return a row for each of the request's ``n`` answers."""
        context_length = self._engine.context_length
        prompt = self._encoder.encode(request.messages, context_length, where)
        if len(prompt) >= context_length:
            raise invalid("messages", f"fewer than {context_length} tokens, the model's context", where)
        most = min(context_length - len(prompt), self._settings.max_tokens_limit)
        max_tokens = request.max_tokens or min(self._settings.max_tokens, most)
        if max_tokens > most:
            raise invalid("max_tokens", f"a whole number from 1 to {most} after these messages", where)
        greedy = not (request.temperature or request.frequency_penalty or request.presence_penalty)
        return [Row(prompt, max_tokens, TextWriter(self._encoder.tokenizer, request.stop),
                    None if greedy else Sampler(request, index), events, stream) for index in range(request.n)]

    def _answers(self, rows, events):
        """Submit rows; yield ``(row, text)`` as it comes and ``(row, None)`` at a row's end."""
        process, left = os.getpid(), len(rows)
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

    def _head(self, kind):
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
                "model": self._settings.model}


def _too_many(asked, most):
    return MlflowException.invalid_parameter_value(
        f"This call asks for {asked} answers, and one call may ask for {most}.")


def usage(rows: list[Row]) -> dict[str, int]:
    """Count the tokens of a request's prompt and of its answers, end tokens left out."""
    prompt, completion = len(rows[0].prompt), sum(row.tokens for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


mlflow.models.set_model(ChatModel())
