"""Answers held to a JSON schema: the tokens a matcher allows, and the schemas that are refused.

Run: python -m helpers test tests/unit/serving/test_schema.py
"""

import json
import math
import re

import pytest
from llguidance import LLMatcher
from support.chat import SECRET, contents, deltas, user
from support.schemas import (
    FIELD,
    INTEGER,
    NULL,
    SCHEMAS,
    STRING,
    VARIANTS,
    answers_of,
    choices,
    fixed,
    judge,
    make_reader,
    request,
    shape,
)

from serving.chat.contract import Refusal, ResponseFormat
from serving.chat.schema import JSON_OPTIONS, UNSUPPORTED, find_broken_requirement

# --- the texts that a matcher allows ----------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tiny):
    return make_reader(tiny.onnx_dir)


def bind(reader, schema, where=""):
    return reader.bind(ResponseFormat.model_validate(shape(schema)), where)


def allows(reader, matcher, text):
    """Tell whether an answer may be this text."""
    tokens = reader._tokens.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


MAP = {"type": "object", "properties": {"a": INTEGER}, "additionalProperties": STRING}
LINES = {"type": "object", "properties": {"a\nb": NULL}, "additionalProperties": INTEGER}
CONTROL_NAME = {
    "type": "object",
    "properties": {"a\x01\x7f": NULL},
    "additionalProperties": INTEGER,
}
NO_CONTROLS = {"type": "string", "pattern": "^[^\\u0000-\\u001f]*$"}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (MAP, '{"a": 1, "b": "x"}'),
        (MAP, '{"a": 1, "b": "x", "b": "y"}'),
        (MAP, '{"ä🙂": "x"}'),
        (MAP, "{}"),
        (LINES, '{"a\\nb": null, "c": 1}'),
        (CONTROL_NAME, '{"a\\u0001\x7f": null, "a": 1}'),
        (NO_CONTROLS, '"\\"\\\\ é🙂"'),
        (STRING, '"\\n\\"\\\\ é🙂"'),
        (INTEGER, "-0"),
        ({}, "1e999"),
        ({"type": "string", "maxLength": 1}, '"🙂"'),
        ({"type": "string", "pattern": '^[^"\\u0000]$'}, '"\\\\"'),
        ({"type": "string", "format": "date"}, '"2024-02-28"'),
        ({"type": "string", "format": "time"}, '"23:59:59.5+02:00"'),
        ({"type": ["string", "null"], "format": "date-time"}, '"2023-12-31T00:00:00Z"'),
        ({"const": {"format": "date"}}, '{"format": "date"}'),
        ({"const": 'é\n"\\\t'}, '"é\\n\\"\\\\\\t"'),
        ({"type": "array", "items": INTEGER}, "[1, 2]"),
        ({"type": "object"}, '{"a": 1, "b": [true, null]}'),
    ],
)
def test_a_text_that_fits_may_be_written(reader, schema, text):
    assert allows(reader, bind(reader, schema), text)
    assert judge(schema, text, "stop") is None


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        # \u0061 is "a", whose value has to be an integer.
        (MAP, '{"\\u0061": "x"}'),
        (MAP, '{"a": 1, "\\u0061": "x"}'),
        (LINES, '{"a\\u000ab": 1}'),
        (
            {"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": NULL},
            '{"\\u0061": null}',
        ),
        (MAP, '{"a": 1, "a": "x"}'),
        (MAP, '{"a": 1, "a": 2}'),
        (MAP, '{"\\ud800": "x"}'),
        (CONTROL_NAME, '{"a\\u0001\x7f": 1}'),
        (STRING, '"\\ud800"'),
        (STRING, '"\\ude42"'),
        (STRING, '"a\nb"'),
        (NO_CONTROLS, '"\\n"'),
        ({"type": "string", "minLength": 2}, '"🙂"'),
        ({"type": "string", "pattern": "^.$"}, '"\\n"'),
        ({"type": "string", "pattern": '^[^"\\u0000]$'}, '"\\""'),
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "date"}, '"2024-02-29"'),
        ({"type": "string", "format": "date"}, '"0000-01-01"'),
        ({"type": "string", "format": "time"}, '"23:59:60Z"'),
        ({"type": "string", "format": "date-time"}, '"2023-04-31T00:00:00Z"'),
        ({"type": "string", "format": "ipv4"}, '"1.2.3.256"'),
        ({"type": "number", "maximum": 5}, "1e3"),
        ({"type": "number", "minimum": -5}, "-1e3"),
        (INTEGER, "1.5"),
        (INTEGER, "01"),
        ({}, "NaN"),
        ({}, "Infinity"),
        ({}, "1 "),
        ({}, " 1"),
        ({}, "[1,  2]"),
        ({}, '{"a"\n: 1}'),
    ],
)
def test_a_text_that_does_not_fit_is_not_written(reader, schema, text):
    assert not allows(reader, bind(reader, schema), text)


