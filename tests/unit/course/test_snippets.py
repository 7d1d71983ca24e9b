"""The commands that the texts, the Makefile, MLproject and the course's own errors name: the course takes them.

tests/nightly/test_snippets.py runs them.

Run: python -m helpers test tests/unit/course/test_snippets.py
"""

import os
import re
import shutil
import subprocess
from argparse import ArgumentParser, _SubParsersAction

import pytest
import yaml
from support import ROOT
from support.commands import find_commands, find_fault, read_helpers, read_settings
from support.markdown import DOCUMENTS, read_html

from course.commands import COMMANDS
from serving import batch
from serving.service import command_line

PROJECT = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
COMMAND_LINES = find_commands()
assert len(COMMAND_LINES) > 60, "the texts have many commands"


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_a_command_of_the_texts_is_one_that_its_program_takes(command):
    assert find_fault(command) is None


def help_of(name):
    """Return the options that a command's parser has, those of its actions, too."""
    parser = ArgumentParser(prog=name)
    for add_options in COMMANDS[name].options:
        add_options(parser)
    actions = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    parsers = [parser, *(inner for action in actions for inner in action.choices.values())]
    return "\n".join(one.format_help() for one in parsers) + (
        "\n-p" if COMMANDS[name].parameters else ""
    )


def test_the_options_that_the_texts_name_are_there(capsys):
    for program in (command_line, batch):
        with pytest.raises(SystemExit):
            program.read_options(["--help"])
    helps = "\n".join([capsys.readouterr().out, *map(help_of, COMMANDS)])
    named = {
        code.text
        for path in DOCUMENTS
        if path.name != "CHANGELOG.md"
        for code in read_html(path).select("code")
        if re.fullmatch(r"--[a-z-]+", code.text)
    }
    assert len(named) > 10
    assert [
        option for option in sorted(named) if not re.search(rf"(?<![\w-]){option}(?![\w-])", helps)
    ] == []


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_both_columns_of_the_readmes_table_are_one_command(monkeypatch):
    pairs = re.findall(
        r"^\|[^|]*\| `make ([^`|]+)` \| `python -m helpers ([^`|]+)` \|",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(pairs) >= 9
    monkeypatch.delenv("COURSE_MODEL")
    for target, words in pairs:
        assert read_recipe(target) == read_helpers(words.split()), target


def read_recipe(target):
    """Return what `python -m helpers` reads from what make would run."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COURSE_", "MAKE"))
    }
    said = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *target.split()],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
        env=environment,
    ).stdout
    settings, words = read_settings(said.strip())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        return read_helpers(words[3:])


@pytest.mark.parametrize("entry", PROJECT)
def test_the_command_of_an_entry_of_mlproject_is_one_that_the_course_takes(entry):
    values = {
        name: "'{}'".format(parameter.get("default", name))
        for name, parameter in PROJECT[entry]["parameters"].items()
    }
    assert find_fault(PROJECT[entry]["command"].format(**values)) is None


def test_what_the_code_tells_people_to_run_are_commands():
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("helpers", "course", "serving", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        command
        for source in sources
        for command in re.findall(r"-m helpers ([a-z]+(?: [a-z]+(?= --))?(?: --[a-z-]+)?)", source)
    }
    assert len(found) > 10
    for command in sorted(found):
        name, *words = command.split()
        assert name in COMMANDS, command
        assert all(word in help_of(name) for word in words), command
