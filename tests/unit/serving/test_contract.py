"""What a request may hold, and the sentence for each that may not be answered. No model.

Run: python -m helpers test tests/unit/serving/test_contract.py
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from support import ROOT
from support.chat import (
    AS_SHOWN,
    BAD,
    CONTENT,
    FIELDS,
    HABITS,
    MESSAGE_FIELDS,
    MESSAGES,
    SECRET,
    SENT_BACK,
    TEMPERATURE,
    parts,
    schema,
    user,
)

from serving.chat_model import (
    SETTINGS,
    SIGNATURE,
    ChatModel,
    ChatRequest,
    ClientHabits,
    Refusal,
    Row,
    _plain,
    read_request,
    read_table,
    usage,
)

OPTIONS = "stream_options has to be include_usage: true or false, for a stream."


def refusal_of(call, *arguments):
    """Return the sentence of a refusal, which has the caller's code and is short."""
    with pytest.raises(MlflowException) as refusal:
        call(*arguments)
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
    assert len(refusal.value.message) < 300
    assert SECRET not in refusal.value.message
    assert str(ROOT) not in refusal.value.message
    return refusal.value.message


def test_the_signature_has_the_fields_of_the_chat_contract_that_work_and_those_that_clients_send_by_habit():
    fields = [column.name for column in SIGNATURE.inputs]
    assert set(fields) == set(ChatRequest.model_fields)
    assert {"messages", "temperature", "max_tokens", "stop", "n", "stream", "top_p", "top_k", "frequency_penalty",
            "presence_penalty", "seed"} <= set(fields)
    served = len(FIELDS.split(", "))
    assert ", ".join(fields[:served]) == FIELDS
    # What is in no signature, MLflow drops: a tool would be ignored, and not refused.
    assert set(fields[served:]) == set(ClientHabits.model_fields) == {name for name, *_ in HABITS}
    assert not any(column.required for column in SIGNATURE.inputs)
    assert [column.name for column in SIGNATURE.outputs] == ["id", "object", "created", "model", "choices", "usage"]


LAST = "The last message's role"  # no field


def test_the_table_of_what_is_refused_names_every_field():
    named = {says.partition(" ")[0] for _, says in BAD}
    assert set(ChatRequest.model_fields) - named == {"stream_options"}  # which has a test of its own


@pytest.mark.parametrize(("fields", "says"), BAD, ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "")
def test_bad_input_is_refused_by_name_and_with_its_parts_as_data(fields, says):
    request = fields if "messages" in fields or not fields else {"messages": user(SECRET)} | fields
    with pytest.raises(Refusal) as refusal:
        read_request(request, "Row 2: ")
    error = refusal.value
    assert error.message == f"Row 2: {says}"
    assert len(error.message) < 300
    if " holds a field that is not served." in says:
        assert (error.code, error.allowed) == ("unknown_field", None)
        assert says.startswith(f"{error.field} holds a field")
    else:
        assert error.code == "invalid_value"
        assert says == f"{error.field or LAST} has to be {error.allowed}."
    body = json.loads(error.serialize_as_json())
    assert body.items() >= {"error_code": "INVALID_PARAMETER_VALUE", "message": f"Row 2: {says}", "code": error.code,
                            "field": error.field, "allowed": error.allowed}.items()
    assert SECRET not in repr(body)
    assert error.get_http_status_code() == 400


@pytest.mark.parametrize("values", [AS_SHOWN | {SECRET: 1}, AS_SHOWN | dict.fromkeys(range(200), 1)])
def test_of_a_field_that_is_unknown_no_name_is_told(values):
    with pytest.raises(Refusal) as refusal:
        read_request(values)
    assert (refusal.value.field, refusal.value.code, refusal.value.allowed) == (None, "unknown_field", None)


