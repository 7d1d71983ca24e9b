"""The server over stand-in models: its policies as tables, and each fault of a caller, of a model or of the store."""

import asyncio
import contextlib
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPResponse

import pytest
from mlflow.exceptions import MlflowException
from support import stand_ins
from support.service import body, events, handles, raw, read_all, running, wait_for

from serving import openai_server
from serving.openai_server import ServiceError, StartError, Turns, admit, check_reach, explain, host_name, retry_after

SECRET = "zqsecret"


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return stand_ins.save(tmp_path_factory.mktemp("streams") / "a", "Streams")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return stand_ins.save(tmp_path_factory.mktemp("plain") / "a", "Plain")


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
        turns, chance, most = Turns(lambda: 3, 2000), random.Random(1), 0

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


# --- answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["streams", "plain"])
def test_an_answer_is_the_same_whole_and_streamed(kind, request):
    with running(request.getfixturevalue(kind)) as server:
        whole = server.ask("words 3").json()
        assert whole["object"] == "chat.completion" and whole["system_fingerprint"] == "model/1"
        assert whole["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "word word word "},
                                     "logprobs": None, "finish_reason": "stop"}]
        chunks = events(server.ask("words 3", stream=True))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "word word word "
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
        assert not any("usage" in chunk for chunk in chunks)
        *others, last = events(server.ask("words 3", stream=True, stream_options={"include_usage": True}))
        assert all(chunk["usage"] is None for chunk in others)
        assert last["choices"] == [] and last["usage"] == whole["usage"] == stand_ins.USAGE
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert server.count("slm_requests_total", outcome="ok") == 3
        assert server.count("slm_completion_tokens_total") == 6
        assert server.count("slm_request_seconds_count") == server.count("slm_first_token_seconds_count") == 3
        assert server.requests() == (0, 0)


@pytest.mark.parametrize("kind, whole", [("TellsStream", "False"), ("Older", "None")])
def test_a_model_is_told_whether_somebody_reads_along(tmp_path, kind, whole):
    with running(stand_ins.save(tmp_path / "a", kind)) as server:
        assert server.ask("x").json()["choices"][0]["message"]["content"] == whole
        assert events(server.ask("x", stream=True))[0]["choices"][0]["delta"]["content"] == "True"
        assert server.count("slm_completion_tokens_total") == 4  # of both, the usage is known


@pytest.mark.parametrize("kind, together", [("streams", 8), ("plain", 1)])
def test_a_model_without_streams_is_asked_by_one_caller_at_a_time(kind, together, request):
    with running(request.getfixturevalue(kind)) as server, ThreadPoolExecutor(8) as callers:
        answers = [callers.submit(server.ask, "gated 1") for _ in range(8)]
        wait_for(lambda: server.model.running == together and sum(server.requests()) == 8)
        assert server.requests() == (together, 8 - together)
        server.model.gate.release(8)
        assert {answer.result().status_code for answer in answers} == {200}


def test_two_servers_in_one_process_do_not_mix(streams):
    with running(streams) as one, running(streams) as other:
        one.ask("words 2")
        assert [server.count("slm_requests_total", outcome="ok") for server in (one, other)] == [1, 0]
        assert "slm_requests_total{outcome=\"ok\"} 1.0" in one.client.get("/metrics").text
        assert "slm_requests_total{" not in other.client.get("/metrics").text


# --- callers that leave, and limits ---------------------------------------------------------


def test_200_clients_that_leave_in_the_middle_stop_their_answers_within_one_step(streams, record_property):
    with running(streams) as server:
        assert server.ask("words 2").status_code == 200
        wait_for(lambda: server.requests() == (0, 0))
        threads, open_files = threading.active_count(), handles()
        clients = [server.connect(raw(body("gated 1000", stream=number % 2 == 0))) for number in range(200)]
        wait_for(lambda: server.model.running == 64 and server.requests() == (64, 136), "200 requests")
        before = server.model.steps
        server.model.gate.release(640)
        wait_for(lambda: server.model.steps == before + 640)
        for client in clients:
            client.close()
        wait_for(lambda: server.count("slm_requests_total", outcome="cancelled") == 200, "200 that left")
        assert server.requests() == (64, 0)  # the model has them still: each is in the middle of a step
        server.model.gate.release(1000)
        wait_for(lambda: server.requests() == (0, 0) and server.model.running == 0, "the end of all rows")
        steps = server.model.steps - before - 640
        record_property("steps per answer after its client left", steps / 64)
        assert steps == 64
        wait_for(lambda: threading.active_count() <= threads and handles() <= open_files, "as few threads and files")
        assert server.ask("words 2").status_code == 200


