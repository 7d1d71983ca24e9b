"""What is written for people to read: spelling, images, headings and links of every page and document.

Run: python -m helpers test tests/unit/course/test_prose.py
"""

import ipaddress
import re
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from support import ROOT
from support.markdown import without_code, without_fences

GLOBS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "notebooks/*.md", "deploy/**/*.md",
         "notebooks/*.ipynb")
PAGES = sorted(path for pattern in GLOBS for path in ROOT.glob(pattern))
# What may be named: this machine, all of its networks, and the address that stands for a host's in the examples.
EXAMPLES = ("127.0.0.1", "0.0.0.0", "192.168.1.5")
SHORTEST_ALT = 21
GLOSSARY = ROOT / "notebooks" / "glossary.md"
# What stands in italics on a page and is no term.
EMPHASIS = ("any, optional", "for each token", "word in italics")

every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


# How Markdown is read


class Tags(HTMLParser):
    """The HTML tags of a text, each with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def headings(text: str) -> list[tuple[int, str]]:
    """Return the headings of a text: each one's level, and its text as it stands there."""
    found, before = [], ""
    for line in without_fences(text).split("\n"):
        if heading := re.match(r" {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$", line):
            found.append((len(heading[1]), heading[2] or ""))
        elif re.match(r" {0,3}(?:=+|-+)[ \t]*$", line) and re.match(r" {0,3}(?![-*+] |[#>|<])\S", before):
            found.append((1 if "=" in line else 2, before.strip()))
        before = line
    return found


def disorder(found: list[tuple[int, str]]) -> list[str]:
    """Return what is wrong with the order of a page's headings: a line for each fault."""
    levels = [level for level, _ in found]
    faults = [] if levels[:1] == [1] else ["does not start with an H1"]
    faults += [f"{title}: a second H1" for level, title in found[1:] if level == 1]
    return faults + [f"{title}: H{level} after H{before}"
                     for before, (level, title) in zip(levels, found[1:], strict=False) if level > before + 1]


# A target: up to the bracket that closes it, or in angle brackets. A title may follow.
TARGET = r"\(\s*(?:<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()]*\)[^\s()]*)*))(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)"
IMAGE = re.compile(r"!\[((?:[^\[\]]|\[[^\[\]]*\])*)\]" + TARGET)
LINK = re.compile(r"(?<!!)(?<!\\)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]" + TARGET)


def images(text: str) -> list[tuple[str, str]]:
    """Return the images of a text: each one's alternative text and target."""
    prose = without_code(text)
    return [(alt, angled or plain) for alt, angled, plain in IMAGE.findall(prose)] + [
        (attributes.get("alt") or "", attributes.get("src") or "")
        for tag, attributes in Tags(prose).found if tag == "img"]


def links(text: str) -> list[str]:
    """Return the targets of a text's links: in brackets, defined below, in HTML, in angle brackets and bare."""
    prose = without_code(text)
    found = [attributes["href"] or "" for tag, attributes in Tags(prose).found if tag == "a" and "href" in attributes]
    prose = IMAGE.sub("image", prose)  # an image may be the text of a link
    found += [angled or plain for _, angled, plain in LINK.findall(prose)]
    prose = LINK.sub(" ", prose)
    definition = re.compile(r"^ {0,3}\[[^\]\n^][^\]\n]*\]:\s+<?([^\s>]+)>?.*$", re.MULTILINE)
    found += definition.findall(prose)
    prose = re.sub(r"""\b(?:href|src)\s*=\s*("[^"]*"|'[^']*')""", " ", definition.sub(" ", prose))
    # GitHub and JupyterLab both make links of these, and leave the punctuation of the sentence out.
    return found + [url.rstrip(".,:;!?*_'\"") for url in re.findall(r"\b[a-z]+://[^\s<>()\[\]|]+", prose)]


def plain(title: str) -> str:
    """Return the letters of a heading that a reader sees."""
    title = LINK.sub(lambda link: link[1], IMAGE.sub("", title))
    return re.sub(r"(\*\*|\*|`)(?=\S)(.+?)(?<=\S)\1", r"\2", title)


def italics(text: str) -> list[str]:
    """Return what stands in italics in a text: in single asterisks or underscores."""
    found = re.findall(r"(?<![\w*\\])([*_])(?![\s*_])((?:(?!\n[ \t]*\n)[^*_])+)(?<!\s)\1(?![\w*])", without_code(text))
    return [" ".join(words.split()) for _, words in found]


