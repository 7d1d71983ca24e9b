"""Reads prompts with their expectations, judges an answer, and decides whether a challenger is promoted.

Plain data comes in and goes out, and no model is asked: so every rule can be tried as a table of cases.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
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
    matches: Annotated[str, AfterValidator(_correct)] | None = None  # this regular expression, somewhere
    words: Annotated[int, Field(ge=1)] | None = None  # so many words at most
    fits: Annotated[dict, AfterValidator(_correct)] | None = Field(None, alias="schema")  # JSON of this schema


class _Prompt(_Strict):
    id: Name
    family: Name
    request: dict
    expectations: Expectations


@dataclass(frozen=True)
class Decision:
    """Whether to promote, why, and the rows that decided: of each the id, and what champion and challenger did."""

    promote: bool
    reason: str
    rows: tuple[tuple[str, str, str], ...]


def read_prompts(path: Path) -> list[dict]:
    """Return the prompts of a file: on each line a JSON object with ``id``, ``family``, ``request``, ``expectations``.

    A CourseError names the first line that is no prompt and what is wrong with it, or an ``id`` that comes twice.
    """
    prompts, seen = [], {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            prompt = json.loads(line)
            name = _Prompt.model_validate(prompt).id
            wrong = f"has the id {name}, and so has line {seen[name]}" if name in seen else None
        except ValidationError as error:
            problem = error.errors()[0]
            wrong = f"is no prompt: {'.'.join(map(str, problem['loc'])) or 'object'}: {problem['msg']}"
        except (ValueError, RecursionError) as error:  # a ValueError, because it is no JSON or no UTF-8
            wrong = f"is no JSON: {error}"
        if wrong:
            raise CourseError("bad-prompts", f"Line {number} of {path.name} {wrong}.", "Correct that line.")
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
    complaint = ("is one, and none was due" if expected.outcome == "refused" else
                 "is empty" if not answer.strip() else _complain(expected, answer))
    return (False, f"answer {complaint}: {answer}") if complaint else (True, f"answer: {answer}")


def _complain(expected, answer):
    """Return what is wrong with an answer, or None."""
    if expected.contains and not any(
            re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in expected.contains):
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


def count_met(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """Return of each family how many of its rows are met, and how many rows it has."""
    met = Counter(row["family"] for row in rows if row["met"])
    return {family: (met[family], count) for family, count in Counter(row["family"] for row in rows).items()}


def gate(champion: list[dict], challenger: list[dict], most_lost: float = 0.1, least_gained: int = 3) -> Decision:
    """Decide whether a challenger becomes champion.

    Rows have ``id``, ``family``, ``met`` and ``reason``, in any order. ``most_lost`` is the share of a family's rows
    that may go lost. ``least_gained`` is how many more rows it has to meet in all, 1 or more: a tie keeps the
    champion. A CourseError says that the two were not asked the same prompts, each once.
    """
    was, now = ({(row["family"], row["id"]): row for row in rows} for rows in (champion, challenger))
    if len(champion) != len(was) or len(challenger) != len(now) or was.keys() != now.keys():
        raise CourseError("other-prompts", "Champion and challenger were not asked the same prompts, each once.",
                          "Evaluate both on the same file.")
    before, after = count_met(champion), count_met(challenger)
    lost = {family: before[family][0] - after[family][0] for family in before}
    worse = [family for family in lost if lost[family] / before[family][1] > most_lost]
    gained = -sum(lost.values())
    promote = not worse and gained >= max(least_gained, 1)
    reason = ("It loses too much: " + ", ".join(f"{lost[family]} of {before[family][1]} {family}" for family in worse)
              if worse else f"It meets {gained:+d} rows in all; {max(least_gained, 1):+d} promote")
    return Decision(promote, f"{reason}.", tuple(
        (key[1], was[key]["reason"], now[key]["reason"]) for key in was if key[0] in (worse or lost)
        and (was[key]["met"], now[key]["met"]) == (not promote, promote)))
