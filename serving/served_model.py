"""One version of an MLflow chat model, loaded, and asked in one way whatever its flavor is.

The service, the batch program and Azure's scoring script share it. It knows which fields a model
takes, which models stream, and what MLflow's transformers flavor can't read by itself.
"""

import contextlib
import time
import uuid
from collections.abc import Iterable, Iterator

import mlflow
from mlflow.exceptions import MlflowException

from .errors import ServiceError
from .request import TEXT, is_text

# Values that change no answer, which clients send by habit. Where a model's signature lacks the
# field, such a value is left out.
NEUTRAL = {
    "n": [1],
    "top_p": [1],
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logprobs": [False],
    "top_logprobs": [0],
    "tools": [[]],
    "functions": [[]],
    "logit_bias": [{}],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
}
# Fields that change no answer, whatever they hold.
UNUSED = {"parallel_tool_calls", "user", "metadata", "store", "service_tier", "safety_identifier"}
UNUSED |= {"prompt_cache_key", "prediction"}
# The signature of MLflow's transformers flavor has more fields than its pipeline takes.
PIPELINE_FIELDS = {"messages", "max_tokens", "temperature", "stop"}


class ServedModel:
    """A model that MLflow has loaded.

    Parameters
    ----------
    model : mlflow.pyfunc.PyFuncModel
        A model of the chat contract, ``llm/v1/chat``.

    Attributes
    ----------
    fields : set of str or None
        The fields that the model takes, None where its signature does not say.
    streams : bool
        Whether it has ``predict_stream``. Nothing says that a model without it may be asked by
        several threads at once.
    is_pipeline : bool
        Whether it is a pipeline of MLflow's transformers flavor.
    """

    def __init__(self, model: mlflow.pyfunc.PyFuncModel):
        self._model = model
        schema = model.metadata.get_input_schema()
        self.fields = set(schema.input_names()) if schema and schema.has_input_names() else None
        # MLflow has no public name for it.
        self.streams = getattr(model, "_predict_stream_fn", None) is not None
        self._stream_tells_usage = self.streams and (
            self.fields is None or "stream_options" in self.fields
        )
        # Only a stream can be ended early. So a whole answer is made of a stream where that works.
        self._completes_by_stream = self._stream_tells_usage
        self.is_pipeline = model.loader_module == "mlflow.transformers"
        self._pipeline = model.get_raw_model() if self.is_pipeline else None
        if self.is_pipeline:
            self.fields = PIPELINE_FIELDS
        self._python_model = None
        with contextlib.suppress(MlflowException, AttributeError):  # a flavor's model has none
            self._python_model = model.unwrap_python_model()

    def stats(self) -> dict:
        """Return what the model counts of itself: ``running`` and ``closed`` at least."""
        stats = getattr(self._python_model, "stats", None)
        counts = stats() if callable(stats) else {}
        return {"running": 0, "closed": False} | (counts if isinstance(counts, dict) else {})

    def try_once(self) -> None:
        """Ask for one token, once as a stream and once whole.

        Raises
        ------
        Exception
            Whatever the model raises, or a ServiceError: the answer is no chat completion.
        """
        request = {"messages": [{"role": "user", "content": "Hello"}]}
        if self.fields is None or "max_tokens" in self.fields:
            request["max_tokens"] = 1
        for streamed in (True, False):
            try:
                completion = join_chunks(self.chunks(request, streamed))
            except MlflowException:
                if streamed or not self._completes_by_stream:
                    raise
                self._completes_by_stream = False  # it refuses `"stream": false`
                completion = join_chunks(self.chunks(request, streamed))
            if not completion["choices"]:
                raise _not_a_completion()

    def complete(self, request: dict) -> dict:
        """Return the whole chat completion for a request in the fields that the model takes."""
        if self._completes_by_stream:
            return join_chunks(self.chunks(request, streamed=False))
        return self._predict(request)

    def _predict(self, request):
        self._check_length(request)
        result = self._model.predict(request)
        completion = result[0] if isinstance(result, list) and len(result) == 1 else result
        if not isinstance(completion, dict) or not isinstance(completion.get("choices"), list):
            raise _not_a_completion()
        return completion

    def complete_all(self, requests: list[dict]) -> list[dict]:
        """Return the chat completions of several requests.

        A pipeline answers them one by one. Any other model gets them as one list, as they are.
        """
        if self.is_pipeline:
            return [self.complete(self.adapt(request)) for request in requests]
        return self._model.predict(requests)

    def chunks(self, request: dict, streamed: bool) -> Iterator[dict]:
        """Yield the chunks of an answer. Closing the iterator ends the work, if the model streams.

        A whole answer comes as one chunk of text, where it is not made of a stream.
        """
        if not (self.streams if streamed else self._completes_by_stream):
            yield from _to_chunks(self._predict(request))
            return
        if self._stream_tells_usage:
            request = request | {"stream": streamed, "stream_options": {"include_usage": True}}
        with contextlib.closing(self._model.predict_stream(request)) as chunks:
            yield from chunks

    def _check_length(self, request):
        """Refuse a prompt longer than the pipeline's context, which it would read for minutes."""
        if self._pipeline is None:
            return
        # Models of text and images keep the configuration of their text apart.
        config = self._pipeline.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        tokenizer = self._pipeline.tokenizer
        try:
            prompt = tokenizer.apply_chat_template(request["messages"], tokenize=False)
        except Exception:  # a template can raise anything; it will again, and MLflow names it
            return
        if longest and len(tokenizer(prompt)["input_ids"]) >= longest:
            raise ServiceError(
                400,
                f"messages has to be fewer than {longest} tokens, the model's context.",
                "context_length_exceeded",
                "messages",
            )

    def adapt(self, request: dict) -> dict:
        """Return the fields of a request that the model takes.

        Raises
        ------
        ServiceError
            A field that the model does not take would change the answer.
        """
        not_for_the_model = ("model", "stream", "stream_options")
        request = {name: request[name] for name in request if name not in not_for_the_model}
        if self.fields is None:
            return request
        if "max_completion_tokens" in request and "max_completion_tokens" not in self.fields:
            request.setdefault("max_tokens", request.pop("max_completion_tokens"))
        for name in [name for name in request if name not in self.fields]:
            value = request.pop(name)
            if name in UNUSED or value in NEUTRAL.get(name, []):
                continue
            is_known = name in NEUTRAL or name in ("seed", "top_k")
            raise ServiceError(
                400,
                "The request holds a field that this model does not take. The fields are: "
                f"{', '.join(sorted(self.fields))}.",
                "unknown_field",
                name if is_known else None,
            )
        return _for_pipeline(request) if self.is_pipeline else request

    def close(self) -> None:
        """Free the model's memory."""
        close = getattr(self._python_model, "close", None)
        try:
            if close:
                close()
        finally:
            self._model = self._python_model = self._pipeline = None


