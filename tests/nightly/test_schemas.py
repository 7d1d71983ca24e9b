"""Many schemas: each answer of a model of noise is valid or was cut. Costly ones are refused.

Run: python -m helpers test tests/nightly/test_schemas.py
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT
from support.chat import deltas, load_chat, user
from support.phi3_layout import CPU, ONNX, write_phi3
from support.schemas import (
    FIELD,
    INTEGER,
    NULL,
    SCHEMAS,
    STRING,
    answers_of,
    choices,
    judge,
    make_reader,
    request,
    shape,
)

from serving.chat.contract import Refusal, ResponseFormat
from serving.chat.schema import find_broken_requirement


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_1000_answers_to_20_schemas_fit_them_or_end_with_length(chat, schema):
    answers = answers_of(chat, schema, seeds=range(3), max_tokens=300)
    assert len(answers) >= 50
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []
    assert "stop" in {reason for _, reason in answers}


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(max_size=6)
    | st.sampled_from([0.5, -2.25, 1e20, "é\n", '"', "\\", "🙂", ""])
)
NAMES = st.text(max_size=4) | st.sampled_from(
    ["a", "b", "größe", 'x"y', "c\\d", "🙂", "a\nb", "$ref", "type", "not"]
)
COUNTS = st.integers(0, 3)


@st.composite
def a_number(draw):
    kind = draw(st.sampled_from(["integer", "number"]))
    words = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "minimum": st.integers(-50, 50),
                "maximum": st.integers(-20, 10**6),
                "exclusiveMinimum": st.integers(-50, 50),
                "exclusiveMaximum": st.integers(-20, 10**4),
                "multipleOf": st.sampled_from([1, 3, 7, 10]),
            },
        )
    )
    return {"type": kind} | words


@st.composite
def a_string(draw):
    return {"type": "string"} | draw(
        st.fixed_dictionaries({}, optional={"minLength": COUNTS, "maxLength": st.integers(0, 12)})
        | st.sampled_from(
            [
                {"pattern": "^[a-z]+$"},
                {"pattern": "x|y", "maxLength": 5},
                {"format": "date"},
                {"format": "uuid"},
                {"pattern": "^\\d{2}(-\\d{2})?$"},
                {"pattern": "[^a]"},
            ]
        )
    )


def an_object(inner):
    return st.builds(
        lambda properties, chosen, extra: {
            "type": "object",
            "properties": properties,
            "additionalProperties": extra,
            "required": [name for name, take in zip(properties, chosen, strict=False) if take],
        },
        st.dictionaries(NAMES, inner, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
        st.just(False) | inner,
    )


def an_array(inner):
    return st.builds(
        lambda items, words: {"type": "array", "items": items} | words,
        inner | st.booleans(),
        st.fixed_dictionaries(
            {},
            optional={
                "minItems": COUNTS,
                "maxItems": COUNTS,
                "prefixItems": st.lists(inner, min_size=1, max_size=2),
            },
        ),
    )


def several(inner):
    return st.builds(
        lambda word, many: {word: many},
        st.sampled_from(["anyOf", "allOf", "oneOf"]),
        st.lists(inner, min_size=1, max_size=3),
    )


MADE = st.recursive(
    st.sampled_from([{}, NULL, {"type": "boolean"}, {"type": ["integer", "null"]}])
    | a_number()
    | a_string()
    | st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=4))
    | st.builds(lambda value: {"const": value}, SCALARS),
    lambda inner: an_object(inner) | an_array(inner) | several(inner),
    max_leaves=6,
)


def fits_or_is_refused(chat, schema, fields):
    asked = request(schema, max_tokens=60, n=2, **fields)
    try:
        answers = choices(chat, asked)
    except Refusal as refusal:
        assert (refusal.code, refusal.field) == ("invalid_value", FIELD)
        return
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []


FIELDS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**53 - 1), "temperature": st.sampled_from([0.0, 1.0, 1.5])},
    optional={
        "top_p": st.sampled_from([0.3, 0.9]),
        "top_k": st.integers(1, 50),
        "frequency_penalty": st.sampled_from([-2.0, 1.5]),
    },
)


@given(MADE, FIELDS)
@settings(
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_answers_fit_500_schemas_that_are_not_refused(chat, schema, fields):
    fits_or_is_refused(chat, schema, fields)


def test_answers_on_many_threads_are_as_they_would_be_alone(chat):
    asked = [
        request(schema, seed=number, max_tokens=20)
        for number, schema in enumerate(SCHEMAS.values())
    ]
    alone = [choices(chat, one) for one in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: choices(chat, one), asked)) == alone


EXPLODING = {
    "optional letters": "^(a?){5000}a{5000}$",
    "stretches": "(x.{1000}){50}",
    "one of the last": "^(a|b)*a(a|b){60}$",
    "three stretches": ".{0,5000}x.{0,5000}y.{0,5000}z",
    "repeats of repeats": "(.{0,300}[a-f]){0,300}",
    "a million letters": "((a{100}){100}){100}",
    "alternatives": "(" + "|".join(f".{{{i},{i + 9}}}{i}" for i in range(500)) + ")*",
}


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


LETTERS = "abcdefghijklmnopqrstuv"
CIRCLE = {"type": "array", "items": {"$ref": "#/$defs/node"}}


def patterns(count):
    """Return schemas of strings whose patterns are costly if all apply to one value."""
    return [
        {"type": "string", "pattern": f"({letter}|..)*{letter}.{{{place + 3}}}"}
        for place, letter in enumerate(LETTERS[:count])
    ]


def definitions(schemas):
    return {f"d{place}": schema for place, schema in enumerate(schemas)}


def pattern_properties(count, start=0):
    return {
        "type": "object",
        "patternProperties": {f"^k{number}_": NULL for number in range(start, start + count)},
    }


def patterns_in_fields(count):
    """Return a schema with 650 fields, to each of which two objects with ``count`` patterns apply."""
    both = {"allOf": [{"$ref": "#/$defs/d0"}, {"$ref": "#/$defs/d1"}]}
    return {
        "$defs": definitions([pattern_properties(count), pattern_properties(count, count)]),
        "type": "object",
        "properties": {f"p{number}": both for number in range(650)},
    }


def beside_any_of(schemas):
    """Return a schema in which each of these applies to the same value, without allOf and $ref."""
    nested = {"type": "string"}
    for schema in schemas:
        nested = schema | {"anyOf": [nested, {"maxLength": 3}]}
    return nested


# llguidance 1.9.1 takes more than five seconds or 300 MB for each, its limits at their defaults.
HARD = {
    "patterns that meet": {"allOf": patterns(22)},
    "patterns that meet by allOf of references": {
        "$defs": definitions(patterns(20)),
        "items": {"allOf": [{"$ref": f"#/$defs/d{place}"} for place in range(20)]},
        "type": "array",
    },
    "patterns that meet by references of references": {
        "$defs": definitions(
            schema | ({"$ref": f"#/$defs/d{place + 1}"} if place < 19 else {})
            for place, schema in enumerate(patterns(20))
        ),
        "$ref": "#/$defs/d0",
    },
    "patterns that meet beside anyOf": beside_any_of(patterns(20)),
    "patterns of names": pattern_properties(700),
    "patterns of names that meet": {
        "allOf": [pattern_properties(1, number) for number in range(200)]
    },
    "patterns of names that meet in many fields": patterns_in_fields(25),
    "multiples of a great prime": {"type": "integer", "multipleOf": 999_983},
    "multiples of many primes": {
        "allOf": [{"type": "integer", "multipleOf": step} for step in (7, 11, 13, 17, 19, 23)]
    },
    "multiples of fractions": {
        "allOf": [{"type": "number", "multipleOf": step / 10} for step in (7, 11, 13, 17, 19, 23)]
    },
    "circles": {"$defs": {"node": {"anyOf": [CIRCLE] * 900}}, "$ref": "#/$defs/node"},
    "circles in choices of choices": {
        "$defs": {"node": {"anyOf": [{"anyOf": [CIRCLE] * 200}] * 5}},
        "$ref": "#/$defs/node",
    },
}
# The greatest schemas that are kept, at one limit each.
KEPT = {
    "patterns that meet": {
        "allOf": [{"type": "string", "pattern": letter * 2} for letter in LETTERS[:8]]
    },
    "patterns of names": pattern_properties(20),
    "patterns of names that meet in many fields": patterns_in_fields(10),
    "multiples of a prime": {"type": "number", "multipleOf": 99_991},
    "circles": {"$defs": {"node": {"anyOf": [CIRCLE] * 200}}, "$ref": "#/$defs/node"},
    "optional properties": {
        "type": "object",
        "additionalProperties": False,
        "properties": {f"{number:x}": {} for number in range(5800)},
    },
}
MEASURE = """
import json, pathlib, resource, sys
from serving.chat.contract import ResponseFormat
from support.schemas import make_reader
reader = make_reader(pathlib.Path(sys.argv[1]))
reader.bind(ResponseFormat(type="json_object"))
before = resource.getrusage(resource.RUSAGE_SELF)
second = int(before.ru_utime + before.ru_stime) + 30
resource.setrlimit(resource.RLIMIT_CPU, (second, second))
for shape in json.load(sys.stdin):
    reader.bind(ResponseFormat.model_validate(shape))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss) // 1024)
