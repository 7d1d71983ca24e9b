"""What MLflow loads and calls: requests come in, chat completions go out, whole or in chunks.

This file knows MLflow. It reads a request by `contract`, makes rows of tokens by `prompt`, and
hands them to `engine`.
"""

import importlib
import queue
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from .contract import ChatRequest, Refusal, invalid, read_request, read_settings
from .decoder import Decoder
from .engine import Engine, Row
from .folder import read_config
from .prompt import PromptEncoder
from .sampler import Sampler
from .schema import SchemaReader
from .table import read_table
from .text import TextWriter


def check_folder(folder: Path) -> None:
    """Raise a Refusal that says why a folder can't be served, before it is logged."""
    config = read_config(folder)
    PromptEncoder(folder)
    Decoder(config, threads=1, room=min(64, config.context_length))


class ChatModel(mlflow.pyfunc.PythonModel):
    """The chat contract of ``llm/v1/chat`` on an ONNX model, for any number of threads.

    What is loaded belongs to the context that MLflow passes with each call. MLflow's loader hands
    over the object of a model file in a global variable, so two threads that load at the same
    moment may get one object for both models, even if their code differs. `stats` and `close` have
    no context: they are for the model that this object loaded last.
    """

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        """Load the artifact ``model``, a folder that onnxruntime-genai's builder wrote."""
        folder = Path(context.artifacts["model"])
        self._loaded = _find_code(folder).LoadedModel(folder, context.model_config)
        context.loaded = self._loaded
        # MLflow keeps the last object that it was given. Give it an empty one, so that this one can
        # be freed.
        mlflow.models.set_model(ChatModel())

    def predict(
        self,
        context: mlflow.pyfunc.PythonModelContext,
        model_input: pd.DataFrame,
        params: dict | None = None,
    ) -> list[dict]:
        """Answer each conversation with a chat completion, in order.

        ``model_input`` is a table, a dict or a list of dicts: the fields of ``ChatRequest``, and
        each row may have its own. ``params`` is not used, because every setting is a field of the
        request.

        A Refusal names a wrong field before any row runs, or says, as RESOURCE_EXHAUSTED, that too
        many answers wait.
        """
        return getattr(context, "loaded", self._loaded).answer(model_input)

    def predict_stream(
        self,
        context: mlflow.pyfunc.PythonModelContext,
        model_input: Any,
        params: dict | None = None,
    ) -> Iterator[dict]:
        """Answer one conversation, a dict or a table of one row, in chunks as the tokens come.

        Each choice begins with its role, goes on with text and ends with its finish reason. Closing
        the iterator ends the work. ``"stream": False`` changes nothing. Errors are those of
        ``predict``; that the model is busy or closed shows at the first chunk.
        """
        return getattr(context, "loaded", self._loaded).stream(model_input)

    def stats(self) -> dict:
        """Return counts: of answers and cached tokens now, and of those since the model was loaded.

        ``since`` is in seconds since 1970. ``reused_prompt_tokens`` are those of ``prompt_tokens``
        that were copied from another prompt in the cache; ``cache_tokens`` are those for which the
        cache has memory now, or has promised it to running answers.
        """
        return self._loaded.engine.stats()

    def close(self) -> None:
        """Free the engine and its thread. Running and waiting answers end with an error."""
        self._loaded.engine.close()


def _find_code(folder):
    """Return this module as it was logged with a model, or this one if it was not logged."""
    logged = next((folder.parent.parent / "code").glob("chat_*/model.py"), None)
    name = f"{logged.parent.name}.model" if logged else __name__
    return importlib.import_module(name)


