"""The rules of the server, in this process: limits, errors, requests, the queue, the version that serves, the document.

Run: python -m helpers test tests/unit/serving/test_openai_server.py
"""

import ast
import asyncio
import inspect
import itertools
import json
import random
import re
import signal
import socket
import tempfile
import threading

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from support import ROOT
from support.chat import AS_SHOWN, SECRET, SENT_BACK, parts, schema, user

from serving import openai_server
from serving.openai_server import (
    TAKEN_BY_FLAVOR,
    Address,
    Desk,
    Figures,
    Limits,
    ServiceError,
    StartError,
    Turns,
    adapt,
    admit,
    check_reach,
    check_request,
    explain,
    host_name,
    join,
    read_json,
    retry_after,
    without_password,
)

# --- the policies ---------------------------------------------------------------------------


@pytest.mark.parametrize("running, waiting, concurrent, most_waiting, comes_in", [
    (0, 0, 1, 1, True), (1, 0, 1, 1, True), (1, 1, 1, 1, False), (1, 1, 1, 2, True), (63, 0, 64, 1, True),
    (64, 256, 64, 256, False), (65, 0, 64, 1, True),
])
def test_who_may_come_in(running, waiting, concurrent, most_waiting, comes_in):
    assert admit(running, waiting, concurrent, most_waiting) is comes_in


@pytest.mark.parametrize("waiting, concurrent, seconds, answer", [
    (1, 1, 0.01, 1), (1, 64, 1, 1), (10, 1, 2, 20), (10, 4, 2, 5), (10, 4, 2.01, 6), (256, 1, 30, 60)])
def test_when_a_client_may_come_again(waiting, concurrent, seconds, answer):
    assert retry_after(waiting, concurrent, seconds) == answer


LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@pytest.mark.parametrize("host, token, allowed, names", [
    ("127.0.0.1", None, [], LOOPBACK), ("127.0.0.2", None, [], LOOPBACK), ("localhost", None, [], LOOPBACK),
    ("::1", None, [], LOOPBACK), ("127.0.0.1", "t", ["Chat.Example"], LOOPBACK | {"chat.example"}),
    ("0.0.0.0", "t", ["chat.example"], {"chat.example"}), ("::", "t", ["a", "b"], {"a", "b"}),
    ("0.0.0.0", None, [], "no token"), ("0.0.0.0", None, ["chat.example"], "no token"),
    ("chat.example", None, [], "no token"), ("0.0.0.0", "t", [], "by what names"), ("", None, [], "no token"),
])
def test_who_may_reach_the_service(host, token, allowed, names):
    if isinstance(names, set):
        assert check_reach(host, token, allowed) == names
    else:
        with pytest.raises(StartError, match=names):
            check_reach(host, token, allowed)


@pytest.mark.parametrize("header, name", [
    ("127.0.0.1:8000", "127.0.0.1"), ("LocalHost", "localhost"), ("localhost.:80", "localhost"), ("[::1]:8000", "::1"),
    ("[::1]", "::1"), ("", ""), ("[", ""), (":80", ""), ("chat.example.evil.example", "chat.example.evil.example")])
def test_the_name_in_a_host_header(header, name):
    assert host_name(header) == name


class _Refusal(MlflowException):
    def __init__(self, code, field=None):
        super().__init__(f"{code} it is.")
        self.code, self.field = code, field


@pytest.mark.parametrize("error, status, code, param, told", [
    (_Refusal("invalid_value", "top_p"), 400, "invalid_value", "top_p", True),
    (_Refusal("context_length_exceeded", "messages"), 400, "context_length_exceeded", "messages", True),
    (_Refusal("busy"), 429, "busy", None, True), (_Refusal("closed"), 503, "closed", None, True),
    (_Refusal("failed"), 500, "failed", None, True),
    (MlflowException.invalid_parameter_value(SECRET), 400, "invalid_value", None, False),
    (MlflowException(SECRET), 500, "failed", None, False), (ValueError(SECRET), 500, "failed", None, False),
    (KeyboardInterrupt(SECRET), 500, "failed", None, False),
    (ServiceError(418, "A teapot.", "teapot", "pot"), 418, "teapot", "pot", True),
])
def test_what_a_caller_reads_of_an_error(error, status, code, param, told):
    said = explain(error)
    assert (said.status, said.code, said.param) == (status, code, param)
    assert told == (said.message == getattr(error, "message", None))
    assert SECRET not in said.message


