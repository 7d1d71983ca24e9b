"""Reads prompts with their expectations, judges an answer, and decides whether a challenger is promoted.

Plain data comes in and goes out, and no model is asked: so every rule can be tried as a table of
cases.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from jsonschema import Draft202012Validator, SchemaError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from helpers.errors import CourseError


def _correct(value):
    """Let a regular expression and a JSON schema pass that are one; pydantic turns a ValueError into its own."""
    try:
        re.compile(value) if isinstance(value, str) else Draft202012Validator.check_schema(value)
    except (re.error, SchemaError) as error:
        raise ValueError(error.args[0]) from None
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


Name = Annotated[str, Field(pattern=r"\S")]
Names = Annotated[list[Name], Field(min_length=1)]


class Expectations(_Strict):
    """What a model has to do with a request. A small letter counts as its capital, except in ``matches``."""

    outcome: Literal["answered", "refused"] = "answered"
    contains: Names | None = None  # one of these, as whole words
    lacks: Names | None = None  # none of these, not even inside a word
    # This regular expression, somewhere.
    matches: Annotated[str, AfterValidator(_correct)] | None = None
    words: Annotated[int, Field(ge=1)] | None = None  # so many words at most
    # JSON of this schema.
    fits: Annotated[dict, AfterValidator(_correct)] | None = Field(None, alias="schema")


class _Prompt(_Strict):
    id: Name
    family: Name
    request: dict
    expectations: Expectations


def read_prompts(path: Path) -> list[dict]:
    """Return the prompts of a file: on each line a JSON object with ``id``, ``family``, ``request``, ``expectations``.

    A CourseError names the first line that is no prompt and what is wrong with it, or an ``id``
    that comes twice.
    """
    prompts, seen = [], {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            prompt = json.loads(line)
            name = _Prompt.model_validate(prompt).id
            wrong = f"has the id {name}, and so has line {seen[name]}" if name in seen else None
        except ValidationError as error:
            problem = error.errors()[0]
            wrong = (
                f"is no prompt: {'.'.join(map(str, problem['loc'])) or 'object'}: {problem['msg']}"
            )
        # A ValueError, because it is no JSON or no UTF-8.
        except (ValueError, RecursionError) as error:
            wrong = f"is no JSON: {error}"
        if wrong:
            raise CourseError(
                "bad-prompts", f"Line {number} of {path.name} {wrong}.", "Correct that line."
            )
        seen[name] = number
        prompts.append(prompt)
    return prompts


def meets(expectations: dict, outcome: dict | None) -> tuple[bool, str]:
    """Return whether what a model did meets the expectations, and in words what it did.

    ``outcome`` is ``{"answer": text}``, ``{"refused": sentence}`` or, where the model failed, None.
    """
    expected = Expectations.model_validate(expectations)
    if outcome is None:
        return False, "failed"
    if "refused" in outcome:
        return expected.outcome == "refused", f"refused: {outcome['refused']}"
    answer = outcome["answer"]
    complaint = (
        "is one, and none was due"
        if expected.outcome == "refused"
        else "is empty"
        if not answer.strip()
        else _complain(expected, answer)
    )
    return (False, f"answer {complaint}: {answer}") if complaint else (True, f"answer: {answer}")


def _complain(expected, answer):
    """Return what is wrong with an answer, or None."""
    if expected.contains and not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE)
        for word in expected.contains
    ):
        return f"lacks {' or '.join(expected.contains)}"
    if found := [word for word in expected.lacks or () if word.casefold() in answer.casefold()]:
        return f"contains {found[0]}"
    if expected.matches and not re.search(expected.matches, answer):
        return f"does not match {expected.matches}"
    if expected.words and (count := len(answer.split())) > expected.words:
        return f"has {count} words"
    if expected.fits is not None:
        try:
            error = next(Draft202012Validator(expected.fits).iter_errors(json.loads(answer)), None)
        except (ValueError, RecursionError):
            return "is no JSON"
        return error and "does not fit the schema"
    return None