GOOD_FIELDS = [
    ({}, "n", 1), ({}, "stop", []), ({}, "temperature", None), ({}, "max_tokens", None), ({}, "top_p", 1.0),
    ({}, "top_k", None), ({}, "frequency_penalty", 0.0), ({}, "presence_penalty", 0.0), ({}, "seed", None),
    ({}, "stream", None), ({}, "stream_options", None),
    ({"stop": "a"}, "stop", ["a"]), ({"stop": ["a", "b", "c", "d"]}, "stop", ["a", "b", "c", "d"]),
    ({"stop": "s" * 100}, "stop", ["s" * 100]),
    ({"temperature": 0}, "temperature", 0), ({"temperature": 2}, "temperature", 2),
    ({"max_tokens": 1}, "max_tokens", 1), ({"max_tokens": 4.0}, "max_tokens", 4), ({"n": 8}, "n", 8),
    ({"max_completion_tokens": 4}, "max_tokens", 4), ({"max_completion_tokens": 4.0}, "max_tokens", 4),
    ({"max_completion_tokens": 4, "max_tokens": 4}, "max_tokens", 4),
    ({"max_completion_tokens": 4, "max_tokens": 4.0}, "max_tokens", 4),
    ({"max_completion_tokens": 4, "max_tokens": None}, "max_tokens", 4),
    ({"max_completion_tokens": None, "max_tokens": 4}, "max_tokens", 4),
    ({}, "response_format", None), ({"response_format": None}, "response_format", None),
    ({"top_p": 1}, "top_p", 1), ({"top_k": 1}, "top_k", 1), ({"top_k": 7.0}, "top_k", 7),
    ({"frequency_penalty": -2}, "frequency_penalty", -2), ({"presence_penalty": 2}, "presence_penalty", 2),
    ({"seed": 0}, "seed", 0), ({"seed": 2**53 - 1}, "seed", 2**53 - 1),
    ({"stream": True}, "stream", True), ({"stream": False}, "stream", False),
    # Spark and pandas give numbers and lists of their own.
    ({"n": np.int64(2)}, "n", 2), ({"temperature": np.float32(0.5)}, "temperature", 0.5),
    ({"stop": np.array(["a", "b"], dtype=object)}, "stop", ["a", "b"]), ({"stop": ("a", "b")}, "stop", ["a", "b"]),
]


@pytest.mark.parametrize(("fields", "name", "value"), GOOD_FIELDS)
def test_a_good_field_is_read(fields, name, value):
    assert getattr(read_request(AS_SHOWN | fields), name) == value


def test_a_whole_number_is_an_int_however_it_came():
    for number in (2, 2.0, np.int64(2), np.float64(2)):
        assert type(read_request(AS_SHOWN | {"n": number}).n) is int


def test_messages_are_read_as_they_came_in_lists_tuples_and_arrays():
    messages = [{"role": "system", "content": "a"}, *user("b"), {"role": "assistant", "content": ""}, *user("d")]
    for given in (messages, tuple(messages), np.array(messages, dtype=object)):
        read = read_request({"messages": given}).messages
        assert [message.model_dump(include={"role", "content"}) for message in read] == messages
    (message,) = read_request({"messages": np.array(user(np.str_("b")), dtype=object)}).messages
    assert type(message.content) is str
    assert len(read_request({"messages": user("a") * 1000}).messages) == 1000
    assert read_request({"messages": [{"role": "system", "content": "a"}]}).messages[0].role == "system"
    options = read_request(AS_SHOWN | {"stream_options": {"include_usage": np.True_}}).stream_options
    assert options.include_usage is True
    options = read_request(AS_SHOWN | {"stream_options": {}}).stream_options
    assert (options.include_usage, options.include_obfuscation) == (False, False)
    assert read_request(AS_SHOWN | {"stream_options": {"include_obfuscation": False}}).stream_options == options


GOOD_CONTENTS = [
    (parts("a"), "a"), (parts("a", "b"), "a\nb"), (parts("a", "", "b"), "a\n\nb"), (parts(""), ""),
    (parts("", ""), "\n"),
    (parts("a\n", "b"), "a\n\nb"), (parts("日本", "🙂"), "日本\n🙂"), (parts("x") * 1000, "\n".join("x" * 1000)),
    (tuple(parts("a", "b")), "a\nb"), (np.array(parts("a", "b"), dtype=object), "a\nb"),
    (np.array(parts(np.str_("a")), dtype=object), "a"), ("a", "a"),
]