# --- the turns ------------------------------------------------------------------------------


def test_turns_come_in_order_and_who_leaves_gives_up_the_place():
    async def story():
        turns, came = Turns(lambda: 1, 4), []

        async def caller(number):
            await turns.take()
            came.append(number)

        callers = [asyncio.create_task(caller(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting, came) == (1, 4, [0])
        with pytest.raises(ServiceError) as refusal:
            await turns.take()
        assert (refusal.value.status, refusal.value.code, refusal.value.retry_after) == (429, "busy", 4)
        callers[2].cancel()
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting) == (1, 3)
        for _ in range(4):
            turns.give(0.1)
            await asyncio.sleep(0)
        assert (turns.running, turns.waiting, came) == (0, 0, [0, 1, 3, 4])

    asyncio.run(story())


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_turn_that_comes_in_the_moment_of_leaving_goes_to_the_next(leaves_first):
    async def story():
        turns = Turns(lambda: 1, 4)
        await turns.take()
        leaver, other = (asyncio.create_task(turns.take()) for _ in range(2))
        await asyncio.sleep(0)
        if leaves_first:
            leaver.cancel()
            turns.give()
        else:
            turns.give()
            leaver.cancel()
        await asyncio.wait([leaver, other], timeout=5)
        assert other.done() and not other.cancelled()
        assert (turns.running, turns.waiting) == (1, 0)

    asyncio.run(story())


def test_a_thousand_callers_that_come_and_go_as_they_like_leave_no_turn_behind():
    async def story():
        turns = Turns(lambda: 3, 2000)
        chance = random.Random(1)
        most = 0

        async def caller():
            nonlocal most
            await turns.take()
            most = max(most, turns.running)
            try:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                turns.give(0.1)

        callers = [asyncio.create_task(caller()) for _ in range(1000)]
        for _ in range(300):
            await asyncio.sleep(0)
            chance.choice(callers).cancel()
        done, left = await asyncio.wait(callers, timeout=30)
        assert not left
        assert sum(task.cancelled() for task in done) > 50
        assert (turns.running, turns.waiting, most) == (0, 0, 3)

    asyncio.run(story())


def test_more_places_are_filled_as_soon_as_a_turn_ends():
    async def story():
        places = 1
        turns = Turns(lambda: places, 9)
        callers = [asyncio.create_task(turns.take()) for _ in range(9)]
        await asyncio.sleep(0)
        places = 4
        turns.give()
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting) == (4, 4)
        for caller in callers:
            caller.cancel()

    asyncio.run(story())


# --- what a caller reads of an error --------------------------------------------------------


@pytest.mark.parametrize(("error", "kind", "headers"), [
    (ServiceError(400, "x", "invalid_value", "n"), "invalid_request_error", {}),
    (ServiceError(401, "x", "invalid_api_key"), "authentication_error", {"www-authenticate": "Bearer"}),
    (ServiceError(404, "x", "not_found"), "not_found_error", {}),
    (ServiceError(429, "x", "busy", retry_after=7), "rate_limit_error", {"retry-after": "7"}),
    (ServiceError(500, "x", "failed"), "server_error", {}),
    (ServiceError(504, "x", "timeout"), "server_error", {"x-should-retry": "false"}),
])
def test_an_error_is_openais_object_with_the_headers_that_its_clients_follow(error, kind, headers):
    response = error.response()
    assert response.status_code == error.status
    assert json.loads(response.body) == {"error": {"message": "x", "type": kind, "code": error.code,
                                                   "param": error.param}}
    assert {name: value for name, value in response.headers.items() if not name.startswith("content-")} == headers


# --- the request ----------------------------------------------------------------------------


