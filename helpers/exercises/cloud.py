"""Checks the exercises of Cloud."""

import math

import pandas as pd

from helpers.exercises import NOT_WRITTEN, exercise


@exercise("reasons")
def _(count_reasons):
    rows = pd.DataFrame(
        {
            "status": ["ok", "error", "ok", "error", "error"],
            "reason": ["", "empty", "", "too long", "empty"],
        }
    )
    found = count_reasons(rows)
    if found is ...:
        return NOT_WRITTEN
    if not isinstance(found, dict):
        return f"it returns a dict, and yours is of the type {type(found).__name__}: pandas has to_dict()."
    if "" in found:
        return "good rows are not in it: take those with the status error first."
    if found != {"empty": 2, "too long": 1}:
        return f"of the reasons empty, too long, empty it is {{'empty': 2, 'too long': 1}}, and yours is {found}."
    good = count_reasons(rows[rows.status == "ok"])
    return (
        None if good == {} else f"a table of good rows has no reasons: {{}}, and yours is {good}."
    )


@exercise("estimate")
def _(estimate):
    found = estimate(1000, 0.5, 20, 10)
    if found is ...:
        return NOT_WRITTEN
    if not isinstance(found, int | float):
        return f"it returns a number of seconds, and yours is of the type {type(found).__name__}."
    if math.isclose(found, 52):
        return (
            "the start is not divided: every executor has to start, and all do so at the same time."
        )
    if math.isclose(found, 520):
        return "the executors share the rows: divide by how many there are."
    if math.isclose(found, 50):
        return "the executors have to start first: add it."
    return (
        None
        if math.isclose(found, 70)
        else (
            f"1,000 rows of 0.5 s on 10 executors that start in 20 s take 70 s, and yours says {found}."
        )
    )


@exercise("size")
def _(choose_size):
    found = choose_size({20: 1.02, 200: 1.04, 1000: 1.1, 10_000: 4.0}, 1.1)
    if found is ...:
        return NOT_WRITTEN
    if found == 20:
        return "it is the largest size that is good enough, and 20 is the smallest."
    if found == 200:
        return "a size whose time is exactly at the bound is good enough, too."
    if found == 10_000:
        return "10,000 takes 4 times the estimate, and at most 1.1 is asked for."
    if found != 1000:
        return f"of these sizes 1000 is the largest that is good enough, and yours is {found!r}."
    try:
        hopeless = choose_size({20: 3.0, 200: 2.0}, 1.1)
    except ValueError:
        return "where no size is good enough, return None: max takes default=None."
    if hopeless is not None:
        return f"where no size is good enough it is None, and yours is {hopeless!r}."
    unsorted = choose_size({1000: 1.0, 20: 1.0}, 1.1)
    return None if unsorted == 1000 else "the sizes may come in any order."


@exercise("copies")
def _(count_copies):
    found = count_copies(9, 4, 1, 10)
    if found is ...:
        return NOT_WRITTEN
    if found == 2:
        return "round up: with two copies, one of them has more than four waiting."
    if isinstance(found, float):
        return "a number of copies is a whole number: round up."
    for waiting, target, least, most, right in (
        (9, 4, 1, 10, 3),
        (8, 4, 1, 10, 2),
        (0, 4, 2, 10, 2),
        (100, 4, 2, 10, 10),
        (40, 4, 2, 10, 10),
    ):
        if (found := count_copies(waiting, target, least, most)) != right:
            return (
                f"{waiting} waiting, {target} for each, from {least} to {most} copies: that is {right}, "
                f"and yours says {found!r}."
            )
    return None