@pytest.mark.parametrize(("content", "text"), GOOD_CONTENTS, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_parts_of_text_become_one_text_of_lines(content, text, role):
    read = read_request({"messages": [{"role": role, "content": content}, *user("b")]}).messages
    assert read[0].content == text
    assert type(read[0].content) is str
    assert read[1].content == "b"


def test_a_developer_is_the_system_wherever_it_speaks():
    messages = [{"role": role, "content": role} for role in ("developer", "user", "assistant", "developer")]
    assert [message.role for message in read_request({"messages": messages}).messages] == [
        "system", "user", "assistant", "system"]
    assert read_request({"messages": messages[:1]}).messages[0].content == "developer"  # its word stays its own


@pytest.mark.parametrize(("more", "name"), [
    ({}, ""), ({"name": None}, ""), ({"name": ""}, ""), ({"name": "Bob"}, "Bob"),
    ({"name": "日本 <|end|>"}, "日本 <|end|>"), ({"name": np.str_("Bob")}, "Bob")])
def test_a_message_may_have_a_name(more, name):
    (message,) = read_request({"messages": [user("a")[0] | more]}).messages
    assert (message.name, message.content) == (name, "a")


@pytest.mark.parametrize("more", [
    {}, SENT_BACK, SENT_BACK | {"tool_calls": []}, SENT_BACK | {"annotations": None},
    {"tool_calls": [], "annotations": []},
    {"tool_calls": np.array([])}, {"reasoning_content": None, "anything": None}])
def test_an_answer_that_a_client_sends_back_is_the_assistants_turn(more):
    messages = [*user("Capital?"), {"role": "assistant", "content": "Paris."} | more, *user("And of Italy?")]
    read = read_request({"messages": messages}).messages
    assert [(message.role, message.content, message.name) for message in read] == [
        ("user", "Capital?", ""), ("assistant", "Paris.", ""), ("user", "And of Italy?", "")]


@pytest.mark.parametrize(("name", "allowed", "harmless", "harmful"), HABITS, ids=[name for name, *_ in HABITS])
def test_what_clients_send_by_habit_is_taken_where_it_changes_nothing(name, allowed, harmless, harmful):
    plain = read_request(AS_SHOWN)
    for value in (*harmless, None):
        read = read_request(AS_SHOWN | {name: value})
        assert getattr(read, name) == value
        assert read.model_copy(update={name: None}) == plain
    # Where a request lacks something else, too, a habit does not hide it. What would change an answer is in BAD.
    assert refusal_of(read_request, {name: harmless[0]}) == MESSAGES


GOOD_FORMATS = [
    ({"type": "text"}, "text", None),
    ({"type": "text", "json_schema": None}, "text", None),
    ({"type": "json_object"}, "json_object", None),
    ({"type": "json_object", "json_schema": None}, "json_object", None),
    (schema({})["response_format"], "json_schema", {}),
    (schema({"type": "object"})["response_format"], "json_schema", {"type": "object"}),
    (schema({"type": "object"}, name=None, strict=None, description=None)["response_format"], "json_schema",
     {"type": "object"}),
    (schema({"const": 1}, name="n" * 64, strict=False, description="x")["response_format"], "json_schema",
     {"const": 1}),
    (schema({"enum": [None, 1]})["response_format"], "json_schema", {"enum": [None, 1]}),  # here a null is a value
    (schema({"const": None, "default": None})["response_format"], "json_schema", {"const": None, "default": None}),
    ({"type": "json_schema", "json_schema": {"schema": {"minimum": np.int64(3)}}}, "json_schema", {"minimum": 3}),
]


@pytest.mark.parametrize(("value", "kind", "definition"), GOOD_FORMATS)
def test_an_answers_form_is_text_an_object_or_a_schema(value, kind, definition):
    shape = read_request(AS_SHOWN | {"response_format": value}).response_format
    assert shape.type == kind
    assert (shape.json_schema and shape.json_schema.definition) == definition


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "text"}, "stop": "a"}, {"response_format": {"type": "json_object"}, "stop": []},
    {"response_format": {"type": "json_object"}, "stop": None}, schema({}) | {"stop": []}])
