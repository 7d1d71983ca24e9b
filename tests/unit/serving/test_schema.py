"""Answers bound to JSON by a schema: on a model whose text is noise, each is valid or ends with ``length``."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from support import ROOT
from support.chat import SECRET, contents, deltas, load_chat, user
from support.phi3_layout import CPU, ONNX, write_phi3

from serving.chat_model import UNKEPT, Batch, JsonSchema, Refusal, ResponseFormat, Sampler, Scheduler, SchemaReader

FIELD = "response_format.json_schema.schema"
JSON_OBJECT = {"type": "json_object"}


def shape(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def request(schema, **fields):
    bound = JSON_OBJECT if schema is JSON_OBJECT else shape(schema)
    return {"messages": user("Write JSON."), "response_format": bound, "temperature": 1.0} | fields


def choices(model, asked):
    return [(choice["message"]["content"], choice["finish_reason"])
            for choice in model.predict(None, asked)[0]["choices"]]


def judge(schema, text, reason):
    """Return what is wrong with an answer, None where it is valid or was cut by its ``max_tokens``."""
    if reason == "length":
        return None
    schema = {"type": "object"} if schema is JSON_OBJECT else schema
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"{error}: {text!r}"
    if text != json.dumps(value, ensure_ascii=False) and "  " in re.sub(r'"(\\.|[^"\\])*"', "", text):
        return f"blanks: {text!r}"
    wrong = next(Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).iter_errors(value),
                 None)
    return wrong and f"{wrong.message}: {text!r}"


def fixed(properties, required=None, **more):
    """Return the schema of an object with these properties and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": list(properties) if required is None else required} | more