def anchors(text: str, notebook: bool) -> list[str]:
    """Return what a link to this page may have after its #.

    GitHub makes them of a document's headings; JupyterLab makes a notebook's
    (`createHeaderId` in its rendermime package: the text, with hyphens for spaces).
    """
    found, seen = [], {}
    for _, title in headings(text):
        if notebook:
            found.append(plain(title).replace(" ", "-"))
            continue
        slug = re.sub(r"[^\w\- ]", "", plain(title).strip().lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        found.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
    return found + [attributes[name] for tag, attributes in Tags(without_code(text)).found
                    for name in ("id", "name") if attributes.get(name) and (name == "id" or tag == "a")]


# What a link may be


def is_outside(target: str) -> bool:
    """Tell whether a link leaves the course."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|//", target))


def misshapen(url: str) -> str | None:
    """Return what is wrong with the shape of a link to the outside."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        return str(error)
    if parts.scheme != "https":
        return "is not https"
    if "@" in parts.netloc:
        return "names a user"
    if port is not None or parts.netloc.endswith(":"):
        return "names a port"
    if host == "localhost" or host.endswith(".localhost") or re.fullmatch(r"[\d.]+", host) or ":" in host:
        return "is no public name"
    if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*\.[a-z]{2,}", host):
        return "has no host"
    if re.search(r"[.,:;!?'\"*]$", url) or (url.endswith(")") and url.count("(") < url.count(")")):
        return "ends in punctuation"
    return None


def astray(target: str, page: Path, root: Path, known: set[str]) -> str | None:
    """Return where a relative link of a page misses: its file, or the heading there.

    ``known`` are the repository's files, by their paths from ``root`` and as git spells them.
    """
    path, _, anchor = unquote(target).partition("#")
    if path.startswith("/"):
        return "is absolute"
    file = (page.parent / path).resolve() if path else page.resolve()
    if not file.is_relative_to(root.resolve()):
        return "leaves the course"
    name = file.relative_to(root.resolve()).as_posix()
    if not file.exists() or not (name in known or any(other.startswith(f"{name}/") for other in known) or name == "."):
        return "is no file of the course"
    if "#" not in target:
        return None
    if file.suffix not in (".md", ".ipynb"):
        return "has no headings"
    notebook = file.suffix == ".ipynb"
    return None if anchor in anchors("\n\n".join(texts(file)), notebook) else "is no heading there"


def foreign(text: str) -> list[str]:
    """Return the paths and addresses of a text that belong to the machine where it was written."""
    text = text.replace("--tmpfs /tmp ", "")  # a container's own
    found = re.findall(r"(?<![\w.~-])/(?:work|tmp|root)(?![\w-])[^\s`)\"']*", text)
    candidates = re.findall(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d)", text)
    candidates += re.findall(r"(?<![\w:.])(?=[\dA-Fa-f:]*[\dA-Fa-f])(?:[\dA-Fa-f]{0,4}:){2,7}[\dA-Fa-f]{0,4}(?![\w:])",
                             text)
    for candidate in candidates:
        try:
            ipaddress.ip_address(candidate)
        except ValueError:
            continue
        if candidate not in EXAMPLES:
            found.append(candidate)
    return found


# The pages


def texts(path: Path) -> list[str]:
    """Return a document's text, or the text of each Markdown cell of a notebook."""
    if path.suffix == ".md":
        return [path.read_text(encoding="utf-8")]
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


def misspelt(pages: dict[str, str], folder: Path) -> list[str]:
    """Return what codespell finds in these texts: the page, the word and what it should be."""
    for number, text in enumerate(pages.values()):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    # In the course's folder, so that codespell reads its section of pyproject.toml.
    command = [sys.executable, "-m", "codespell_lib", "--builtin", "clear,rare", "--quiet-level", "35", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode in (0, 65), result.stderr  # 65: it found something
    names = list(pages)
    return [f"{names[int(Path(file).stem)]}: {words}" for file, words in
            re.findall(r"^(.*\d+\.txt):\d+: (.*)$", result.stdout, re.MULTILINE)]


@pytest.fixture(scope="module")
def known():
    """Return the files of the repository: those that git has, and those that it would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        pytest.skip("not a git checkout")
    return set(result.stdout.split("\0"))


@pytest.mark.parametrize(("text", "found"), [
    ("# One\n\n## Two ##\n### A `b` c\n####### seven\n#none", [(1, "One"), (2, "Two"), (3, "A `b` c")]),
    ("One\n===\n\nTwo\n---\n\n- a\n---\n\n---\n| a |\n|---|", [(1, "One"), (2, "Two")]),
    ("```\n# no\n```\n# yes", [(1, "yes")]),
    ("~~~~ sh\n# no\n~~~\n# no\n~~~~\n# yes", [(1, "yes")]),
    ("1. ```\n   # no\n   ```\n> ```\n> # no\n> ```\n# yes", [(1, "yes")]),
    ("<!--\n# no\n-->\n# yes", [(1, "yes")]),
    ("```a``` is code\n# yes", [(1, "yes")]),
    ("```\n# no, the fence is never closed", []),
])
def test_headings_are_found_and_what_stands_in_code_is_none(text, found):
    assert headings(text) == found


@pytest.mark.parametrize(("levels", "faults"), [
    ([1, 2, 3, 3, 2, 3], []),
    ([1, 2, 3, 4, 2], []),
    ([], ["does not start with an H1"]),
    ([2, 3], ["does not start with an H1"]),
    ([2, 1], ["does not start with an H1", "1: a second H1"]),
    ([1, 2, 1], ["2: a second H1"]),
    ([1, 3, 2, 4], ["1: H3 after H1", "3: H4 after H2"]),
])
def test_headings_start_with_one_h1_and_skip_no_level_going_down(levels, faults):
    assert disorder([(level, str(number)) for number, level in enumerate(levels)]) == faults


@pytest.mark.parametrize(("text", "found"), [
    ("![a [b] c](d.svg) and ![](<e f.svg> 'title')", [("a [b] c", "d.svg"), ("", "e f.svg")]),
    ("[![alt](a.svg)](b.md)", [("alt", "a.svg")]),
    ("![two\nlines](a.svg)", [("two\nlines", "a.svg")]),
    ("<p><img src='a.svg'\n alt=\"b > c\"/><IMG></p>", [("b > c", "a.svg"), ("", "")]),
    ("`![a](b)` and `` <img src=` > ``\n```\n![a](b)\n```\n[a](b)", []),
])
def test_images_are_found_in_markdown_and_html_and_not_in_code(text, found):
    assert images(text) == found


@pytest.mark.parametrize(("text", "found"), [
    ("[a](b.md) [c](d.md#e 'title') [f](<g h.md>) [i [j]](k)", ["b.md", "d.md#e", "g h.md", "k"]),
    ("[a](b_(c).md), and ([d](e)).", ["b_(c).md", "e"]),
    ("[`a`](b.md)", ["b.md"]),
    ("[two\nlines](a.md)", ["a.md"]),
    ("[![alt](a.svg)](b.md)", ["b.md"]),
    ("![alt](a.svg) ![alt](https://a.org/b.svg)", []),
    ("[a][b] and [^1]\n\n[b]: https://c.org/d 'title'\n[^1]: A note.", ["https://c.org/d"]),
    ("<a href='a.md'>a</a> <a id='b'></a>", ["a.md"]),
    ("<https://a.org/b> and https://c.org/d. Or http://e.org/f?", ["https://a.org/b", "https://c.org/d", "http://e.org/f"]),
    ("[https://a.org](https://a.org/b)", ["https://a.org/b"]),
    ("`[a](b)` ``c ` [d](e)`` `f\n[g](h)`", []),
    ("```python\nmodel[0](messages)\nhttp://localhost:8000\n```\n> ~~~\n> [a](b)\n> ~~~", []),
    ("<!-- [a](b) https://c.org -->", []),
    ("`a``b [c](d)`", []),
    ("a ` alone, [b](c), another\n\n` one", ["c"]),
    ("messages[].role (a) \\[b](c)", []),
])
def test_links_are_found_in_all_their_forms_and_not_in_code(text, found):
    assert links(text) == found


@pytest.mark.parametrize(("text", "found"), [
    ("A *chat template*, *tokens*; _logits_ and (*ONNX*).", ["chat template", "tokens", "logits", "ONNX"]),
    ("a *tracking\nURI*.", ["tracking URI"]),
    ("> *one*\n\n- *two*\n* three *four*\n* five", ["one", "two", "four"]),
    ("**bold** and **bold *both* bold**, ***all***", ["both"]),
    ("`*a*` and ``_b_``\n```\n*c*\n```", []),
    ("2 * 3 * 4, a_b_c, \\*d*, *e\n\nf*", []),
])
def test_italics_are_found_and_bold_and_code_are_none(text, found):
    assert italics(text) == found


@pytest.mark.parametrize(("text", "document", "notebook"), [
    ("# Run it", ["run-it"], ["Run-it"]),
    ("# A `b_c`: d, *e*!", ["a-b_c-d-e"], ["A-b_c:-d,-e!"]),
    ("# [A](b.md) & C", ["a--c"], ["A-&-C"]),
    ("# Schön 2.0", ["schön-20"], ["Schön-2.0"]),
    ("# A\n## A\n## A", ["a", "a-1", "a-2"], ["A", "A", "A"]),
    ("# A\n<a id='b'></a><a name='c'></a><meta name='d'>", ["a", "b", "c"], ["A", "b", "c"]),
    ("```\n# A\n```", [], []),
])
def test_anchors_are_what_github_and_jupyterlab_make_of_headings(text, document, notebook):
    assert anchors(text, notebook=False) == document
    assert anchors(text, notebook=True) == notebook


@pytest.mark.parametrize(("url", "reason"), [
    ("https://huggingface.co/microsoft/Phi-3-mini-4k-instruct", None),
    ("https://en.wikipedia.org/wiki/Loop_(graph)#Top", None),
    ("https://mlflow.org", None),
    ("http://mlflow.org", "is not https"),
    ("//mlflow.org", "is not https"),
    ("mailto:a@mlflow.org", "is not https"),
    ("file:///etc/hosts", "is not https"),
    ("https://me@mlflow.org/a", "names a user"),
    ("https://me:word@mlflow.org/a", "names a user"),
    ("https://mlflow.org:443/a", "names a port"),
    ("https://mlflow.org:/a", "names a port"),
    ("https://mlflow.org:high/a", "Port could not be cast to integer value as 'high'"),
    ("https://localhost/a", "is no public name"),
    ("https://127.0.0.1/a", "is no public name"),
    ("https://[::1]/a", "is no public name"),
    ("https://mlflow/a", "has no host"),
    ("https:///a", "has no host"),
    ("https://mlflow.org/a.", "ends in punctuation"),
    ("https://mlflow.org/a)", "ends in punctuation"),
])
def test_a_link_to_the_outside_has_a_public_host_and_nothing_odd(url, reason):
    assert is_outside(url)
    assert misshapen(url) == reason


@pytest.fixture
def house(tmp_path):
    """Return a small repository's folder, and the files in it that git would know."""
    root = tmp_path / "höuse"
    (root / "docs").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "README.md").write_text("# The house\n\n## Run it\n", encoding="utf-8")
    (root / "docs" / "a b.md").write_text("# A b\n", encoding="utf-8")
    (root / "docs" / "ignored.md").write_text("# Ignored\n", encoding="utf-8")
    (root / "tool.py").write_text("", encoding="utf-8")
    (tmp_path / "outside.md").write_text("# Outside\n", encoding="utf-8")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Track A"),
                                               nbformat.v4.new_code_cell("# Not a heading")])
    nbformat.write(notebook, root / "page.ipynb")
    return root, {"README.md", "docs/a b.md", "tool.py", "page.ipynb", "gone.md"}


