"""What a request and the settings may hold, and the error for everything else. No model.

Run: python -m helpers test tests/unit/serving/test_contract.py
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.pyfunc.scoring_server import infer_and_parse_data
from mlflow.types.schema import AnyType
from pydantic import ValidationError
from support.chat import (
    A_TOOL,
    AS_SHOWN,
    HABITS,
    MESSAGE_FIELDS,
    MESSAGES,
    SECRET,
    SENT_BACK,
    parts,
    schema,
    user,
)

from serving.chat.contract import (
    SERVED,
    SETTINGS,
    SIGNATURE,
    ChatRequest,
    Refusal,
    UnusedFields,
    read_request,
    read_settings,
    to_python,
)
from serving.chat.model import usage
from serving.chat.table import is_gap, read_table

NOT_SERVED = "holds a field that is not served. The fields are:"
FIELDS = (
    "messages, temperature, max_tokens, max_completion_tokens, stop, n, stream, top_p, top_k, "
    "frequency_penalty, presence_penalty, seed, response_format, stream_options"
)
LAST_ROLE = "The last message's role"  # in an error: words that are no field


def refusal_of(call, *arguments):
    """Return the refusal that a call raises. It has the caller's code and quotes no request."""
    with pytest.raises(Refusal) as refusal:
        call(*arguments)
    error = refusal.value
    assert (error.error_code, error.get_http_status_code()) == ("INVALID_PARAMETER_VALUE", 400)
    assert len(error.message) < 300
    assert SECRET not in error.serialize_as_json()
    return error


# --- the signature --------------------------------------------------------------------------


def test_the_signature_has_every_field_as_optional_and_of_any_type():
    columns = {column.name: column for column in SIGNATURE.inputs}
    # MLflow drops a field that no signature has: a tool would be ignored, and not refused.
    assert list(columns) == [*SERVED, *UnusedFields.model_fields]
    assert set(columns) == set(ChatRequest.model_fields)
    assert ", ".join(SERVED) == FIELDS
    assert list(UnusedFields.model_fields) == [name for name, *_ in HABITS]
    assert not any(column.required for column in columns.values())
    options = columns.pop("stream_options").type.properties
    assert {option.name for option in options} == {"include_usage", "include_obfuscation"}
    assert not any(option.required for option in options)
    assert all(column.type == AnyType() for column in columns.values())
    outputs = ["id", "object", "created", "model", "choices", "usage"]
    assert SIGNATURE.outputs.input_names() == outputs
    assert ModelSignature.from_dict(SIGNATURE.to_dict()) == SIGNATURE


# --- requests out of the contract -----------------------------------------------------------

OBJECT = "has to be an object with role and content."
ROLE = "has to be system, developer, user or assistant."
TEXT = "has to be text, without NUL and without half a surrogate pair."
CONTENT = (
    "messages[0].content has to be text, or 1 to 1000 parts of text, "
    "without NUL and without half a surrogate pair."
)
TEMPERATURE = "temperature has to be a number from 0 to 2."
MAX_TOKENS = "max_tokens has to be a whole number from 1 up to what the context leaves."
MAX_COMPLETION_TOKENS = (
    "max_completion_tokens has to be a whole number from 1 up to what the context leaves."
)
BOTH_LIMITS = "max_completion_tokens has to be left out beside another max_tokens."
STOP = "stop has to be up to 4 texts of 1 to 100 characters."
STOP_IN_JSON = "stop has to be left out where response_format asks for JSON, which it would cut."
N = "n has to be a whole number from 1 to 8."
STREAM = "stream has to be true, for predict_stream alone, false or left out."
TOP_P = "top_p has to be a number above 0, up to 1."
TOP_K = "top_k has to be a whole number from 1."
FREQUENCY = "frequency_penalty has to be a number from -2 to 2."
PRESENCE = "presence_penalty has to be a number from -2 to 2."
SEED = "seed has to be a whole number from 0 to 2**53 - 1."
FORMAT = "response_format has to be an object with the type text, json_object or json_schema."
FORMAT_TYPE = "response_format.type has to be text, json_object or json_schema."
JSON_SCHEMA = "response_format.json_schema has to be an object with name and schema."
SCHEMA = "response_format.json_schema.schema has to be an object: a JSON schema."
SCHEMA_NAME = "response_format.json_schema.name has to be a text of up to 64 characters."
OPTIONS = "stream_options has to be include_usage: true or false, for a stream."