def _for_pipeline(request):
    """Return a request in the types of the transformers flavor's signature."""
    messages = [
        _to_plain_message(number, message) for number, message in enumerate(request["messages"])
    ]
    request = request | {"messages": messages}
    if isinstance(request.get("stop"), str):
        request["stop"] = [request["stop"]]
    if "max_tokens" in request:
        request["max_tokens"] = int(request["max_tokens"])
    if "temperature" in request:  # a pipeline that samples divides by it
        request["temperature"] = max(float(request["temperature"]), 0.001)
    return request


def _to_plain_message(number, message):
    """Return a message with role, content and name, all of them text."""
    content = message["content"]
    name = f"messages[{number}]"
    if isinstance(content, list):
        is_parts_of_text = all(
            part.get("type") == "text" and is_text(part.get("text")) for part in content
        )
        if len(content) > 1000 or not is_parts_of_text:
            raise ServiceError(
                400,
                f"{name}.content has to be {TEXT}, or 1 to 1000 parts of text.",
                "invalid_value",
                f"{name}.content",
            )
        content = "\n".join(part["text"] for part in content)
    if not is_text(message.get("name") or ""):
        raise ServiceError(400, f"{name}.name has to be {TEXT}.", "invalid_value", f"{name}.name")
    others = message.keys() - {"role", "content", "name"}
    if any(message[other] for other in others):
        raise ServiceError(
            400,
            f"{name} holds a field that this model does not take. The fields are: role, content, "
            "name.",
            "unknown_field",
            name,
        )
    # Few chat templates know the role developer; the others would leave the message out.
    role = "system" if message["role"] == "developer" else message["role"]
    plain = {"role": role, "content": content}
    return plain | ({"name": message["name"]} if message.get("name") else {})


def _not_a_completion():
    return ServiceError(500, "The model's answer is no chat completion.", "unusable_model")


def _to_chunks(completion):
    """Yield a whole chat completion as a stream with one chunk of text."""
    head = {
        "id": completion.get("id") or f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk",
        "created": completion.get("created") or int(time.time()),
    }
    texts = []
    ends = []
    for choice in completion["choices"]:
        index = choice["index"]
        delta = {"role": "assistant", "content": choice["message"]["content"]}
        texts.append({"index": index, "delta": delta, "finish_reason": None})
        ends.append({"index": index, "delta": {}, "finish_reason": choice["finish_reason"]})
    yield head | {"choices": texts}
    yield head | {"choices": ends}
    yield head | {"choices": [], "usage": completion.get("usage")}


def join_chunks(chunks: Iterable[dict]) -> dict:
    """Return the whole chat completion that a stream's chunks make."""
    head = {}
    usage = None
    choices = {}
    for chunk in chunks:
        head = head or chunk
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            choice = choices.setdefault(
                part["index"],
                {
                    "index": part["index"],
                    "message": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                },
            )
            choice["message"]["content"] += part["delta"].get("content") or ""
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
    names = ("id", "created", "model", "system_fingerprint")
    return {name: head[name] for name in names if name in head} | {
        "object": "chat.completion",
        "choices": [choices[index] for index in sorted(choices)],
        "usage": usage,
    }
