"""Reads the catalogue of models, ``data/models.toml``, and names such as ``hub:org/name``. Downloads nothing."""

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from helpers.errors import CourseError
from helpers.paths import DATA

TRACKS = ("transformers", "onnx")
HUB_NAME = re.compile(
    r"hub:(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?", re.ASCII
)


@dataclass(frozen=True)
class CatalogueEntry:
    """What the course knows about a model before any of its files are downloaded.

    For a model that is named ``hub:org/name``, the numbers are None until its files are here.
    """

    name: str  # the value of the parameter `model`
    title: str
    summary: str
    licence: str
    homepage: str
    task: str  # the Hub's name of what the model does
    parameters: int | None  # number of weights
    context_length: int | None  # tokens that a prompt and its answer may take together
    download: int | None  # megabytes (10**6 bytes) to download
    disk: int | None  # megabytes of the prepared folders
    memory: int | None  # megabytes of memory that preparing and running needs at its peak
    # Where the files come from; helpers.models.sources reads it.
    source: dict = field(repr=False)

    @property
    def folder(self) -> str:
        """Name of the model's folder in the cache."""
        return self.name.replace(":", "--").replace("/", "--")


def read_catalogue(path: Path = DATA / "models.toml") -> dict[str, CatalogueEntry]:
    """Return the entries of the catalogue by name, in the file's order."""
    known = set(CatalogueEntry.__dataclass_fields__) - {"name", "source"}
    return {
        name: CatalogueEntry(
            name=name,
            source={key: value for key, value in table.items() if key not in known},
            **{key: table[key] for key in known},
        )
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items()
    }


def find_entry(name: str) -> CatalogueEntry:
    """Return the entry of a model by its name; raise CourseError with all names if there is none.

    ``hub:org/name`` is a repository of the Hugging Face Hub at its newest commit,
    ``hub:org/name@revision`` at a branch, tag or commit.
    """
    entries = read_catalogue()
    if name in entries:
        return entries[name]
    hub = HUB_NAME.fullmatch(name)
    if not hub or ".." in name:
        raise CourseError(
            "model-unknown",
            f"There is no model called {name!r}.",
            f"Choose one of: {', '.join(entries)}; or hub: and a name of the Hugging Face Hub, "
            "such as hub:microsoft/Phi-3-mini-4k-instruct.",
        )
    repository = {"repo": hub["repo"]} | ({"revision": hub["revision"]} if hub["revision"] else {})
    return CatalogueEntry(
        name=name,
        title=hub["repo"],
        summary="a repository of the Hugging Face Hub",
        licence="not stated",
        homepage=f"https://huggingface.co/{hub['repo']}",
        task="text-generation",
        parameters=None,
        context_length=None,
        download=None,
        disk=None,
        memory=None,
        source={"hub": dict.fromkeys(TRACKS, repository)},
    )