# Fields of a request, and the sentence that refuses them.
BAD = [
    ({}, MESSAGES),
    ({"messages": None}, MESSAGES),
    ({"messages": []}, MESSAGES),
    ({"messages": SECRET}, MESSAGES),
    ({"messages": user(SECRET)[0]}, MESSAGES),
    ({"messages": user(SECRET) * 1001}, MESSAGES),
    ({"messages": [SECRET]}, f"messages[0] {OBJECT}"),
    ({"messages": [None]}, f"messages[0] {OBJECT}"),
    ({"messages": [{"content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [{"role": "tool", "content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [{"role": 5, "content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [*user("a"), {"role": SECRET, "content": "b"}]}, f"messages[1].role {ROLE}"),
    ({"messages": [{"role": "user"}]}, CONTENT),
    ({"messages": user(None)}, CONTENT),
    ({"messages": user(5)}, CONTENT),
    ({"messages": user([])}, CONTENT),
    ({"messages": user([SECRET])}, CONTENT),
    ({"messages": user(parts(SECRET)[0])}, CONTENT),
    ({"messages": user([{"type": "text"}])}, CONTENT),
    ({"messages": user([{"text": SECRET}])}, CONTENT),
    ({"messages": user([*parts("a"), {"type": "text", "text": None}])}, CONTENT),
    ({"messages": user([{"type": "image_url", "image_url": {"url": SECRET}}])}, CONTENT),
    ({"messages": user([parts("a")[0] | {SECRET: 1}])}, CONTENT),
    ({"messages": user(parts("a", SECRET + "\ud83d"))}, CONTENT),
    ({"messages": user(parts(SECRET + "\0"))}, CONTENT),
    ({"messages": user(parts(SECRET) * 1001)}, CONTENT),
    ({"messages": user(SECRET + "\ud83d")}, CONTENT),
    ({"messages": user(SECRET + "\0")}, CONTENT),
    ({"messages": [user("a")[0] | {"name": 5}]}, f"messages[0].name {TEXT}"),
    ({"messages": [user("a")[0] | {"name": SECRET + "\0"}]}, f"messages[0].name {TEXT}"),
    (
        {"messages": [SENT_BACK | {"tool_calls": [A_TOOL]}, *user("a")]},
        "messages[0].tool_calls has to be empty or left out: this model calls no tools.",
    ),
    (
        {"messages": [*user("a"), SENT_BACK | {"annotations": [{SECRET: 1}]}, *user("b")]},
        "messages[1].annotations has to be empty or left out.",
    ),
    (
        {"messages": [SENT_BACK | {"refusal": SECRET}, *user("a")]},
        f"messages[0] {NOT_SERVED} {MESSAGE_FIELDS}.",
    ),
    (
        {"messages": [*user("a"), {"role": "assistant", "content": SECRET}]},
        f"{LAST_ROLE} has to be user or system: the assistant speaks next.",
    ),
    ({"temperature": -1}, TEMPERATURE),
    ({"temperature": 2.1}, TEMPERATURE),
    ({"temperature": math.inf}, TEMPERATURE),
    ({"temperature": math.nan}, TEMPERATURE),
    ({"temperature": np.float64("nan")}, TEMPERATURE),
    ({"temperature": SECRET}, TEMPERATURE),
    ({"temperature": True}, TEMPERATURE),
    ({"temperature": [0.5]}, TEMPERATURE),
    ({"max_tokens": 0}, MAX_TOKENS),
    ({"max_tokens": "4"}, MAX_TOKENS),
    ({"max_tokens": 4.5}, MAX_TOKENS),
    ({"max_tokens": True}, MAX_TOKENS),
    ({"max_completion_tokens": 0}, MAX_COMPLETION_TOKENS),
    ({"max_completion_tokens": "4"}, MAX_COMPLETION_TOKENS),
    ({"max_completion_tokens": 4, "max_tokens": 5}, BOTH_LIMITS),
    ({"max_completion_tokens": 5, "max_tokens": 4}, BOTH_LIMITS),
    ({"max_completion_tokens": 4, "max_tokens": 0}, MAX_TOKENS),
    ({"stop": [SECRET] * 5}, STOP),
    ({"stop": ""}, STOP),
    ({"stop": [""]}, STOP),
    ({"stop": "s" * 101}, STOP),
    ({"stop": ["s" * 101]}, STOP),
    ({"stop": ["a", None]}, STOP),  # in a list, a null is a value
    ({"n": 0}, N),
    ({"n": 9}, N),
    ({"n": 1.5}, N),
    ({"stream": SECRET}, STREAM),
    ({"top_p": 0}, TOP_P),
    ({"top_p": 1.01}, TOP_P),
    ({"top_k": 0}, TOP_K),
    ({"top_k": SECRET}, TOP_K),
    ({"frequency_penalty": 2.5}, FREQUENCY),
    ({"frequency_penalty": -2.5}, FREQUENCY),
    ({"presence_penalty": 2.5}, PRESENCE),
    ({"presence_penalty": -2.5}, PRESENCE),
    ({"seed": -1}, SEED),
    ({"seed": 2**53}, SEED),
    ({"seed": SECRET}, SEED),
    ({"stream_options": [SECRET]}, OPTIONS),
    ({"stream_options": True}, OPTIONS),
    (
        {"stream_options": {"include_usage": SECRET}},
        "stream_options.include_usage has to be true or false.",
    ),
    (
        {"stream_options": {"include_obfuscation": 1}},
        "stream_options.include_obfuscation has to be true or false.",
    ),
    (
        {"stream_options": {"include_usage": True, SECRET: 1}},
        f"stream_options {NOT_SERVED} include_usage, include_obfuscation.",
    ),
    ({"response_format": "json_object"}, FORMAT),
    ({"response_format": [SECRET]}, FORMAT),
    ({"response_format": {}}, FORMAT_TYPE),
    ({"response_format": {"type": None}}, FORMAT_TYPE),
    ({"response_format": {"type": SECRET}}, FORMAT_TYPE),
    (
        {"response_format": {"type": "json_schema", "schema": {"type": SECRET}}},
        f"response_format {NOT_SERVED} type, json_schema.",
    ),
    ({"response_format": {"type": "json_schema"}}, JSON_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": None}}, JSON_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": SECRET}}, JSON_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": SECRET}}}, SCHEMA),
    ({"response_format": {"type": "text", "json_schema": {"schema": 5}}}, SCHEMA),
    (schema(None), SCHEMA),
    (schema([SECRET]), SCHEMA),
    (schema(True), SCHEMA),
    (schema({}, name=5), SCHEMA_NAME),
    (schema({}, name=SECRET * 9), SCHEMA_NAME),
    (
        schema({}, description=[SECRET]),
        "response_format.json_schema.description has to be a text.",
    ),
    (schema({}, strict=1), "response_format.json_schema.strict has to be true or false."),
    (
        schema({}, definition={SECRET: 1}),
        f"response_format.json_schema {NOT_SERVED} name, description, strict, schema.",
    ),
    ({"response_format": {"type": "json_object"}, "stop": SECRET}, STOP_IN_JSON),
    (schema({}) | {"stop": [SECRET]}, STOP_IN_JSON),
    *(
        ({name: value}, f"{name} has to be {allowed}.")
        for name, allowed, _, harmful in HABITS
        for value in harmful
    ),
]


@pytest.mark.parametrize(
    ("fields", "says"), BAD, ids=lambda value: repr(value)[:40] if isinstance(value, dict) else ""
)
def test_a_field_out_of_its_range_is_refused_by_name(fields, says):
    request = fields if "messages" in fields or not fields else {"messages": user(SECRET)} | fields
    error = refusal_of(read_request, request, "Row 2: ")
    assert error.message == f"Row 2: {says}"
    if NOT_SERVED in says:
        assert (error.code, error.allowed) == ("unknown_field", None)
        assert says.startswith(f"{error.field} {NOT_SERVED}")
    else:
        assert error.code == "invalid_value"
        assert says == f"{error.field or LAST_ROLE} has to be {error.allowed}."
    body = json.loads(error.serialize_as_json())
    for name in ("error_code", "message", "field", "code", "allowed"):
        assert body[name] == getattr(error, name)


def test_the_table_of_bad_requests_has_every_field():
    assert {says.split()[0].split(".")[0] for _, says in BAD} >= set(ChatRequest.model_fields)


@pytest.mark.parametrize("key", [5, "\ud83d", SECRET, ("a", 1), "Messages", "definition"])
def test_an_unknown_field_is_refused_without_its_name(key):
    error = refusal_of(read_request, AS_SHOWN | {key: SECRET}, "Row 3: ")
    assert error.message == f"Row 3: The request {NOT_SERVED} {FIELDS}."
    assert (error.field, error.code, error.allowed) == (None, "unknown_field", None)
    error = refusal_of(read_request, {"messages": [user("a")[0] | {key: SECRET}]})
    assert error.message == f"messages[0] {NOT_SERVED} {MESSAGE_FIELDS}."
    assert error.field == "messages[0]"


@pytest.mark.parametrize(
    "values", [AS_SHOWN | dict.fromkeys(range(1000), 1), {"messages": [SECRET] * 1000}]
)
def test_many_faults_make_one_error(values):
    with pytest.raises(ValidationError) as errors:
        ChatRequest.model_validate(values)
    assert errors.value.error_count() == 1


@pytest.mark.parametrize("value", ["The sky is", 5, None, b"x", [["a"]], []])
def test_a_request_that_is_no_object_is_refused(value):
    error = refusal_of(read_request, value, "Row 1: ")
    assert error.message == "Row 1: A request has to be an object with messages."
    assert (error.field, error.allowed) == (None, "an object with messages")


def test_a_value_nested_too_deeply_is_refused():
    deep = SECRET
    for _ in range(100_000):
        deep = [deep]
    assert refusal_of(read_request, AS_SHOWN | {"stop": deep}).message == STOP


# --- requests within the contract -----------------------------------------------------------

JSON_OBJECT = {"response_format": {"type": "json_object"}}
# Fields of a request, and what one of its fields becomes.
GOOD = [
    ({}, "temperature", None),
    ({}, "max_tokens", None),
    ({}, "stop", []),
    ({}, "n", 1),
    ({}, "stream", None),
    ({}, "top_p", 1.0),
    ({}, "top_k", None),
    ({}, "frequency_penalty", 0.0),
    ({}, "presence_penalty", 0.0),
    ({}, "seed", None),
    ({}, "response_format", None),
    ({}, "stream_options", None),
    ({"temperature": 0}, "temperature", 0.0),
    ({"temperature": 2}, "temperature", 2.0),
    ({"temperature": np.float32(0.5)}, "temperature", 0.5),
    ({"max_tokens": 1}, "max_tokens", 1),
    ({"max_tokens": 4.0}, "max_tokens", 4),
    ({"max_completion_tokens": 4.0}, "max_tokens", 4),
    ({"max_completion_tokens": 4, "max_tokens": 4}, "max_tokens", 4),
    ({"max_completion_tokens": 4, "max_tokens": None}, "max_tokens", 4),
    ({"max_completion_tokens": None, "max_tokens": 4}, "max_tokens", 4),
    ({"stop": "s" * 100}, "stop", ["s" * 100]),
    ({"stop": list("abcd")}, "stop", list("abcd")),
    ({"stop": ("a", "b")}, "stop", ["a", "b"]),
    ({"stop": np.array(["a", "b"], dtype=object)}, "stop", ["a", "b"]),
    ({"stop": "a", "response_format": {"type": "text"}}, "stop", ["a"]),
    ({"stop": []} | JSON_OBJECT, "stop", []),
    ({"stop": None} | JSON_OBJECT, "stop", []),
    ({"n": 8}, "n", 8),
    ({"n": np.int64(2)}, "n", 2),
    ({"n": np.float64(2)}, "n", 2),
    ({"stream": True}, "stream", True),
    ({"stream": False}, "stream", False),
    ({"top_p": 1}, "top_p", 1.0),
    ({"top_k": 1}, "top_k", 1),
    ({"top_k": 7.0}, "top_k", 7),
    ({"frequency_penalty": -2}, "frequency_penalty", -2.0),
    ({"presence_penalty": 2}, "presence_penalty", 2.0),
    ({"seed": 0}, "seed", 0),
    ({"seed": 2**53 - 1}, "seed", 2**53 - 1),
]


@pytest.mark.parametrize(("fields", "name", "value"), GOOD)
def test_a_field_within_its_range_is_read(fields, name, value):
    read = getattr(read_request(AS_SHOWN | fields), name)
    assert (read, type(read)) == (value, type(value))


# A message, and the role, content and name that it becomes.
GOOD_MESSAGES = [
    *(({"role": role, "content": ""}, role, "", "") for role in ("system", "user", "assistant")),
    ({"role": "developer", "content": "developer"}, "system", "developer", ""),
    ({"role": "developer", "content": parts("a", "b")}, "system", "a\nb", ""),
    ({"role": "user", "content": np.str_("a")}, "user", "a", ""),
    (
        {"role": "user", "content": "a", "name": np.str_("日本 <|end|>")},
        "user",
        "a",
        "日本 <|end|>",
    ),
    *(
        ({"role": "user", "content": content}, "user", text, "")
        for content, text in [
            (parts("a"), "a"),
            (parts("a", "", "b"), "a\n\nb"),
            (parts("a\n", "日本🙂"), "a\n\n日本🙂"),
            (parts("x") * 1000, "\n".join("x" * 1000)),
            (tuple(parts("a", "b")), "a\nb"),
            (np.array(parts(np.str_("a"), "b"), dtype=object), "a\nb"),
        ]
    ),
    (SENT_BACK, "assistant", "Paris.", ""),
    (SENT_BACK | {"tool_calls": [], "annotations": np.array([])}, "assistant", "Paris.", ""),
    (SENT_BACK | {"reasoning_content": None, "anything": None}, "assistant", "Paris.", ""),
]


@pytest.mark.parametrize(
    ("message", "role", "content", "name"), GOOD_MESSAGES, ids=lambda value: repr(value)[:30]
)
def test_a_message_becomes_a_role_a_text_and_a_name(message, role, content, name):
    messages = [message, message, *user("b")]
    for sent in (messages, tuple(messages), np.array(messages, dtype=object)):
        *same, last = read_request({"messages": sent}).messages
        assert [(read.role, read.content, read.name) for read in same] == [
            (role, content, name)
        ] * 2
        assert {type(text) for read in same for text in (read.content, read.name)} == {str}
        assert (last.role, last.content) == ("user", "b")


def test_a_request_may_have_1000_messages():
    assert len(read_request({"messages": user("a") * 1000}).messages) == 1000


@pytest.mark.parametrize(("name", "_", "harmless", "__"), HABITS, ids=[row[0] for row in HABITS])
def test_a_field_that_is_not_used_changes_nothing_else(name, _, harmless, __):
    plain = read_request(AS_SHOWN)
    for value in (*harmless, None):
        read = read_request(AS_SHOWN | {name: value})
        assert getattr(read, name) == value
        assert read.model_copy(update={name: None}) == plain


GOOD_FORMATS = [
    ({"type": "text"}, "text", None),
    ({"type": "json_object", "json_schema": None}, "json_object", None),
    (schema({})["response_format"], "json_schema", {}),
    (
        schema({"const": 1}, name="n" * 64, strict=False, description="x")["response_format"],
        "json_schema",
        {"const": 1},
    ),
    # In a schema, a null is a value.
    (
        schema({"const": None, "enum": [None, 1]})["response_format"],
        "json_schema",
        {"const": None, "enum": [None, 1]},
    ),
    (schema({"minimum": np.int64(3)})["response_format"], "json_schema", {"minimum": 3}),
]


@pytest.mark.parametrize(("value", "kind", "definition"), GOOD_FORMATS)
def test_the_form_of_an_answer_is_text_an_object_or_a_schema(value, kind, definition):
    response_format = read_request(AS_SHOWN | {"response_format": value}).response_format
    json_schema = response_format.json_schema
    assert (response_format.type, json_schema and json_schema.definition) == (kind, definition)


# Fields with nulls in them, and the same request without nulls.
NULLS = [
    (dict.fromkeys(ChatRequest.model_fields) | {"x": None} | AS_SHOWN, {}),
    (
        {"messages": [user("a")[0] | {"name": None, "tool_calls": None, "audio": None}]},
        {"messages": user("a")},
    ),
    ({"messages": user([parts("a")[0] | {"x": None}])}, {"messages": user(parts("a"))}),
    ({"stream_options": {"include_usage": None, "x": None}}, {"stream_options": {}}),
    (
        {"stream_options": {}},
        {"stream_options": {"include_usage": np.False_, "include_obfuscation": False}},
    ),
    (
        {"response_format": {"type": "text", "json_schema": None, "x": None}},
        {"response_format": {"type": "text"}},
    ),
    (schema({}, name=None, strict=None, description=None, x=None), schema({}, name="")),
]


@pytest.mark.parametrize(("nulls", "plain"), NULLS)
def test_a_null_is_a_field_not_given(nulls, plain):
    assert read_request(AS_SHOWN | nulls) == read_request(AS_SHOWN | plain)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(1), 1),
        (np.array([[1.5]]), [[1.5]]),
        ({"a": (np.array([np.str_("b")], dtype=object),)}, {"a": [["b"]]}),
        # Five levels down to the text of a part.
        (
            {"messages": ({"content": np.array([{"text": np.str_("a")}])},)},
            {"messages": [{"content": [{"text": "a"}]}]},
        ),
        ((((((((1,),),),),),),), [[[[[((1,),)]]]]]),
        ({"a": {"b": {"c": {"d": {"e": (1,)}}}}}, {"a": {"b": {"c": {"d": {"e": (1,)}}}}}),
    ],
)
def test_values_of_numpy_become_pythons_own(value, expected):
    assert repr(to_python(value)) == repr(expected)


# --- tables ---------------------------------------------------------------------------------


def test_a_table_has_a_request_in_each_row_and_a_gap_is_null():
    table = pd.DataFrame(
        {
            "messages": [user("a"), None],
            "max_tokens": [3, math.nan],
            "seed": pd.array([1, pd.NA], dtype="Int64"),
            "stop": ["nan", pd.NaT],
        },
        index=[5, 5],
    )
    assert read_table(table) == [
        {"messages": user("a"), "max_tokens": 3.0, "seed": 1, "stop": "nan"},
        {"messages": None, "max_tokens": None, "seed": None, "stop": None},
    ]
    assert read_table(table[:0]) == []


@pytest.mark.parametrize("value", [pd.NA, pd.NaT, math.nan, np.float64("nan")])
def test_what_pandas_fills_in_is_a_gap(value):
    assert is_gap(value)


@pytest.mark.parametrize("value", ["nan", "", 0, 0.0, False, [], [math.nan], np.array([math.nan])])
def test_a_value_is_no_gap(value):
    assert not is_gap(value)


def test_a_table_without_columns_or_with_two_of_one_name_is_refused():
    assert refusal_of(read_table, pd.DataFrame()).message == MESSAGES
    two = pd.DataFrame([[SECRET] * 2], columns=["messages", "messages"])
    error = refusal_of(read_table, two)
    assert error.message == "A table has to be of one column for each field."


def table_of(instances):
    """Return the table that MLflow's server makes of a body with ``instances``."""
    return pd.DataFrame([infer_and_parse_data({"instances": instances}, SIGNATURE.inputs)])


@pytest.mark.parametrize(
    "requests",
    [
        [{"messages": user("a")}],
        [{"messages": user("a"), "stop": ["a", "b"]}],
        [{"messages": user("a"), "max_tokens": 3}, {"messages": user("b"), "max_tokens": 4}],
    ],
)
def test_a_table_of_instances_has_several_requests_in_a_row(requests):
    assert [to_python(request) for request in read_table(table_of(requests))] == requests


def test_instances_with_different_fields_are_refused():
    fewer = table_of([{"messages": user(SECRET), "n": 2}, {"messages": user("b")}])
    no_list = pd.DataFrame([{"messages": [user(SECRET), user("b")], "user": "ab"}])
    for table in (fewer, no_list):
        assert refusal_of(read_table, table).message.endswith("or the same fields with each.")


@pytest.mark.parametrize("messages", [user("a"), [], SECRET, 5])
def test_a_row_without_several_conversations_is_one_request(messages):
    assert read_table(pd.DataFrame([{"messages": messages, "n": 2}])) == [
        {"messages": messages, "n": 2}
    ]


# --- settings -------------------------------------------------------------------------------


def test_a_setting_that_is_not_given_has_its_default():
    defaults = {
        "model": "slm-onnx",
        "max_tokens": 256,
        "temperature": 0.0,
        "max_tokens_limit": 2048,
        "max_rows": 256,
        "max_waiting": 512,
        "cache_tokens": None,
        "threads": None,
        "provider": "cpu",
    }
    assert read_settings(SETTINGS).model_dump() == defaults
    assert read_settings(None).model_dump() == defaults
    given = {"provider": "cpu", "temperature": 2, "cache_tokens": 2, "threads": None}
    assert read_settings(given).model_dump() == defaults | given


FROM_1 = "a whole number from 1"
CPU = "cpu: for another device, use track B's wrapper or an engine made for it"
CACHE_TOKENS = "a whole number from 2, or null for twice the model's context length"


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("model", 5, "the name that answers carry, a text"),
        ("max_tokens", 0, FROM_1),
        ("max_tokens", "16", FROM_1),
        ("temperature", 5, "a number from 0 to 2"),
        ("temperature", "hot", "a number from 0 to 2"),
        ("max_tokens_limit", 0, FROM_1),
        ("max_rows", 0, FROM_1),
        ("max_waiting", 0, FROM_1),
        ("max_waiting", None, FROM_1),
        ("cache_tokens", 1, CACHE_TOKENS),
        ("cache_tokens", True, CACHE_TOKENS),
        ("threads", 0, "a whole number from 1, or null for one on each core"),
        ("provider", "cuda", CPU),
        ("provider", "dml", CPU),
        ("kept_conversations", 4, f"left out: the settings are {', '.join(SETTINGS)}"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(setting, value, allowed):
    error = refusal_of(read_settings, {setting: value})
    assert error.message == f"model_config's {setting} has to be {allowed}."
    assert (error.field, error.code, error.allowed) == (None, "invalid_value", allowed)


# --- usage ----------------------------------------------------------------------------------


def test_usage_counts_the_prompt_once_and_adds_up_the_answers():
    rows = [SimpleNamespace(prompt=[1, 2, 3], token_count=tokens) for tokens in (4, 5)]
    assert usage(rows) == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