def test_each_end_token_of_a_model_ends_an_answer_only_if_it_is_complete(tiny):
    ends = [5, 6, 7]
    reader = make_reader(tiny.onnx_dir, end_tokens=tuple(ends))
    matcher = bind(reader, INTEGER)

    def allowed_ends():
        mask = matcher.compute_bitmask()
        return [token for token in ends if mask[token // 8] >> token % 8 & 1]

    assert allowed_ends() == []
    assert matcher.consume_tokens(reader._tokens.tokenize_str("7"))
    assert allowed_ends() == ends


@pytest.mark.parametrize("response_format", [None, {"type": "text"}])
def test_any_text_needs_no_matcher(reader, response_format):
    assert reader.bind(response_format and ResponseFormat.model_validate(response_format)) is None


# --- schemas that are refused -----------------------------------------------------------------


def deep(levels, keyword="items"):
    schema = INTEGER
    for _ in range(levels):
        schema = {"type": "array", "items": schema} if keyword == "items" else fixed({"a": schema})
    return schema


def named(schema):
    """Return a schema with a property whose name no error may quote."""
    return {"type": "object", "properties": {SECRET: schema}, "required": [SECRET]}


NO_JSON = "that is JSON, and not too deep"
UNKEPT = "that can be kept while the answer is written"
TOO_LONG = "of up to 65536 characters"
NO_OPTIONS = "without x-guidance"
REFUSED = {
    "NaN": (named({"const": math.nan}), NO_JSON),
    "infinity": (named({"maximum": math.inf}), NO_JSON),
    "a set": (named({"enum": {1}}), NO_JSON),
    "bytes": (named({"const": SECRET.encode()}), NO_JSON),
    "half a character": (named({"const": SECRET + "\ud800"}), NO_JSON),
    "half a character in a name": (named({"properties": {"\udfff": {}}}), NO_JSON),
    "a great number": (named({"const": 10**400}), NO_JSON),
    "a number of 5,000 digits": (named({"const": 10**5000}), NO_JSON),
    "100,000 levels": (named(deep(100_000)), NO_JSON),
    "500 levels": (named(deep(500)), NO_JSON),
    "130 levels": (named(deep(130)), NO_JSON),
    "70 objects": (named(deep(70, "objects")), NO_JSON),
    "1 MB": (named({"description": "x" * 2**20}), TOO_LONG),
    "a huge enum": (named({"enum": [f"v{number}" for number in range(100_000)]}), TOO_LONG),
    "x-guidance": ({"x-guidance": {"whitespace_pattern": SECRET}}, NO_OPTIONS),
    "x-guidance in an array": (named({"anyOf": [{"items": {"x-guidance": {}}}]}), NO_OPTIONS),
    "a URL": (named({"$ref": f"https://{SECRET}.example/schema.json"}), UNKEPT),
    "a file": (named({"$ref": f"file:///etc/{SECRET}"}), UNKEPT),
    "no such definition": (named({"$ref": f"#/$defs/{SECRET}"}), UNKEPT),
    "itself": ({"$ref": "#", "description": SECRET}, UNKEPT),
    "a circle": (
        {
            "$defs": {SECRET: {"$ref": "#/$defs/b"}, "b": {"$ref": f"#/$defs/{SECRET}"}},
            "$ref": "#/$defs/b",
        },
        UNKEPT,
    ),
    "a circle of allOf": (named({"allOf": [{"$ref": f"#/properties/{SECRET}"}, INTEGER]}), UNKEPT),
    "no such type": (named({"type": SECRET}), UNKEPT),
    "no such format": (named({"type": "string", "format": SECRET}), UNKEPT),
    "a length that is no number": (named({"type": "string", "minLength": SECRET}), UNKEPT),
    "properties in a list": (named({"properties": [SECRET]}), UNKEPT),
    "an empty enum": (named({"enum": []}), UNKEPT),
    "bounds that cross": (named({"type": "integer", "minimum": 5, "maximum": 4}), UNKEPT),
    "nothing fits": (named(False), UNKEPT),
    "overlapping oneOf": (named({"oneOf": [INTEGER, {"type": "number"}]}), UNKEPT),
    "lookahead": (named({"type": "string", "pattern": f"(?={SECRET})b"}), UNKEPT),
    "lookbehind": (named({"type": "string", "pattern": f"(?<!{SECRET})b"}), UNKEPT),
    "backreference": (named({"type": "string", "pattern": f"({SECRET})\\1"}), UNKEPT),
    "no pattern": (named({"type": "string", "pattern": f"({SECRET}"}), UNKEPT),
    "costly": (named({"multipleOf": 999_983}), "with less or no multipleOf"),
}


@pytest.mark.parametrize(("schema", "requirement"), REFUSED.values(), ids=REFUSED)
def test_a_schema_that_cannot_be_kept_is_refused(reader, schema, requirement):
    with pytest.raises(Refusal) as refusal:
        bind(reader, schema, "Row 2: ")
    assert (refusal.value.code, refusal.value.field) == ("invalid_value", FIELD)
    assert refusal.value.message == f"Row 2: {FIELD} has to be a JSON schema {requirement}."


# Some keywords count only beside others, of which the error may name either.
KEYWORDS = {
    "not": {"not": {}},
    "if": {"if": {}, "then": NULL},
    "then": {"then": NULL, "if": {}},
    "else": {"else": NULL, "if": {}},
    "uniqueItems": {"uniqueItems": True},
    "contains": {"contains": {}},
    "minContains": {"minContains": 1, "contains": {}},
    "maxContains": {"maxContains": 1, "contains": {}},
    "dependentRequired": {"dependentRequired": {"a": [SECRET]}},
    "dependentSchemas": {"dependentSchemas": {"a": {}}},
    "propertyNames": {"propertyNames": {"maxLength": 3}},
    "unevaluatedItems": {"unevaluatedItems": False},
    "unevaluatedProperties": {"unevaluatedProperties": False},
}


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_that_cannot_be_kept_is_quoted(reader, keyword):
    with pytest.raises(Refusal) as refusal:
        bind(reader, named(KEYWORDS[keyword]))
    assert keyword in UNSUPPORTED
    requirement, _, quoted = refusal.value.allowed.partition(", without ")
    assert requirement == f"a JSON schema {UNKEPT}"
    assert KEYWORDS[keyword].keys() & set(quoted.split(" or "))


REF = {"$ref": "#/$defs/a"}
STEPS = [{"type": "integer", "multipleOf": step} for step in (7, 11, 13, 17, 19)]


def patterns(count):
    return [{"pattern": f"{number}$"} for number in range(count)]


def pattern_properties(count, kind="k"):
    return {"patternProperties": {f"^{kind}{number}_": NULL for number in range(count)}}


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"anyOf": [REF] * 201}, "anyOf"),
        ({"anyOf": [REF] * 200 + [NULL] * 9}, None),
        ({"anyOf": [{"anyOf": [REF] * 99}] * 3}, "anyOf"),
        ({"anyOf": [INTEGER] * 999}, None),  # no reference, so no choice contains the others
        ({"anyOf": [INTEGER] * 199, "items": {"properties": {"b": {"anyOf": [REF, NULL]}}}}, None),
        (pattern_properties(21), "patternProperties"),
        (pattern_properties(20), None),
        (
            {"allOf": [pattern_properties(11), pattern_properties(10, "m")]},
            "patternProperties",
        ),
        ({"allOf": patterns(11)}, "pattern"),
        ({"allOf": patterns(10)}, None),
        ({"items": [REF | {"items": {}}], "$defs": {"a": {"anyOf": patterns(11)}}}, "pattern"),
        ({"pattern": "x", "anyOf": patterns(11)}, "pattern"),
        ({"pattern": "x", "oneOf": patterns(11)}, "pattern"),
        (
            pattern_properties(1)
            | {"properties": {f"p{number}": each for number, each in enumerate(patterns(11))}},
            "pattern",
        ),
        # These don't apply to the same value.
        ({"anyOf": patterns(11), "title": "x"}, None),
        ({"properties": {f"p{number}": each for number, each in enumerate(patterns(11))}}, None),
        (REF | {"$defs": {"a": {"anyOf": patterns(11)}}}, None),
        ({"multipleOf": 999_983}, "multipleOf"),
        ({"multipleOf": 100_000.5}, "multipleOf"),
        ({"multipleOf": 100_000}, None),
        ({"multipleOf": 10**9}, None),
        ({"multipleOf": 0.0000123}, None),
        ({"allOf": STEPS}, "multipleOf"),  # 323,323
        ({"allOf": STEPS[:4]}, None),
        ({"allOf": [{"multipleOf": step / 10} for step in (7, 11, 13, 17, 190)]}, "multipleOf"),
        ({"allOf": [{"multipleOf": step / 10} for step in (7, 11, 13, 17, 19)]}, None),  # 32,332.3
        ({"properties": {"a": {"multipleOf": 99_990}, "b": {"multipleOf": 9_090}}}, None),
        ({"minProperties": 2}, "minProperties"),
        ({"minProperties": 1}, None),
        ({"minProperties": 3, "required": ["a"]}, "minProperties"),
        ({"minProperties": 2, "required": ["a"]}, None),
        # Values of another type are llguidance's to refuse.
        ({"multipleOf": "7", "minProperties": "2", "required": 5, "anyOf": 5, "pattern": 5}, None),
        ({"multipleOf": 0, "patternProperties": 5, "const": 5, "enum": 5}, None),
        ({"multipleOf": -7}, None),
    ],
)
def test_a_schema_within_its_limits_is_compiled(schema, keyword):
    requirement = keyword and f"with less or no {keyword}"
    assert find_broken_requirement(json.dumps(schema)) == requirement
    nested = {"properties": {"x": {"items": [schema]}}, "$defs": {"a": {}}}
    assert find_broken_requirement(json.dumps(nested)) == requirement