@pytest.mark.parametrize("body", [
    b"", b"{" + SECRET.encode(), b"[1]", b'"zqsecret"', b'{"messages": "\xff\xfe"}', '{"messages": 1}'.encode("utf-16"),
    b"[" * 100_000, b'{"messages": NaN}', b'{"temperature": -Infinity}', b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"messages": ' + b"[" * 300 + b"]" * 300 + b"}", b'{"a": ' * 300 + b"1" + b"}" * 300,
], ids=lambda body: repr(body[:20]))
def test_a_body_that_is_no_object_of_json_is_refused(body):
    with pytest.raises(ServiceError) as refusal:
        read_json(body)
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_json")
    assert SECRET not in refusal.value.message


def test_a_body_is_an_object_without_its_nulls():
    assert read_json(b'{"messages": [{"content": null}], "n": null, "seed": 0}') == {
        "messages": [{"content": None}], "seed": 0}
    assert read_json(b'{"a": ' + b"[" * 198 + b"]" * 198 + b"}")["a"]


# A request's fields, and the field that its refusal names. The chat model has tests of its own for what it refuses.
REFUSED = [
    ({"messages": None}, "messages"), ({"messages": []}, "messages"), ({"messages": "a"}, "messages"),
    ({"messages": user("a") * 1001}, "messages"), ({"messages": [SECRET]}, "messages[0]"),
    ({"messages": [*user("a"), {"role": SECRET, "content": "b"}]}, "messages[1].role"),
    ({"messages": [{"content": SECRET}]}, "messages[0].role"), ({"messages": user(5)}, "messages[0].content"),
    ({"messages": user([])}, "messages[0].content"), ({"messages": user([SECRET])}, "messages[0].content"),
    ({"messages": user(SECRET + "\0")}, "messages[0].content"),
    ({"messages": user(SECRET + "\ud83d")}, "messages[0].content"), ({"model": 5}, "model"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "4"}, "max_tokens"), ({"max_tokens": 101}, "max_tokens"), ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": float("inf")}, "max_tokens"),
    ({"max_completion_tokens": 101}, "max_completion_tokens"), ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 4, "max_tokens": 5}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"n": 0}, "n"), ({"n": 9}, "n"), ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": {SECRET: 1}}, "stop"), ({"stop": "s" * 101}, "stop"),
    ({"stream": "yes"}, "stream"), ({"stream_options": {}}, "stream_options"),
    ({"stream_options": SECRET, "stream": True}, "stream_options"),
    ({"stream_options": {SECRET: 1}, "stream": True}, "stream_options"),
    ({"stream_options": {"include_usage": 1}, "stream": True}, "stream_options.include_usage"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: repr(value)[:60])
def test_a_request_that_no_model_could_answer_is_refused_by_its_field(fields, param):
    with pytest.raises(ServiceError) as refusal:
        check_request(AS_SHOWN | fields, Limits(max_tokens=100))
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert refusal.value.message.startswith(param) and SECRET not in refusal.value.message
    assert len(refusal.value.message) < 200


def test_a_limit_of_the_service_is_in_the_sentence_that_names_the_field():
    with pytest.raises(ServiceError, match=r"^max_tokens has to be a whole number from 1 to 100\.$"):
        check_request(AS_SHOWN | {"max_tokens": 101}, Limits(max_tokens=100))