class LoadedModel:
    """The model of a folder, its engine and its settings."""

    def __init__(self, folder: Path, settings: dict | None):
        self._settings = read_settings(settings)
        config = read_config(folder)
        self._encoder = PromptEncoder(folder)
        self._schemas = SchemaReader(self._encoder.tokenizer, config)
        self.engine = Engine(
            config, self._settings.max_waiting, self._settings.threads, self._settings.cache_tokens
        )
        # The engine's thread has no reference to this object, which can be freed, and then the
        # thread ends.
        weakref.finalize(self, self.engine.stop)

    def answer(self, model_input: Any) -> list[dict]:
        """Do what ``ChatModel.predict`` says."""
        called = time.time_ns()
        if isinstance(model_input, pd.DataFrame):
            requests = read_table(model_input)
        else:
            requests = model_input if isinstance(model_input, list) else [model_input]
        most = min(self._settings.max_rows, self._settings.max_waiting)
        if len(requests) > most:
            raise _too_many(len(requests), most)
        named = {
            number: f"Row {number}: " if len(requests) > 1 else ""
            for number in range(len(requests))
        }
        read = [self._read(values, named[number]) for number, values in enumerate(requests)]
        for number, request in enumerate(read):
            if request.stream:
                raise invalid(
                    "stream", ChatRequest.model_fields["stream"].description, named[number]
                )
            if request.stream_options:
                raise invalid(
                    "stream_options", "left out where the answer comes whole", named[number]
                )
        if (total := sum(request.n for request in read)) > most:
            raise _too_many(total, most)
        events = queue.SimpleQueue()
        jobs = [self._rows(request, events, named[number]) for number, request in enumerate(read)]
        rows = [row for job in jobs for row in job]
        for _ in self._answers(rows, events, called):
            pass
        return [
            self._head("chat.completion")
            | {
                "choices": [
                    {
                        "index": index,
                        "message": {"role": "assistant", "content": row.text},
                        "finish_reason": row.finish_reason,
                    }
                    for index, row in enumerate(job)
                ],
                "usage": usage(job),
            }
            for job in jobs
        ]

    def stream(self, model_input: Any) -> Iterator[dict]:
        """Do what ``ChatModel.predict_stream`` says."""
        called = time.time_ns()
        if isinstance(model_input, pd.DataFrame):
            model_input = read_table(model_input)
        if isinstance(model_input, list):
            if len(model_input) != 1:
                raise Refusal("A stream answers exactly one conversation.", "invalid_value")
            (model_input,) = model_input
        request = self._read(model_input)
        events = queue.SimpleQueue()
        rows = self._rows(request, events, stream=True)
        return self._chunks(request, rows, events, called)

    def _chunks(self, request, rows, events, called):
        head = self._head("chat.completion.chunk")
        begun = set()

        def chunk(row, delta, finish_reason=None):
            return head | {
                "choices": [
                    {"index": rows.index(row), "delta": delta, "finish_reason": finish_reason}
                ]
            }

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

    def _read(self, values, where=""):
        request = read_request(values, where)
        if request.temperature is None:
            request.temperature = self._settings.temperature
        return request

    def _rows(self, request, events, where="", stream=False):
        """Return a row for each of the request's ``n`` answers."""
        context_length = self.engine.context_length
        prompt = self._encoder.encode(request.messages, context_length, where)
        if len(prompt) >= context_length:
            raise invalid(
                "messages",
                f"fewer than {context_length} tokens, the model's context",
                where,
                "context_length_exceeded",
            )
        most = min(context_length - len(prompt), self._settings.max_tokens_limit)
        max_tokens = request.max_tokens or min(self._settings.max_tokens, most)
        if max_tokens > most:
            raise invalid(
                "max_tokens", f"a whole number from 1 to {most} after these messages", where
            )
        matcher = self._schemas.bind(request.response_format, where)
        greedy = not (
            request.temperature or request.frequency_penalty or request.presence_penalty or matcher
        )
        return [
            Row(
                prompt,
                max_tokens,
                TextWriter(self._encoder.tokenizer, request.stop),
                None if greedy else Sampler(request, index, matcher and matcher.deep_copy()),
                events,
                stream,
                request.prompt_cache_key,
            )
            for index in range(request.n)
        ]

    def _answers(self, rows, events, called):
        """Submit rows; yield ``(row, text)`` as it comes and ``(row, None)`` at a row's end."""
        left = len(rows)
        caller = mlflow.get_current_active_span()
        try:
            if rows:
                self.engine.submit(rows)
            while left:
                try:
                    row, text = events.get(timeout=1)  # Windows takes Ctrl-C only between two waits
                except queue.Empty:
                    continue
                if row.error:
                    # A raised error refers to its frames, and these to the row.
                    error = row.error
                    row.error = None
                    raise error
                left -= text is None
                yield row, text
        finally:
            for row in rows:
                row.end()  # a caller who went away wants no more tokens
            if caller:
                _trace(caller, rows, called)

    def _head(self, kind):
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self._settings.model,
        }


def _too_many(asked, most):
    return Refusal(
        f"This call asks for {asked} answers, and one call may ask for {most}.", "invalid_value"
    )


def _trace(caller, rows, called):
    """Add spans with the times and sizes of each row to a caller's span, without any text."""
    for row in rows:
        spans = [
            ("read", "submitted", {}),
            ("wait", "started", {}),
            (
                "prefill",
                "first",
                {"prompt_tokens": len(row.prompt), "reused_prompt_tokens": row.reused_tokens},
            ),
            (
                "decode",
                "ended",
                {"completion_tokens": row.token_count, "finish_reason": row.finish_reason},
            ),
        ]
        began = called
        for name, end, sizes in spans:
            ended = row.times.get(end, row.times["ended"])
            mlflow.start_span_no_context(
                name, parent_span=caller, attributes=sizes, start_time_ns=began
            ).end(end_time_ns=ended)
            began = ended


def usage(rows: list[Row]) -> dict[str, int]:
    """Count the tokens of a request's prompt and of its answers, end tokens left out."""
    prompt = len(rows[0].prompt)
    completion = sum(row.token_count for row in rows)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
