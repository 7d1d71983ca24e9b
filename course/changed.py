"""Finds the pages that a change touches, by what their cells import, start and read.

It imports nothing that has to be installed: a CI job calls it before set-up. It reads code and runs
none. A string that names a file or a module of the course counts as a use of it, so the list may
have a page too many.
"""

import ast
import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.errors import CourseError
from helpers.paths import ROOT

# A change of these touches every page.
USED_BY_ALL = ("pyproject.toml", "constraints.txt", "data/models.toml")
# What starts a page. The commands import what they need inside their functions, so of their file
# only the imports at the top and the commands that a page starts count.
COMMANDS = "course/commands.py"
STARTERS = (
    "helpers/__init__.py",
    "helpers/__main__.py",
    "course/__init__.py",
    "course/__main__.py",
    "course/execute.py",
    COMMANDS,
)
# The folders whose files a page may use: not documents, not tests.
FOLDERS = ("course", "data", "deploy", "helpers", "notebooks", "serving")
# Folders whose files are named by the last part of the path alone, such as DATA / "page.css".
NAMED_BY_LAST_PART = ("data", "serving")
# The dict in helpers/__init__.py from each name of the package to the module that is imported on
# its first use.
LAZY_NAMES = "_HOME"
MODULE = re.compile(r"\b(?:helpers|serving|course)(?:\.\w+)+")
COMMAND = re.compile(r"-m helpers (\w+)")
# A line that IPython understands and Python does not: %magic, !command, names = !command, help?.
IPYTHON = re.compile(r"\s*(\w[\w, ]*=\s*)?[%!]|\s*\??[\w.]+\?+\s*$")


def changed_pages(since: str, root: Path = ROOT) -> list[str]:
    """Return the names of the pages that a change touches, sorted.

    The change is everything since the branch left the commit ``since``, with what is not committed
    yet.

    Raises
    ------
    CourseError
        There is no git, no checkout, no such commit, or no common one.
    """
    changed = _changed_files(since, root)
    files = {*_git(root, "ls-files", "-z").split("\0"), *changed} - {""}
    pages = sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))
    if changed.intersection(USED_BY_ALL):
        return pages
    uses = Uses(root, files)
    return [page for page in pages if changed & uses.find(f"notebooks/{page}.ipynb")]


def _changed_files(since, root):
    """Return the paths, from the course's folder on, that changed since a commit, deleted and new ones included."""
    _git(root, "rev-parse", "--git-dir")  # refused here where this is no checkout
    unknown = CourseError(
        "ref-unknown",
        f"git knows no commit called {since!r}.",
        "Name a commit, a branch or a tag such as origin/main; `git fetch` gets what is not here.",
    )
    if not since or since.startswith("-"):
        raise unknown
    commit = _git(
        root, "rev-parse", "--verify", "--quiet", f"{since}^{{commit}}", error=unknown
    ).strip()
    base = _git(
        root,
        "merge-base",
        commit,
        "HEAD",
        error=CourseError(
            "ref-unrelated",
            f"git finds no commit that {since} and this branch have in common.",
            "Fetch the whole history: git fetch --unshallow, or fetch-depth: 0 for actions/checkout.",
        ),
    ).strip()
    listed = (
        _git(root, "diff", "--relative", "--name-only", "--no-renames", "-z", base),
        _git(root, "ls-files", "--others", "--exclude-standard", "-z"),
    )
    return {name for names in listed for name in names.split("\0") if name}