@pytest.mark.parametrize("fields", [
    {}, {"max_tokens": 100}, {"max_tokens": 3.0}, {"max_completion_tokens": 4, "max_tokens": 4}, {"temperature": 0},
    {"temperature": 2}, {"n": 8}, {"n": 2.0}, {"stop": "a"}, {"stop": []}, {"stream": True, "stream_options": {}},
    {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": None}}, {SECRET: 1},
    {"messages": user(parts("a", "b"))}, {"messages": user("日本語 🙂\n")},
    {"messages": [*user("a"), SENT_BACK, *user("b")]},
], ids=lambda fields: repr(fields)[:60])
def test_a_request_within_the_limits_is_left_to_the_model(fields):
    check_request(AS_SHOWN | fields, Limits(max_tokens=100))


FLAVOR = TAKEN_BY_FLAVOR["mlflow.transformers"]


@pytest.mark.parametrize(("fields", "kept"), [
    ({}, {}), ({"model": "x", "stream": True, "stream_options": {}}, {}),
    ({"max_completion_tokens": 2}, {"max_tokens": 2}), ({"max_tokens": 3.0}, {"max_tokens": 3}),
    ({"stop": "a"}, {"stop": ["a"]}), ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"temperature": 0}, {"temperature": 0.001}), ({"temperature": 1}, {"temperature": 1.0}),
    ({"n": 1, "top_p": 1, "tools": [], "response_format": {"type": "text"}, "user": "Bob", "store": False}, {}),
    ({"messages": user(parts("a", "b"))}, {"messages": user("a\nb")}),
    ({"messages": [{"role": "developer", "content": "a"}]}, {"messages": [{"role": "system", "content": "a"}]}),
    ({"messages": [user("a")[0] | {"name": "Bob"}]}, {"messages": [user("a")[0] | {"name": "Bob"}]}),
    ({"messages": [SENT_BACK]}, {"messages": [{"role": "assistant", "content": "Paris."}]}),
], ids=lambda value: repr(value)[:60])
def test_a_pipeline_gets_the_types_of_its_signature(fields, kept):
    adapted = adapt(AS_SHOWN | fields, FLAVOR)
    assert adapted == AS_SHOWN | kept
    assert {name: type(value) for name, value in adapted.items()} == {
        name: type(value) for name, value in (AS_SHOWN | kept).items()}


@pytest.mark.parametrize(("fields", "code", "param"), [
    ({"n": 2}, "unknown_field", "n"), ({"seed": 1}, "unknown_field", "seed"), ({"top_k": 5}, "unknown_field", "top_k"),
    ({"tools": [{SECRET: 1}]}, "unknown_field", "tools"), ({"top_p": 0.5}, "unknown_field", "top_p"),
    (schema({}), "unknown_field", "response_format"), ({SECRET: 1}, "unknown_field", None),
    ({"messages": user([{"type": "text"}])}, "invalid_value", "messages[0].content"),
    ({"messages": user([{"type": "image_url", "text": "a"}])}, "invalid_value", "messages[0].content"),
    ({"messages": user(parts(SECRET + "\0"))}, "invalid_value", "messages[0].content"),
    ({"messages": user(parts("a") * 1001)}, "invalid_value", "messages[0].content"),
    ({"messages": [*user("a"), user("a")[0] | {"name": 5}]}, "invalid_value", "messages[1].name"),
    ({"messages": [user("a")[0] | {"tool_calls": [{SECRET: 1}]}]}, "unknown_field", "messages[0]"),
], ids=lambda value: repr(value)[:60])
def test_what_would_change_a_pipelines_answer_is_refused_by_name(fields, code, param):
    with pytest.raises(ServiceError) as refusal:
        adapt(AS_SHOWN | fields, FLAVOR)
    assert (refusal.value.code, refusal.value.param) == (code, param)
    assert SECRET not in refusal.value.message


def test_a_model_gets_the_fields_of_its_signature_as_they_are():
    fields = {"max_completion_tokens": 2, "n": 2, "temperature": 0, "stop": "a"}
    assert adapt(AS_SHOWN | fields, None) == AS_SHOWN | fields
    assert adapt(AS_SHOWN | fields, {"messages", *fields}) == AS_SHOWN | fields
    assert adapt(AS_SHOWN | {"n": 1, "top_p": 1}, {"messages", "n"}) == AS_SHOWN | {"n": 1}


# --- the version that serves ----------------------------------------------------------------


class Served:
    """Stands for a loaded version: it counts how it is used."""

    def __init__(self, version, broken):
        self.name, self.version, self.broken = "stand-in", version, broken
        self.borrowed = 1
        self.closed = threading.Event()

    def rows(self):
        return 0

    def try_once(self):
        if self.broken:
            raise ValueError("This model is broken.")

    def close(self):
        self.closed.set()