CONTROLS = "without control characters in const, enum and patterns"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("schema", "requirement"),
    [
        ({"const": "a\x01b"}, CONTROLS),
        ({"enum": [1, ["\x7f"]]}, CONTROLS),
        ({"const": {"a": "\x00"}}, CONTROLS),
        ({"const": {"a\x01": "\b\t\n\f\r\u2028\x80"}}, None),
        ({"const": "a\\u0001b"}, None),
        ({"description": "\x01", "properties": {"\x01": {}}, "required": ["\x01"]}, None),
        ({"pattern": "a\x01b"}, CONTROLS),
        ({"patternProperties": {"^\u0001": NULL}}, CONTROLS),
        ({"pattern": "^[^\\u0000-\\u001f]*$"}, None),
        ({"pattern": "[\\x00-\\x7f]"}, None),
        ({"pattern": "[\\x01a][\\x7f\u0100][\\x00-\\x09]"}, None),
        ({"pattern": "\\n\\x09\t\\\\u0001.\\W\\D\\S\\b"}, None),
        ({"pattern": '^[^"\\u0000]*[^"\\t]*[^"\\s]*$'}, None),
        ({"pattern": "\\p{Cc}[a&&[^b]]"}, None),
    ],
)
def test_a_schema_for_which_llguidance_writes_other_texts_is_refused(schema, requirement):
    assert find_broken_requirement(json.dumps(schema)) == requirement


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"const": "a\x01b"}, '"ab"'),
        ({"const": "a\x7fb"}, '"ab"'),
        (
            {"type": "object", "additionalProperties": NULL, "minProperties": 2},
            '{"a": null, "a": null}',
        ),
    ],
)
def test_llguidance_still_writes_texts_that_do_not_fit(reader, schema, text):
    # If this fails, llguidance has been mended, and a check in serving/chat/schema.py can go.
    assert find_broken_requirement(json.dumps(schema))
    bind(reader, {})  # reads the vocabulary
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)
    assert allows(reader, LLMatcher(reader._tokens, grammar, log_level=0), text)
    assert judge(schema, text, "stop")


