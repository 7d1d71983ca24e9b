"""What is checked of a request before any model is asked.

Run: python -m helpers test tests/unit/serving/test_request.py
"""

import json

import pytest
from support.chat import AS_SHOWN, SECRET, SENT_BACK, parts, user

from serving.errors import ServiceError
from serving.request import check_request, read_json


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{" + SECRET.encode(),
        b"[1]",
        b'"zqsecret"',
        b'{"messages": "\xff\xfe"}',
        '{"messages": 1}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"messages": NaN}',
        b'{"temperature": -Infinity}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"a": ' * 300 + b"1" + b"}" * 300,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_object_of_json_is_refused(body):
    with pytest.raises(ServiceError) as refusal:
        read_json(body)
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_json")
    assert SECRET not in refusal.value.message


def test_a_body_is_an_object_without_its_nulls():
    assert read_json(b'{"messages": [{"content": null}], "n": null, "seed": 0}') == {
        "messages": [{"content": None}],
        "seed": 0,
    }
    assert read_json(b'{"a": ' + b"[" * 198 + b"]" * 198 + b"}")["a"]


def test_a_byte_order_mark_is_no_part_of_a_body():
    assert read_json(b'\xef\xbb\xbf{"messages": 1}') == {"messages": 1}


@pytest.mark.parametrize("message", [{"content": None}, {}], ids=repr)
def test_an_assistants_message_without_content_is_an_empty_text(message):
    body = json.dumps({"messages": [{"role": "assistant"} | message, {"role": "user"} | message]})
    first, second = read_json(body.encode())["messages"]
    assert first["content"] == ""
    assert second.get("content") is None


# A request's fields, and the field that its refusal names. The chat model has tests of its own for
# what it refuses.
REFUSED = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": user("a") * 1001}, "messages"),
    ({"messages": [SECRET]}, "messages[0]"),
    ({"messages": [*user("a"), {"role": SECRET, "content": "b"}]}, "messages[1].role"),
    ({"messages": [{"content": SECRET}]}, "messages[0].role"),
    ({"messages": user(5)}, "messages[0].content"),
    ({"messages": user([])}, "messages[0].content"),
    ({"messages": user([SECRET])}, "messages[0].content"),
    ({"messages": user(SECRET + "\0")}, "messages[0].content"),
    ({"messages": user(SECRET + "\ud83d")}, "messages[0].content"),
    ({"model": 5}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "4"}, "max_tokens"),
    ({"max_tokens": 101}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": float("inf")}, "max_tokens"),
    ({"max_completion_tokens": 101}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 4, "max_tokens": 5}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": {SECRET: 1}}, "stop"),
    ({"stop": "s" * 101}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream_options": SECRET, "stream": True}, "stream_options"),
    ({"stream_options": {SECRET: 1}, "stream": True}, "stream_options"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
    ({"messages": [{"role": "user", "content": "a", "\ud83d": 1}]}, "messages[0]"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: repr(value)[:60])
def test_a_request_that_no_model_could_answer_is_refused_by_its_field(fields, param):
    with pytest.raises(ServiceError) as refusal:
        check_request(AS_SHOWN | fields, 100)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert refusal.value.message.startswith(param) and SECRET not in refusal.value.message
    assert len(refusal.value.message) < 200


def test_a_limit_of_the_service_is_in_the_sentence_that_names_the_field():
    with pytest.raises(
        ServiceError, match=r"^max_tokens has to be a whole number from 1 to 100\.$"
    ):
        check_request(AS_SHOWN | {"max_tokens": 101}, 100)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 100},
        {"max_tokens": 3.0},
        {"max_completion_tokens": 4, "max_tokens": 4},
        {"temperature": 0},
        {"temperature": 2},
        {"n": 8},
        {"n": 2.0},
        {"stop": "a"},
        {"stop": []},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": None}},
        {SECRET: 1},
        {"messages": user(parts("a", "b"))},
        {"messages": user("日本語 🙂\n")},
        {"messages": [*user("a"), SENT_BACK, *user("b")]},
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_a_request_within_the_limits_is_left_to_the_model(fields):
    check_request(AS_SHOWN | fields, 100)


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(ServiceError, match="has a field whose name is no text") as refusal:
        check_request(AS_SHOWN | {"\ud83d": 1})
    assert (refusal.value.status, refusal.value.code) == (400, "unknown_field")