class Registry:
    """Stands for an address whose alias a test moves; ``broken`` names the versions that do not load."""

    def __init__(self, version="1", broken=()):
        self.uri = "models:/stand-in@champion"
        self.version = version
        self.broken = set(broken)
        self.loaded = []

    def find_version(self):
        if self.version is None:
            raise MlflowException("There is no such alias.")
        return self.version

    def fetch(self, version):
        return f"the folder of {version}"

    def load(self, version, folder):
        assert folder == f"the folder of {version}"
        self.loaded.append(Served(version, version in self.broken))
        return self.loaded[-1]


def desk_story(story, **registry):
    """Run a story of a registry, the desk that has looked there once, and its figures."""
    async def tell():
        address, figures = Registry(**registry), Figures()
        desk = Desk(address, figures, 5)
        await desk.begin()
        await story(address, desk, lambda name, **labels: figures.registry.get_sample_value(name, labels))

    asyncio.run(tell())


def test_an_alias_that_moves_brings_its_version_and_the_one_before_ends_what_it_has_begun():
    async def story(address, desk, figure):
        request = desk.borrow()
        address.version = "2"
        await desk.look()
        assert (desk.current.version, desk.failed) == ("2", None)
        assert figure("slm_model_version", model="stand-in", version="2") == 1
        assert figure("slm_model_version", model="stand-in", version="1") is None
        assert (request.version, request.borrowed, request.closed.is_set()) == ("1", 1, False)
        desk.give_back(request)
        assert request.closed.wait(30)
        assert not desk.current.closed.is_set()

    desk_story(story)


def test_a_version_that_does_not_load_is_told_tried_once_and_left_when_the_alias_moves_back():
    async def story(address, desk, figure):
        address.version = "2"
        for _ in range(3):
            await desk.look()
        assert (desk.current.version, desk.failed) == ("1", "2")
        assert [served.version for served in address.loaded] == ["1", "2"]
        assert (figure("slm_model_failed_version"), figure("slm_model_load_failures_total")) == (2, 1)
        assert address.loaded[1].closed.wait(30)
        address.version = "1"
        await desk.look()
        assert (desk.current.version, desk.failed, figure("slm_model_failed_version")) == ("1", None, 0)
        address.version = "2"
        address.broken = set()
        await desk.look()
        assert (desk.current.version, desk.failed) == ("2", None)

    desk_story(story, broken=["2"])


def test_a_registry_that_does_not_answer_changes_nothing():
    async def story(address, desk, figure):
        address.version = None
        await desk.look()
        assert (desk.current.version, desk.failed, len(address.loaded)) == ("1", None, 1)
        address.version = "2"
        await desk.look()
        assert desk.current.version == "2"

    desk_story(story)


@pytest.mark.parametrize(("registry", "what"), [
    ({"version": None}, "names no version at models:/stand-in@champion: MlflowException: There is no such alias."),
    ({"broken": ["1"]}, "does not load: ValueError: This model is broken."),
])
def test_a_service_without_a_first_version_does_not_begin(registry, what):
    async def story(*_):
        raise AssertionError("it began")

    with pytest.raises(StartError) as refusal:
        desk_story(story, **registry)
    assert refusal.value.what.endswith(what) and refusal.value.fix.endswith("--model.")


@pytest.mark.parametrize(("uri", "name", "moves"), [
    ("models:/slm-onnx@champion", "slm-onnx", True), ("models:/slm-onnx/3", "slm-onnx", False),
    ("models:/m-0123", "model", False), ("/a/folder", "model", False)])
def test_an_address_has_a_name_and_moves_with_its_alias(uri, name, moves):
    address = Address(uri)
    assert (address.name, bool(address.moves)) == (name, moves)
    assert address.uri in openai_server.names(address) and name in openai_server.names(address)


def test_a_password_is_no_part_of_what_is_said():
    assert without_password(f"http://user:{SECRET}@there:80/a and b@c") == "http://there:80/a and b@c"