def _git(root, *words, error=None):
    """Return what git says; raise ``error``, or one with git's own words, where it fails."""
    try:
        result = subprocess.run(
            ["git", *words],
            cwd=root,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except FileNotFoundError:
        raise CourseError(
            "git-missing",
            "There is no git on this machine's path.",
            "Install it, or run all pages: python -m helpers run.",
        ) from None
    if result.returncode:
        raise error or CourseError(
            "not-a-checkout",
            f"git cannot read {root}: {' '.join(result.stderr.split()) or 'it said nothing'}.",
            "Clone the course with git, or run all pages: python -m helpers run.",
        )
    return result.stdout


class Uses:
    """Finds the files that a page uses: by imports, by commands that it starts, by names in strings.

    Parameters
    ----------
    root : pathlib.Path
    files : set of str
        All that git lists, new and deleted ones included: a page may still import a deleted one.
    """

    def __init__(self, root: Path, files: set[str]):
        self.root = root
        self.files = {file for file in files if file.partition("/")[0] in FOLDERS}
        # Files by their last parts, and by the names of folders of data/ and deploy/.
        self.by_name = {}
        for file in self.files:
            top, *folders, name = file.split("/")
            short_names = folders if top in ("data", "deploy") else []
            if top in NAMED_BY_LAST_PART:
                short_names.append(name)
            for short_name in short_names:
                self.by_name.setdefault(short_name, set()).add(file)
        self.lazy = self._read_lazy_names()

    def find(self, page: str) -> set[str]:
        """Return the page's path and those of all files that it uses, directly or not."""
        found, left = set(), {page, *STARTERS} & self.files
        while left:
            file = left.pop()
            found.add(file)
            left |= self._used_by(file) - found
        return found

    def _used_by(self, file):
        path = self.root / file
        if not path.is_file() or path.suffix not in (".py", ".ipynb"):
            return set()
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".ipynb":
            return self._used_by_cells(json.loads(text)["cells"])
        tree = _parse(text)
        if tree is None:
            return set()
        if file == COMMANDS:
            return self._used_by_nodes(
                node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
            )
        return self._used_by_nodes([tree])

    def _used_by_cells(self, cells):
        found = set()
        for cell in cells:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code":
                python, shell = _split_cell(source)
                tree = _parse(python)
                if tree is None:
                    found |= self._used_by_text(source)
                else:
                    found |= self._used_by_text(shell) | self._used_by_nodes([tree])
            else:  # a page shows images
                found |= {
                    file
                    for file in self.files
                    if file.startswith("notebooks/images/")
                    and file.removeprefix("notebooks/") in source
                }
        return found

    def _used_by_nodes(self, nodes: Iterable[ast.AST]):
        found = set()
        for node in _walk(nodes):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found |= self._module(alias.name) | self._lazy_modules(alias.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                lazy = self.lazy if node.module == "helpers" else {}
                for alias in node.names:
                    found |= self._module(lazy.get(alias.name) or f"{node.module}.{alias.name}")
            elif isinstance(node, ast.List | ast.Tuple):
                words = [item.value if isinstance(item, ast.Constant) else "" for item in node.elts]
                for first, second, name in zip(words, words[1:], words[2:], strict=False):
                    if (first, second) == ("-m", "helpers"):
                        found |= self._used_by_command(name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= self._used_by_string(node.value)
        return found

    def _used_by_string(self, text):
        """Return the files that a string names: by their paths, by their last parts, or as modules."""
        modules = {file for name in MODULE.findall(text) for file in self._module(name)}
        return modules | ({text} & self.files) | self.by_name.get(text, set())

    def _used_by_text(self, text):
        """Return what a shell line, or code that is no Python, uses."""
        found = {
            file for word in re.split(r"[\s\"'=(),]+", text) for file in self._used_by_string(word)
        }
        for command in COMMAND.findall(text):
            found |= self._used_by_command(command)
        return found

    def _used_by_command(self, name):
        """Return what a command of ``python -m helpers`` uses: its entry, and the functions of that file it calls."""
        path = self.root / COMMANDS
        tree = _parse(path.read_text(encoding="utf-8")) if path.is_file() else None
        if tree is None:
            return set()
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        entries = [
            value
            for node in ast.walk(tree)
            if isinstance(node, ast.Dict)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and key.value == name
        ]
        nodes, left = [], entries
        while left:
            node = left.pop()
            nodes.append(node)
            called = {
                inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)
            } & functions.keys()
            left += [functions.pop(function) for function in called]
        return self._used_by_nodes(nodes)

    def _module(self, name):
        """Return the files that importing a dotted name reads: its module and the packages above it."""
        parts = name.split(".")
        found = set()
        for length in range(1, len(parts) + 1):
            stem = "/".join(parts[:length])
            found |= {f"{stem}.py", f"{stem}/__init__.py"} & self.files
        return found

    def _lazy_modules(self, name):
        """Return all modules that ``import helpers`` may reach by an attribute."""
        return (
            {file for module in self.lazy.values() for file in self._module(module)}
            if name == "helpers"
            else set()
        )

    def _read_lazy_names(self):
        path = self.root / "helpers" / "__init__.py"
        tree = _parse(path.read_text(encoding="utf-8")) if path.is_file() else None
        for node in tree.body if tree else []:
            if _is_lazy_table(node):
                return ast.literal_eval(node.value)
        return {}


def _is_lazy_table(node):
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == LAZY_NAMES
    )


def _walk(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield nodes and all below them, but for docstrings and the table of lazy names, which use nothing."""
    left = list(nodes)
    while left:
        node = left.pop()
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_docstring and not _is_lazy_table(node):
            yield node
            left += ast.iter_child_nodes(node)


def _parse(text):
    """Return the syntax tree of Python code, or None for what is no Python: it imports nothing."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _split_cell(source):
    """Return a cell's Python, and what IPython reads by itself: magics, shell commands, calls for help."""
    lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        return "\n".join(lines[1:]), lines[0]
    is_shell = [IPYTHON.match(line) for line in lines]
    python = [
        re.sub(r"\S.*", "pass", line) if shell else line
        for line, shell in zip(lines, is_shell, strict=True)
    ]
    return "\n".join(python), "\n".join(
        line for line, shell in zip(lines, is_shell, strict=True) if shell
    )