def test_a_turn_comes_back_only_when_predict_is_free(plain):
    with running(plain) as server:
        client = server.connect(raw(body("gated 2")))
        wait_for(lambda: server.model.running == 1)
        client.close()
        wait_for(lambda: server.count("slm_requests_total", outcome="cancelled") == 1)
        with ThreadPoolExecutor(1) as callers:
            answer = callers.submit(server.ask, "words 1")
            wait_for(lambda: server.requests() == (1, 1))
            assert server.model.asked[-1] == "gated 2"  # the next one is not in the model yet
            server.model.gate.release(2)
            assert answer.result().status_code == 200
        assert server.model.asked[-1] == "words 1"


def test_who_finds_no_place_is_told_when_to_come_again(streams):
    with running(streams, concurrent=2, waiting=3) as server:
        clients = []
        for number in range(5):
            clients.append(server.connect(raw(body(f"gated 1{number}", stream=True))))
            wait_for(lambda so_far=number: sum(server.requests()) == so_far + 1)
        assert server.requests() == (2, 3)
        refused = server.ask("words 1")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"] == {"message": "The service is busy: 3 requests wait. Try again later.",
                                           "type": "rate_limit_error", "code": "busy", "param": None}
        clients[3].close()
        wait_for(lambda: server.requests() == (2, 2))
        clients.append(server.connect(raw(body("gated 15", stream=True))))
        wait_for(lambda: server.requests() == (2, 3))
        server.model.gate.release(1000)
        wait_for(lambda: server.requests() == (0, 0))
        asked = [text for text in server.model.asked if text != "Hello"]  # that is the trial's
        assert sorted(asked[:2]) + asked[2:] == [
            "gated 10", "gated 11", "gated 12", "gated 14", "gated 15"]
        assert server.count("slm_requests_total", outcome="busy") == 1
        for client in clients:
            client.close()


def test_a_timeout_ends_the_answer_and_says_so(streams):
    with running(streams, timeout=0.3) as server:
        whole = server.ask("gated 9")
        assert whole.status_code == 504 and whole.headers["x-should-retry"] == "false"
        assert whole.json()["error"] == {"message": "The answer took longer than 0.3 seconds.", "type": "server_error",
                                         "code": "timeout", "param": None}
        server.model.gate.release(2)
        wait_for(lambda: server.model.running == 0 and server.requests() == (0, 0))
        server.model.gate.release(2)
        stream = server.ask("gated 9", stream=True)
        assert stream.status_code == 200
        assert json.loads(stream.text.strip().rpartition("data: ")[2])["error"]["code"] == "timeout"
        server.model.gate.release(9)
        wait_for(lambda: server.model.running == 0 and server.requests() == (0, 0))
        assert server.count("slm_requests_total", outcome="timeout") == 2
        assert server.ask("words 2").status_code == 200


def test_a_request_that_waits_too_long_gives_up_its_place(plain):
    with running(plain, timeout=0.3) as server:
        client = server.connect(raw(body("gated 1")))
        wait_for(lambda: server.model.running == 1)
        assert server.ask("words 1").status_code == 504
        assert server.requests() == (1, 0)
        server.model.gate.release()
        client.close()


@pytest.mark.parametrize("text, streamed", [("raise", False), ("raise", True), ("exit", False), ("exit", True)])
def test_a_model_that_raises_fails_one_request_and_quotes_nothing(text, streamed, streams):
    with running(streams) as server:
        answer = server.ask(f"{text} {SECRET}", stream=streamed)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "failed"
        assert SECRET not in answer.text
        assert server.ask("words 1").status_code == 200
        assert server.count("slm_requests_total", outcome="failed") == 1
        wait_for(lambda: server.requests() == (0, 0))


