"""Checks what a learner put in place of ``...``: prints PASS or one hint.

Each page has a module here. A check takes its answers by name from the page. It returns what to
look at, or nothing if all is well; it may raise whatever an answer makes it raise.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from IPython import get_ipython

CHECKS: dict[str, Callable[..., str | None]] = {}
DOTS = "put your own in place of the three dots after return, run that cell, then this one."


def check(name: str, answers: dict | None = None) -> bool:
    """Print PASS or what to look at, and return whether the exercise is solved.

    ``answers`` has them by name; left out, they are those of the page that asks.
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
    """Return what to look at in the answers to an exercise; None where they are right."""
    find = load_checks()[name]
    needed = list(inspect.signature(find).parameters)
    for answer in needed:
        if answer not in answers:
            return f"there is no {answer} on this page. Run the cells above, from the top."
        if answers[answer] is ...:
            return f"put your own in place of the three dots after {answer}, run that cell, then this one."
    try:
        return find(**{answer: answers[answer] for answer in needed})
    except Exception as error:  # whatever a learner wrote: it is their code that runs here
        return f"your answer stops with {type(error).__name__}: {error}"


def exercise(name: str) -> Callable:
    """Put a check into CHECKS under its exercise's name."""
    return lambda function: CHECKS.setdefault(name, function)


def surplus(answer, *known):
    """Return a hint where an answer holds a field that its exercise does not need, and that may not go well."""
    return next(
        (
            f"leave {name} out: it is more than this exercise asks for."
            for name in answer
            if name not in known
        ),
        None,
    )
