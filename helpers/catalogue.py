"""Reads ``data/models.toml``, the list of models, and the names ``hub:org/name``. It downloads nothing."""

import re
import tomllib
from dataclasses import dataclass, field

from helpers.errors import CourseError
from helpers.paths import DATA

HUB_NAME = re.compile(r"hub:(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII)


@dataclass(frozen=True)
class Card:
    """What the course knows about a model before it has any of its files.

    Attributes
    ----------
    name : str
        The value of the parameter ``model``.
    title, summary, licence, homepage, task : str
        For the reader. ``task`` is the Hub's name of what the model does.
    parameters : int or None
        Number of weights.
    context_length : int or None
        Tokens that a prompt and its answer may take together.
    download, disk, memory : int or None
        Megabytes (10**6 bytes): what travels, what stays, what a run needs at its peak.
        Of a model that only the Hub knows, all these numbers are None until it is here.
    source : dict
        The rest of the entry: where the files come from.
    """

    name: str
    title: str
    summary: str
    licence: str
    homepage: str
    task: str
    parameters: int | None
    context_length: int | None
    download: int | None
    disk: int | None
    memory: int | None
    source: dict = field(repr=False)

    @property
    def folder(self):
        """Name of the model's folder in the cache."""
        return self.name.replace(":", "--").replace("/", "--")


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

    Parameters
    ----------
    name : str
        A name of the catalogue, or ``hub:org/name`` for a repository of the Hugging Face Hub;
        ``hub:org/name@revision`` for another than its newest commit.

    Raises
    ------
    CourseError
        The catalogue has no such model; the message lists those it has.
    """
    cards = read_catalogue()
    if name in cards:
        return cards[name]
    hub = HUB_NAME.fullmatch(name)
    if not hub or ".." in name:
        raise CourseError(f"There is no model called {name!r}.",
                          f"Choose one of: {', '.join(cards)}; or hub: and a name of the Hugging Face Hub, "
                          "such as hub:microsoft/Phi-3-mini-4k-instruct.")
    repository = {"repo": hub["repo"]} | ({"revision": hub["revision"]} if hub["revision"] else {})
    return Card(name=name, title=hub["repo"], summary="a repository of the Hugging Face Hub", licence="not stated",
                homepage=f"https://huggingface.co/{hub['repo']}", task="text-generation", parameters=None,
                context_length=None, download=None, disk=None, memory=None,
                source={"hub": {"transformers": repository, "onnx": repository}})