@pytest.mark.parametrize(("target", "reason"), [
    ("../README.md", None),
    ("../README.md#run-it", None),
    ("a%20b.md#a-b", None),
    ("#a-b", None),
    ("../docs", None),
    ("../docs/", None),
    ("..", None),
    ("../tool.py", None),
    ("../page.ipynb#Track-A", None),
    ("../page.ipynb#track-a", "is no heading there"),
    ("../page.ipynb#Not-a-heading", "is no heading there"),
    ("../README.md#Run-it", "is no heading there"),
    ("../README.md#", "is no heading there"),
    ("#a", "is no heading there"),
    ("../tool.py#L1", "has no headings"),
    ("../readme.md", "is no file of the course"),
    ("README.md", "is no file of the course"),
    ("ignored.md", "is no file of the course"),
    ("../gone.md", "is no file of the course"),
    ("../empty", "is no file of the course"),
    ("../../outside.md", "leaves the course"),
    ("/README.md", "is absolute"),
])
def test_a_relative_link_points_to_a_file_that_git_knows_and_a_heading_in_it(house, target, reason):
    root, known = house
    assert not is_outside(target)
    assert astray(target, root / "docs" / "a b.md", root, known) == reason


@pytest.mark.parametrize(("text", "found"), [
    ("Read `/tmp/a.log`, then /root and (/work/main).", ["/tmp/a.log", "/root", "/work/main"]),
    ("http://10.0.0.7:8750 or 8.8.8.8.", ["10.0.0.7", "8.8.8.8"]),
    ("on fe80::1 or ::1", ["fe80::1", "::1"]),
    ("```\ncd /work/main\n```", ["/work/main"]),
    ("127.0.0.1, 0.0.0.0 and http://192.168.1.5:8750", []),
    ("build/tmp/a, https://a.org/work/b, and/or, /rooted, ~/work/a", []),
    ("2026.10.11549, 3.11.7, 12:30:45, 1.2.3.4.5, 300.1.1.1, std::move", []),
])
def test_paths_and_addresses_of_the_authors_machine_are_found(text, found):
    assert foreign(text) == found


