"""What a request to the chat model may hold, what the model's settings may be, and the errors.

It knows nothing about the model: what depends on the context length or on the chat template is
checked by the files that read those.
"""

from typing import Annotated, Any, Literal

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.types.schema import AnyType, Array, ColSpec, DataType, Object, Property, Schema
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

# --- types of values ------------------------------------------------------------------------


def as_whole_number(value: Any) -> Any:
    """Accept 4.0 as 4: pandas turns an integer column with gaps into floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(as_whole_number)]
Text = Annotated[str, Field(pattern=r"\A[^\x00]*\z")]  # pydantic refuses surrogates by itself
StopSequence = Annotated[str, Field(min_length=1, max_length=100)]
Empty = Annotated[list | dict, Field(max_length=0)]

# Descriptions of ranges, which complete the sentence "The field has to be ...".
FROM_1 = "a whole number from 1"
UP_TO_CONTEXT = "a whole number from 1 up to what the context leaves"
TEXT = "text, without NUL and without half a surrogate pair"


class StrictModel(BaseModel):
    """Types are not converted, except that a whole number may be given for a float."""

    model_config = ConfigDict(strict=True)


# --- requests -------------------------------------------------------------------------------


class RequestObject(StrictModel):
    """An object in a request: a null counts as not given, and an unknown field is an error."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Leave out nulls, and refuse names that the class lacks."""
        if not isinstance(values, dict):
            return values  # pydantic refuses it next
        given = {name: value for name, value in values.items() if value is not None}
        # Pydantic's extra="forbid" would make an error of each unknown name, however many come.
        if not given.keys() <= _fields(cls).keys():
            raise ValueError("unknown field")
        return given


def _fields(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a class by the names that a request uses."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


class TextPart(RequestObject):
    """A part of a message's content."""

    type: Literal["text"] = Field(description="text")
    text: Text = Field(description=TEXT)


class Message(RequestObject):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant"
    )
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1000)] = Field(
        description="text, or 1 to 1000 parts of text, "
        "without NUL and without half a surrogate pair"
    )
    name: Text = Field("", description=TEXT)  # passed to the chat template
    # Unused: clients that send an answer back send these fields with it.
    tool_calls: Empty | None = Field(
        None, description="empty or left out: this model calls no tools"
    )
    annotations: Empty | None = Field(None, description="empty or left out")


class StreamOptions(RequestObject):
    """What a stream adds to the text. ``include_obfuscation`` is ignored."""

    include_usage: bool = Field(False, description="true or false")
    include_obfuscation: bool = Field(False, description="true or false")


class JsonSchema(RequestObject):
    """A schema that the answer has to fit. ``name``, ``description`` and ``strict`` are ignored."""

    name: str = Field("", max_length=64, description="a text of up to 64 characters")
    description: str = Field("", description="a text")
    strict: bool = Field(True, description="true or false")
    definition: dict = Field(alias="schema", description="an object: a JSON schema")


class ResponseFormat(RequestObject):
    """The form of an answer: any text, a JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text, json_object or json_schema"
    )
    json_schema: JsonSchema | None = Field(None, description="an object with name and schema")


class UnusedFields(RequestObject):
    """Fields that OpenAI's clients send and that change no answer here."""

    # Requests share what their prompts have in common if they have the same key, which saves time.
    prompt_cache_key: str | None = Field(None, description="a text")
    # Checked, and then unused.
    model: str | None = Field(None, description="a text")
    user: str | None = Field(None, description="a text")
    safety_identifier: str | None = Field(None, description="a text")
    service_tier: str | None = Field(None, description="a text")
    metadata: dict | None = Field(None, description="an object")
    prediction: dict | None = Field(None, description="an object")
    store: bool | None = Field(None, description="true or false")
    parallel_tool_calls: bool | None = Field(None, description="true or false")
    # Refused where they ask for token probabilities, tools, favoured tokens or sound.
    logprobs: Literal[False] | None = Field(None, description="false or left out")
    top_logprobs: Literal[0] | None = Field(None, description="0 or left out")
    tools: Empty | None = Field(None, description="empty or left out")
    functions: Empty | None = Field(None, description="empty or left out")
    logit_bias: Empty | None = Field(None, description="empty or left out")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="none, auto or left out")
    function_call: Literal["none", "auto"] | None = Field(
        None, description="none, auto or left out"
    )
    modalities: list[Literal["text"]] | None = Field(
        None, description="a list of text, and of nothing else"
    )