@pytest.mark.parametrize(
    "schema",
    [
        deep(50),
        deep(50, "objects"),
        named({"description": "x" * 60_000}),
        {"enum": [f"{number:05d}" for number in range(6000)]},
        fixed({f"p{number}": INTEGER for number in range(500)}, []),
    ],
    ids=["arrays", "objects", "size", "enum", "optional properties"],
)
def test_a_large_schema_is_kept(chat, schema):
    ((text, reason),) = choices(chat, request(schema, seed=1, max_tokens=400))
    assert judge(schema, text, reason) is None


# --- answers of a chat model ------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_answers_fit_their_schema_or_end_with_length(chat, schema):
    variants = [VARIANTS[1], VARIANTS[4], VARIANTS[6]]
    answers = answers_of(chat, schema, seeds=[1], max_tokens=40, variants=variants)
    assert [wrong for answer in answers if (wrong := judge(schema, *answer))] == []
    assert {reason for _, reason in answers} <= {"stop", "length"}


def test_an_answer_that_its_last_allowed_token_completes_ends_with_stop(chat):
    schema = {"const": {"né": 5}}
    whole = chat.predict(None, request(schema, seed=1, max_tokens=100))[0]
    assert whole["choices"][0]["finish_reason"] == "stop"
    size, text = whole["usage"]["completion_tokens"], contents(whole)[0]
    for tokens in range(1, size):
        ((cut, reason),) = choices(chat, request(schema, seed=1, max_tokens=tokens))
        assert reason == "length"
        assert len(cut) < len(text)
        assert text.startswith(cut.rstrip("\ufffd"))
    assert choices(chat, request(schema, seed=1, max_tokens=size)) == [(text, "stop")]