def test_a_stop_string_beside_text_is_taken_and_so_is_none_beside_json(fields):
    read_request(AS_SHOWN | fields)


def test_what_lies_too_deep_is_refused_and_not_followed():
    deep = SECRET
    for _ in range(100_000):
        deep = [deep]
    assert refusal_of(read_request, AS_SHOWN | {"stop": deep}).startswith("stop has to be up to 4 texts")
    assert refusal_of(read_request, {"messages": user(np.array([SECRET]))}) == \
        f"messages[0].content {CONTENT}"


@pytest.mark.parametrize("value", ["The sky is", 5, None, b"x", [["a"]], []])
def test_what_is_no_conversation_is_refused(value):
    assert refusal_of(read_request, value) == "A request has to be an object with messages."
    assert refusal_of(read_request, value, "Row 1: ") == "Row 1: A request has to be an object with messages."


@pytest.mark.parametrize("key", [5, None, b"x", "\ud83d", SECRET, ("a", 1), "reasoning_effort", "Messages",
                                 "definition"])
def test_a_field_of_any_name_is_refused(key):
    unknown = f"The request holds a field that is not served. The fields are: {FIELDS}."
    assert refusal_of(read_request, AS_SHOWN | {key: SECRET}) == unknown
    assert refusal_of(read_request, AS_SHOWN | {key: SECRET}, "Row 3: ") == f"Row 3: {unknown}"
    inside = [refusal_of(read_request, {"messages": [AS_SHOWN["messages"][0] | {key: SECRET}]}),
              refusal_of(read_request, AS_SHOWN | {"stream_options": {"include_usage": True, key: SECRET}})]
    if key == "\ud83d":  # half a character makes the whole object unreadable
        assert inside == ["messages[0] has to be an object with role and content.", OPTIONS]
    else:
        assert inside == [f"messages[0] holds a field that is not served. The fields are: {MESSAGE_FIELDS}.",
                          "stream_options holds a field that is not served. The fields are: include_usage, "
                          "include_obfuscation."]


@pytest.mark.parametrize("value", [5, [SECRET], SECRET, True])
def test_stream_options_that_are_no_object_are_refused(value):
    assert refusal_of(read_request, AS_SHOWN | {"stream_options": value}) == OPTIONS


def test_five_levels_become_pythons_own_and_what_lies_deeper_stays():
    assert _plain((((((((1,),),),),),),)) == [[[[[((1,),)]]]]]
    assert _plain({"a": {"b": {"c": {"d": {"e": (1,)}}}}, "e": (np.int64(1), (2,))}) == {
        "a": {"b": {"c": {"d": {"e": (1,)}}}}, "e": [1, [2]]}
    # The text of a part is as deep as a request goes.
    part = {"messages": (({"content": (np.array([np.str_("a")]),)}),)}
    assert _plain(part) == {"messages": [{"content": [["a"]]}]}
    assert _plain({"a": ({"b": (1,)},)}) == {"a": [{"b": [1]}]}
    assert type(_plain([np.int64(1)])[0]) is int


@pytest.mark.parametrize("more", [89, 99, 100, 200_000])
def test_a_hundred_thousand_unknown_fields_take_no_longer_than_one(monkeypatch, more):
    checked = []
    validate = ChatRequest.model_validate
    monkeypatch.setattr(ChatRequest, "model_validate", lambda values: (checked.append(1), validate(values))[1])
    says = refusal_of(read_request, AS_SHOWN | dict.fromkeys(range(more), 1), "Row 3: ")
    assert says == f"Row 3: The request holds a field that is not served. The fields are: {FIELDS}."
    assert bool(checked) == (more < 100)  # each unknown field would get an error of its own


def test_a_null_field_is_a_field_not_given():
    nulls = dict.fromkeys(ChatRequest.model_fields) | {"a field that nobody knows": None}
    message = AS_SHOWN["messages"][0] | {"refusal": None, "tool_calls": None, "annotations": None, "name": None}
    assert read_request(nulls | {"messages": [message]}) == read_request(AS_SHOWN)
    # A content that is null is no text.
    assert refusal_of(read_request, {"messages": [message | {"content": None}]}).startswith("messages[0].content has")


