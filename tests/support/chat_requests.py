"""Strategies for requests within the chat contract and out of it, and checks of the answers."""

from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from serving.chat.contract import ChatRequest
from support.chat import FRAGMENTS, HABITS, deltas, parts, user

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40) | st.lists(
    st.sampled_from(FRAGMENTS), max_size=8
).map("".join)
CONTENTS = TEXTS | st.lists(TEXTS, min_size=1, max_size=3).map(lambda texts: parts(*texts))
A_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": CONTENTS},
    optional={
        "name": TEXTS,
        "tool_calls": st.none() | st.just([]),
        "annotations": st.just([]),
        "refusal": st.none(),
    },
)
STOPS = st.text(min_size=1, max_size=3)
GOOD = {
    "temperature": st.floats(0, 2),
    "max_tokens": st.integers(1, 20),
    "stop": STOPS | st.lists(STOPS, max_size=4),
    "n": st.integers(1, 3),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(1, 600),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "seed": st.integers(0, 2**53 - 1),
    "response_format": st.sampled_from([None, {"type": "text"}]),
    **{name: st.sampled_from([*harmless, None]) for name, _, harmless, _ in HABITS},
}
REQUESTS = st.fixed_dictionaries(
    {
        "messages": st.builds(
            lambda earlier, last: [*earlier, *user(last)], st.lists(A_MESSAGE, max_size=3), CONTENTS
        )
    },
    optional=GOOD,
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.none() | st.integers() | st.text(max_size=4) | A_MESSAGE, max_size=5),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.fixed_dictionaries({"include_usage": st.booleans()}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", 5])},
        optional={
            "json_schema": st.none()
            | st.fixed_dictionaries(
                {
                    "schema": st.none()
                    | st.dictionaries(
                        st.sampled_from(["type", "enum", "not", "const"]),
                        st.integers() | st.sampled_from(["string", "object"]),
                        max_size=2,
                    )
                }
            )
        },
    ),
)


OTHER_FIELDS = st.dictionaries(
    st.sampled_from([*ChatRequest.model_fields, "verbosity"]), ANYTHING, min_size=1, max_size=2
)


def check_answer(chat, request):
    """Ask for an answer, check it against the contract, and return it."""
    (completion,) = chat.predict(None, dict(request))
    n, stop = request.get("n") or 1, request.get("stop") or []
    assert [choice["index"] for choice in completion["choices"]] == list(range(n))
    stops = [stop] if isinstance(stop, str) else stop
    for choice in completion["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        assert not [text for text in stops if text in choice["message"]["content"]]
    limit = request.get("max_tokens") or request.get("max_completion_tokens") or 16
    assert completion["usage"]["completion_tokens"] <= n * limit
    if request.get("seed") is not None or not request.get("temperature"):
        assert chat.predict(None, dict(request))[0]["choices"] == completion["choices"]
    return completion


def check_stream(chat, request):
    """Check the answer and the stream to a request within the contract."""
    completion = check_answer(chat, request)
    chunks = list(
        chat.predict_stream(
            None, request | {"stream": True, "stream_options": {"include_usage": True}}
        )
    )
    deltas(chunks, len(completion["choices"]))  # checks the shape of the chunks
    assert chunks[-1]["usage"]["prompt_tokens"] == completion["usage"]["prompt_tokens"]


def check_answer_or_refusal(chat, request):
    """Check that any request gets an answer within the contract, or a refusal."""
    try:
        if request.get("stream") is True:
            chunks = list(chat.predict_stream(None, request))
            assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
        else:
            check_answer(chat, request)
    except MlflowException as error:
        assert error.error_code == "INVALID_PARAMETER_VALUE"
        assert len(error.message) < 300
