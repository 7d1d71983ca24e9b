"""Who is champion: the alias of a new version, a promotion and its way back, and the gate.

Run: python -m helpers test tests/unit/helpers/test_release.py
"""

import mlflow
import pytest
from support import refuses

from helpers import CourseError
from helpers.release import (
    choose_alias,
    choose_name,
    find_champion,
    gate,
    model_of,
    promote,
    roll_back,
)


@pytest.fixture
def client(store):
    """Return a client of an empty store."""
    return mlflow.MlflowClient(store, store)


@pytest.fixture
def register(client):
    """Return a function that registers a version without files, of one of the course's models."""

    def make(model, name="slm"):
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        return client.create_model_version(
            name, "file:///nowhere", tags={"model": model} if model else None
        )

    return make


@pytest.mark.parametrize(
    ("champion", "model", "alias", "name"),
    [
        ("nobody", "smollm2-135m", "champion", "slm"),
        ("smollm2-135m", "smollm2-135m", "champion", "slm"),  # a new version of the same
        ("tiny-phi3", "smollm2-135m", "champion", "slm"),  # random weights keep no place
        ("smollm2-135m", "tiny-phi3", "challenger", "slm-tiny-phi3"),
        ("smollm2-135m", "hub:org/na.me@x", "challenger", "slm-hub-org-na-me-x"),
        (None, "smollm2-135m", "challenger", "slm-smollm2-135m"),  # made by hand, without a tag
    ],
)
def test_a_new_version_takes_a_champions_place_by_one_rule(
    client, register, champion, model, alias, name
):
    if champion != "nobody":
        client.set_registered_model_alias("slm", "champion", register(champion).version)
    found = find_champion(client, "slm")
    assert model_of(found) == (champion or "an unknown model")
    assert choose_alias(found, model) == alias
    assert choose_name(client, "slm", model) == name


def test_a_name_that_nobody_has_or_without_that_alias_has_no_champion(client, register):
    assert find_champion(client, "slm") is None
    register("tiny-phi3")
    assert find_champion(client, "slm") is None
    assert choose_name(client, "slm", "tiny-phi3") == "slm"


def test_a_promotion_can_be_rolled_back(client, register):
    first, second = register("smollm2-135m"), register("smollm2-135m")
    promote(client, first)
    with refuses("nothing-replaced"):
        roll_back(client, "slm")
    promote(client, second)
    assert find_champion(client, "slm").version == second.version
    promote(client, find_champion(client, "slm"))  # once more changes nothing
    roll_back(client, "slm")
    assert find_champion(client, "slm").version == first.version


def test_nobody_can_be_rolled_back(client):
    with refuses("nothing-replaced"):
        roll_back(client, "slm")


def rows(**families):
    """Return rows of families, such as ``facts="++-"``: two met, one not."""
    return [
        {"id": f"{family}-{number}", "family": family, "met": mark == "+", "reason": f"{mark}"}
        for family, marks in families.items()
        for number, mark in enumerate(marks)
    ]


@pytest.mark.parametrize(
    ("was", "now", "promoted", "decided"),
    [
        ({"f": "+---------"}, {"f": "++++------"}, True, ["f-1", "f-2", "f-3"]),  # three more
        ({"f": "+---------"}, {"f": "+++-------"}, False, []),  # two more may be luck
        ({"f": "++--"}, {"f": "++--"}, False, []),  # a tie keeps the champion
        ({"f": "++--"}, {"f": "--++"}, False, ["f-0", "f-1"]),  # a tie, though other rows
        ({"f": "++++"}, {"f": "----"}, False, ["f-0", "f-1", "f-2", "f-3"]),
        # A fifth of g.
        ({"f": "-----", "g": "+" * 10}, {"f": "+++++", "g": "--++++++++"}, False, ["g-0", "g-1"]),
        # A tenth.
        (
            {"f": "-----", "g": "+" * 10},
            {"f": "+++++", "g": "-+++++++++"},
            True,
            [f"f-{n}" for n in range(5)],
        ),
        # A tenth of the family's ten rows, although a fifth of those that were met.
        (
            {"f": "-----", "g": "+++++-----"},
            {"f": "+++++", "g": "-++++-----"},
            True,
            [f"f-{n}" for n in range(5)],
        ),
        # No family too much, no gain in all.
        ({"f": "+" * 10, "g": "-"}, {"f": "-+++++++++", "g": "+"}, False, ["f-0"]),
        # F lost no more than it may.
        ({"f": "+" * 10, "g": "++"}, {"f": "-+++++++++", "g": "--"}, False, ["g-0", "g-1"]),
        ({}, {}, False, []),
    ],
)
def test_the_gate(was, now, promoted, decided):
    decision = gate(rows(**was), list(reversed(rows(**now))), most_lost=0.1, least_gained=3)
    assert decision.promote is promoted
    assert [row[0] for row in decision.rows] == decided
    assert all(row[1:] == (("-", "+") if promoted else ("+", "-")) for row in decision.rows)


def test_the_gate_names_the_families_that_lost():
    reason = gate(rows(f="++++", g="++", h="----"), rows(f="--++", g="++", h="++++")).reason
    assert reason == "It loses too much: 2 of 4 f."


def test_no_gate_is_open_to_a_tie():
    assert not gate(rows(f="+-"), rows(f="-+"), most_lost=1.0, least_gained=0).promote


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:-1],
        lambda rows: rows + rows[:1],
        lambda rows: [*rows[1:], rows[1]],
        lambda rows: [rows[0] | {"id": "other"}, *rows[1:]],
        lambda rows: [rows[0] | {"family": "other"}, *rows[1:]],
    ],
)
@pytest.mark.parametrize("side", ["champion", "challenger"])
def test_other_prompts_are_not_compared(change, side):
    both = {"champion": rows(f="+++"), "challenger": rows(f="+++")}
    both[side] = change(both[side])
    with pytest.raises(CourseError) as caught:
        gate(**both)
    assert caught.value.code == "other-prompts"