def test_the_end_token_is_not_counted_and_not_written(chat):
    asked = [request({"enum": [1, 12]}, seed=seed) for seed in range(8)]
    ended = [answer for answer in chat.predict(None, asked) if contents(answer) == ["1"]]
    assert ended  # an end token decides that this is not 12
    assert {answer["usage"]["completion_tokens"] for answer in ended} == {1}
    assert {answer["choices"][0]["finish_reason"] for answer in ended} == {"stop"}


def test_answers_to_many_schemas_and_to_none_are_the_same_together_and_alone(chat):
    asked = [
        request(schema, seed=number, n=2, max_tokens=30, temperature=number % 3 / 2)
        for number, schema in enumerate(SCHEMAS.values())
    ]
    free = {"messages": user("x"), "max_tokens": 30, "temperature": 1.5, "seed": 1}
    asked += [free, free | {"temperature": 0}, free | {"response_format": {"type": "text"}}]
    together = [contents(completion) for completion in chat.predict(None, asked)]
    assert together == [contents(chat.predict(None, one)[0]) for one in asked]
    assert any(len(set(answers)) == 2 for answers in together)


@pytest.mark.parametrize("name", ["names", "json_object"])
def test_a_stream_joins_to_the_answer(chat, name):
    asked = request(SCHEMAS[name], seed=2, n=2, max_tokens=60)
    pieces = deltas(chat.predict_stream(None, asked), n=2)
    joined = ["".join(text for text, index in pieces if index == wanted) for wanted in range(2)]
    assert joined == [text for text, _ in choices(chat, asked)]
    assert len(pieces) > 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_schema_is_named_before_any_answer_begins(chat, stream):
    before = chat.stats()["answers"]
    with pytest.raises(
        Refusal, match=f"^{'' if stream else 'Row 1: '}{re.escape(FIELD)} has to be"
    ):
        if stream:
            list(chat.predict_stream(None, request({"not": {}})))
        else:
            chat.predict(None, [{"messages": user("x"), "max_tokens": 1}, request({"not": {}})])
    assert chat.stats()["answers"] == before


MANY = "|".join(f".{{{number},{number + 9}}}{number}" for number in range(500))


@pytest.mark.parametrize(
    "schema",
    [
        # After the first bracket, each of the choices is open.
        {"anyOf": [{"type": "array", "items": INTEGER}] * 400},
        # After the first character, any place in any of the alternatives may be next.
        {"type": "string", "pattern": f"({MANY})*"},
    ],
    ids=["choices", "pattern"],
)
def test_a_schema_that_grows_beyond_llguidances_limits_ends_its_own_answer_only(chat, schema):
    growing = request(schema, seed=1, max_tokens=60)
    asked = request(SCHEMAS["lengths"], seed=3, max_tokens=40)
    stream = chat.predict_stream(None, asked)
    chunks = [next(stream)]
    with pytest.raises(Refusal, match="simpler") as refusal:
        chat.predict(None, growing)
    assert (refusal.value.code, refusal.value.field) == ("invalid_value", FIELD)
    pieces = deltas([*chunks, *stream])
    assert "".join(text for text, _ in pieces) == choices(chat, asked)[0][0]
