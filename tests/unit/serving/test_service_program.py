"""How the service starts, who may reach it, and whether its document says the same as its code.

Run: python -m helpers test tests/unit/serving/test_service_program.py
"""

import ast
import itertools
import re
import signal
import socket
import tempfile
from pathlib import Path

import mlflow
import pytest
from support import ROOT
from support.chat import SECRET

import serving
from serving import errors
from serving.errors import ProgramError
from serving.package import SHARED_FILES
from serving.service import command_line
from serving.service.app import host_name
from serving.service.command_line import check_reach
from serving.service.metrics import Metrics

# The codes of the chat model's refusals.
REFUSALS = ["invalid_value", "unknown_field", "context_length_exceeded", "busy", "closed", "failed"]
REFUSALS += ["unusable_model"]

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@pytest.mark.parametrize(
    "host, token, allowed, names",
    [
        ("127.0.0.1", None, [], LOOPBACK),
        ("127.0.0.2", None, [], LOOPBACK | {"127.0.0.2"}),
        ("localhost", None, [], LOOPBACK),
        ("::1", None, [], LOOPBACK),
        ("127.0.0.1", "t", ["Chat.Example"], LOOPBACK | {"chat.example"}),
        ("0.0.0.0", "t", ["chat.example"], {"chat.example"}),
        ("::", "t", ["a", "b"], {"a", "b"}),
        ("0.0.0.0", None, [], "no token"),
        ("0.0.0.0", None, ["chat.example"], "no token"),
        ("chat.example", None, [], "no token"),
        ("0.0.0.0", "t", [], "no host name"),
        ("", None, [], "no token"),
        ("127.0.0.1", "a\tb", [], "no HTTP header"),
        ("127.0.0.1", None, ["*"], "is no host name"),
        ("127.0.0.1", None, ["https://chat.example"], "is no host name"),
        ("0.0.0.0", "t", ["chat.example:80"], "is no host name"),
        ("0.0.0.0", "t", ["::1", "10.0.0.7", "a_b"], {"::1", "10.0.0.7", "a_b"}),
    ],
)
def test_who_may_reach_the_service(host, token, allowed, names):
    if isinstance(names, set):
        assert check_reach(host, token, allowed) == names
    else:
        with pytest.raises(ProgramError, match=names):
            check_reach(host, token, allowed)


@pytest.mark.parametrize(
    "header, name",
    [
        ("127.0.0.1:8000", "127.0.0.1"),
        ("LocalHost", "localhost"),
        ("localhost.:80", "localhost"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("", ""),
        ("[", ""),
        (":80", ""),
        ("chat.example.evil.example", "chat.example.evil.example"),
    ],
)
def test_the_name_in_a_host_header(header, name):
    assert host_name(header) == name


@pytest.fixture
def main(monkeypatch, capsys):
    """Return a function that runs the program in this process, and returns the two sentences of its refusal."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    handler = signal.getsignal(signal.SIGHUP) if hasattr(signal, "SIGHUP") else None

    def run(*words):
        capsys.readouterr()
        assert command_line.main([str(word) for word in words]) == 1
        what, fix = capsys.readouterr().err.strip().split("\n")
        assert what.startswith("error: ") and what.endswith(".") and fix.startswith("       ")
        return what.removeprefix("error: "), fix.strip()

    yield run
    if handler is not None:
        signal.signal(signal.SIGHUP, handler)


def test_a_port_that_is_taken(main):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main("--port", port) == (
            f"Port {port} is taken.",
            f"Choose another one: --port {port + 1}.",
        )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "/nowhere"], "does not load"),
        (["--model", ""], "does not load"),
        (["--host", "203.0.113.7", "--allowed-host", "x"], "no token"),
        (["--host", "0.0.0.0"], "no token"),
    ],
)
def test_what_the_program_cannot_begin_with(words, says, main):
    assert says in main("--port", 0, *words)[0]


def test_a_password_of_the_store_is_not_shown(main, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"http://user:{SECRET}@127.0.0.1:9")
    try:
        what, fix = main("--model", "models:/stand-in@champion", "--port", 0)
    finally:
        mlflow.set_tracking_uri(before)
    assert "The store http://127.0.0.1:9 names no version" in what and SECRET not in what + fix


@pytest.mark.parametrize(
    "words",
    [
        ["--timeout", "nan"],
        ["--timeout", "0"],
        ["--waiting", "-1"],
        ["--port", "x"],
        ["--max-body", "1e9"],
        ["--mode", "x"],
        ["--drain", "inf"],
    ],
)
def test_options_that_are_none(words):
    with pytest.raises(SystemExit) as refusal:
        command_line.read_options(words)
    assert refusal.value.code == 2


# --- the document ---------------------------------------------------------------------------

DOCUMENT = ROOT / "docs" / "serving.md"


def rows(heading):
    """Return the cells of the rows of the first table below a heading of the document."""
    lines = iter(
        DOCUMENT.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].splitlines()
    )
    table = itertools.takewhile(
        lambda line: line.startswith("|"),
        itertools.dropwhile(lambda line: not line.startswith("|"), lines),
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table][2:]


def test_the_document_has_the_options_and_what_they_are_unless_given():
    told = {}
    for names, defaults, _ in rows("Options"):
        told |= zip(
            re.findall("`--([a-z-]+)`", names),
            re.findall("`(.+?)`(?:,|$)", defaults) or [""] * 2,
            strict=False,
        )
    options = vars(command_line.read_options([]))
    assert {name.replace("-", "_") for name in told} == options.keys()
    defaults = {
        name: str(value) for name, value in options.items() if value not in (None, [], False)
    }
    assert {name: told[name.replace("_", "-")] for name in defaults} == defaults


def test_the_document_has_the_metrics():
    metrics = {
        f"{family.name}{'_total' if family.type == 'counter' else ''}"
        for family in Metrics().registry.collect()
        if not family.name.startswith("process_")
    }
    assert {name.strip("`").partition("{")[0] for name, _ in rows("Metrics")} == metrics


def test_the_document_has_every_error_of_the_service_and_the_model():
    folder = Path(serving.__file__).parent
    files = [*folder.glob("service/*.py"), *map(folder.joinpath, SHARED_FILES)]
    calls = [
        node
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "ServiceError"
    ]
    raised = {
        (call.args[0].value, call.args[2].value)
        for call in calls
        if all(isinstance(call.args[place], ast.Constant) for place in (0, 2))
    }
    assert len(raised) > 12
    raised |= {(errors.STATUS_OF_CODE.get(code, 400), code) for code in REFUSALS}
    documented = {
        (int(status), code)
        for statuses, codes, _ in rows("Errors")
        for status in statuses.split(", ")
        for code in re.findall("`(.+?)`", codes)
    }
    assert raised - documented == set()
    assert {code for _, code in documented} == {code for _, code in raised}
