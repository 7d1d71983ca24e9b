"""The commands that the texts print, and whether the course takes them; nothing is started."""

import re
import shlex

import pytest

from course.commands import run_command
from course.execute import find_notebook
from helpers import CourseError
from helpers.models.catalogue import find_entry
from support import ROOT
from support.markdown import DOCUMENTS, read_html

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# What stands for a word of the reader's own, and one that could stand there.
PLACEHOLDERS = {"COMMAND": "help", "NAME": "ChatModel"}
A_COMMAND = re.compile(
    r"(\.venv/bin/)?(make|python3?|mlflow|papermill|conda|az|docker|kubectl|curl|export) \S"
    r"|(\$env:)?[A-Z_]+=\S+ \S"
)


def find_commands() -> list[str]:
    """Return the commands of the documents and the pages, each once; the changelog names those of its day."""
    codes = [
        code.text
        for path in DOCUMENTS
        if path.name != "CHANGELOG.md"
        for code in read_html(path).select("code:not([class])")
    ]
    return list(
        dict.fromkeys(line for code in codes for line in code.splitlines() if A_COMMAND.match(line))
    )


def read_settings(command: str) -> tuple[dict[str, str], list[str]]:
    """Return the variables that a command begins with, of a POSIX shell or of PowerShell, and its other words."""
    settings, words = {}, shlex.split(command.removeprefix("export "))
    while words and (found := re.fullmatch(r"(?:\$env:)?([A-Z_]+)=(.*?);?", words[0])):
        settings[found[1]] = found[2]
        del words[0]
    return settings, words


def read_helpers(words: list[str]) -> tuple:
    """Return the command and the options that ``python -m helpers`` reads from these words.

    CourseError or SystemExit where it does not take them.
    """
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "course.commands._in_environment",
            lambda command, options, arguments: read.append((command, options)),
        )
        run_command([PLACEHOLDERS.get(word, word) for word in words])
    ((command, options),) = read
    for model in (getattr(options, "model", None) or [], options.parameters.get("model", [])):
        for name in [model] if isinstance(model, str) else model:
            find_entry(name)
    if command.parameters and hasattr(options, "name"):
        find_notebook(options.name)
    return command, options


def find_fault(command: str) -> str | None:
    """Return what is wrong with a command: a variable, a name, an option or a file that is not there.

    Commands of other programs, such as MLflow's, are run in tests/nightly/test_snippets.py.
    """
    settings, words = read_settings(command)
    known = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))
    if unknown := [
        name for name in settings if name != "MLFLOW_TRACKING_URI" and f"| {name} |" not in known
    ]:
        return f"no table in docs/ has {unknown[0]}"
    absent = [
        word
        for word in words
        if re.match("(deploy|notebooks)/", word) and not list(ROOT.glob(word))
    ]
    if absent:
        return f"there is no {absent[0]}"
    try:
        match words:
            case ["make", *targets]:
                for word in targets:
                    line = f"{word}:" if "=" not in word else f"{word.partition('=')[0]} ?="
                    if f"\n{line}" not in MAKEFILE:
                        return f"the Makefile has no {word}"
            case ["python" | "python3" | ".venv/bin/python", "-m", "helpers", *rest]:
                read_helpers(rest)
            case ["az", *_]:
                printed = (ROOT / "course" / "azure.py").read_text(encoding="utf-8")
                return None if " ".join(words) in printed else "the course prints no such command"
    except CourseError as error:
        return str(error)
    except SystemExit:
        return "is refused with a usage"
    return None