class ChatRequest(UnusedFields):
    """The fields of ``llm/v1/chat`` that the model serves, named as OpenAI names them.

    A field that is null counts as not given. ``max_completion_tokens`` is OpenAI's new name for
    ``max_tokens``, and the role ``developer`` its new name for ``system``. A content in parts is
    the same as their texts, each on a line of its own.
    """

    messages: Annotated[list[Message], FailFast()] = Field(
        min_length=1,
        max_length=1000,
        description="a list of 1 to 1000 messages, role and content each",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    max_tokens: WholeNumber | None = Field(None, ge=1, description=UP_TO_CONTEXT)
    max_completion_tokens: WholeNumber | None = Field(None, ge=1, description=UP_TO_CONTEXT)
    stop: StopSequence | Annotated[list[StopSequence], Field(max_length=4)] = Field(
        [], description="up to 4 texts of 1 to 100 characters"
    )
    n: WholeNumber = Field(1, ge=1, le=8, description="a whole number from 1 to 8")
    stream: bool | None = Field(
        None, description="true, for predict_stream alone, false or left out"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, up to 1")
    top_k: WholeNumber | None = Field(None, ge=1, description=FROM_1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="a number from -2 to 2")
    seed: WholeNumber | None = Field(
        None, ge=0, lt=2**53, description="a whole number from 0 to 2**53 - 1"
    )
    response_format: ResponseFormat | None = Field(
        None, description="an object with the type text, json_object or json_schema"
    )
    stream_options: StreamOptions | None = Field(
        None, description="include_usage: true or false, for a stream"
    )


# The fields that an answer depends on.
SERVED = [name for name in ChatRequest.model_fields if name not in UnusedFields.model_fields]
# The fields that hold objects, or lists of them, with fields of their own.
_OBJECTS = {
    "messages": Message,
    "response_format": ResponseFormat,
    "json_schema": JsonSchema,
    "stream_options": StreamOptions,
}


# --- settings -------------------------------------------------------------------------------


class Settings(StrictModel, extra="forbid"):
    """The values of ``model_config=``: set when the model is logged, changed when it is loaded."""

    model: str = Field("slm-onnx", description="the name that answers carry, a text")
    # What a request without these fields gets.
    max_tokens: int = Field(256, ge=1, description=FROM_1)
    temperature: float = Field(0.0, ge=0, le=2, description="a number from 0 to 2")
    # The largest max_tokens that a request may ask for.
    max_tokens_limit: int = Field(2048, ge=1, description=FROM_1)
    # The largest number of answers that one call may ask for.
    max_rows: int = Field(256, ge=1, description=FROM_1)
    # The largest number of answers that may wait to be started.
    max_waiting: int = Field(512, ge=1, description=FROM_1)
    # The tokens of prompts and answers that the key/value cache may hold, all rows together.
    cache_tokens: int | None = Field(
        None,
        ge=2,
        description="a whole number from 2, or null for twice the model's context length",
    )
    threads: int | None = Field(None, ge=1, description=f"{FROM_1}, or null for one on each core")
    provider: Literal["cpu"] = Field(
        "cpu",
        description="cpu: for another device, use track B's wrapper or an engine made for it",
    )


SETTINGS = Settings().model_dump()


# --- errors ---------------------------------------------------------------------------------


class Refusal(MlflowException):
    """Any error of the chat model, with fields that MLflow's server sends beside the sentence.

    Parameters
    ----------
    sentence : str
        What is wrong. It quotes nothing of the request.
    code : str
        invalid_value, unknown_field, context_length_exceeded, busy, closed, failed or
        unusable_model.
    field : str, optional
        The field that is wrong, such as ``messages[0].role``.
    allowed : str, optional
        What the field may hold.
    error_code : int
        MLflow's code, which decides the HTTP status.
    """

    def __init__(
        self,
        sentence: str,
        code: str = "invalid_value",
        field: str | None = None,
        allowed: str | None = None,
        error_code: int = INVALID_PARAMETER_VALUE,
    ):
        super().__init__(sentence, error_code, field=field, code=code, allowed=allowed)
        self.field = field
        self.code = code
        self.allowed = allowed


def invalid(subject: str, allowed: str, where: str = "", code: str = "invalid_value") -> Refusal:
    """Return the error for a value out of its range.

    Parameters
    ----------
    subject : str
        A field's name, or words with a space, such as ``"A request"``, which are no field.
    allowed : str
        What it has to be.
    where : str
        What the sentence starts with, such as ``"Row 2: "``.
    code : str
        The refusal's code.
    """
    field = None if " " in subject else subject
    return Refusal(f"{where}{subject} has to be {allowed}.", code, field, allowed)


# --- reading --------------------------------------------------------------------------------


def read_settings(values: dict | None) -> Settings:
    """Check the ``model_config`` of a model, and fill in the defaults.

    Raises
    ------
    Refusal
        For a setting that is unknown or out of its range.
    """
    try:
        return Settings.model_validate(values or {})
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
    if name in Settings.model_fields:
        allowed = Settings.model_fields[name].description
    else:
        allowed = f"left out: the settings are {', '.join(SETTINGS)}"
    raise invalid(f"model_config's {name}", allowed)


def read_request(values: Any, where: str = "") -> ChatRequest:
    """Check one request and bring it into one form.

    Parameters
    ----------
    values : dict
        The request's fields, with values of Python, numpy, pandas or Spark.
    where : str
        What an error's sentence starts with, such as ``"Row 2: "``.

    Returns
    -------
    ChatRequest
        ``stop`` is a list, ``max_tokens`` holds ``max_completion_tokens`` too, and each message
        has the role system, user or assistant and a content of text.

    Raises
    ------
    Refusal
        For the first thing that is wrong in the request.
    """
    if not isinstance(values, dict):
        raise invalid("A request", "an object with messages", where)
    try:
        request = ChatRequest.model_validate(to_python(values))
    except ValidationError as error:
        raise _to_refusal(error, where) from None
    _check_combinations(request, where)
    if isinstance(request.stop, str):
        request.stop = [request.stop]
    request.max_tokens = request.max_tokens or request.max_completion_tokens
    for message in request.messages:
        if message.role == "developer":
            message.role = "system"
        if isinstance(message.content, list):
            message.content = "\n".join(part.text for part in message.content)
    return request


def to_python(value: Any, depth: int = 5) -> Any:
    """Return a value with Python's own numbers and lists in place of numpy's.

    The elements of ``depth`` nested lists and objects are converted. A request has five: itself,
    its messages, a message, its parts and a part. The limit keeps a value that is nested without
    end from overflowing the stack.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if depth and isinstance(value, list | tuple):
        return [to_python(item, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return {name: to_python(item, depth - 1) for name, item in value.items()}
    return value


def _to_refusal(error: ValidationError, where: str) -> Refusal:
    """Turn pydantic's first problem into a Refusal, by the field's name and its description."""
    problem = error.errors()[0]  # its input quotes the request
    name, allowed, kind = "", "", ChatRequest
    for step in problem["loc"]:
        if kind is None:
            break  # what follows names a type or an item inside the field
        if isinstance(step, int):
            name, allowed = f"{name}[{step}]", "an object with role and content"
        else:
            name = f"{name}.{step}" if name else step
            allowed = _fields(kind)[step].description
            kind = _OBJECTS.get(step)
    if problem["type"] != "value_error":  # which only an unknown field's name raises
        return invalid(name, allowed, where)
    names = SERVED if kind is ChatRequest else _fields(kind)
    return Refusal(
        f"{where}{name or 'The request'} holds a field that is not served. "
        f"The fields are: {', '.join(names)}.",
        "unknown_field",
        name or None,
    )


def _check_combinations(request: ChatRequest, where: str) -> None:
    """Refuse fields whose values are in range and do not go together."""
    if request.messages[-1].role == "assistant":
        raise invalid("The last message's role", "user or system: the assistant speaks next", where)
    limit, new_limit = request.max_tokens, request.max_completion_tokens
    if limit and new_limit and limit != new_limit:
        raise invalid("max_completion_tokens", "left out beside another max_tokens", where)
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return
    if response_format.type == "json_schema" and response_format.json_schema is None:
        allowed = _fields(ResponseFormat)["json_schema"].description
        raise invalid("response_format.json_schema", allowed, where)
    if request.stop:
        allowed = "left out where response_format asks for JSON, which it would cut"
        raise invalid("stop", allowed, where)


# --- the signature --------------------------------------------------------------------------

# MLflow checks types before the model sees a request. It refuses a temperature of 2 where the
# signature says double, and an integer column with gaps, and its errors quote the whole request. So
# in the signature every field is optional and of any type, and ChatRequest checks it.
# `stream_options` is an object: without a column that is one, MLflow makes a row of each message. A
# server sets MLFLOW_DISABLE_SCHEMA_DETAILS=true, because of what MLflow still refuses:
# stream_options that are no object, and a list of requests with another value in it.
_INPUT_TYPES = dict.fromkeys([*SERVED, *UnusedFields.model_fields], AnyType()) | {
    "stream_options": Object(
        [Property(name, AnyType(), required=False) for name in StreamOptions.model_fields]
    ),
}
# MLflow's CHAT_MODEL_OUTPUT_SCHEMA promises more: tool calls and custom outputs, among others.
_MESSAGE = Object([Property("role", DataType.string), Property("content", DataType.string)])
_CHOICE = Object(
    [
        Property("index", DataType.long),
        Property("message", _MESSAGE),
        Property("finish_reason", DataType.string),
    ]
)
_USAGE = Object(
    [
        Property("prompt_tokens", DataType.long),
        Property("completion_tokens", DataType.long),
        Property("total_tokens", DataType.long),
    ]
)
_OUTPUT_TYPES = {
    "id": DataType.string,
    "object": DataType.string,
    "created": DataType.long,
    "model": DataType.string,
    "choices": Array(_CHOICE),
    "usage": _USAGE,
}
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(kind, name, required=False) for name, kind in _INPUT_TYPES.items()]),
    outputs=Schema([ColSpec(kind, name) for name, kind in _OUTPUT_TYPES.items()]),
)
