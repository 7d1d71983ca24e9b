"""Turns a request's JSON schema into an ``LLMatcher`` of llguidance, which knows the next tokens.

A schema is refused before its answer begins if llguidance can't follow it, takes many seconds or
hundreds of MB for it, or writes answers that don't fit it. The figures beside the limits were
measured with llguidance 1.9.1, its own limits at their defaults and 49,152 tokens.

Knows nothing of logits: `sampler` asks the matcher before each token.
"""

import json
import math
import re
import threading
from fractions import Fraction

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from .contract import ResponseFormat, invalid
from .folder import Config

# Characters of JSON. 5,800 optional properties in 65,000 characters take 4 to 5 s, and 10,000 in
# 299,000 characters take 15 s.
MAX_SCHEMA = 65_536
# Each pattern for the same value doubles the work: 12 take 0.04 s, 16 take 1.2 s, 18 take 8 s and
# 490 MB, 22 take more than 30 s and 1.5 GB.
MAX_PATTERNS = 10
# Each pair of names is compared: 300 in one object take 5 s, 700 take more than 30 s. Two objects
# with 10 each, which both apply to each of 650 fields, take 3 s, with 25 each 12 to 19 s.
MAX_PATTERN_PROPERTIES = 20
# Remainders are tried one by one: 99,991 takes 1 s, 999,983 takes 11 s and 380 MB,
# 9,999,991 takes more than 30 s and 1.3 GB.
MAX_MULTIPLE = 100_000
# Where each choice contains the list of choices again, 200 take 0.4 s and then up to 0.8 s for each
# token, 500 take 5 s, 900 take more than 30 s.
MAX_CHOICES = 200

# Keywords whose schemas apply to the same value as the keywords beside them, annotations aside.
OVERLAPPING = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"}
ANNOTATIONS = {"$schema", "$id", "$defs", "$comment", "definitions", "title", "description"}
ANNOTATIONS |= {"default", "examples", "type"}
# Keywords that llguidance refuses. An error quotes these and nothing else of a schema.
UNSUPPORTED = {"not", "if", "then", "else", "contains", "minContains", "maxContains"}
UNSUPPORTED |= {"uniqueItems", "dependentRequired", "dependentSchemas", "propertyNames"}
UNSUPPORTED |= {"unevaluatedItems", "unevaluatedProperties"}