def test_codespell_notices_a_planted_mistake(tmp_path):
    planted = {"a.md": "A loop in six steps.", "b.md": "It is " + "teh" + " model, and you " + "recieve" + " a text."}
    assert misspelt(planted, tmp_path) == ["b.md: teh ==> the", "b.md: recieve ==> receive"]


def test_the_pages_are_spelt_right(tmp_path):
    assert misspelt({path.relative_to(ROOT).as_posix(): "\n\n".join(texts(path)) for path in PAGES}, tmp_path) == []


def test_codespell_ignores_only_words_that_a_page_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    words = project["tool"].get("codespell", {}).get("ignore-words-list", "")
    used = "\n".join(text for path in PAGES for text in texts(path)).lower()
    assert [word for word in re.split(r"[,\s]+", words) if word and not re.search(rf"\b{word}\b", used)] == []


@every_page
def test_every_image_is_there_and_has_a_text_that_says_what_it_shows(path, known):
    for alt, target in (image for text in texts(path) for image in images(text)):
        assert len(" ".join(alt.split())) >= SHORTEST_ALT, target
        assert not is_outside(target), target
        assert (path.parent / unquote(target)).is_file() and astray(target, path, ROOT, known) is None, target


@every_page
def test_the_headings_of_a_page_are_in_order(path):
    assert disorder([heading for text in texts(path) for heading in headings(text)]) == []


