"""What a request may hold before any model is asked: the JSON of its body, and its common fields.

The service and Azure's scoring script share it. What else a field may hold is for the model to say.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from .errors import ServiceError

# A body's lists and objects inside each other. MLflow and others follow them by recursion.
MAX_LEVELS = 200
STREAM_OPTIONS = ("include_usage", "include_obfuscation")  # obfuscation is not added
TEXT = "text, without NUL and without half a surrogate pair"


def _as_whole_number(value):
    """Accept 4.0 as 4: JSON has one type for both."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(_as_whole_number)]
From1 = Annotated[WholeNumber, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
StopSequence = Annotated[str, Field(min_length=1, max_length=100)]


class _StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class ChatMessage(_StrictModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="system, developer, user or assistant"
    )
    content: Text | Annotated[list[dict], Field(min_length=1)] = Field(
        description=f"{TEXT}, or a list of parts"
    )


class ChatCompletionRequest(_StrictModel):
    """The fields that are checked here, because a wrong value could harm any model."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(
        min_length=1,
        max_length=1000,
        description="a list of 1 to 1000 messages, role and content each",
    )
    model: str | None = Field(None, description="a text")
    max_tokens: From1 | None = Field(None, description="a whole number from 1")
    max_completion_tokens: From1 | None = Field(None, description="a whole number from 1")
    temperature: float | None = Field(None, ge=0, le=2, description="a number from 0 to 2")
    n: Annotated[WholeNumber, Field(ge=1, le=8)] | None = Field(
        None, description="a whole number from 1 to 8"
    )
    stop: StopSequence | Annotated[list[StopSequence], Field(max_length=4)] | None = Field(
        None, description="up to 4 texts of 1 to 100 characters"
    )
    stream: bool | None = Field(None, description="true, false or left out")
    stream_options: dict | None = Field(
        None, description="include_usage: true or false, for a stream"
    )


def read_json(body: bytes) -> dict:
    """Return the object in a request's body, without fields that are null.

    Raises
    ------
    ServiceError
        The body is no JSON object, or too deep. The error quotes nothing of it.
    """
    try:
        # PowerShell and Excel write a byte order mark before the text.
        values = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ServiceError(400, "The body has to be JSON, in UTF-8.", "invalid_json") from None
    if not isinstance(values, dict):
        raise ServiceError(400, "The body has to be a JSON object with messages.", "invalid_json")
    level = [values]
    for _ in range(MAX_LEVELS):
        level = [item for outer in level for item in _items(outer) if isinstance(item, dict | list)]
        if not level:
            break
    else:
        raise ServiceError(
            400, f"The body may be nested at most {MAX_LEVELS} levels.", "invalid_json"
        )
    values = {name: value for name, value in values.items() if value is not None}
    _fill_empty_contents(values.get("messages"))
    return values


def _refuse_constant(constant):
    raise ValueError(constant)  # NaN and Infinity, which are no JSON


def _items(value):
    return value.values() if isinstance(value, dict) else value


def _fill_empty_contents(messages):
    """Give an assistant's message an empty text where a client that sends it back left it out."""
    for message in messages if isinstance(messages, list) else []:
        is_assistants = isinstance(message, dict) and message.get("role") == "assistant"
        if is_assistants and message.get("content") is None:
            message["content"] = ""


def check_request(values: dict, max_tokens: int | None = None) -> None:
    """Check the fields that every request has in common.

    Parameters
    ----------
    values : dict
        What `read_json` returned.
    max_tokens : int, optional
        The most tokens that a request may ask for.

    Raises
    ------
    ServiceError
        A value is out of its range. The error names the field and the range.
    """
    try:
        request = ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        name, allowed = _field_at(problem["loc"])
        if not name:  # half a surrogate pair, for example
            message = "The request has a field whose name is no text."
            raise ServiceError(400, message, "unknown_field") from None
        raise _out_of_range(name, allowed, max_tokens) from None
    for name in ("max_tokens", "max_completion_tokens"):
        if max_tokens and (getattr(request, name) or 0) > max_tokens:
            raise _out_of_range(name, _description(name), max_tokens)
    if request.max_tokens and request.max_completion_tokens not in (None, request.max_tokens):
        raise _out_of_range(
            "max_completion_tokens", "left out beside another max_tokens", max_tokens
        )
    if request.stream_options is not None and not request.stream:
        raise _out_of_range("stream_options", "left out where the answer comes whole", max_tokens)
    for name, value in (request.stream_options or {}).items():
        if name not in STREAM_OPTIONS and value is not None:
            raise ServiceError(
                400,
                "stream_options holds a field that is not served. The fields are: "
                f"{', '.join(STREAM_OPTIONS)}.",
                "unknown_field",
                "stream_options",
            )
        if type(value) not in (bool, type(None)):
            raise _out_of_range(f"stream_options.{name}", "true or false", max_tokens)


def _out_of_range(name, allowed, max_tokens):
    if max_tokens and allowed == _description("max_tokens"):
        allowed += f" to {max_tokens}"
    return ServiceError(400, f"{name} has to be {allowed}.", "invalid_value", name)


def _description(name):
    return ChatCompletionRequest.model_fields[name].description


def _field_at(loc: tuple) -> tuple[str, str]:
    """Return the name of the field at pydantic's ``loc``, and what it may hold."""
    name = ""
    allowed = ""
    fields = ChatCompletionRequest.model_fields
    for step in loc:
        if name == "messages" and isinstance(step, int):
            name = f"messages[{step}]"
            allowed = "an object with role and content"
            fields = ChatMessage.model_fields
        elif step in fields:
            name = f"{name}.{step}".lstrip(".")
            allowed = fields[step].description
            fields = {}
    return name, allowed


def is_text(value: Any) -> bool:
    """Tell whether a value is text that a tokenizer can read."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)
