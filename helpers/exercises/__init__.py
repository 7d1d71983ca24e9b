"""Checks a learner's answers to the exercises of a page: prints PASS or one hint.

Each page has a module here. A check is a function whose parameters are names of the page. It
returns a hint, or None if the answers are right; an error that an answer raises becomes a hint.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from IPython import get_ipython

CHECKS: dict[str, Callable[..., str | None]] = {}
NOT_WRITTEN = (
    "write your own in place of the three dots after return, run that cell, then this one."
)


def check(name: str, answers: dict | None = None) -> bool:
    """Print PASS or a hint, and return whether the exercise is solved.

    ``answers`` has the answers by name; by default they are the variables of the page.
    """
    answers = get_ipython().user_ns if answers is None else answers
    hint = find_hint(name, answers)
    print(f"Not yet: {hint}" if hint else "PASS")
    return not hint


def load_checks() -> dict[str, Callable[..., str | None]]:
    """Return the checks of all pages by the names of their exercises."""
    # Here, because the modules import the libraries of their pages, which takes seconds.
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return CHECKS


def find_hint(name: str, answers: dict) -> str | None:
    """Return a hint on the answers to an exercise; None if they are right."""
    check_answers = load_checks()[name]
    needed = list(inspect.signature(check_answers).parameters)
    for answer in needed:
        if answer not in answers:
            return f"there is no {answer} on this page. Run the cells above, from the top."
        if answers[answer] is ...:
            return f"write your own in place of the three dots after {answer}, run that cell, then this one."
    try:
        return check_answers(**{answer: answers[answer] for answer in needed})
    except Exception as error:  # this runs the learner's code, which may raise anything
        return f"your answer stops with {type(error).__name__}: {error}"


def exercise(name: str) -> Callable:
    """Register a function in CHECKS as the check of an exercise."""
    return lambda function: CHECKS.setdefault(name, function)


def surplus(answer, *known):
    """Return a hint if an answer has a field other than the known ones; None if not."""
    return next(
        (
            f"leave {name} out: it is more than this exercise asks for."
            for name in answer
            if name not in known
        ),
        None,
    )
