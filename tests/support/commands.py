"""Reads a command that a text prints as the program reads it that it names, and starts nothing."""

import importlib
import re
import shlex

import click
import pytest

from course.commands import run_command
from course.environment import project
from course.execute import find_notebook
from helpers import CourseError
from helpers.models.catalogue import find_entry
from helpers.paths import BUILD
from helpers.stores.database import SQLITE
from support import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE)
VARIABLES = re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE)
# What stands for a word of the reader's own, and one that could stand there.
PLACEHOLDERS = {"COMMAND": "help", "NAME": "ChatModel"}
SETTING = re.compile(r"([A-Z][A-Z_]*)=(\"[^\"]*\"|\S*)(?: +|$)")
POWERSHELL = re.compile(r"\$env:([A-Z][A-Z_]*)=\"([^\"]*)\"(?:; +|$)")


def read_settings(command: str) -> tuple[dict[str, str], str]:
    """Return the variables that a command begins with, of a POSIX shell or of PowerShell, and the rest of it."""
    settings, command = {}, re.sub("^export ", "", command)
    while found := POWERSHELL.match(command) or SETTING.match(command):
        settings[found[1]] = found[2].strip('"')
        command = command[found.end():]
    return settings, command


def read_helpers(words: list[str]) -> tuple:
    """Return the command and the options that ``python -m helpers`` reads from these words.

    CourseError or SystemExit where it does not take them.
    """
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("course.commands._in_environment",
                      lambda command, options, arguments: read.append((command, options)))
        run_command([PLACEHOLDERS.get(word, word) for word in words])
    ((command, options),) = read
    for model in (getattr(options, "model", None) or [], options.parameters.get("model", [])):
        for name in [model] if isinstance(model, str) else model:
            find_entry(name)
    if command.parameters and hasattr(options, "name"):
        find_notebook(options.name)
    return command, options


def find_fault(command: str) -> str | None:
    """Return what is wrong with a command: a program, a name or an option that is not there. None for nothing."""
    settings, command = read_settings(command)
    known = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))
    for name, value in settings.items():
        if name == "MLFLOW_TRACKING_URI":
            if ROOT / value.removeprefix(SQLITE) != BUILD / "mlflow.db":
                return f"{value} is not the course's store"
        elif f"| {name} |" not in known:
            return f"no table in docs/ has {name}"
    words = shlex.split(command)
    if not words:
        return None if settings else "is empty"
    program, *words = words
    program = program.removeprefix(".venv/bin/")
    try:
        if program == "make":
            return _make_fault(words)
        if program in ("python", "python3", "py") and words[:2] == ["-m", "helpers"]:
            read_helpers(words[2:])
        elif program == "python" and words[:2] == ["-m", "nbstripout"]:
            importlib.import_module("nbstripout")
        elif program == "mlflow":
            from mlflow.cli import cli

            _read_click(cli, words)
        elif program == "papermill":
            from papermill.cli import papermill

            _read_click(papermill, words)
            if not (ROOT / words[0]).is_file():
                return f"there is no {words[0]}"
        elif program == "python" and words[:4] == ["-m", "pip", "install", "--editable"]:
            (extra,) = re.fullmatch(r"\.\[(\w+)\]", words[4]).groups()
            return None if extra in project()["optional-dependencies"] else f"there is no extra {extra}"
        elif program == "conda" and words[:3] == ["env", "create", "--file"]:
            return None if (ROOT / words[3]).is_file() else f"there is no {words[3]}"
        elif program == "az":
            printed = (ROOT / "course" / "azure.py").read_text(encoding="utf-8")
            return None if " ".join(["az", *words]) in printed else "the course prints no such command"
        elif program in ("docker", "kubectl") or (program == "python" and words[:2] == ["-m", "uv"]):
            gone = [word for word in words if word.startswith("deploy/") and not (ROOT / word).exists()]
            return f"there is no {gone[0]}" if gone else None
        elif program == "curl":
            return None if any(word.startswith("http://127.0.0.1:") for word in words) else "asks another machine"
        else:
            return f"nobody knows how to read {program}"
    except CourseError as error:
        return str(error)
    except SystemExit:
        return "is refused with a usage"
    except click.ClickException as error:
        return error.format_message()
    return None


def _make_fault(words):
    for word in words:
        name, equals, value = word.partition("=")
        if name not in (VARIABLES if equals else TARGETS):
            return f"the Makefile has no {name}"
        if name == "MODEL":
            find_entry(value)
    return None


def _read_click(command, words):
    """Let a command of the click library read these words; the name of a command alone says that it exists."""
    context = click.Context(command, info_name=command.name)
    named = 0
    while isinstance(command, click.Group) and words:
        name, *words = words
        command = command.get_command(context, name)
        if command is None:
            raise click.UsageError(f"there is no command {name}")
        context, named = click.Context(command, parent=context, info_name=name), named + 1
    if words or not named:
        command.make_context(command.name, [*words], parent=context)  # it takes the list apart