INTEGER, NULL, STRING = {"type": "integer"}, {"type": "null"}, {"type": "string"}
SCHEMAS = {
    "nested objects": fixed({"person": fixed({"name": {"type": "string", "maxLength": 20}, "home": fixed(
        {"city": {"type": "string", "maxLength": 20}, "number": INTEGER})}), "known": {"type": "boolean"}}),
    "arrays with bounds": fixed({
        "some": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
        "pair": {"type": "array", "prefixItems": [INTEGER, NULL], "items": False, "minItems": 2}}),
    "enum": {"type": "array", "items": {"enum": ["red", None, 1, 2.5, True, {"a": [1]}, '"q\\']}, "minItems": 1,
             "maxItems": 5},
    "const": fixed({"kind": {"const": 'é\n"x'}, "share": {"const": -0.5}, "none": {"const": None}}),
    "anyOf": {"anyOf": [{"type": "integer", "minimum": -5, "maximum": 1000}, fixed({"a": STRING}), NULL]},
    "oneOf": {"oneOf": [fixed({"kind": {"const": "a"}, "x": INTEGER}), fixed({"kind": {"const": "b"}, "y": STRING})]},
    "allOf": {"allOf": [{"type": "object", "properties": {"a": INTEGER}, "required": ["a"],
                         "additionalProperties": {"type": "boolean"}},
                        {"properties": {"b": {"type": "boolean"}, "a": {"minimum": 3}}, "required": ["b"]}]},
    "references": {"$defs": {"point": fixed({"x": INTEGER, "label": {"$ref": "#/$defs/a~1b"}}),
                             "a/b": {"type": ["string", "null"]}},
                   "type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 2},
    "a tree": {"$defs": {"node": fixed({"value": {"type": "integer", "minimum": 0, "maximum": 9}, "children": {
        "type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}})}, "$ref": "#/$defs/node"},
    "patterns": fixed({"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
                       "part": {"type": "string", "pattern": "a|b", "maxLength": 9},
                       "pairs": {"type": "string", "pattern": "^(ab)*$", "minLength": 3, "maxLength": 7}}),
    "formats": {"anyOf": [{"type": "string", "format": name} for name in (
        "date-time", "date", "time", "uuid", "email", "ipv4", "ipv6", "hostname", "duration", "uri")]},
    "lengths": fixed({"some": {"type": "string", "minLength": 2, "maxLength": 5},
                      "none": {"type": "string", "maxLength": 0}, "long": {"type": "string", "minLength": 3}}),
    "bounds": fixed({"low": {"type": "integer", "exclusiveMinimum": 3, "maximum": 17}, "week": {
        "type": "integer", "multipleOf": 7}, "share": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2},
        "half": {"type": "number", "multipleOf": 0.5, "maximum": 100}, "minus": {"type": "integer", "maximum": -3},
        "great": {"type": "number", "minimum": 1e10}}),
    "a map": {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": {"type": "boolean"}},
    "not empty": {"type": "object", "additionalProperties": NULL, "minProperties": 1},
    "patterns of names": {"type": "object", "patternProperties": {"^[a-c]$": INTEGER, "^x": STRING},
                          "additionalProperties": False},
    "names": fixed({"größe": INTEGER, 'a"b': NULL, "c\\d": {"type": "boolean"}, "": NULL, "x\ny": NULL,
                    "🙂": {"type": "string", "maxLength": 2}}),
    "optional": fixed({"a": INTEGER, "b": {"type": "boolean"}, "c": NULL}, []),
    "anything": {},
    "json_object": JSON_OBJECT,
}
VARIANTS = [
    {"max_tokens": 200}, {"temperature": 1.5, "n": 3}, {"top_p": 0.5, "n": 2, "max_tokens": 40},
    {"top_k": 3, "max_tokens": 100}, {"frequency_penalty": 2.0, "presence_penalty": -2.0, "max_tokens": 60},
    {"temperature": 2.0, "frequency_penalty": -2.0, "n": 2}, {"temperature": 0.0, "max_tokens": 30},
    {"max_tokens": 1}, {"n": 4, "max_tokens": 9}, {"temperature": 1e-9, "top_k": 1, "max_tokens": 20},
]


def answers_of(model, schema, seeds, max_tokens=120):
    """Return the answers for each seed and each variant, as (text, finish reason)."""
    asked = [request(schema, seed=seed, **{"max_tokens": max_tokens} | fields) for seed in seeds for fields in VARIANTS]
    return [(choice["message"]["content"], choice["finish_reason"])
            for completion in model.predict(None, asked) for choice in completion["choices"]]


# --- what answers hold ----------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_answers_fit_their_schema_or_end_with_length(chat, schema):
    answers = answers_of(chat, schema, seeds=[1], max_tokens=60)
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []
    assert {reason for _, reason in answers} <= {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_1000_answers_to_20_schemas_fit_them_or_end_with_length(chat, schema):
    answers = answers_of(chat, schema, seeds=range(3), max_tokens=300)
    assert len(answers) >= 50
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []
    assert "stop" in {reason for _, reason in answers}


SCALARS = st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.text(max_size=6) | st.sampled_from(
    [0.5, -2.25, 1e20, "é\n", '"', "\\", "🙂", ""])
NAMES = st.text(max_size=4) | st.sampled_from(["a", "b", "größe", 'x"y', "c\\d", "🙂", "a\nb", "$ref", "type", "not"])
COUNTS = st.integers(0, 3)


@st.composite
def a_number(draw):
    kind = draw(st.sampled_from(["integer", "number"]))
    words = draw(st.fixed_dictionaries({}, optional={
        "minimum": st.integers(-50, 50), "maximum": st.integers(-20, 10**6), "exclusiveMinimum": st.integers(-50, 50),
        "exclusiveMaximum": st.integers(-20, 10**4), "multipleOf": st.sampled_from([1, 3, 7, 10])}))
    return {"type": kind} | words


@st.composite
def a_string(draw):
    return {"type": "string"} | draw(st.fixed_dictionaries({}, optional={
        "minLength": COUNTS, "maxLength": st.integers(0, 12)}) | st.sampled_from([
            {"pattern": "^[a-z]+$"}, {"pattern": "x|y", "maxLength": 5}, {"format": "date"}, {"format": "uuid"},
            {"pattern": "^\\d{2}(-\\d{2})?$"}, {"pattern": "[^a]"}]))


def an_object(inner):
    return st.builds(lambda properties, chosen, extra: {
        "type": "object", "properties": properties, "additionalProperties": extra,
        "required": [name for name, take in zip(properties, chosen, strict=False) if take]},
        st.dictionaries(NAMES, inner, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4),
        st.just(False) | inner)


def an_array(inner):
    return st.builds(lambda items, words: {"type": "array", "items": items} | words, inner | st.booleans(),
                     st.fixed_dictionaries({}, optional={"minItems": COUNTS, "maxItems": COUNTS,
                                                    "prefixItems": st.lists(inner, min_size=1, max_size=2)}))


def several(inner):
    return st.builds(lambda word, many: {word: many}, st.sampled_from(["anyOf", "allOf", "oneOf"]),
                     st.lists(inner, min_size=1, max_size=3))


MADE = st.recursive(
    st.sampled_from([{}, NULL, {"type": "boolean"}, {"type": ["integer", "null"]}]) | a_number() | a_string()
    | st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=4))
    | st.builds(lambda value: {"const": value}, SCALARS),
    lambda inner: an_object(inner) | an_array(inner) | several(inner), max_leaves=6)


def fits_or_is_refused(chat, schema, fields):
    asked = request(schema, max_tokens=60, n=2, **fields)
    try:
        answers = choices(chat, asked)
    except Refusal as refusal:
        assert (refusal.code, refusal.field) == ("invalid_value", FIELD)
        return
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []


FIELDS = st.fixed_dictionaries({"seed": st.integers(0, 2**53 - 1), "temperature": st.sampled_from([0.0, 1.0, 1.5])},
                               optional={"top_p": st.sampled_from([0.3, 0.9]), "top_k": st.integers(1, 50),
                                         "frequency_penalty": st.sampled_from([-2.0, 1.5])})


@pytest.mark.slow
@given(MADE, FIELDS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_answers_fit_any_schema_that_is_not_refused(chat, schema, fields):
    fits_or_is_refused(chat, schema, fields)


@pytest.mark.slow
@given(MADE, FIELDS)
@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_answers_fit_500_schemas_that_are_not_refused(chat, schema, fields):
    fits_or_is_refused(chat, schema, fields)


# --- texts that a model might write -----------------------------------------------------------


def allows(chat, schema, text):
    """Tell whether an answer to this schema may be this text."""
    matcher = chat._schemas.bind(ResponseFormat.model_validate(shape(schema)))
    tokens = chat._schemas._tokens.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


MAP = {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": STRING}
LINES = {"type": "object", "properties": {"a\nb": NULL}, "additionalProperties": INTEGER}


@pytest.mark.slow
@pytest.mark.parametrize(("schema", "text"), [
    (MAP, '{"a": 1, "b": "x"}'), (MAP, '{"a": 1, "b": "x", "b": "y"}'), (MAP, '{"ä🙂": "x"}'), (MAP, "{}"),
    (LINES, '{"a\\nb": null, "c": 1}'), (STRING, '"\\n\\"\\\\ é🙂"'), (INTEGER, "-0"), ({}, "1e999"),
    ({"type": "string", "maxLength": 1}, '"🙂"'), ({"const": 'é\n"\\\t'}, '"é\\n\\"\\\\\\t"'),
    ({"type": "array", "items": INTEGER}, "[1, 2]"), (JSON_OBJECT | {"type": "object"}, '{"a": 1, "b": [true, null]}'),
    ({"type": "string", "format": "date"}, '"2024-02-29"'),
])
def test_a_text_that_fits_may_be_written(chat, schema, text):
    assert allows(chat, schema, text)
    assert judge(schema, text, "stop") is None


@pytest.mark.slow
@pytest.mark.parametrize(("schema", "text"), [
    # Read by a parser, the name is "a", whose value is no integer then.
    (MAP, '{"\\u0061": "x"}'), (MAP, '{"a": 1, "\\u0061": "x"}'), (LINES, '{"a\\u000ab": 1}'),
    ({"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": NULL}, '{"\\u0061": null}'),
    # The second "a" takes the place of the first: one property.
    ({"type": "object", "additionalProperties": NULL, "minProperties": 2}, '{"a": null, "a": null}'),
    (MAP, '{"a": 1, "a": "x"}'), (MAP, '{"a": 1, "a": 2}'), (STRING, '"\\ud800"'), (MAP, '{"\\ud800": "x"}'),
    (STRING, '"\\ude42"'), (STRING, '"a\nb"'), ({"type": "string", "minLength": 2}, '"🙂"'),
    ({"type": "number", "maximum": 5}, "1e3"), ({"type": "number", "minimum": -5}, "-1e3"), (INTEGER, "1.5"),
    (INTEGER, "01"), ({}, "NaN"), ({}, "Infinity"), ({}, "1 "), ({}, " 1"), ({}, "[1,  2]"), ({}, '{"a"\n: 1}'),
    ({"type": "string", "format": "date"}, '"2023-02-30"'), ({"type": "string", "format": "ipv4"}, '"1.2.3.256"'),
    ({"type": "string", "pattern": "^.$"}, '"\\n"'),
])
def test_a_text_that_does_not_fit_is_never_written(chat, schema, text):
    try:
        assert not allows(chat, schema, text)
    except Refusal as refusal:
        assert refusal.field == FIELD


@pytest.mark.parametrize("value", ["a\x01b", "\x1f", "\x7f", {"a\x01b": "\x00"}, ["\x08\x0c", "\u2028"]])
def test_a_constant_with_control_characters_is_written_as_it_is_or_refused(chat, value):
    for schema in ({"const": value}, {"enum": [value]}):
        try:
            ((text, reason),) = choices(chat, request(schema, max_tokens=100))
        except Refusal as refusal:
            assert refusal.field == FIELD
        else:
            assert (json.loads(text), reason) == (value, "stop")


# --- the end of an answer ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("schema", [{"const": {"a": 5}}, {"type": "boolean"}, SCHEMAS["const"], {"enum": ["né"]}])
def test_an_answer_that_its_last_allowed_token_completes_ends_with_stop(chat, schema):
    whole = chat.predict(None, request(schema, seed=1, max_tokens=100))[0]
    assert whole["choices"][0]["finish_reason"] == "stop"
    size, text = whole["usage"]["completion_tokens"], contents(whole)[0]
    for tokens in range(1, size):
        ((cut, reason),) = choices(chat, request(schema, seed=1, max_tokens=tokens))
        assert reason == "length"
        assert len(cut) < len(text) and text.startswith(cut.rstrip("\ufffd"))
    assert choices(chat, request(schema, seed=1, max_tokens=size)) == [(text, "stop")]


def test_the_end_token_is_not_counted_and_not_written(chat):
    asked = [request({"enum": [1, 12]}, seed=seed) for seed in range(8)]
    ended = [completion for completion in chat.predict(None, asked) if contents(completion) == ["1"]]
    assert ended  # what could be 12 ends with an end token
    assert {(one["usage"]["completion_tokens"], one["choices"][0]["finish_reason"]) for one in ended} == {(1, "stop")}


def test_each_end_token_of_a_model_ends_an_answer_only_where_it_is_complete(chat):
    config = chat._engine.config
    several = tuple({*config.end_tokens, config.vocab_size - 1, config.vocab_size - 2})
    reader = SchemaReader(chat._encoder.tokenizer, dataclasses.replace(config, end_tokens=several))
    matcher = reader.bind(ResponseFormat.model_validate(shape(INTEGER)))
    (digit,) = chat._encoder.tokenizer.encode("7", add_special_tokens=False).ids

    def ends():
        mask = matcher.compute_bitmask()
        return [bool(mask[token // 8] >> token % 8 & 1) for token in several]

    assert ends() == [False] * len(several)
    assert matcher.consume_token(digit)
    assert ends() == [True] * len(several)


# --- alone, in a batch, streamed ----------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch):
    """Return the rows of the batch that made a step, for each step."""
    rows, step = [], Batch.step

    def note(batch):
        rows.append(batch.rows)
        step(batch)

    monkeypatch.setattr(Batch, "step", note)
    return rows


@pytest.mark.slow
def test_rows_of_many_schemas_and_of_none_share_a_batch_and_are_as_they_would_be_alone(chat, batches):
    bound = [(schema, request(schema, seed=number, max_tokens=30, **{"temperature": number % 3 / 2}))
             for number, schema in enumerate(SCHEMAS.values())]
    free = [{"messages": user("x"), "max_tokens": 30, "temperature": 1.5, "seed": number} for number in range(3)]
    free += [{"messages": user("x"), "max_tokens": 30}, free[0] | {"response_format": {"type": "text"}}]
    asked = [one for _, one in bound] + free
    alone = [choices(chat, one) for one in asked]
    batches.clear()
    together = [[(choice["message"]["content"], choice["finish_reason"]) for choice in completion["choices"]]
                for completion in chat.predict(None, asked)]
    assert together == alone
    # Bound rows sample with a matcher, others sample without one, and greedy ones do not sample.
    kinds = [{row.sampler and bool(row.sampler._matcher) for row in rows} for rows in batches]
    assert {True, False, None} in kinds
    assert max(map(len, batches)) > 4
    for (schema, _), answers in zip(bound, together, strict=False):
        assert [judge(schema, *answer) for answer in answers] == [None]


def test_rows_of_one_schema_share_a_batch_and_each_of_n_has_its_own_answer(chat, batches):
    asked = request(SCHEMAS["lengths"], seed=4, n=4, max_tokens=40)
    answers = choices(chat, asked)
    assert {len(rows) for rows in batches} == {4}
    assert len(set(answers)) > 1
    assert choices(chat, asked | {"n": 1}) == answers[:1]
    assert choices(chat, asked) == answers


@pytest.mark.parametrize("name", ["names", "lengths", "anyOf", "const", "json_object"])
def test_a_stream_joins_to_the_answer(chat, name):
    asked = request(SCHEMAS[name], seed=2, n=2, max_tokens=60)
    pieces = deltas(chat.predict_stream(None, asked), n=2)
    joined = ["".join(text for text, index in pieces if index == wanted) for wanted in range(2)]
    assert joined == [text for text, _ in choices(chat, asked)]
    assert len(pieces) > 2


@pytest.mark.slow
def test_answers_on_many_threads_are_as_they_would_be_alone(chat):
    asked = [request(schema, seed=number, max_tokens=20) for number, schema in enumerate(SCHEMAS.values())]
    alone = [choices(chat, one) for one in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: choices(chat, one), asked)) == alone


# --- refusals -----------------------------------------------------------------------------------


def deep(levels, word="items"):
    schema = INTEGER
    for _ in range(levels):
        schema = {"type": "array", "items": schema} if word == "items" else fixed({"a": schema})
    return schema


def planted(schema):
    """Return a schema with a name that no error may quote."""
    return {"type": "object", "properties": {SECRET: schema}, "required": [SECRET]}


REFUSED = {
    "NaN": planted({"const": math.nan}), "infinity": planted({"maximum": math.inf}), "a set": planted({"enum": {1}}),
    "bytes": planted({"const": SECRET.encode()}), "half a character": planted({"const": SECRET + "\ud800"}),
    "half a character in a name": planted({"properties": {"\udfff": {}}}),
    "a great number": planted({"const": 10**400}),
    "100,000 levels": planted(deep(100_000)), "500 levels": planted(deep(500)), "130 levels": planted(deep(130)),
    "70 objects": planted(deep(70, "objects")), "500 objects": planted(deep(500, "objects")),
    "1 MB": planted({"description": "x" * 2**20}), "a huge enum": planted({"enum": [f"v{i}" for i in range(100_000)]}),
    "a URL": planted({"$ref": f"https://{SECRET}.example/schema.json"}),
    "a file": planted({"$ref": f"file:///etc/{SECRET}"}), "no such definition": planted({"$ref": f"#/$defs/{SECRET}"}),
    "itself": {"$ref": "#", "description": SECRET},
    "a circle": {"$defs": {SECRET: {"$ref": "#/$defs/b"}, "b": {"$ref": f"#/$defs/{SECRET}"}}, "$ref": "#/$defs/b"},
    "a circle of allOf": planted({"$defs": {}, "allOf": [{"$ref": f"#/properties/{SECRET}"}, INTEGER]}),
    "no such type": planted({"type": SECRET}), "a type that is no text": planted({"type": 5}),
    "no such format": planted({"type": "string", "format": SECRET}),
    "a length that is no number": planted({"type": "string", "minLength": SECRET}),
    "properties that are none": planted({"properties": [SECRET]}), "no choice": planted({"enum": []}),
    "bounds that cross": planted({"type": "integer", "minimum": 5, "maximum": 4}),
    "nothing fits": planted(False), "overlapping oneOf": planted({"oneOf": [INTEGER, {"type": "number"}]}),
    "looks ahead": planted({"type": "string", "pattern": f"(?={SECRET})b"}),
    "looks behind": planted({"type": "string", "pattern": f"(?<!{SECRET})b"}),
    "refers back": planted({"type": "string", "pattern": f"({SECRET})\\1"}),
    "no pattern": planted({"type": "string", "pattern": f"({SECRET}"}),
    "x-guidance": planted({"x-guidance": {"lenient": True}}),
    "x-guidance on top": planted({}) | {"x-guidance": {"whitespace_pattern": SECRET}},
    "x-guidance in an array": planted({"anyOf": [{"items": {"x-guidance": {}}}]}),
}


def refusal_of(model, schema, stream=False):
    before = model.stats()["answers"]
    with pytest.raises(Refusal) as caught:
        if stream:
            list(model.predict_stream(None, request(schema)))
        else:
            # Another row of the same call does not run either.
            model.predict(None, [{"messages": user("x"), "max_tokens": 1}, request(schema)])
    assert model.stats()["answers"] == before
    return caught.value


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED)
def test_a_schema_that_cannot_be_kept_is_refused_by_name_before_any_row_runs(chat, schema):
    for stream in (False, True):
        refusal = refusal_of(chat, schema, stream)
        assert (refusal.code, refusal.field) == ("invalid_value", FIELD)
        assert refusal.message == f"{'' if stream else 'Row 1: '}{FIELD} has to be {refusal.allowed}."
        assert SECRET not in refusal.message
        assert len(refusal.message) < 300


WORDS = {"not": {}, "if": {}, "then": {}, "else": {}, "uniqueItems": True, "contains": {}, "minContains": 1,
         "maxContains": 1, "dependentRequired": {"a": [SECRET]}, "dependentSchemas": {"a": {}},
         "propertyNames": {"pattern": SECRET}, "unevaluatedItems": False, "unevaluatedProperties": False}


def test_all_words_that_cannot_be_kept_are_tried_here():
    assert WORDS.keys() == set(UNKEPT)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_cannot_be_kept_is_named(chat, word):
    # Some words count only beside others.
    beside = {"if": {"then": NULL}, "then": {"if": {}}, "else": {"if": {}}, "minContains": {"contains": {}},
              "maxContains": {"contains": {}}}.get(word, {})
    refusal = refusal_of(chat, planted({word: WORDS[word]} | beside))
    named = set(re.findall(r"\w+", refusal.allowed.partition("without ")[2])) - {"or"}
    assert word in named | ({"if"} if word in ("then", "else") else set()) or named & beside.keys()
    assert SECRET not in refusal.message


@pytest.mark.parametrize("value", [None, 5, SECRET, [SECRET], True])
def test_a_schema_that_is_no_object_is_refused(chat, value):
    refusal = refusal_of(chat, value)
    assert refusal.code == "invalid_value"
    assert refusal.field == FIELD
    assert SECRET not in refusal.message


@pytest.mark.slow
@pytest.mark.parametrize("schema", [deep(50, "objects"), deep(50), {"enum": [f"{i:05d}" for i in range(6000)]},
                                    planted({"description": "x" * 60_000})], ids=["objects", "arrays", "enum", "size"])
def test_a_great_schema_within_the_bounds_is_kept(chat, schema):
    ((text, reason),) = choices(chat, request(schema, seed=1, max_tokens=400))
    assert judge(schema, text, reason) is None


# --- bounds of work -------------------------------------------------------------------------------

EXPLODING = {
    "optional letters": "^(a?){5000}a{5000}$", "stretches": "(x.{1000}){50}", "one of the last": "^(a|b)*a(a|b){60}$",
    "three stretches": ".{0,5000}x.{0,5000}y.{0,5000}z", "repeats of repeats": "(.{0,300}[a-f]){0,300}",
    "a million letters": "((a{100}){100}){100}", "alternatives": "(" + "|".join(
        f".{{{i},{i + 9}}}{i}" for i in range(500)) + ")*"}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", EXPLODING.values(), ids=EXPLODING)
def test_a_pattern_that_explodes_is_refused_or_kept_and_the_model_goes_on(chat, pattern):
    schema = {"type": "string", "pattern": pattern}
    try:
        ((text, reason),) = choices(chat, request(schema, seed=1, max_tokens=60))
    except Refusal as refusal:
        assert refusal.field == FIELD
    else:
        assert reason == "length" or (text[0], text[-1]) == ('"', '"')
    assert choices(chat, request({"const": 1})) == [("1", "stop")]


class Together(Scheduler):
    """Waits for two rows, and starts them as one batch."""

    def linger_time(self, waiting, last_size):
        return 60.0 if len(waiting) < 2 else 0.0

    def next(self, waiting, running, now):
        return list(waiting)


class Overgrown:
    """A matcher that takes no token."""

    def __init__(self, matcher):
        self._matcher = matcher

    def __getattr__(self, name):
        return getattr(self._matcher, name)

    def consume_token(self, token):
        return False


@pytest.mark.slow
def test_a_row_that_grows_too_much_ends_with_an_error_and_the_others_of_its_batch_go_on(chat, batches, monkeypatch):
    asked = request(SCHEMAS["lengths"], seed=3, max_tokens=20)
    alone, choose = choices(chat, asked), Sampler.choose

    def grow(sampler, logits):
        if sampler._request.seed == 7 and sampler._counts:
            sampler._matcher = Overgrown(sampler._matcher)
        return choose(sampler, logits)

    monkeypatch.setattr(Sampler, "choose", grow)
    monkeypatch.setattr(chat._engine, "_scheduler", Together(chat._engine.context_length))
    batches.clear()
    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.submit(choices, chat, asked), pool.submit(choices, chat, asked | {"seed": 7})
        assert good.result() == alone
        with pytest.raises(Refusal, match="simpler") as caught:
            bad.result()
    assert {len(rows) for rows in batches} == {2}
    assert (caught.value.code, caught.value.field) == ("invalid_value", FIELD)


@pytest.mark.slow
def test_a_schema_of_1000_properties_that_may_be_left_out_is_kept_or_refused_before_any_row_runs(chat):
    schema = fixed({f"p{number}": INTEGER for number in range(1000)}, [])
    before = chat.stats()["answers"]
    try:
        answers = choices(chat, request(schema, seed=1, max_tokens=60))
    except Refusal as refusal:
        assert refusal.field == FIELD
        assert chat.stats()["answers"] == before
    else:
        assert [judge(schema, *answer) for answer in answers] == [None]


# Each took more than five seconds or 300 MB in llguidance 1.9.1, whatever its limits.
HARD = {
    "patterns that meet": {"allOf": [{"type": "string", "pattern": f"({letter}|..)*{letter}.{{{place + 3}}}"}
                                     for place, letter in enumerate("abcdefghijklmnopqrstuv")]},
    "patterns of names": {"type": "object", "patternProperties": {f"^k{number}_": NULL for number in range(700)}},
    "patterns of names that meet": {"allOf": [{"type": "object", "patternProperties": {f"^k{number}_": NULL}}
                                              for number in range(200)]},
    "multiples of a great prime": {"type": "integer", "multipleOf": 999_983},
    "circles": {"$defs": {"node": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/node"}}] * 900}},
                "$ref": "#/$defs/node"},
}
MEASURE = """
import json, pathlib, resource, sys
from tokenizers import Tokenizer
from serving.chat_model import Refusal, ResponseFormat, SchemaReader, read_config
folder = pathlib.Path(sys.argv[1])
reader = SchemaReader(Tokenizer.from_file(str(folder / "tokenizer.json")), read_config(folder))
reader.bind(ResponseFormat(type="json_object"))
used = resource.getrusage(resource.RUSAGE_SELF)
second = int(used.ru_utime + used.ru_stime) + 6
resource.setrlimit(resource.RLIMIT_CPU, (second, second))
try:
    reader.bind(ResponseFormat.model_validate(json.loads(sys.stdin.read())))
except Refusal:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used.ru_maxrss) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="2026-11-28: only Linux bounds a process's seconds of work")
@pytest.mark.parametrize("schema", HARD.values(), ids=HARD)
def test_a_schema_that_takes_much_to_compile_is_refused_or_kept_with_bounded_work(tiny, schema):
    """The child ends at the sixth second of work; it prints the megabytes that the schema took."""
    ended = subprocess.run([sys.executable, "-c", MEASURE, str(tiny.onnx_dir)], input=json.dumps(shape(schema)),
                           cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 300


@pytest.mark.slow
def test_a_running_answer_goes_on_while_a_schema_is_compiled(fresh):
    """Count the steps that a stream makes between the begin and the end of a compilation."""
    hard = {"type": "object", "patternProperties": {f"^k{i}_": NULL for i in range(20)},
            "properties": {f"p{i}": {"anyOf": [INTEGER, STRING]} for i in range(900)}}
    fresh._schemas.bind(ResponseFormat(type="json_object"))  # reads the vocabulary
    steps, begun, step = [], threading.Event(), Batch.step

    def count(batch):
        step(batch)
        steps.append(batch)
        begun.set()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(Batch, "step", count)
        stream = pool.submit(fresh.predict, None, {"messages": user("x"), "max_tokens": 2000,
                                                   "frequency_penalty": -2.0})
        assert begun.wait(60)
        before = len(steps)
        fresh._schemas.bind(ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=hard)))
        between = len(steps) - before
        fresh.close()
        stream.exception()
    assert between > 0


# --- other models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """Return a chat model whose tokens begin with blanks, and which has three end tokens."""
    root = tmp_path_factory.mktemp("phi3")
    write_phi3(root, real=True)
    model = load_chat(root / ONNX / CPU)
    yield model
    model.close()


@pytest.mark.slow
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_answers_of_a_tokenizer_with_blanks_in_front_fit_their_schema(sentencepiece, schema):
    answers = answers_of(sentencepiece, schema, seeds=[1])
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []


@pytest.mark.slow
@pytest.mark.parametrize("value", ["a b", " a", "a ", "  ", "", "né 🙂", [" ", {"a b": " x  y "}], {" ": 1}])
def test_a_tokenizer_with_blanks_in_front_writes_the_blanks_that_are_due(sentencepiece, value):
    for seed in range(3):
        asked = request({"const": value}, seed=seed, max_tokens=200)
        ((text, reason),) = choices(sentencepiece, asked)
        assert (text, reason) == (json.dumps(value, ensure_ascii=False), "stop")
        pieces = deltas(sentencepiece.predict_stream(None, asked))
        assert "".join(piece for piece, _ in pieces) == text


@pytest.fixture(scope="module")
def real(smol):
    model = load_chat(smol.onnx_dir)
    yield model
    model.close()


@pytest.mark.parametrize("name", ["oneOf", "names", "json_object"])
def test_the_real_model_fits_its_schema(real, name):
    schema = SCHEMAS[name]
    asked = [request(schema, seed=seed, max_tokens=40, temperature=temperature)
             for seed, temperature in enumerate((0.0, 0.7, 1.5))]
    answers = [(choice["message"]["content"], choice["finish_reason"])
               for completion in real.predict(None, asked) for choice in completion["choices"]]
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []
    assert [choices(real, one) for one in asked] == [[answer] for answer in answers]
