"""Checks the exercises of Operations."""

import mlflow
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag
from mlflow.exceptions import MlflowException
from openai.types.chat import ChatCompletionChunk

from helpers.exercises import NOT_WRITTEN, exercise


@exercise("roll back")
def _(find_former):
    def version(number, **tags):
        return ModelVersion(
            "slm", str(number), 0, tags=[ModelVersionTag(*tag) for tag in tags.items()]
        )

    former = find_former(version(9, model="tiny-phi3", replaced="4"))
    if former is ...:
        return NOT_WRITTEN
    if str(former) == "8":
        return "the version before it by number need not be the one that it replaced: read the tag."
    if str(former) != "4":
        return f"version 9 has replaced version 4, and you return {former!r}. The tag is called replaced."
    if find_former(version(1, model="tiny-phi3")) is not None:
        return "a version without the tag has replaced nobody: return None for it."
    return None


@exercise("scorer")
def _(ends_well):
    found = ends_well({"answer": "The capital of Spain is Madrid."})
    if found is ...:
        return NOT_WRITTEN
    if found is not True:
        return f"an answer that ends with a full stop is True, and yours is {found!r}."
    for answer, expected in (
        ("Is it? Yes!", True),
        ("Why is it so?", True),
        ("The capital of Spain is", False),
        ("First. And then", False),
        ("", False),
    ):
        if (found := ends_well({"answer": answer})) is not expected:
            return f"for the answer {answer!r} it has to be {expected}, and yours is {found!r}."
    if ends_well({"answer": "Madrid. \n"}) is not True:
        return "a space or a line break after the full stop doesn't count: strip it first."
    if ends_well({"refused": "messages has to be a list."}) is not None:
        return "a refusal is no answer: return None for it."
    return (
        None
        if ends_well(None) is None
        else "a row that failed has None as its outputs: return None for it."
    )


@exercise("failed calls")
def _(failures, experiment, refused):
    if not isinstance(failures, str):
        return "a filter is text, such as \"trace.name = 'chat'\"."
    try:
        found = mlflow.search_traces(
            locations=[experiment.experiment_id],
            filter_string=failures,
            max_results=500,
            include_spans=False,
            return_type="list",
        )
    except MlflowException as error:
        return f"MLflow can't read this filter: {error.message.splitlines()[0]}"
    if any(trace.info.state.value == "OK" for trace in found):
        return "it finds calls that went well, too."
    if refused not in [trace.info.trace_id for trace in found]:
        return "it doesn't find the call that failed above."
    return None


@exercise("stream usage")
def _(read_stream):
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "slm"}

    def chunk(delta, reason=None):
        return ChatCompletionChunk.model_validate(
            head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        )

    chunks = [
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Ma"}),
        chunk({"content": "drid"}),
        chunk({}, "stop"),
        ChatCompletionChunk.model_validate(
            head
            | {
                "choices": [],
                "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
            }
        ),
    ]
    read = read_stream(chunks)
    if read is ...:
        return NOT_WRITTEN
    if not isinstance(read, tuple) or len(read) != 2:
        return "it returns two things: return text, tokens."
    text, tokens = read
    if text != "Madrid":
        return f"of a stream with the pieces 'Ma' and 'drid', the whole text is 'Madrid', and yours is {text!r}."
    return (
        None
        if tokens == 2
        else (
            f"that stream's usage counts 2 tokens of the answer, and yours are {tokens!r}: usage.completion_tokens."
        )
    )


@exercise("outside the band")
def _(find_outside):
    found = find_outside([5, 1, 2, 9, 8, 5], 2, 8)
    if found is ...:
        return NOT_WRITTEN
    if not isinstance(found, list):
        return f"it returns a list of numbers, and yours is of the type {type(found).__name__}."
    if found == [1, 3]:
        return "the windows are counted from 1: enumerate(values, 1)."
    if found == [2, 3, 4, 5]:
        return "a value on the line is inside: 2 and 8 belong to a band from 2 to 8."
    if found == [4]:
        return "a value below the band is outside as well."
    return (
        None
        if found == [2, 4]
        else (
            f"of the values 5, 1, 2, 9, 8, 5 and a band from 2 to 8, windows 2 and 4 are outside; yours are {found}."
        )
    )


@exercise("retry")
def _(pause):
    for status, headers, right in [
        (429, {"retry-after": "2"}, 2),
        (503, {"retry-after": "7"}, 7),
        (429, {}, 1),
        (400, {}, None),
        (200, {}, None),
        (404, {"retry-after": "5"}, None),
    ]:
        found = pause(status, headers)
        if found is ...:
            return NOT_WRITTEN
        if isinstance(found, str):
            return "a header is text, and nobody can sleep for a text: make a number of it, with float."
        if found != right or isinstance(found, bool):
            return (
                f"a {status} with the headers {headers} asks for {right}, and yours says {found}."
            )
    return None