@every_page
def test_every_link_leads_somewhere(path, known):
    targets = [target for text in texts(path) for target in links(text)]
    faults = {target: misshapen(target) if is_outside(target) else astray(target, path, ROOT, known)
              for target in targets}
    assert {target: reason for target, reason in faults.items() if reason} == {}


@every_page
def test_the_prose_names_nothing_of_the_machine_where_it_was_written(path):
    assert [place for text in texts(path) for place in foreign(text)] == []


def entries():
    """Return the words of the glossary, in its order."""
    return re.findall(r"^- \*\*(.+?)\*\*: \S.*[^\s.]\.$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)


def terms():
    """Return what stands in italics on the course's pages: the page and the words."""
    return [(path.name, words) for path in PAGES if path.suffix == ".ipynb"
            for text in texts(path) for words in italics(text)]


def test_the_glossary_has_a_line_for_each_word_in_alphabetical_order():
    assert entries() == sorted(set(entries()), key=str.lower)
    lines = [line for line in GLOSSARY.read_text(encoding="utf-8").splitlines() if line]
    assert len(lines) == len(entries()) + 2  # the heading and one sentence


def test_every_word_in_italics_stands_in_the_glossary():
    known = {word.lower() for word in entries()} | set(EMPHASIS)
    lacking = [f"{page}: {words}" for page, words in terms()
               if not {words.lower(), words.lower().removesuffix("s")} & known]
    assert lacking == []
    assert set(EMPHASIS) <= {words for _, words in terms()}
