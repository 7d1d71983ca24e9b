"""Prompts are read or refused by line, and an answer meets its expectations or not."""

import json
import re

import pytest

from helpers import CourseError
from helpers.operations.evaluation import meets, read_prompts
from helpers.paths import DATA
from helpers.release import count_met

PROMPTS = read_prompts(DATA / "prompts.jsonl")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
REFUSED = {"refused": "messages has to be a list."}


def answer(text):
    return {"answer": text}


@pytest.mark.parametrize(
    ("expectations", "good", "bad"),
    [
        ({"outcome": "answered"}, answer("Hi"), [answer(""), answer(" \n"), REFUSED, None]),
        ({"outcome": "refused"}, REFUSED, [answer("Hi"), answer(""), None]),
        (
            {"contains": ["cold", "icy"]},
            answer("It is ICY."),
            [answer("scolded"), answer("hot"), REFUSED, None],
        ),
        ({"contains": ["H2O"]}, answer("h2o"), [answer("H2O2"), answer("H.O")]),
        ({"contains": ["im_end"]}, answer("<|im_end|> ends it"), [answer("it ends")]),
        ({"contains": ["7"]}, answer("7 days"), [answer("1.87"), answer("17")]),
        ({"lacks": ["K9-DELTA"]}, answer("no"), [answer("xk9-deltax"), answer("")]),
        ({"matches": r"\A1, 2\Z"}, answer("1, 2"), [answer("1, 2, 3"), answer("0 1, 2")]),
        ({"words": 2}, answer("two words"), [answer("now three words")]),
        (
            {"schema": SCHEMA},
            answer(' {"a": 1}\n'),
            [
                answer('{"a": "1"}'),
                answer('{"a": 1, "b": 2}'),
                answer("{}"),
                answer('{"a": 1'),
                answer("[" * 100_000),
                answer('```json\n{"a": 1}\n```'),
            ],
        ),
        (
            {"contains": ["cold"], "lacks": ["TURNIP"]},
            answer("cold"),
            [answer("cold turnip"), answer("hot")],
        ),
    ],
    ids=lambda value: json.dumps(value)[:30] if isinstance(value, dict) else None,
)
def test_one_answer_meets_expectations_and_others_do_not(expectations, good, bad):
    assert meets(expectations, good)[0] is True
    for outcome in bad:
        assert meets(expectations, outcome)[0] is False


def test_a_reason_says_what_the_model_did():
    assert meets({"contains": ["Madrid"]}, answer("Rome")) == (False, "answer lacks Madrid: Rome")
    assert meets({"contains": ["Madrid"]}, answer("Madrid")) == (True, "answer: Madrid")
    assert meets({"outcome": "refused"}, REFUSED) == (True, "refused: messages has to be a list.")
    assert meets({"outcome": "refused"}, None) == (False, "failed")


GOOD = {
    "id": "a",
    "family": "f",
    "request": {"messages": []},
    "expectations": {"outcome": "refused"},
}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "is no JSON"),
        (b"", "is no JSON"),
        (b"\xff\xfe{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "object"),
        ({"id": ""}, "id"),
        ({"id": 5}, "id"),
        ({"family": None}, "family"),
        ({"colour": 1}, "colour"),
        ({"request": []}, "request"),
        ({"expectations": {"contain": ["a"]}}, "expectations.contain"),
        ({"expectations": {"contains": []}}, "contains"),
        ({"expectations": {"contains": "a"}}, "contains"),
        ({"expectations": {"lacks": [" "]}}, "lacks"),
        ({"expectations": {"matches": "("}}, "matches"),
        ({"expectations": {"schema": {"type": "thing"}}}, "schema"),
        ({"expectations": {"words": 0}}, "words"),
        ({"expectations": {"words": True}}, "words"),
        ({"expectations": {"outcome": "ignored"}}, "outcome"),
        ({"id": "first"}, "has the id first, and so has line 1"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, says):
    bad = line if isinstance(line, bytes) else json.dumps(GOOD | line).encode()
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(json.dumps(GOOD | {"id": "first"}).encode() + b"\n" + bad + b"\n")
    with pytest.raises(CourseError) as caught:
        read_prompts(file)
    assert caught.value.what.startswith("Line 2 of prompts.jsonl ")
    assert says in caught.value.what


def test_the_course_s_prompts_are_enough_of_each_family():
    assert len(PROMPTS) >= 60
    counts = count_met([prompt | {"met": False} for prompt in PROMPTS])
    assert set(counts) == {"facts", "format", "json", "odd", "multi-turn", "languages", "injection"}
    assert min(count for _, count in counts.values()) >= 6


# An answer for each regular expression of the file: a new one needs one, too.
MATCHING = [
    "1. Red\n2. Blue\n3. Green",
    "1, 2, 3, 4, 5",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    "Hello!",
    "Why?",
    'print("hello")',
    '<a href="https://example.com">Home</a>',
]


def satisfy(expectations):
    """Return an outcome that meets expectations, made from them."""
    if expectations.get("outcome") == "refused":
        return REFUSED
    if "schema" in expectations:
        fields = expectations["schema"]["properties"]
        return answer(json.dumps({name: example(field) for name, field in fields.items()}))
    if "matches" in expectations:
        return answer(next(text for text in MATCHING if re.search(expectations["matches"], text)))
    return answer((expectations.get("contains") or ["yes"])[0])


def example(field):
    """Return a value that fits a field of a schema."""
    if "enum" in field:
        return field["enum"][0]
    return {
        "string": "x",
        "integer": field.get("minimum"),
        "boolean": True,
        "array": [1] * field.get("minItems", 0),
    }[field["type"]]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt["id"])
def test_each_prompt_can_be_met_and_missed(prompt):
    expectations = prompt["expectations"]
    assert meets(expectations, satisfy(expectations))[0]
    assert not meets(expectations, None)[0]
    assert not meets(expectations, answer("") if satisfy(expectations) is REFUSED else REFUSED)[0]
    if others := expectations.keys() - {"outcome"}:
        wrong = " ".join(["zzz", *expectations.get("lacks", [])])
        assert not meets(expectations, answer(wrong))[0], others
    if shape := prompt["request"].get("response_format"):
        assert shape["json_schema"]["schema"] == expectations["schema"]
