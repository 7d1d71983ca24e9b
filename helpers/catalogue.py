"""Reads ``data/models.toml``, the one list of models. It downloads nothing."""

import tomllib
from dataclasses import dataclass, field

from helpers.errors import CourseError
from helpers.paths import DATA


@dataclass(frozen=True)
class Card:
    """What the course knows about a model before it has any of its files.

    Attributes
    ----------
    name : str
        The value of the parameter ``model``.
    title, summary, licence, homepage, task : str
        For the reader. ``task`` is the Hub's name of what the model does.
    parameters : int
        Number of weights.
    context_length : int
        Tokens that a prompt and its answer may take together.
    download, disk, memory : int
        Megabytes (10**6 bytes): what travels, what stays, what a run needs at its peak.
    source : dict
        The rest of the entry: where the files come from.
    """

    name: str
    title: str
    summary: str
    licence: str
    homepage: str
    task: str
    parameters: int
    context_length: int
    download: int
    disk: int
    memory: int
    source: dict = field(repr=False)


def read_catalogue(path=DATA / "models.toml"):
    """Read the catalogue.

    Returns
    -------
    dict of str to Card
        In the file's order.
    """
    known = {name for name in Card.__dataclass_fields__ if name not in ("name", "source")}
    return {
        name: Card(
            name=name,
            source={key: value for key, value in entry.items() if key not in known},
            **{key: entry[key] for key in known},
        )
        for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items()
    }


def find_card(name):
    """Return the card of the model called ``name``.

    Raises
    ------
    CourseError
        The catalogue has no such model; the message lists those it has.
    """
    cards = read_catalogue()
    if name not in cards:
        raise CourseError(f"There is no model called {name!r}.", f"Choose one of: {', '.join(cards)}.")
    return cards[name]