# --- what is no proper request --------------------------------------------------------------


def refused(said: bytes) -> tuple[int, str]:
    """Return the status and the code of a raw response, which has to be OpenAI's error object."""
    head, _, content = said.partition(b"\r\n\r\n")
    if b"chunked" in head.lower():
        content = b"".join(content.split(b"\r\n")[1::2])
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert SECRET.encode() not in content
    return int(head.split()[1]), error["code"]


DEEP = b"[" * 100_000
BROKEN = {
    "nothing": (b"", 400, "invalid_json"), "no JSON": (b"{" + SECRET.encode(), 400, "invalid_json"),
    "a list": (b"[1]", 400, "invalid_json"), "a text": (b'"zqsecret"', 400, "invalid_json"),
    "no UTF-8": (b'{"messages": "\xff\xfe"}', 400, "invalid_json"),
    "UTF-16": ('{"messages": 1}'.encode("utf-16"), 400, "invalid_json"),
    "deep": (DEEP, 400, "invalid_json"), "deep in a message": (b'{"messages": ' + DEEP, 400, "invalid_json"),
    "deep and whole": (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, None),
    "NaN": (b'{"messages": NaN}', 400, "invalid_json"),
    "Infinity": (b'{"temperature": -Infinity}', 400, "invalid_json"),
    "5,000 digits": (body("words 1", max_tokens=1).replace(b": 1", b": " + b"9" * 5000), 400, "invalid_json"),
    "4,000 digits": (body("words 1", max_tokens=1).replace(b": 1", b": " + b"9" * 4000), 400, "invalid_value"),
    "a huge exponent": (body("words 1", max_tokens=1).replace(b": 1", b": 1e999"), 400, "invalid_value"),
    "no messages": (b"{}", 400, "invalid_value"), "wrong messages": (b'{"messages": 5}', 400, "invalid_value"),
    "wrong content": (body(5), 400, "invalid_value"), "wrong stream": (body("x", stream="yes"), 400, "invalid_value"),
    "too many tokens": (body("x", max_tokens=2049), 400, "invalid_value"),
    "another model": (body("x", model=SECRET), 404, "model_not_found"),
}


@pytest.fixture(scope="module")
def guarded(streams):
    """Return a server that wants a token, for tests that leave no trace in it."""
    with running(streams, token="geheim-ß") as server:
        yield server


TOKEN_HEADER = "Authorization: Bearer geheim-ß"


@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_is_none_is_refused_in_openais_shape(name, guarded):
    content, status, code = BROKEN[name]
    with guarded.connect() as connection:
        connection.sendall(raw(content, TOKEN_HEADER, "Connection: close"))
        answer = refused(read_all(connection))
    assert answer == (status, code or answer[1])
    assert guarded.service.turns.running == 0


@pytest.mark.parametrize("expect", [False, True])
def test_20_mb_that_are_announced_are_refused_before_they_come(expect, guarded, record_property):
    with guarded.connect() as connection:
        connection.sendall(raw(b"", TOKEN_HEADER, "Content-Length: 20000000", "Connection: close",
                               *(["Expect: 100-continue"] if expect else []), length=False))
        record_property("bytes of the body that were sent", 0)
        assert refused(read_all(connection)) == (413, "request_too_large")