JSON_OPTIONS = {
    # The spaces of Python's json. With all whitespace, a small model writes line ends forever.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # All escapes but \u. With \u0061 an answer could write the property "a" under a name that
    # llguidance takes for another one.
    "json_allowed_escapes": '"\\bfnrt',
}
# llguidance's own formats let through what readers refuse: seconds of 60, and 29 February of any
# year. These patterns are narrower: no leap second, no 29 February, years from 1000.
DATE = (
    r"[1-9][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    r"|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
FORMATS = {"date": f"^{DATE}$", "time": f"^{TIME}$", "date-time": f"^{DATE}T{TIME}$"}
# Without \u, llguidance can't write these characters in a string.
UNWRITABLE = {chr(code) for code in range(32)} - set("\b\t\n\f\r") | {"\x7f"}


class SchemaReader:
    """Makes the matchers for one model.

    onnxruntime-genai has llguidance inside (``set_guidance``), but there a whole batch has one
    schema, and the engine's thread compiles it while all answers wait. Here each answer has its own
    schema, and its caller's thread compiles it.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config):
        self._tokenizer = tokenizer
        self._config = config
        self._lock = threading.Lock()  # one schema is compiled at a time, to bound memory
        self._tokens = None

    def bind(self, shape: ResponseFormat | None, where: str = "") -> LLMatcher | None:
        """Return the matcher for a response format, or None if any text will do.

        Parameters
        ----------
        shape : ResponseFormat or None
            The request's ``response_format``.
        where : str
            The beginning of an error's sentence, such as ``"Row 2: "``.

        Raises
        ------
        Refusal
            No answer can be held to this schema. The error quotes only known keywords of it.
        """
        if shape is None or shape.type == "text":
            return None
        if shape.type == "json_schema":
            field, schema = "response_format.json_schema.schema", shape.json_schema.definition
        else:
            field, schema = "response_format", {"type": "object"}
        try:
            text = json.dumps(schema)
            requirement = find_broken_requirement(text)
            text = json.dumps(narrow_formats(json.loads(text)))
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
        except (TypeError, ValueError, RecursionError):
            requirement = "that is JSON, and not too deep"
        if requirement:
            raise invalid(field, f"a JSON schema {requirement}", where)
        with self._lock:
            if self._tokens is None:  # takes half a second, and many models never write JSON
                self._tokens = LLTokenizer(
                    self._tokenizer.to_str(),
                    n_vocab=self._config.vocab_size,
                    eos_token=list(self._config.end_tokens),
                )
            # Both calls release Python's lock, so that other threads go on.
            matcher = LLMatcher(self._tokens, grammar, log_level=0)
            matcher.compute_bitmask()
        if matcher.is_error():
            requirement = "that can be kept while the answer is written"
            quoted = re.findall(r'"(\w+)"', matcher.get_error())
            keywords = [keyword for keyword in quoted if keyword in UNSUPPORTED]
            if keywords:
                requirement += f", without {' or '.join(keywords)}"
            raise invalid(field, f"a JSON schema {requirement}", where)
        return matcher


def narrow_formats(schema: dict) -> dict:
    """Replace the formats date, time and date-time in a schema by patterns. Changes the schema."""
    for item in _walk(schema):
        is_string = isinstance(item, dict) and item.get("type") in ("string", ["string", "null"])
        if is_string and "pattern" not in item and str(item.get("format")) in FORMATS:
            item["pattern"] = FORMATS[item.pop("format")]
    return schema


def find_broken_requirement(text: str) -> str | None:
    """Return what a schema has to be and is not, or None if llguidance may compile it.

    Parameters
    ----------
    text : str
        The schema as JSON.
    """
    if len(text) > MAX_SCHEMA:
        return f"of up to {MAX_SCHEMA} characters"
    if '"x-guidance"' in text:  # llguidance's options, which can allow text that is no JSON
        return "without x-guidance"
    objects = [value for value in _walk(json.loads(text)) if isinstance(value, dict)]
    if keyword := _find_costly_keyword(objects):
        return f"with less or no {keyword}"
    if any(map(_counts_repeated_names, objects)):
        return "with less or no minProperties"
    texts = _values(objects, "const", str | list | dict) + _values(objects, "enum", list)
    texts += _values(objects, "pattern", str) + _pattern_properties(objects)
    for value in _walk(texts):
        if isinstance(value, str) and UNWRITABLE.intersection(value):  # they would be left out
            return "without control characters in const, enum and patterns"
    return None


def _find_costly_keyword(objects):
    """Return the keyword for which a schema takes many seconds or hundreds of MB, or None.

    The limits are for the whole schema, because references can bring any of its parts together.
    """
    choices = [choice for any_of in _values(objects, "anyOf", list) for choice in any_of]
    # Optional fields have the choice of null, which contains no further choices.
    choices = [choice for choice in choices if choice != {"type": "null"}]
    if len(choices) > MAX_CHOICES and any("$ref" in item for item in objects):
        return "anyOf"
    if len(_pattern_properties(objects)) > MAX_PATTERN_PROPERTIES:
        return "patternProperties"
    if len(_values(objects, "pattern", str)) > MAX_PATTERNS and any(map(_overlaps, objects)):
        return "pattern"
    if _common_multiple(_values(objects, "multipleOf", int | float)) > MAX_MULTIPLE:
        return "multipleOf"
    return None


def _overlaps(item):
    """Tell whether several parts of an object in a schema apply to the same value."""
    keywords = item.keys() - ANNOTATIONS
    return "allOf" in keywords or (len(keywords) > 1 and not keywords.isdisjoint(OVERLAPPING))


def _common_multiple(steps):
    """Return the least common multiple, which llguidance uses if several apply to one number.

    Powers of ten are left out, because they take no time.
    """
    steps = [Fraction(str(step)) for step in steps if step > 0 and math.log10(step) % 1]
    numerator = math.lcm(*(step.numerator for step in steps))
    denominator = math.gcd(*(step.denominator for step in steps))
    return Fraction(numerator, denominator or 1)


def _counts_repeated_names(item):
    """Tell whether an answer could have too few properties.

    llguidance counts a name that an answer repeats as another property. Required names are not
    repeated, and neither is a single further name.
    """
    least, required = item.get("minProperties"), item.get("required")
    count = len(required) if isinstance(required, list) else 0
    return isinstance(least, int) and least > count + 1


def _pattern_properties(objects):
    return [name for item in _values(objects, "patternProperties", dict) for name in item]


def _values(objects, keyword, kind):
    """Return a keyword's values in the objects of a schema, values of another type left out."""
    return [item[keyword] for item in objects if isinstance(item.get(keyword), kind)]


def _walk(value):
    """Yield a JSON value and all values in it, at any depth."""
    remaining = [value]
    while remaining:
        value = remaining.pop()
        yield value
        if isinstance(value, dict):
            remaining += value.values()
        elif isinstance(value, list):
            remaining += value
