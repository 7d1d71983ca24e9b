"""A conversation goes in, a chat completion comes out: an ONNX model for many callers at once.

MLflow logs this file itself (models from code). It imports nothing of the course, and it is one file on
purpose: MLflow loads it under a new name for each model, so two versions in one process share no code.

From top to bottom: the contract (what a request may hold), the prompt (where text stays text), the engine
(rows in batches, on one thread), the model (what MLflow calls).
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
from pathlib import Path
from typing import Annotated, Literal

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


def invalid(field, allowed, where=""):
    """Return the error that names a field and what it may be, and quotes nothing of the request."""
    return MlflowException.invalid_parameter_value(f"{where}{field} has to be {allowed}.")


def read_request(values, where=""):
    """Check one request.

    Parameters
    ----------
    values : dict
        Field to value, as they came.
    where : str, optional
        Stands in front of an error, such as ``"Row 2: "``.

    Returns
    -------
    ChatRequest

    Raises
    ------
    MlflowException
        INVALID_PARAMETER_VALUE, with the field and its range.
    """
    if not isinstance(values, dict):
        raise invalid("A request", "an object with messages", where)
    if len(values) > 100:  # each unknown field would get an error of its own
        raise _unknown("The request", ChatRequest.model_fields, where)
    try:
        request = ChatRequest.model_validate(_without_nulls(_plain(values)))
    except ValidationError as error:
        # Of the library's report, the place and the kind: the rest of it quotes the input.
        problem = error.errors(include_input=False, include_url=False, include_context=False)[0]
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
            {name: value for name, value in message.items() if value is not None or name == "content"}
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
            fields = StreamOptions.model_fields if step == "stream_options" else {}
    if kind in ("extra_forbidden", "invalid_key") or allowed is None:
        return _unknown(name or "The request", fields, where)
    return invalid(name, allowed, where)


def _unknown(name, fields, where):
    return MlflowException.invalid_parameter_value(
        f"{where}{name} holds a field that is not served. The fields are: {', '.join(fields)}.")


def _plain(value, depth=4):
    """Return a value as Python's own type: Spark gives arrays, pandas gives numpy's numbers.

    A request is four levels deep. What lies deeper stays as it is, and no field takes it.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if depth and isinstance(value, list | tuple):
        return [_plain(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return {name: _plain(item, depth - 1) for name, item in value.items()}
    return value


def read_table(table):
    """Return a table's rows as requests, without what pandas fills in.

    Parameters
    ----------
    table : pandas.DataFrame
        One conversation in each row. MLflow makes this of a dict and of a list of dicts, too.

    Returns
    -------
    list of dict

    Raises
    ------
    MlflowException
        INVALID_PARAMETER_VALUE: the table has no columns, or two of one name.
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
    """Turns messages into tokens by the model's own chat template. Text of a message stays text.

    Parameters
    ----------
    folder : pathlib.Path
        Of an ONNX model for onnxruntime-genai.
    """

    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._template = og.Tokenizer(str(folder))
        added = self.tokenizer.get_added_tokens_decoder().values()
        markup = {token.content for token in added if token.content.strip()}
        # Finds the first character of every piece of markup, overlapping ones too.
        self._markup = re.compile("|".join(
            f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in sorted(markup)) or r"(?!)")
        self._longest = max(map(len, self.tokenizer.get_vocab()))

    def encode(self, messages, context_length, where=""):
        """Return the tokens of a conversation, ready for the assistant's answer.

        A tokenizer takes ``<|end|>`` for markup wherever it stands. Cut in two pieces, ``<`` and ``|end|>``,
        it is text. So whatever looks like markup inside a message is cut, and the template's own is not.

        Raises
        ------
        MlflowException
            The messages are too long, or the template refuses their order.
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

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
    stop : list of str
        The answer ends before the first of these to be complete.
    """

    def __init__(self, tokenizer, stop):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens, self._start, self._written = [], 0, 0  # text of tokens[start:written] is out
        self._held = ""
        self.stopped = False

    def write(self, token):
        """Add a token; return the text that is certain by now."""
        self._tokens.append(token)
        return self._release(self._decode(last=False))

    def close(self):
        """Return what was held back: the answer has ended."""
        text = self._release(self._decode(last=True))
        return text if self.stopped else text + self._held

    def _decode(self, last):
        # A few tokens back for context: some tokenizers write a space only between two tokens.
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


# --- the engine -----------------------------------------------------------------------------

MAX_BATCH = 16  # rows in a batch; more make each step longer and hardly any token cheaper
MAX_BATCHES = 16  # running in turns
EAGER_BATCHES = 4  # running in turns before streams, too, wait for company
MAX_PREFILL = 512  # tokens that a batch of several rows reads at once; a row alone reads in chunks
CHUNK = 128
PATIENCE = 3.0  # seconds, the most that a row waits for a running batch to end before it starts beside it
LINGER = 0.003  # seconds without a newcomer that a batch waits for company, for each row of the one before
# What a step costs beside its rows, counted in rows: reading the weights. On two cores 5.8 ms and 1.6 ms.
STEP_COST = 3.6


class Sampler:
    """Chooses a row's next token from its logits: penalties first, then temperature, top_k and top_p.

    onnxruntime-genai has one set of search options for a batch. Here each row has its own. At temperature 0
    the likeliest token wins, whatever top_k and top_p say.

    Parameters
    ----------
    request : ChatRequest
    index : int
        Which of the request's ``n`` answers; each draws its own numbers from the seed.
    """

    def __init__(self, request, index):
        self._request = request
        self._random = np.random.default_rng(None if request.seed is None else [request.seed, index])
        self._counts = {}

    def choose(self, logits):
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
    surplus = np.count_nonzero(weights >= least) - count
    weights[weights < least] = 0
    if surplus:
        weights[np.flatnonzero(weights == least)[-surplus:]] = 0


class Row:
    """One answer in the making.

    Parameters
    ----------
    prompt : list of int
        Tokens.
    max_tokens : int
    writer : TextWriter
    sampler : Sampler or None
        None takes the likeliest token.
    events : queue.SimpleQueue
        Gets ``(row, text)`` for each token of a stream, and ``(row, None)`` at the end.
    stream : bool
    """

    def __init__(self, prompt, max_tokens, writer, sampler, events, stream):
        self.prompt, self.max_tokens, self.writer, self.sampler = prompt, max_tokens, writer, sampler
        self.events, self.stream = events, stream
        self.text, self.tokens, self.finish_reason, self.error, self.ended, self.due = "", 0, None, None, False, 0.0

    def take(self, token, end_tokens):
        """Add the next token, and end where it ends the answer."""
        if token in end_tokens:
            self._finish("stop")
            return
        self.tokens += 1
        self._write(self.writer.write(token))
        if self.writer.stopped:
            self._finish("stop")
        elif self.tokens == self.max_tokens:
            self._finish("length")

    def _write(self, text):
        self.text += text
        if self.stream:
            self.events.put((self, text))

    def _finish(self, reason):
        if not self.writer.stopped:
            self._write(self.writer.close())
        self.finish_reason = "stop" if self.writer.stopped else reason
        self.end()

    def end(self, error=None):
        """End the row, whatever it has: its caller got all, went away, or gets an error."""
        if not self.ended:
            self.error, self.ended = error, True
            self.events.put((self, None))


class Batch:
    """Rows that one ``og.Generator`` runs side by side, to the longest one's end.

    Parameters
    ----------
    model : og.Model
    rows : list of Row
    pad, end_tokens : int, set of int
        From the model's ``genai_config.json``.
    """

    def __init__(self, model, rows, pad, end_tokens):
        self.rows, self._model, self._pad, self._end_tokens = rows, model, pad, end_tokens
        self._width, self._max_length = widest(rows)
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
    def alive(self):
        """Tell whether any row still wants a token."""
        return not all(row.ended for row in self.rows)

    def end(self, error):
        """End every row that has not ended."""
        for row in self.rows:
            row.end(error)

    def step(self):
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


def widest(rows):
    """Return what a batch reserves for each of its rows: tokens of prompt, tokens of prompt and answer."""
    width = max(len(row.prompt) for row in rows)
    return width, width + max(row.max_tokens for row in rows)


def choose_batch(waiting, room, must=None):
    """Choose the waiting rows that make the best batch: the most wanted tokens for the work.

    Rows of a batch are padded to its longest prompt and run to its longest answer, so rows of similar length
    belong together.

    Parameters
    ----------
    waiting : list of Row
    room : int
        Tokens of cache that the batch may take.
    must : Row, optional
        Has to be in it.

    Returns
    -------
    list of Row
        Empty where none fits.
    """
    rows = sorted(waiting, key=lambda row: (row.max_tokens, len(row.prompt)))
    best, best_rate = [], 0.0
    for start in range(len(rows)):
        width = wanted = 0
        for stop in range(start, min(start + MAX_BATCH, len(rows))):
            row, count = rows[stop], stop - start + 1
            width, new = max(width, len(row.prompt)), row.max_tokens
            wanted += len(row.prompt) + new
            if count * (width + new) > room or (count > 1 and count * width > MAX_PREFILL):
                break
            rate = wanted / (count * width + new * (count + STEP_COST))
            if rate > best_rate and (must is None or must in rows[start:stop + 1]):
                best, best_rate = rows[start:stop + 1], rate
    return best


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

    It knows nothing of messages. Its thread starts with the first row, and ends with ``close``. After a fork, the
    child loads the model anew with its first row. Such a child has to end as those of multiprocessing do, with
    ``os._exit``: onnxruntime-genai waits for the parent's threads at a normal exit.

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

    def __init__(self, folder, max_waiting, threads=None, provider="cpu"):
        self._folder, self._max_waiting, self._provider = folder, max_waiting, provider
        # Left alone, the engine takes half of what the machine has, as if each core ran two threads.
        self._threads = threads or _cores()
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.context_length = config["context_length"]
        ends = config["eos_token_id"]
        self._end_tokens = set(ends if isinstance(ends, list) else [ends])
        self._pad = config["pad_token_id"]
        self._closed = False
        self._begin()
        self._model = self._load()
        _engines.add(self)

    def _begin(self):
        self._changed = threading.Condition()
        self._waiting, self._thread, self._process, self._company = [], None, os.getpid(), 1

    def _load(self):
        config = og.Config(str(self._folder))
        config.overlay(json.dumps(
            {"model": {"decoder": {"session_options": {"intra_op_num_threads": self._threads}}}}))
        if self._provider != "cpu":
            if not {"cuda": og.is_cuda_available, "dml": og.is_dml_available}[self._provider]():
                package = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}[self._provider]
                raise _error(f"The provider is {self._provider}, and the onnxruntime-genai that is installed runs "
                             f"without it. Install {package} in its place, or load with the provider cpu.")
            config.clear_providers()
            config.append_provider(self._provider)
        return og.Model(config)

    def leave_parent(self):
        """Start anew in a child process: a fork takes the memory along and leaves the threads behind."""
        # Freeing the parent's model would wait for its threads, which are not here.
        _models_of_parents.append(self._model)
        self._model = None
        self._begin()

    def submit(self, rows):
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
                # A call of many rows takes its turns like many calls, one after the other; a stream does not wait.
                row.due = now - PATIENCE if row.stream else now + place // MAX_BATCH * PATIENCE
            self._waiting += rows
            self._changed.notify()

    def check(self, process):
        """Raise the error of a caller who waits, since ``process``, for what can't come any more."""
        if process != os.getpid():
            raise _error("This answer is the parent process's. Ask again.")
        if self._closed and not (self._thread and self._thread.is_alive()):
            raise _unanswered()

    def close(self):
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
            if not batches:
                # Who asks at about the same time is answered together. Where many asked before, they will again.
                linger = LINGER * min(self._company, 5)
                while not self._closed and len(self._waiting) < MAX_BATCH and self._changed.wait(linger):
                    pass
            if self._closed:
                return None
            self._waiting = [row for row in self._waiting if not row.ended]
            if not self._waiting or len(batches) >= MAX_BATCHES:
                return []
            first = min(self._waiting, key=lambda row: row.due)
            waited = time.monotonic() - first.due
            # Beside a lone row, a newcomer costs little. Beside a full batch it waits for the next one, which it
            # will share, unless that takes too long.
            beside = sum(len(batch.rows) for batch in batches)
            patience = PATIENCE * min(1, max(0, beside - 1) / 8) + PATIENCE * (len(batches) >= EAGER_BATCHES)
            if batches and waited < patience:
                return []
            # A batch takes no more cache than one request of full context; all together, no more than two.
            room = min(self.context_length, 2 * self.context_length - sum(batch.cache_tokens for batch in batches))
            early = sorted(self._waiting, key=lambda row: row.due)[:4 * MAX_BATCH]
            rows = choose_batch(early, room, first if batches or waited >= PATIENCE else None)
            if not rows and waited < 10 * PATIENCE:
                rows = choose_batch(early, room)  # smaller ones go first while the first one does not fit
            self._waiting = [row for row in self._waiting if row not in rows]
            self._company = len(rows) or self._company
            return rows


def _cores():
    """Return the number of cores that this process may use."""
    cores = psutil.cpu_count(logical=False) or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores


# --- the model ------------------------------------------------------------------------------


class ChatModel(mlflow.pyfunc.PythonModel):
    """The chat contract of ``llm/v1/chat`` on an ONNX model. One instance serves any number of threads."""

    def load_context(self, context):
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

    def predict(self, context, model_input: pd.DataFrame, params=None):
        """Answer each conversation, in order.

        Parameters
        ----------
        context : mlflow.pyfunc.PythonModelContext
        model_input : pandas.DataFrame, dict or list of dict
            The fields of ``ChatRequest``; each row may have its own.
        params : dict, optional
            Not used: every setting is a field of the request.

        Returns
        -------
        list of dict
            A chat completion for each conversation.

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

    def predict_stream(self, context, model_input, params=None):
        """Answer one conversation in chunks, as the tokens come.

        Parameters
        ----------
        context, params
            As for ``predict``.
        model_input : dict
            The fields of ``ChatRequest``.

        Returns
        -------
        iterator of dict
            Chat completion chunks: for each choice its role, then text, then its finish reason. Closing the
            iterator ends the work.
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

    def close(self):
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
        room = context_length - len(prompt)
        if room < 1:
            raise invalid("messages", f"fewer than {context_length} tokens, the model's context", where)
        most = min(room, self._settings.max_tokens_limit)
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


def usage(rows):
    """Count the tokens of a request's prompt and of its answers, end tokens left out."""
    prompt, completion = len(rows[0].prompt), sum(row.tokens for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


mlflow.models.set_model(ChatModel())
