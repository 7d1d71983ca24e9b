"""Answers bound to JSON by a schema: on a model whose text is noise, each is valid or ends with ``length``.

Run: python -m helpers test tests/unit/serving/test_schema.py
"""

import dataclasses
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.chat import SECRET, contents, deltas, user
from support.conversations import Together
from support.schemas import (
    FIELD,
    INTEGER,
    JSON_OBJECT,
    NULL,
    SCHEMAS,
    STRING,
    VARIANTS,
    answers_of,
    choices,
    fixed,
    judge,
    request,
    shape,
)

from serving.chat.contract import Refusal, ResponseFormat
from serving.chat.engine import Batch
from serving.chat.sampler import Sampler
from serving.chat.schema import SchemaReader, UNKEPT, find_costly

# --- what answers hold ----------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_answers_fit_their_schema_or_end_with_length(chat, schema):
    answers = answers_of(chat, schema, seeds=[1], max_tokens=40, variants=[VARIANTS[1], VARIANTS[4], VARIANTS[6]])
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []
    assert {reason for _, reason in answers} <= {"stop", "length"}


# --- texts that a model might write -----------------------------------------------------------


def allows(chat, schema, text):
    """Tell whether an answer to this schema may be this text."""
    matcher = chat._schemas.bind(ResponseFormat.model_validate(shape(schema)))
    tokens = chat._schemas._tokens.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


MAP = {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": STRING}
LINES = {"type": "object", "properties": {"a\nb": NULL}, "additionalProperties": INTEGER}


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


@pytest.mark.parametrize("schema", [{"const": {"a": 5}}, {"enum": ["né"]}])
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
    "what takes much": planted({"multipleOf": 999_983}),
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


@pytest.mark.parametrize("schema", [deep(50, "objects"), planted({"description": "x" * 60_000})],
                         ids=["objects", "size"])
def test_a_great_schema_within_the_bounds_is_kept(chat, schema):
    ((text, reason),) = choices(chat, request(schema, seed=1, max_tokens=400))
    assert judge(schema, text, reason) is None


# --- bounds of work -------------------------------------------------------------------------------


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


STEPS = [{"type": "integer", "multipleOf": step} for step in (7, 11, 13, 17, 19)]


@pytest.mark.parametrize(("schema", "word"), [
    ({"allOf": [{"pattern": f"{place}$"} for place in range(11)]}, "pattern"),
    ({"allOf": [{"pattern": f"{place}$"} for place in range(10)]}, None),
    ({"anyOf": [{"pattern": f"{place}$"} for place in range(11)]}, None),
    ({"$ref": "#/$defs/a", "properties": {f"p{place}": {"pattern": "x"} for place in range(11)}}, "pattern"),
    ({"patternProperties": {f"^k{place}_": NULL for place in range(101)}}, "patternProperties"),
    ({"patternProperties": {f"^k{place}_": NULL for place in range(100)}}, None),
    ({"allOf": [{"patternProperties": {f"^k{place}_": NULL for place in range(6)}}]}, "patternProperties"),
    ({"allOf": [{"patternProperties": {f"^k{place}_": NULL for place in range(5)}}]}, None),
    ({"allOf": [{"patternProperties": {f"^k{place}_": NULL}} for place in range(11)]}, "patternProperties"),
    ({"multipleOf": 999_983}, "multipleOf"), ({"multipleOf": 10**6}, None), ({"multipleOf": 9_973}, None),
    ({"allOf": STEPS}, "multipleOf"), ({"allOf": STEPS[:4]}, None),
    ({"anyOf": [INTEGER] * 201}, "anyOf"), ({"oneOf": [INTEGER] * 201}, "oneOf"), ({"anyOf": [INTEGER] * 200}, None),
    ({"minProperties": 2}, "minProperties"), ({"minProperties": 1}, None),
    ({"minProperties": 2, "required": ["a"]}, None), ({"minProperties": 3, "required": ["a"]}, "minProperties"),
    ({"properties": {"a": {"items": [{"anyOf": [INTEGER] * 201}]}}}, "anyOf"), ({"const": 5}, None), ([5, "a"], None),
    # What is no schema is refused elsewhere.
    ({"multipleOf": "7", "patternProperties": 5, "minProperties": "2", "required": 5, "anyOf": 5}, None)])
def test_what_takes_seconds_to_compile_is_found(schema, word):
    assert find_costly(schema) == word


class Overgrown:
    """A matcher that takes no token."""

    def __init__(self, matcher):
        self._matcher = matcher

    def __getattr__(self, name):
        return getattr(self._matcher, name)

    def consume_token(self, token):
        return False


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
        good = pool.submit(choices, chat, asked)
        bad = pool.submit(choices, chat, asked | {"seed": 7})
        assert good.result() == alone
        with pytest.raises(Refusal, match="simpler") as caught:
            bad.result()
    assert {len(rows) for rows in batches} == {2}
    assert (caught.value.code, caught.value.field) == ("invalid_value", FIELD)