def test_the_chunks_of_several_answers_become_one_completion():
    def chunk(index, text=None, reason=None):
        return {"id": "1", "created": 5, "choices": [{"index": index, "finish_reason": reason,
                                                      "delta": {"content": text} if text else {}}]}

    answer = join([chunk(1, "b"), chunk(0, "a"), chunk(1, "d"), chunk(0, "c"), chunk(0, None, "stop"),
                   chunk(1, None, "length"), {"id": "1", "created": 5, "choices": [], "usage": {"total_tokens": 4}}])
    assert [(choice["index"], choice["message"], choice["finish_reason"]) for choice in answer["choices"]] == [
        (0, {"role": "assistant", "content": "ac"}, "stop"), (1, {"role": "assistant", "content": "bd"}, "length")]
    assert (answer["object"], answer["id"], answer["usage"]) == ("chat.completion", "1", {"total_tokens": 4})


# --- the program's beginning ----------------------------------------------------------------


@pytest.fixture
def main(monkeypatch, capsys):
    """Return a function that runs the program in this process, and returns the two sentences of its refusal."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}

    def run(*words):
        capsys.readouterr()
        assert openai_server.main([str(word) for word in words]) == 1
        what, fix = capsys.readouterr().err.strip().split("\n")
        assert what.startswith("error: ") and what.endswith(".") and fix.startswith("       ")
        return what.removeprefix("error: "), fix.strip()

    yield run
    for name, handler in handlers.items():
        signal.signal(name, handler)


def test_a_port_that_is_taken(main):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main("--port", port) == (f"Port {port} is taken.", f"Choose another one: --port {port + 1}.")


@pytest.mark.parametrize(("words", "says"), [
    (["--model", "/nowhere"], "does not load"), (["--model", ""], "does not load"),
    (["--host", "203.0.113.7", "--allowed-host", "x"], "no token"), (["--host", "0.0.0.0"], "no token"),
])
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


@pytest.mark.parametrize("words", [["--timeout", "nan"], ["--timeout", "0"], ["--waiting", "-1"], ["--port", "x"],
                                   ["--max-body", "1e9"], ["--mode", "x"], ["--drain", "inf"]])
def test_options_that_are_none(words):
    with pytest.raises(SystemExit) as refusal:
        openai_server.read_options(words)
    assert refusal.value.code == 2


# --- the document ---------------------------------------------------------------------------

DOCUMENT = ROOT / "docs" / "serving.md"


def rows(heading):
    """Return the cells of the rows of the first table below a heading of the document."""
    lines = iter(DOCUMENT.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].splitlines())
    table = itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(
        lambda line: not line.startswith("|"), lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table][2:]


def test_the_document_has_the_options_and_what_they_are_unless_given():
    told = {}
    for names, defaults, _ in rows("Options"):
        told |= zip(re.findall("`--([a-z-]+)`", names), re.findall("`(.+?)`(?:,|$)", defaults) or [""] * 2,
                    strict=False)
    options = vars(openai_server.read_options([]))
    assert {name.replace("-", "_") for name in told} == options.keys()
    defaults = {name: str(value) for name, value in options.items() if value not in (None, [], False)}
    assert {name: told[name.replace("_", "-")] for name in defaults} == defaults


def test_the_document_has_the_figures():
    figures = {f"{family.name}{'_total' if family.type == 'counter' else ''}"
               for family in openai_server.Figures().registry.collect() if not family.name.startswith("process_")}
    assert {name.strip("`").partition("{")[0] for name, _ in rows("Figures")} == figures


def test_the_document_has_every_error_of_the_service_and_the_model():
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(openai_server))) if isinstance(node, ast.Call)
             and getattr(node.func, "id", None) == "ServiceError"]
    raised = {(call.args[0].value, call.args[2].value) for call in calls
              if all(isinstance(argument, ast.Constant) for argument in (call.args[0], call.args[2]))}
    raised |= {(openai_server.STATUS.get(code, 400), code) for code in (
        "invalid_value", "unknown_field", "context_length_exceeded", "busy", "closed", "failed", "unusable_model")}
    told = {(int(status), code) for statuses, codes, _ in rows("Errors")
            for status in statuses.split(", ") for code in re.findall("`(.+?)`", codes)}
    assert raised - told == set()
    assert {code for _, code in told} == {code for _, code in raised}
