"""How a model is asked whatever its flavor is: which fields it gets, and what its answer becomes.

Run: python -m helpers test tests/unit/serving/test_served_model.py
"""

from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from support.chat import AS_SHOWN, SECRET, SENT_BACK, parts, schema, user

from serving.errors import ServiceError
from serving.served_model import PIPELINE_FIELDS, ServedModel, join_chunks


class StandIn:
    """An MLflow model with these fields in its signature, of the transformers flavor or not."""

    def __init__(self, fields, is_pipeline=False, config=None):
        schema = fields and SimpleNamespace(
            input_names=lambda: fields, has_input_names=lambda: True
        )
        self.metadata = SimpleNamespace(get_input_schema=lambda: schema)
        self.loader_module = "mlflow.transformers" if is_pipeline else "mlflow.pyfunc.model"
        self._config = config

    def get_raw_model(self):
        tokenizer = Tokenizer()
        return SimpleNamespace(model=SimpleNamespace(config=self._config), tokenizer=tokenizer)

    def unwrap_python_model(self):
        raise MlflowException("This flavor has no Python model.")

    def predict(self, request):
        choice = {"index": 0, "message": {"content": "Yes."}, "finish_reason": "stop"}
        return [{"choices": [choice], "usage": {"total_tokens": 9}}]


class Tokenizer:
    """A tokenizer with a token for each character."""

    def apply_chat_template(self, messages, tokenize):
        return "".join(message["content"] for message in messages)

    def __call__(self, text):
        return {"input_ids": list(text)}


def pipeline(config=None):
    return ServedModel(StandIn(["messages", "max_tokens", "stop"], is_pipeline=True, config=config))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {}),
        ({"model": "x", "stream": True, "stream_options": {}}, {}),
        ({"max_completion_tokens": 2}, {"max_tokens": 2}),
        ({"max_tokens": 3.0}, {"max_tokens": 3}),
        ({"stop": "a"}, {"stop": ["a"]}),
        ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
        ({"temperature": 0}, {"temperature": 0.001}),
        ({"temperature": 1}, {"temperature": 1.0}),
        (
            {
                "n": 1,
                "top_p": 1,
                "tools": [],
                "response_format": {"type": "text"},
                "user": "Bob",
                "store": False,
            },
            {},
        ),
        ({"messages": user(parts("a", "b"))}, {"messages": user("a\nb")}),
        (
            {"messages": [{"role": "developer", "content": "a"}]},
            {"messages": [{"role": "system", "content": "a"}]},
        ),
        (
            {"messages": [user("a")[0] | {"name": "Bob"}]},
            {"messages": [user("a")[0] | {"name": "Bob"}]},
        ),
        ({"messages": [SENT_BACK]}, {"messages": [{"role": "assistant", "content": "Paris."}]}),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_pipeline_gets_the_types_of_its_signature(fields, kept):
    adapted = pipeline().adapt(AS_SHOWN | fields)
    assert adapted == AS_SHOWN | kept
    assert {name: type(value) for name, value in adapted.items()} == {
        name: type(value) for name, value in (AS_SHOWN | kept).items()
    }


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"n": 2}, "unknown_field", "n"),
        ({"seed": 1}, "unknown_field", "seed"),
        ({"top_k": 5}, "unknown_field", "top_k"),
        ({"tools": [{SECRET: 1}]}, "unknown_field", "tools"),
        ({"top_p": 0.5}, "unknown_field", "top_p"),
        (schema({}), "unknown_field", "response_format"),
        ({SECRET: 1}, "unknown_field", None),
        ({"messages": user([{"type": "text"}])}, "invalid_value", "messages[0].content"),
        (
            {"messages": user([{"type": "image_url", "text": "a"}])},
            "invalid_value",
            "messages[0].content",
        ),
        ({"messages": user(parts(SECRET + "\0"))}, "invalid_value", "messages[0].content"),
        ({"messages": user(parts("a") * 1001)}, "invalid_value", "messages[0].content"),
        (
            {"messages": [*user("a"), user("a")[0] | {"name": 5}]},
            "invalid_value",
            "messages[1].name",
        ),
        (
            {"messages": [user("a")[0] | {"tool_calls": [{SECRET: 1}]}]},
            "unknown_field",
            "messages[0]",
        ),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_what_would_change_a_pipelines_answer_is_refused_by_name(fields, code, param):
    with pytest.raises(ServiceError) as refusal:
        pipeline().adapt(AS_SHOWN | fields)
    assert (refusal.value.code, refusal.value.param) == (code, param)
    assert SECRET not in refusal.value.message


def test_a_model_gets_the_fields_of_its_signature_as_they_are():
    fields = {"max_completion_tokens": 2, "n": 2, "temperature": 0, "stop": "a"}
    request = AS_SHOWN | fields
    assert ServedModel(StandIn(None)).adapt(request) == request
    assert ServedModel(StandIn(["messages", *fields])).adapt(request) == request
    few = ServedModel(StandIn(["messages", "n"])).adapt(AS_SHOWN | {"n": 1, "top_p": 1})
    assert few == AS_SHOWN | {"n": 1}


def test_a_python_model_with_a_pipelines_fields_is_no_pipeline():
    model = ServedModel(StandIn(sorted(PIPELINE_FIELDS)))
    request = {"messages": [{"role": "developer", "content": "a"}], "temperature": 0}
    assert model.adapt(request) == request


class TextConfig:
    """The configuration of a model of text and images, whose context length is that of its text."""

    def __init__(self, longest):
        self.text_config = SimpleNamespace(max_position_embeddings=longest)

    def get_text_config(self):
        return self.text_config


@pytest.mark.parametrize(
    ("length", "longest", "fits"), [(4, 5, True), (5, 5, False), (9, None, True)]
)
def test_a_prompt_longer_than_a_pipelines_context_is_refused(length, longest, fits):
    model = pipeline(TextConfig(longest))
    request = {"messages": user("x" * length)}
    if fits:
        assert model.complete(request)["choices"][0]["message"]["content"] == "Yes."
        return
    with pytest.raises(ServiceError) as refusal:
        model.complete(request)
    assert (refusal.value.code, refusal.value.param) == ("context_length_exceeded", "messages")


def test_the_chunks_of_several_answers_become_one_completion():
    def chunk(index, text=None, reason=None):
        return {
            "id": "1",
            "created": 5,
            "choices": [
                {
                    "index": index,
                    "finish_reason": reason,
                    "delta": {"content": text} if text else {},
                }
            ],
        }

    answer = join_chunks(
        [
            chunk(1, "b"),
            chunk(0, "a"),
            chunk(1, "d"),
            chunk(0, "c"),
            chunk(0, None, "stop"),
            chunk(1, None, "length"),
            {"id": "1", "created": 5, "choices": [], "usage": {"total_tokens": 4}},
        ]
    )
    assert [
        (choice["index"], choice["message"], choice["finish_reason"])
        for choice in answer["choices"]
    ] == [
        (0, {"role": "assistant", "content": "ac"}, "stop"),
        (1, {"role": "assistant", "content": "bd"}, "length"),
    ]
    assert (answer["object"], answer["id"], answer["usage"]) == (
        "chat.completion",
        "1",
        {"total_tokens": 4},
    )