NULLS = [
    ({"messages": [user("a")[0] | {"name": None, "audio": None, "function_call": None}]}, {"messages": user("a")}),
    ({"messages": user([parts("a")[0] | {"annotations": None}])}, {"messages": user(parts("a"))}),
    ({"stream_options": {"include_usage": None, "x": None}}, {"stream_options": {}}),
    ({"response_format": {"type": "text", "json_schema": None, "x": None}}, {"response_format": {"type": "text"}}),
    (schema({}, name=None, strict=None, description=None, x=None), schema({}, name="")),
    ({"tools": None, "tool_choice": None, "x": None}, {}),
]


@pytest.mark.parametrize(("nulls", "plain"), NULLS)
def test_a_null_inside_an_object_is_a_field_not_given(nulls, plain):
    assert read_request(AS_SHOWN | nulls) == read_request(AS_SHOWN | plain)
    assert refusal_of(read_request, AS_SHOWN | {"stop": [None]}).startswith("stop has")  # of a list it is an item


def test_a_number_that_is_none_is_refused():
    for nan in (math.nan, np.float64("nan"), -math.inf):
        assert refusal_of(read_request, AS_SHOWN | {"temperature": nan}) == TEMPERATURE


def test_a_table_gives_a_request_for_each_row_and_a_gap_is_null():
    table = pd.DataFrame({
        "messages": [user("a"), None], "max_tokens": [3, math.nan], "seed": pd.array([1, pd.NA], dtype="Int64"),
        "stop": ["nan", pd.NaT]}, index=[5, 5])
    assert read_table(table) == [
        {"messages": user("a"), "max_tokens": 3.0, "seed": 1, "stop": "nan"},
        {"messages": None, "max_tokens": None, "seed": None, "stop": None}]
    assert read_table(table[:0]) == []
    # A list that holds a gap is no gap.
    assert math.isnan(read_table(pd.DataFrame({"stop": [[math.nan]]}))[0]["stop"][0])


def test_a_table_without_columns_or_with_two_of_one_name_is_refused():
    assert refusal_of(read_table, pd.DataFrame()) == MESSAGES
    two = pd.DataFrame([[SECRET] * 2], columns=["messages", "messages"])
    assert refusal_of(read_table, two) == "A table has to be of one column for each field."


def test_usage_adds_up_the_answers():
    rows = [Row([1, 2, 3], 9, None, None, None, False) for _ in range(2)]
    rows[0].tokens, rows[1].tokens = 4, 5
    assert usage(rows) == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}


@pytest.mark.parametrize(("setting", "value", "allowed"), [
    ("temperature", 5, "a number from 0 to 2"), ("temperature", "hot", "a number from 0 to 2"),
    ("max_tokens", 0, "a whole number from 1"), ("max_tokens", "16", "a whole number from 1"),
    ("max_waiting", None, "a whole number from 1"), ("max_rows", 0, "a whole number from 1"),
    ("max_tokens_limit", -1, "a whole number from 1"), ("provider", "gpu", "cpu, cuda or dml"),
    ("kept_conversations", -1, "a whole number from 0, which keeps none"),
    ("kept_conversations", None, "a whole number from 0, which keeps none"),
    ("kept_conversations", True, "a whole number from 0, which keeps none"),
    ("threads", 0, "a whole number from 1, or null for one on each core"),
    ("model", 5, "the name that answers carry, a text"),
    ("tokens", 5, f"left out: the settings are {', '.join(SETTINGS)}"),
])
def test_a_setting_out_of_its_range_is_refused(setting, value, allowed, tmp_path):
    class Context:
        artifacts, model_config = {"model": str(tmp_path)}, {setting: value}

    assert refusal_of(ChatModel().load_context, Context) == f"model_config's {setting} has to be {allowed}."


def test_the_settings_of_a_model_that_names_none():
    assert SETTINGS == {"model": "slm-onnx", "max_tokens": 256, "temperature": 0.0, "max_tokens_limit": 2048,
                        "max_rows": 256, "max_waiting": 512, "kept_conversations": 4, "threads": None,
                        "provider": "cpu"}