@pytest.mark.parametrize("chunked", [False, True])
def test_20_mb_that_come_all_the_same_are_forgotten_and_the_connection_goes_on(chunked, guarded, record_property):
    piece, sent = b"x" * 65536, []
    coded = ("Transfer-Encoding: chunked",) if chunked else ("Content-Length: 20971520",)
    frame = b"10000\r\n%s\r\n" % piece if chunked else piece

    def send():
        for _ in range(320):
            connection.sendall(frame)
            sent.append(len(piece))
        connection.sendall(b"0\r\n\r\n" if chunked else b"")

    with guarded.connect(raw(b"", TOKEN_HEADER, *coded, length=False)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sender = threading.Thread(target=send)
        sender.start()
        answer = HTTPResponse(connection)
        answer.begin()
        record_property("bytes of the body that had been sent when the answer came", sum(sent))
        assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "request_too_large"
        sender.join()
        connection.sendall(raw(body("words 1"), TOKEN_HEADER, "Connection: close"))
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_body_that_is_expected_to_be_asked_for_is_asked_for(guarded):
    content = body("words 1")
    with guarded.connect(raw(b"", TOKEN_HEADER, f"Content-Length: {len(content)}", "Expect: 100-continue",
                             "Connection: close", length=False)) as connection:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(content)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("authorization, status", [
    (None, 401), ("Bearer", 401), ("Bearer geheim", 401), ("Bearer geheim-ß", 200),
    ("geheim-ß", 401),
    ("Basic geheim-ß", 401), ("bearer geheim-ß", 200), ("Bearer \xff\xfe", 401), ("Bearer geheim-ß, Bearer x", 401)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/metrics"])
def test_without_the_token_there_is_nothing_to_read(authorization, status, path, guarded):
    headers = {"authorization": authorization.encode()} if authorization else {}
    ask = partial(guarded.client.post, content=body("words 1")) if "chat" in path else guarded.client.get
    answer = ask(path, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"


def test_of_two_tokens_only_the_first_one_counts(guarded):
    for first, second, status in (("x", "geheim-ß", b"401"), ("geheim-ß", "x", b"200")):
        with guarded.connect(raw(body("words 1"), f"Authorization: Bearer {first}", f"Authorization: Bearer {second}",
                                 "Connection: close")) as connection:
            assert read_all(connection).split()[1] == status


@pytest.mark.parametrize("head, answer", [
    ("Host: evil.example", (421, "unknown_host")), ("Host: 127.0.0.1.evil.example", (421, "unknown_host")),
    ("Host: 169.254.169.254", (421, "unknown_host")), ("Host: ", (421, "unknown_host")),
    ("Host: localhost\r\nHost: evil.example", (400, "invalid_request")), ("Accept: */*", (400, "invalid_request")),
    ("Host: localhost\r\nContent-Length: x", (400, "invalid_request")),
    ("Host: localhost\r\nContent-Length: 1\r\nContent-Length: 2", (400, "invalid_request")),
    ("Host: localhost\r\nTransfer-Encoding: gzip", (400, "invalid_request")),
    ("Host: localhost\r\nbroken", (400, "invalid_request")),
])
@pytest.mark.parametrize("line", ["POST /v1/chat/completions HTTP/1.1", "GET /metrics HTTP/1.1"])
def test_a_head_that_is_wrong(line, head, answer, guarded):
    with guarded.connect(f"{line}\r\n{head}\r\nConnection: close\r\n\r\n".encode()) as connection:
        assert refused(read_all(connection)) == answer


@pytest.mark.parametrize("head", ["Host: localhost:1", "Host: [::1]", "Host: 127.0.0.1", "Host: LOCALHOST."])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_proper_host_is_answered_also_by_http_1_0(version, head, streamed, guarded):
    content = body("words 1", stream=streamed)
    request = (f"POST /v1/chat/completions HTTP/{version}\r\n{head}\r\n{TOKEN_HEADER}\r\n"
               f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n").encode() + content
    with guarded.connect(request) as connection:
        said = read_all(connection)
    assert said.startswith(b"HTTP/1.1 200") and b"word " in said
    assert (b"[DONE]" in said) == streamed


def test_http_1_0_without_a_host_is_refused(guarded):
    with guarded.connect(b"GET /v1/models HTTP/1.0\r\n\r\n") as connection:
        assert refused(read_all(connection)) == (421, "unknown_host")


@pytest.mark.parametrize("method, path, status, code", [
    ("GET", "/v1/chat/completions", 405, "method_not_allowed"), ("PUT", "/v1/models", 405, "method_not_allowed"),
    ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"), ("DELETE", "/health", 405, "method_not_allowed"),
    ("POST", "/v1/completions", 404, "not_found"), ("GET", "/", 404, "not_found"), ("GET", "/docs", 404, "not_found"),
    ("GET", "/v1/models/", 404, "not_found"), ("GET", "/../../etc/passwd", 404, "not_found"),
    ("GET", "/zqsecret", 404, "not_found"),
])
def test_a_path_or_method_that_is_not_there(method, path, status, code, guarded):
    answer = guarded.client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert SECRET not in answer.text
    assert status != 405 or answer.headers["allow"] in ("GET", "POST")


def test_head_is_refused_without_a_body_and_the_connection_goes_on(guarded):
    for _ in range(2):
        answer = guarded.client.head("/health")
        assert (answer.status_code, answer.content) == (405, b"")
    assert guarded.client.get("/health").json() == {"status": "ok"}


def test_no_answer_waits_for_its_own_beginning_to_be_confirmed(guarded):
    guarded.client.get("/health")
    (connection, *_) = guarded.server.server_state.connections
    option = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert option  # without it, each answer takes 40 ms more


def test_requests_that_come_in_one_piece_are_answered_one_after_the_other(guarded):
    one = raw(body("words 1"), TOKEN_HEADER)
    last = raw(body("words 1", stream=True), TOKEN_HEADER, "Connection: close")
    with guarded.connect(one * 3 + last) as connection:
        said = read_all(connection)
    assert said.count(b"HTTP/1.1 200") == 4 and said.count(b"chat.completion.chunk") == 2


def test_the_service_listens_on_ipv6_too(streams):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    with running(streams, host="::1") as server:
        assert server.address.startswith("http://[::1]:")
        assert server.ask("words 1").status_code == 200


# --- slow callers ---------------------------------------------------------------------------


def test_a_head_that_never_ends_is_cut_off(streams, monkeypatch, record_property):
    monkeypatch.setattr(openai_server, "HEAD_SECONDS", 0.3)
    with running(streams) as server:
        for begin in (b"", b"POST /v1/chat/comp", raw(b"")[:-2]):
            with server.connect(begin) as connection:
                assert read_all(connection) == b""  # the server breaks it off
        with server.connect(b"GET /health HTTP/1.1\r\n") as connection:
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 10_000_000:
                    sent += connection.send(b"X-Filler: " + b"x" * 1000 + b"\r\n")
            record_property("bytes of a head that were sent", sent)
        assert server.ask("words 1").status_code == 200
        server.client.close()
        wait_for(lambda: not server.server.server_state.connections)


def test_a_head_of_more_than_64_kib_is_refused(guarded):
    with guarded.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000) as connection:
        assert refused(read_all(connection)) == (400, "invalid_request")


def test_a_body_that_comes_too_slowly_is_refused(streams):
    begun = raw(b"", "Content-Length: 100", length=False)
    with running(streams, timeout=0.5) as server, server.connect(begun) as connection:
        connection.settimeout(0.05)
        answered = b""
        while not answered:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answered = connection.recv(1, socket.MSG_PEEK)
        connection.settimeout(60)
        answer = HTTPResponse(connection)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (408, "timeout")
        assert server.requests() == (0, 0)


def test_a_client_that_never_reads_is_cut_off_and_leaves_nothing(streams, record_property):
    # The connection has 5 seconds more than an answer, for its last words.
    with running(streams, timeout=0.5, concurrent=1) as server:
        before = handles()
        connection = server.connect(raw(body("big 1000", stream=True)))  # 50 MB
        wait_for(lambda: server.count("slm_requests_total", outcome="timeout") == 1)
        wait_for(lambda: server.requests() == (0, 0) and server.model.running == 0)
        record_property("steps of 50 kB that the model made for it", server.model.steps)
        assert server.ask("words 1").status_code == 200
        server.client.close()
        wait_for(lambda: not server.server.server_state.connections)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 20):
                pass
        connection.close()
        wait_for(lambda: handles() <= before)


def test_a_client_that_reads_byte_by_byte_gets_all(streams):
    request = raw(body("slow 9", stream=True), "Connection: close")
    with running(streams) as server, server.connect(request) as connection:
        said = b"".join(iter(lambda: connection.recv(1), b""))
        assert said.count(b"word ") == 9 and b"[DONE]" in said