"""


@pytest.mark.parametrize("schema", HARD.values(), ids=HARD)
def test_a_hard_schema_is_refused_before_llguidance_has_it(schema):
    assert find_broken_requirement(json.dumps(schema))


@pytest.mark.skipif(
    sys.platform != "linux", reason="2026-11-28: only Linux bounds a process's seconds of work"
)
def test_the_hardest_schemas_that_are_kept_take_bounded_work(smol):
    # The child ends after 30 seconds of work. It prints the megabytes that the schemas took.
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(smol.onnx_dir)],
        input=json.dumps([shape(schema) for schema in KEPT.values()]),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 300


def test_a_running_answer_goes_on_while_a_schema_is_compiled(fresh, tiny):
    hard = {
        "type": "object",
        "patternProperties": {f"^k{number}_": NULL for number in range(20)},
        "properties": {f"p{number}": {"anyOf": [INTEGER, STRING]} for number in range(900)},
    }
    reader = make_reader(tiny.onnx_dir)
    reader.bind(ResponseFormat(type="json_object"))  # reads the vocabulary
    chunks = fresh.predict_stream(
        None, {"messages": user("x"), "max_tokens": 2000, "frequency_penalty": -2.0}
    )
    seen = [next(chunks)]
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(lambda: [seen.append(chunk) for chunk in chunks])
        before = len(seen)
        reader.bind(ResponseFormat.model_validate(shape(hard)))
        between = len(seen) - before
        fresh.close()
        rest.exception()
    assert between > 0


# --- other models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """Return a chat model whose tokens begin with blanks, and which has three end tokens."""
    root = tmp_path_factory.mktemp("phi3")
    write_phi3(root, real=True)
    model = load_chat(root / ONNX / CPU)
    yield model
    model.close()


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_answers_of_a_tokenizer_with_blanks_in_front_fit_their_schema(sentencepiece, schema):
    answers = answers_of(sentencepiece, schema, seeds=[1])
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []


@pytest.mark.parametrize(
    "value", ["a b", " a", "a ", "  ", "", "né 🙂", [" ", {"a b": " x  y "}], {" ": 1}]
)
def test_a_tokenizer_with_blanks_in_front_writes_the_blanks_that_are_due(sentencepiece, value):
    for seed in range(3):
        asked = request({"const": value}, seed=seed, max_tokens=200)
        ((text, reason),) = choices(sentencepiece, asked)
        assert (text, reason) == (json.dumps(value, ensure_ascii=False), "stop")
        pieces = deltas(sentencepiece.predict_stream(None, asked))
        assert "".join(piece for piece, _ in pieces) == text


@pytest.mark.parametrize("name", ["oneOf", "names", "json_object"])
def test_the_real_model_fits_its_schema(real_chat, name):
    schema = SCHEMAS[name]
    asked = [
        request(schema, seed=seed, max_tokens=40, temperature=temperature)
        for seed, temperature in enumerate((0.0, 0.7, 1.5))
    ]
    answers = [
        (choice["message"]["content"], choice["finish_reason"])
        for completion in real_chat.predict(None, asked)
        for choice in completion["choices"]
    ]
    assert [wrong for text, reason in answers if (wrong := judge(schema, text, reason))] == []
    assert [choices(real_chat, one) for one in asked] == [[answer] for answer in answers]
