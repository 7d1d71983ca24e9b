"""What a reader of the documents and the pages runs into: spelling, headings, images, links, and the glossary.

Run: python -m helpers test tests/unit/course/test_prose.py
"""

import re
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest
from support import ROOT
from support.markdown import DOCUMENTS, read_html, read_text

every_page = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)
# What stands in italics on a page and is no term.
EMPHASIS = {"any, optional", "for each token", "word in italics"}


def find_headings(path):
    return read_html(path).select("h1, h2, h3, h4, h5, h6")


def find_anchors(path):
    """Return what a link to this page may have after its #.

    GitHub makes them of a document's headings; JupyterLab makes a notebook's
    (`createHeaderId` in its rendermime package: the text, with hyphens for spaces).
    """
    titles = [heading.text.strip() for heading in find_headings(path)]
    if path.suffix == ".ipynb":
        return [title.replace(" ", "-") for title in titles]
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.fixture(scope="module")
def known():
    """Return the files of the repository: those that git has, and those that it would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        pytest.skip("not a git checkout")
    return {ROOT / name for name in result.stdout.split("\0")}


def find_fault(page, target, known):
    """Return what is wrong with the target of a link: nothing where it leads somewhere."""
    parts = urlsplit(target)
    if parts.scheme or parts.netloc:
        public = parts.scheme == "https" and re.fullmatch(
            r"[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}", parts.netloc
        )
        return None if public else "is no address that a reader can open"
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if file not in known and not any(file in other.parents for other in known):
        return "is no file of the course"
    if parts.fragment and unquote(parts.fragment) not in find_anchors(file):
        return "is no heading there"
    return None


@every_page
def test_every_link_and_image_leads_somewhere(path, known):
    html = read_html(path)
    targets = [link["href"] for link in html.select("a[href]")] + [
        image["src"] for image in html.select("img")
    ]
    faults = {target: find_fault(path, target, known) for target in targets}
    assert {target: fault for target, fault in faults.items() if fault} == {}


@every_page
def test_every_image_has_a_text_that_says_what_it_shows(path):
    assert [
        image["src"] for image in read_html(path).select("img") if len(image["alt"]) <= 20
    ] == []


@every_page
def test_headings_start_with_one_h1_and_skip_no_level_going_down(path):
    first, *levels = [int(heading.name[1]) for heading in find_headings(path)]
    assert first == 1 and 1 not in levels
    assert all(level <= before + 1 for before, level in zip([first, *levels], levels, strict=False))


@every_page
def test_no_text_names_a_folder_of_the_machine_where_it_was_written(path):
    assert re.findall(r"(?<![\w.~-])/(?:work|root)/\S*", read_text(path)) == []


def test_the_texts_are_spelt_right(tmp_path):
    for number, path in enumerate(DOCUMENTS):
        (tmp_path / f"{number} {path.name}.txt").write_text(read_text(path), encoding="utf-8")
    # In the course's folder, so that codespell reads its section of pyproject.toml.
    command = [
        sys.executable,
        "-m",
        "codespell_lib",
        "--builtin",
        "clear,rare",
        "--quiet-level",
        "35",
        str(tmp_path),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def test_every_word_in_italics_on_a_page_stands_in_the_glossary():
    terms = {
        word.text.lower()
        for word in read_html(ROOT / "notebooks" / "glossary.md").select("li > strong")
    }
    named = {
        (path.name, " ".join(word.text.lower().split()))
        for path in DOCUMENTS
        if path.suffix == ".ipynb"
        for word in read_html(path).select("em")
    }
    assert [
        one for one in named if not {one[1], one[1].removesuffix("s")} & (terms | EMPHASIS)
    ] == []
