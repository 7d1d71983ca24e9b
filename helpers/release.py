"""Decides which version of a registered model is champion. All pages use these rules.

The alias ``champion`` marks the version that answers, ``challenger`` one that may replace it.
"""

import re
from collections import Counter
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from helpers.errors import CourseError

RANDOM_MODEL = "tiny-phi3"  # has random weights, so any model may replace it


def find_champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """Return the version of a registered model that has the alias ``champion``; None if no version has it."""
    found = client.search_registered_models(f"name = '{name}'")
    if not found or "champion" not in found[0].aliases:
        return None
    return client.get_model_version_by_alias(name, "champion")


def model_of(version: ModelVersion | None) -> str:
    """Return the name of the course's model in a version, from its tag ``model``."""
    if version is None:
        return "nobody"
    # A version that somebody made by hand may not have the tag.
    return version.tags.get("model") or "an unknown model"


def choose_alias(champion: ModelVersion | None, model: str) -> str:
    """Return ``champion`` for a new version of ``model`` that may replace the champion, else ``challenger``.

    It may replace the champion if there is none, if the champion is a version of the same model, or
    if the champion has random weights.
    """
    if champion is None or model_of(champion) in (model, RANDOM_MODEL):
        return "champion"
    return "challenger"


def choose_name(client: MlflowClient, name: str, model: str) -> str:
    """Return ``name``, or ``name-model`` if ``name`` has a champion that ``model`` may not replace."""
    if choose_alias(find_champion(client, name), model) == "champion":
        return name
    return f"{name}-{re.sub('[^A-Za-z0-9]+', '-', model)}"


def promote(client: MlflowClient, version: ModelVersion) -> None:
    """Make a version champion, and tag it with the version that it replaces."""
    former = find_champion(client, version.name)
    client.set_registered_model_alias(version.name, "champion", version.version)
    if former and former.version != version.version:
        client.set_model_version_tag(version.name, version.version, "replaced", former.version)


def roll_back(client: MlflowClient, name: str) -> None:
    """Make the version champion again that the present champion replaced."""
    champion = find_champion(client, name)
    if champion is None or "replaced" not in champion.tags:
        raise CourseError(
            "nothing-replaced",
            f"The champion of {name} has replaced no other version.",
            "Promote a version first, or set the alias yourself: client.set_registered_model_alias.",
        )
    client.set_registered_model_alias(name, "champion", champion.tags["replaced"])


@dataclass(frozen=True)
class Decision:
    """Whether to promote a challenger, why, and the rows that decided.

    Each row is an id, the champion's result and the challenger's result.
    """

    promote: bool
    reason: str
    rows: tuple[tuple[str, str, str], ...]


def count_met(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """Return for each family how many of its rows met their expectations, and how many rows it has."""
    met = Counter(row["family"] for row in rows if row["met"])
    return {
        family: (met[family], count)
        for family, count in Counter(row["family"] for row in rows).items()
    }


def gate(
    champion: list[dict], challenger: list[dict], most_lost: float = 0.1, least_gained: int = 3
) -> Decision:
    """Decide whether a challenger becomes champion.

    Parameters
    ----------
    champion, challenger : list of dict
        The evaluated rows, in any order: ``id``, ``family``, ``met`` and ``reason``.
    most_lost : float
        The largest share of a family's rows that the challenger may lose.
    least_gained : int
        How many more rows the challenger has to meet in all, at least 1: a tie keeps the champion.

    Raises
    ------
    CourseError
        The two did not answer the same prompts, each once.
    """
    was = {(row["family"], row["id"]): row for row in champion}
    now = {(row["family"], row["id"]): row for row in challenger}
    if len(champion) != len(was) or len(challenger) != len(now) or was.keys() != now.keys():
        raise CourseError(
            "other-prompts",
            "Champion and challenger did not answer the same prompts, each once.",
            "Evaluate both on the same file.",
        )
    before, after = count_met(champion), count_met(challenger)
    lost = {family: before[family][0] - after[family][0] for family in before}
    worse = [family for family in lost if lost[family] / before[family][1] > most_lost]
    gained = -sum(lost.values())
    needed = max(least_gained, 1)
    promoted = not worse and gained >= needed
    if worse:
        losses = ", ".join(f"{lost[family]} of {before[family][1]} {family}" for family in worse)
        reason = f"It loses too much: {losses}."
    else:
        reason = f"It meets {gained:+d} rows in all; {needed:+d} promote."
    decisive = worse or lost
    # The rows that only the challenger meets, if it is promoted; else those that only the champion meets.
    rows = tuple(
        (key[1], was[key]["reason"], now[key]["reason"])
        for key in was
        if key[0] in decisive and (was[key]["met"], now[key]["met"]) == (not promoted, promoted)
    )
    return Decision(promoted, reason, rows)
