"""Reads prompts with their expectations, and decides whether an answer meets them.

The functions take and return plain data and call no model: a test can try each rule by itself.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from jsonschema import Draft202012Validator, SchemaError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from helpers.errors import CourseError


def _correct(value):
    """Return a regular expression or a JSON schema if it is valid; else raise ValueError for pydantic."""
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
    """What an answer has to be like. Upper and lower case are the same, except in ``matches``."""

    outcome: Literal["answered", "refused"] = "answered"
    contains: Names | None = None  # at least one of these, as whole words
    lacks: Names | None = None  # none of these, not even inside a word
    # The answer contains a match of this regular expression.
    matches: Annotated[str, AfterValidator(_correct)] | None = None
    words: Annotated[int, Field(ge=1)] | None = None  # at most this many words
    # The answer is JSON that fits this schema.
    fits: Annotated[dict, AfterValidator(_correct)] | None = Field(None, alias="schema")


class _Prompt(_Strict):
    id: Name
    family: Name
    request: dict
    expectations: Expectations


def read_prompts(path: Path) -> list[dict]:
    """Return the prompts of a file: on each line a JSON object with ``id``, ``family``, ``request``, ``expectations``.

    CourseError names the first line that is no prompt, or whose ``id`` is not new, and the reason.
    """
    prompts = []
    seen = {}
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
        # ValueError: the line is no JSON or no UTF-8.
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
    """Return whether an outcome meets the expectations, and a description of the outcome.

    ``outcome`` is ``{"answer": text}``, ``{"refused": sentence}``, or None if the model failed.
    """
    expected = Expectations.model_validate(expectations)
    if outcome is None:
        return False, "failed"
    if "refused" in outcome:
        return expected.outcome == "refused", f"refused: {outcome['refused']}"
    answer = outcome["answer"]
    problem = _find_problem(expected, answer)
    return (False, f"answer {problem}: {answer}") if problem else (True, f"answer: {answer}")


def _find_problem(expected, answer):
    """Return what is wrong with an answer; None if it meets the expectations."""
    if expected.outcome == "refused":
        return "came, and the model should have refused"
    if not answer.strip():
        return "is empty"
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
