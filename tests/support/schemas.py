"""Schemas of many kinds, requests for answers that fit them, and a judge of the answers."""

import dataclasses
import json
import re

from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from serving.chat.folder import read_config
from serving.chat.schema import SchemaReader
from support.chat import user

FIELD = "response_format.json_schema.schema"
JSON_OBJECT = {"type": "json_object"}


def shape(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def make_reader(folder, **config):
    """Return the SchemaReader of a model's folder, with other values in its Config."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return SchemaReader(tokenizer, dataclasses.replace(read_config(folder), **config))


def request(schema, **fields):
    bound = JSON_OBJECT if schema is JSON_OBJECT else shape(schema)
    return {"messages": user("Write JSON."), "response_format": bound, "temperature": 1.0} | fields


def choices(model, asked):
    return [
        (choice["message"]["content"], choice["finish_reason"])
        for choice in model.predict(None, asked)[0]["choices"]
    ]


def judge(schema, text, reason):
    """Return what is wrong with an answer, None if it is valid or was cut by ``max_tokens``."""
    if reason == "length":
        return None
    schema = {"type": "object"} if schema is JSON_OBJECT else schema
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"{error}: {text!r}"
    if text != json.dumps(value, ensure_ascii=False) and "  " in re.sub(
        r'"(\\.|[^"\\])*"', "", text
    ):
        return f"spaces: {text!r}"
    wrong = next(
        Draft202012Validator(
            schema, format_checker=Draft202012Validator.FORMAT_CHECKER
        ).iter_errors(value),
        None,
    )
    return wrong and f"{wrong.message}: {text!r}"


def fixed(properties, required=None, **more):
    """Return the schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "required": list(properties) if required is None else required,
    } | more


INTEGER = {"type": "integer"}
NULL = {"type": "null"}
STRING = {"type": "string"}
SCHEMAS = {
    "nested objects": fixed(
        {
            "person": fixed(
                {
                    "name": {"type": "string", "maxLength": 20},
                    "home": fixed({"city": {"type": "string", "maxLength": 20}, "number": INTEGER}),
                }
            ),
            "known": {"type": "boolean"},
        }
    ),
    "arrays with bounds": fixed(
        {
            "some": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
            "pair": {
                "type": "array",
                "prefixItems": [INTEGER, NULL],
                "items": False,
                "minItems": 2,
            },
        }
    ),
    "enum": {
        "type": "array",
        "items": {"enum": ["red", None, 1, 2.5, True, {"a": [1]}, '"q\\']},
        "minItems": 1,
        "maxItems": 5,
    },
    "const": fixed({"kind": {"const": 'é\n"x'}, "share": {"const": -0.5}, "none": {"const": None}}),
    "anyOf": {
        "anyOf": [{"type": "integer", "minimum": -5, "maximum": 1000}, fixed({"a": STRING}), NULL]
    },
    "oneOf": {
        "oneOf": [
            fixed({"kind": {"const": "a"}, "x": INTEGER}),
            fixed({"kind": {"const": "b"}, "y": STRING}),
        ]
    },
    "allOf": {
        "allOf": [
            {
                "type": "object",
                "properties": {"a": INTEGER},
                "required": ["a"],
                "additionalProperties": {"type": "boolean"},
            },
            {"properties": {"b": {"type": "boolean"}, "a": {"minimum": 3}}, "required": ["b"]},
        ]
    },
    "references": {
        "$defs": {
            "point": fixed({"x": INTEGER, "label": {"$ref": "#/$defs/a~1b"}}),
            "a/b": {"type": ["string", "null"]},
        },
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "maxItems": 2,
    },
    "a tree": {
        "$defs": {
            "node": fixed(
                {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                }
            )
        },
        "$ref": "#/$defs/node",
    },
    "patterns": fixed(
        {
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
            "part": {"type": "string", "pattern": "a|b", "maxLength": 9},
            "pairs": {"type": "string", "pattern": "^(ab)*$", "minLength": 3, "maxLength": 7},
        }
    ),
    "formats": {
        "anyOf": [
            {"type": "string", "format": name}
            for name in (
                "date-time",
                "date",
                "time",
                "uuid",
                "email",
                "ipv4",
                "ipv6",
                "hostname",
                "duration",
                "uri",
            )
        ]
    },
    "lengths": fixed(
        {
            "some": {"type": "string", "minLength": 2, "maxLength": 5},
            "none": {"type": "string", "maxLength": 0},
            "long": {"type": "string", "minLength": 3},
        }
    ),
    "bounds": fixed(
        {
            "low": {"type": "integer", "exclusiveMinimum": 3, "maximum": 17},
            "week": {"type": "integer", "multipleOf": 7},
            "share": {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2},
            "half": {"type": "number", "multipleOf": 0.5, "maximum": 100},
            "minus": {"type": "integer", "maximum": -3},
            "great": {"type": "number", "minimum": 1e10},
        }
    ),
    "a map": {
        "type": "object",
        "properties": {"a": INTEGER},
        "additionalProperties": {"type": "boolean"},
    },
    "not empty": {"type": "object", "additionalProperties": NULL, "minProperties": 1},
    "patterns of names": {
        "type": "object",
        "patternProperties": {"^[a-c]$": INTEGER, "^x": STRING},
        "additionalProperties": False,
    },
    "names": fixed(
        {
            "größe": INTEGER,
            'a"b': NULL,
            "c\\d": {"type": "boolean"},
            "": NULL,
            "x\ny": NULL,
            "🙂": {"type": "string", "maxLength": 2},
        }
    ),
    "optional": fixed({"a": INTEGER, "b": {"type": "boolean"}, "c": NULL}, []),
    "anything": {},
    "json_object": JSON_OBJECT,
}
VARIANTS = [
    {"max_tokens": 200},
    {"temperature": 1.5, "n": 3},
    {"top_p": 0.5, "n": 2, "max_tokens": 40},
    {"top_k": 3, "max_tokens": 100},
    {"frequency_penalty": 2.0, "presence_penalty": -2.0, "max_tokens": 60},
    {"temperature": 2.0, "frequency_penalty": -2.0, "n": 2},
    {"temperature": 0.0, "max_tokens": 30},
    {"max_tokens": 1},
    {"n": 4, "max_tokens": 9},
    {"temperature": 1e-9, "top_k": 1, "max_tokens": 20},
]


def answers_of(model, schema, seeds, max_tokens=120, variants=VARIANTS):
    """Return the answers for each seed and each variant, as (text, finish reason)."""
    asked = [
        request(schema, seed=seed, **{"max_tokens": max_tokens} | fields)
        for seed in seeds
        for fields in variants
    ]
    return [
        (choice["message"]["content"], choice["finish_reason"])
        for completion in model.predict(None, asked)
        for choice in completion["choices"]
    ]
