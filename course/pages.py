"""Reads data/pages.toml, the list of the course's pages."""

import tomllib
from dataclasses import dataclass

from helpers.paths import DATA


@dataclass(frozen=True)
class Page:
    """A page of the course; data/pages.toml says what each field means."""

    name: str  # of the notebook, without its ending
    track: str
    minutes: int
    run: bool
    afterwards: str
    label: str = ""


def read_pages() -> list[Page]:
    """Return the pages in their order."""
    text = (DATA / "pages.toml").read_text(encoding="utf-8")
    return [Page(name, **fields) for name, fields in tomllib.loads(text).items()]


def tracks_to_run() -> dict[str, str]:
    """Return the pages that ``python -m helpers run`` executes, each with the track that it needs."""
    return {page.name: page.track for page in read_pages() if page.run}
