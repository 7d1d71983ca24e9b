"""The service over HTTP: answers, one refusal of each code, the queue, the alias, traces, and clients that misbehave.

Run: python -m helpers test tests/services/test_service.py
"""

import contextlib
import gc
import json
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPResponse
from pathlib import Path

import httpx
import mlflow
import openai
import pytest
from support import clients, stand_ins
from support.chat import (
    AS_SHOWN,
    SECRET,
    change_code,
    chat_model_for,
    contents,
    deltas,
    parts,
    schema,
    user,
)
from support.served_program import URI
from support.service import (
    body,
    events,
    handles,
    raw,
    read_all,
    running,
    save_pipeline,
    wait_for,
    wait_for_version,
)
from support.stand_ins import move_alias

from serving.service import active_version, app
from serving.service import connection as service_connection

TOKEN = "geheim-ß"
TOKEN_HEADER = f"Authorization: Bearer {TOKEN}"


# --- the services ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_service(tiny, tmp_path_factory):
    """Serve the chat model on the toy model, with 16 tokens where a request says nothing."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    mlflow.pyfunc.save_model(folder, **chat_model_for(tiny, max_tokens=16))
    with running(folder, token=clients.TOKEN, name="model") as server:
        yield server


@pytest.fixture(scope="module")
def pipeline_service(tiny, tmp_path_factory):
    """Serve track A's model, greedily and with 8 tokens where a request says nothing."""
    folder = save_pipeline(
        tiny, tmp_path_factory.mktemp("pipeline") / "model", max_new_tokens=8, do_sample=False
    )
    with running(folder, token=clients.TOKEN) as server:
        yield server


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """Return the folder of a stand-in that streams."""
    return stand_ins.save(tmp_path_factory.mktemp("streams") / "a", "Streams")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the folder of a stand-in that answers whole."""
    return stand_ins.save(tmp_path_factory.mktemp("plain") / "a", "Plain")


@pytest.fixture(scope="module")
def guarded(streams):
    """Return a server that wants a token, for tests that leave no trace in it."""
    with running(streams, token=TOKEN) as server:
        yield server


# --- the chat model and the pipeline --------------------------------------------------------


def post(server, values):
    """Return what the service says to a request."""
    return server.client.post("/v1/chat/completions", json=AS_SHOWN | values)


def said(choices):
    """Return what an answer says, and why it ends."""
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in choices]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.5, "seed": 7, "n": 3},
        {"stop": ["a", "e"]},
        {"max_completion_tokens": 5},
        {"messages": user(parts("a", "b")), "top_p": 0.5, "temperature": 1, "seed": 1},
        {
            "messages": [{"role": "developer", "content": "日本語 🙂"}, *user("b")],
            "frequency_penalty": 1,
        },
        schema({"const": {"ok": True}}, strict=True) | {"max_tokens": 40},
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_the_chat_model_answers_over_http_as_it_does_itself(fields, chat_service, chat):
    (direct,) = chat.predict(None, AS_SHOWN | fields)
    whole = post(chat_service, fields).json()
    assert said(whole["choices"]) == said(direct["choices"])
    assert whole["usage"] == direct["usage"]
    streamed = events(
        post(chat_service, fields | {"stream": True, "stream_options": {"include_usage": True}})
    )
    pieces = deltas(streamed, len(direct["choices"]))
    assert [
        "".join(text for text, index in pieces if index == choice)
        for choice in range(len(direct["choices"]))
    ] == contents(direct)
    assert streamed[-1]["usage"] == direct["usage"]


LONG_TEXT = {"messages": user(f"{SECRET} " * 3000), "max_tokens": 1}


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"messages": []}, 400, "invalid_value", "messages"),  # the service's own refusal
        ({"top_k": SECRET}, 400, "invalid_value", "top_k"),  # the model's
        ({SECRET: 1}, 400, "unknown_field", None),
        ({"stream_options": {}}, 400, "invalid_value", "stream_options"),
        (schema({"type": SECRET}), 400, "invalid_value", "response_format.json_schema.schema"),
        ({"model": SECRET}, 404, "model_not_found", "model"),
        (LONG_TEXT, 400, "context_length_exceeded", "messages"),
        ({"messages": user("x" * (1 << 20))}, 413, "request_too_large", None),
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_before_an_answer(fields, status, code, param, stream, chat_service):
    answer = post(
        chat_service, fields if "stream_options" in fields else fields | {"stream": stream}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(answer.json()) == {"error"} and set(error) == {"message", "type", "code", "param"}
    assert SECRET not in answer.text and len(answer.text) < 1000
    assert post(chat_service, {"max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 3.0},
        {"max_completion_tokens": 2},
        {"stop": ["a", "日本"]},
        {"temperature": 0},
        {"temperature": 0.7},
        {"messages": user("")},
        {"messages": [user("a")[0] | {"name": "Bob"}]},
        {"n": 1, "tools": []},
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_the_pipeline_answers_what_it_can(fields, pipeline_service):
    answer = post(pipeline_service, fields)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert type(choice["message"]["content"]) is str and choice["finish_reason"] in (
        "stop",
        "length",
    )
    assert 1 <= answer.json()["usage"]["completion_tokens"] <= (fields.get("max_tokens") or 8)


def test_the_pipeline_reads_parts_as_lines_and_a_developer_as_the_system(pipeline_service):
    plain, sent = (
        {"messages": [{"role": role, "content": "Be brief."}, *user(content)]}
        for role, content in (("system", "a\nb"), ("developer", parts("a", "b")))
    )
    answers = [
        post(pipeline_service, values).json()
        for values in (plain, sent, {"messages": user("a\nb")})
    ]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]
    assert said(answers[0]["choices"]) == said(answers[1]["choices"])
    assert answers[2]["usage"]["prompt_tokens"] < answers[0]["usage"]["prompt_tokens"]


def test_a_stream_of_the_pipeline_is_one_chunk(pipeline_service):
    streamed = events(
        post(pipeline_service, {"stream": True, "stream_options": {"include_usage": True}})
    )
    ((text, _),) = deltas(streamed)
    whole = post(pipeline_service, {}).json()
    assert text == contents(whole)[0]
    assert streamed[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_pipeline_refuses_what_it_cannot(stream, pipeline_service, chat_service):
    refused = post(pipeline_service, LONG_TEXT | {"stream": stream})
    assert refused.status_code == 400
    assert refused.json() == post(chat_service, LONG_TEXT).json()
    refused = post(pipeline_service, {"seed": 1, "stream": stream})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")


def test_a_template_that_takes_no_such_conversation_is_the_callers_matter(tiny, tmp_path):
    folder = save_pipeline(
        tiny,
        tmp_path / "model",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('"
        + SECRET
        + "') }}{% endif %}x",
        max_new_tokens=4,
    )
    with running(folder) as served:
        assert post(served, {}).status_code == 200
        refused = post(served, {"messages": [{"role": "system", "content": SECRET}, *user("a")]})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (
        400,
        "messages",
        "invalid_value",
    )
    assert SECRET not in refused.text


# --- the clients of docs/serving.md ---------------------------------------------------------


def test_what_the_calls_of_openais_client_come_to(chat_service, pipeline_service, tmp_path):
    clients.check_script("openai", chat_service, pipeline_service, tmp_path)


@pytest.mark.skipif(not shutil.which("curl"), reason="2026-11-28: needs curl")
def test_what_curl_gets(chat_service, pipeline_service):
    clients.check_curl(chat_service, pipeline_service)


def test_a_full_queue_is_a_rate_limit_error_after_the_clients_own_retries(streams):
    with running(streams, concurrent=1, waiting=1) as server:
        before = [server.connect(raw(body("gated 1"))) for _ in range(2)]
        wait_for(lambda: server.requests() == (1, 1))
        with openai.OpenAI(
            base_url=f"{server.address}/v1", api_key="none", max_retries=1
        ) as client:
            ask = partial(client.chat.completions.create, model="model")
            with pytest.raises(openai.RateLimitError) as refusal:
                ask(messages=user("words 1"))
            assert refusal.value.code == "busy"
            assert server.count("slm_requests_total", outcome="busy") == 2
            server.model.gate.release(2)
            wait_for(lambda: server.requests() == (0, 0))
            assert ask(messages=user("words 1")).choices[0].message.content == "word "
        for connection in before:
            connection.close()


def test_the_real_model_answers_in_words(smol, tmp_path):
    folder = tmp_path / "model"
    mlflow.pyfunc.save_model(folder, **chat_model_for(smol))
    asked = {
        "model": "slm-onnx",
        "max_tokens": 32,
        "messages": [
            {"role": "system", "content": "Answer in one short sentence."},
            *user("What is the capital of Spain?"),
        ],
    }
    with (
        running(folder) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="none") as client,
    ):
        whole = client.chat.completions.create(**asked).choices[0].message.content
        assert "Madrid" in whole
        streamed = [
            chunk.choices[0].delta.content
            for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(filter(None, streamed)) == whole
        assert len(streamed) > 3


# --- answers of stand-ins --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["streams", "plain"])
def test_an_answer_is_the_same_whole_and_streamed(kind, request):
    with running(request.getfixturevalue(kind)) as server:
        whole = server.ask("words 3").json()
        assert whole["object"] == "chat.completion" and whole["system_fingerprint"] == "model/1"
        assert whole["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word word word "},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        chunks = events(server.ask("words 3", stream=True))
        assert (
            "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            == "word word word "
        )
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]
        assert not any("usage" in chunk for chunk in chunks)
        *others, last = events(
            server.ask("words 3", stream=True, stream_options={"include_usage": True})
        )
        assert all(chunk["usage"] is None for chunk in others)
        assert last["choices"] == [] and last["usage"] == whole["usage"] == stand_ins.USAGE
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert server.count("slm_requests_total", outcome="ok") == 3
        assert server.count("slm_completion_tokens_total") == 6
        assert (
            server.count("slm_request_seconds_count")
            == server.count("slm_first_token_seconds_count")
            == 3
        )
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
        assert [server.count("slm_requests_total", outcome="ok") for server in (one, other)] == [
            1,
            0,
        ]
        assert 'slm_requests_total{outcome="ok"} 1.0' in one.client.get("/metrics").text
        assert "slm_requests_total{" not in other.client.get("/metrics").text


# --- callers that leave, and limits ---------------------------------------------------------


def test_200_clients_that_leave_in_the_middle_stop_their_answers_within_one_step(
    streams, record_property
):
    with running(streams) as server:
        assert server.ask("words 2").status_code == 200
        wait_for(lambda: server.requests() == (0, 0))
        threads, open_files = threading.active_count(), handles()
        clients = [
            server.connect(raw(body("gated 1000", stream=number % 2 == 0))) for number in range(200)
        ]
        wait_for(
            lambda: server.model.running == 64 and server.requests() == (64, 136), "200 requests"
        )
        before = server.model.steps
        server.model.gate.release(640)
        wait_for(lambda: server.model.steps == before + 640)
        for client in clients:
            client.close()
        wait_for(
            lambda: server.count("slm_requests_total", outcome="cancelled") == 200, "200 that left"
        )
        # The model has them still: each is in the middle of a step.
        assert server.requests() == (64, 0)
        server.model.gate.release(1000)
        wait_for(
            lambda: server.requests() == (0, 0) and server.model.running == 0, "the end of all rows"
        )
        steps = server.model.steps - before - 640
        record_property("steps per answer after its client left", steps / 64)
        assert steps == 64
        wait_for(
            lambda: threading.active_count() <= threads and handles() <= open_files,
            "as few threads and files",
        )
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
        assert refused.json()["error"] == {
            "message": "The service is busy: 3 requests wait. Try again later.",
            "type": "rate_limit_error",
            "code": "busy",
            "param": None,
        }
        clients[3].close()
        wait_for(lambda: server.requests() == (2, 2))
        clients.append(server.connect(raw(body("gated 15", stream=True))))
        wait_for(lambda: server.requests() == (2, 3))
        server.model.gate.release(1000)
        wait_for(lambda: server.requests() == (0, 0))
        asked = [text for text in server.model.asked if text != "Hello"]  # that is the trial's
        assert sorted(asked[:2]) + asked[2:] == [
            "gated 10",
            "gated 11",
            "gated 12",
            "gated 14",
            "gated 15",
        ]
        assert server.count("slm_requests_total", outcome="busy") == 1
        for client in clients:
            client.close()


def test_a_timeout_ends_the_answer_and_says_so(streams):
    with running(streams, timeout=0.3) as server:
        whole = server.ask("gated 9")
        assert whole.status_code == 504 and whole.headers["x-should-retry"] == "false"
        assert whole.json()["error"] == {
            "message": "The answer took longer than 0.3 seconds. Ask for less: max_tokens.",
            "type": "server_error",
            "code": "timeout",
            "param": None,
        }
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


@pytest.mark.parametrize(
    "text, streamed", [("raise", False), ("raise", True), ("exit", False), ("exit", True)]
)
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


def test_a_body_that_is_none_is_refused_in_openais_shape(guarded):
    with guarded.connect(raw(b"[" * 100_000, TOKEN_HEADER, "Connection: close")) as connection:
        assert refused(read_all(connection)) == (400, "invalid_json")
    assert guarded.service.queue.running == 0


def test_an_answer_that_is_no_chat_completion_is_an_error(guarded, monkeypatch):
    model = guarded.service.active.current.model
    monkeypatch.setattr(model, "_completes_by_stream", False)
    monkeypatch.setattr(model._model, "predict", lambda request: "a text")
    answer = guarded.ask("words 1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "unusable_model")


@pytest.mark.parametrize("expect", [False, True])
def test_20_mb_that_are_announced_are_refused_before_they_come(expect, guarded, record_property):
    with guarded.connect() as connection:
        connection.sendall(
            raw(
                b"",
                TOKEN_HEADER,
                "Content-Length: 20000000",
                "Connection: close",
                *(["Expect: 100-continue"] if expect else []),
                length=False,
            )
        )
        record_property("bytes of the body that were sent", 0)
        assert refused(read_all(connection)) == (413, "request_too_large")


@pytest.mark.parametrize("chunked", [False, True])
def test_20_mb_that_come_all_the_same_are_refused_and_the_connection_ends(
    chunked, guarded, record_property
):
    piece, sent = b"x" * 65536, []
    coded = ("Transfer-Encoding: chunked",) if chunked else ("Content-Length: 20971520",)
    frame = b"10000\r\n%s\r\n" % piece if chunked else piece

    def send():
        with contextlib.suppress(ConnectionError):
            for _ in range(320):
                connection.sendall(frame)
                sent.append(len(piece))

    with guarded.connect(raw(b"", TOKEN_HEADER, *coded, length=False)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        sender = threading.Thread(target=send)
        sender.start()
        answer = HTTPResponse(connection)
        answer.begin()
        record_property("bytes of the body that had been sent when the answer came", sum(sent))
        assert (
            answer.status == 413
            and json.loads(answer.read())["error"]["code"] == "request_too_large"
        )
        assert answer.getheader("connection") == "close"
        sender.join(60)
        assert not sender.is_alive()
    assert guarded.ask("words 1").status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/zqsecret"])
def test_after_a_refusal_whose_body_has_not_come_the_connection_ends(path, guarded):
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    with guarded.connect(head.encode() + b"1\r\n{\r\n") as connection:
        # Which reads until the service ends the connection.
        status, code = refused(read_all(connection))
    assert (status, code) == (401, "invalid_api_key")


def test_a_body_that_is_expected_to_be_asked_for_is_asked_for(guarded):
    content = body("words 1")
    with guarded.connect(
        raw(
            b"",
            TOKEN_HEADER,
            f"Content-Length: {len(content)}",
            "Expect: 100-continue",
            "Connection: close",
            length=False,
        )
    ) as connection:
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(content)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "authorization, status",
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer geheim", 401),
        ("Bearer geheim-ß", 200),
        ("geheim-ß", 401),
        ("Basic geheim-ß", 401),
        ("bearer geheim-ß", 200),
        ("Bearer \xff\xfe", 401),
        ("Bearer geheim-ß, Bearer x", 401),
    ],
)
def test_without_the_token_there_is_nothing_to_read(authorization, status, guarded):
    with httpx.Client(
        base_url=guarded.address,
        trust_env=False,
        verify=False,
        headers={"authorization": authorization.encode()} if authorization else {},
    ) as client:
        paths = [
            client.get("/v1/models"),
            client.get("/metrics"),
            client.post("/v1/chat/completions", content=body("words 1")),
        ]
    for answer in paths:
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_of_two_tokens_only_the_first_one_counts(guarded):
    for first, second, status in (("x", "geheim-ß", b"401"), ("geheim-ß", "x", b"200")):
        with guarded.connect(
            raw(
                body("words 1"),
                f"Authorization: Bearer {first}",
                f"Authorization: Bearer {second}",
                "Connection: close",
            )
        ) as connection:
            assert read_all(connection).split()[1] == status


@pytest.mark.parametrize(
    "head, answer",
    [
        ("Host: evil.example", (421, "unknown_host")),
        ("Host: 127.0.0.1.evil.example", (421, "unknown_host")),
        ("Host: ", (421, "unknown_host")),
        ("Host: localhost\r\nHost: evil.example", (400, "invalid_request")),
        ("Accept: */*", (400, "invalid_request")),
        ("Host: localhost\r\nContent-Length: x", (400, "invalid_request")),
        ("Host: localhost\r\nTransfer-Encoding: gzip", (400, "invalid_request")),
        ("Host: localhost\r\nbroken", (400, "invalid_request")),
    ],
)
def test_a_head_that_is_wrong(head, answer, guarded):
    request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\nConnection: close\r\n\r\n"
    with guarded.connect(request.encode()) as connection:
        assert refused(read_all(connection)) == answer


@pytest.mark.parametrize(
    ("version", "head", "streamed"),
    [
        ("1.0", "Host: localhost:1", False),
        ("1.0", "Host: [::1]", True),
        ("1.1", "Host: 127.0.0.1", False),
        ("1.1", "Host: LOCALHOST.", True),
    ],
)
def test_a_proper_host_is_answered_also_by_http_1_0(version, head, streamed, guarded):
    content = body("words 1", stream=streamed)
    request = (
        f"POST /v1/chat/completions HTTP/{version}\r\n{head}\r\n{TOKEN_HEADER}\r\n"
        f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode() + content
    with guarded.connect(request) as connection:
        said = read_all(connection)
    assert said.startswith(b"HTTP/1.1 200") and b"word " in said
    assert (b"[DONE]" in said) == streamed


def test_http_1_0_without_a_host_is_refused(guarded):
    with guarded.connect(b"GET /v1/models HTTP/1.0\r\n\r\n") as connection:
        assert refused(read_all(connection)) == (421, "unknown_host")


@pytest.mark.parametrize(
    "method, path, status, code",
    [
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
        ("POST", "/v1/completions", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/../../etc/passwd", 404, "not_found"),
        ("GET", "/zqsecret", 404, "not_found"),
    ],
)
def test_a_path_or_method_that_is_not_there(method, path, status, code, guarded):
    answer = guarded.client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert SECRET not in answer.text
    assert status != 405 or set(answer.headers["allow"].split(", ")) <= {"GET", "HEAD", "POST"}


def test_head_is_refused_without_a_body(guarded):
    for _ in range(2):
        answer = guarded.client.head("/v1/models")
        assert (answer.status_code, answer.content) == (405, b"")
    assert guarded.client.get("/health").json() == {"status": "ok"}


def test_no_answer_waits_for_its_own_beginning_to_be_confirmed(guarded):
    guarded.client.get("/health")
    (connection, *_) = guarded.server.server_state.connections
    option = connection.transport.get_extra_info("socket").getsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY
    )
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


# --- what clients and probes do -------------------------------------------------------------


def test_a_probe_may_ask_by_head_and_a_client_for_the_model_by_its_name(guarded):
    for path in ("/health", "/ready"):
        answer = guarded.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    name = guarded.service.active.name
    assert guarded.client.get(f"/v1/models/{name}").json()["id"] == name
    assert guarded.client.get(f"/v1/models/{SECRET}").json()["error"]["code"] == "model_not_found"


def test_an_answer_that_a_client_sends_back_may_have_no_content(chat_service):
    conversation = [*user("a"), {"role": "assistant", "content": None}, *user("b")]
    assert post(chat_service, {"messages": conversation}).status_code == 200


def test_a_stream_is_passed_on_at_once_by_proxies(guarded):
    answer = guarded.ask("words 1", stream=True)
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"


def test_callers_of_different_names_share_no_prompts(tiny, tmp_path):
    mlflow.pyfunc.save_model(tmp_path / "model", **chat_model_for(tiny))
    with running(tmp_path / "model", caller_header="x-caller") as server:

        def reused(caller, **fields):
            before = server.model.stats()["reused_prompt_tokens"]
            request = {
                "messages": user("The harbour is full of ships. " * 5),
                "max_tokens": 1,
            } | fields
            answer = server.client.post(
                "/v1/chat/completions", json=request, headers={"x-caller": caller}
            )
            assert answer.status_code == 200
            return server.model.stats()["reused_prompt_tokens"] - before

        assert reused("a") == 0
        assert reused("a") > 20
        assert reused("b") == 0
        assert reused("a", prompt_cache_key="k") == 0
        assert reused("a", prompt_cache_key="k") > 20
        answer = server.client.post("/v1/chat/completions", json=AS_SHOWN | {"prompt_cache_key": 5})
        assert answer.json()["error"]["param"] == "prompt_cache_key"


def test_callers_of_one_address_share_prompts_where_no_header_names_them(tiny, tmp_path):
    mlflow.pyfunc.save_model(tmp_path / "model", **chat_model_for(tiny))
    with running(tmp_path / "model", separates_addresses=True) as server:
        for _ in range(2):
            server.client.post(
                "/v1/chat/completions", json={"messages": user("word " * 40), "max_tokens": 1}
            )
        assert server.model.stats()["reused_prompt_tokens"] > 20


def test_an_engine_that_has_ended_is_neither_healthy_nor_ready(tiny, tmp_path):
    mlflow.pyfunc.save_model(tmp_path / "model", **chat_model_for(tiny))
    with running(tmp_path / "model", poll=600) as server:
        assert server.client.get("/health").status_code == 200
        server.model.close()
        for path in ("/health", "/ready"):
            answer = server.client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "closed")


def test_the_time_to_the_first_token_is_not_that_to_the_last(streams):
    with running(streams) as server, ThreadPoolExecutor(1) as pool:
        steps = server.model.steps
        answer = pool.submit(server.ask, "gated 2", stream=True)
        server.model.gate.release()
        wait_for(lambda: server.model.steps == steps + 1)
        time.sleep(0.3)
        server.model.gate.release()
        assert answer.result().status_code == 200
        first = server.count("slm_first_token_seconds_sum")
        assert 0 < first <= server.count("slm_request_seconds_sum") - 0.3


def test_a_token_is_compared_in_the_same_time_wherever_it_differs(guarded, monkeypatch):
    compared = []
    monkeypatch.setattr(
        app.hmac, "compare_digest", lambda one, other: compared.append((one, other)) or one == other
    )
    assert guarded.client.get("/v1/models").status_code == 200
    assert (
        guarded.client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    )
    assert compared == [(TOKEN.encode(), TOKEN.encode()), (b"x", TOKEN.encode())]


# --- slow callers ---------------------------------------------------------------------------


def test_a_body_in_very_many_pieces_is_refused(guarded, monkeypatch):
    monkeypatch.setattr(service_connection, "MAX_PIECES", 100)
    with guarded.connect(
        raw(b"", TOKEN_HEADER, "Transfer-Encoding: chunked", length=False)
    ) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(101):
                connection.sendall(b"1\r\n{\r\n")
        assert refused(read_all(connection)) == (400, "invalid_request")


def test_a_request_with_two_lengths_is_refused_and_its_connection_closed(guarded):
    begin = raw(b"0\r\n\r\n", TOKEN_HEADER, "Transfer-Encoding: chunked")
    for request in (begin, begin.replace(b"POST /v1/chat/completions", b"POST /health")):
        with guarded.connect(request) as connection:
            assert refused(read_all(connection)) == (400, "invalid_request")


def test_a_body_that_is_half_here_does_not_hold_up_the_end(streams):
    with running(streams, drain=600) as server:
        connection = server.connect(raw(b"{", "Content-Length: 100", length=False))
        wait_for(lambda: server.server.server_state.tasks, "the request")
        server.server.should_exit = True
        assert refused(read_all(connection)) == (503, "closed")
        connection.close()
        server.client.close()


def test_a_head_that_never_ends_is_cut_off(streams, monkeypatch, record_property):
    monkeypatch.setattr(service_connection, "HEADER_SECONDS", 0.3)
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
    with guarded.connect(
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000
    ) as connection:
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


# --- the end --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["streams", "plain"])
def test_a_short_drain_ends_answers_with_an_error_even_of_a_model_that_does_not_end(kind, request):
    with (
        running(request.getfixturevalue(kind), drain=1, concurrent=2) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        model = server.model
        callers = [pool.submit(server.ask, "gated 9", stream=stream) for stream in (False, True)]
        wait_for(lambda: model.running == 2)
        if kind == "streams":
            model.gate.release(2)
            wait_for(lambda: model.steps >= 2)
        server.server.should_exit = True  # as uvicorn sets it at a signal
        for caller, streamed in zip(callers, (False, True), strict=True):
            answer = caller.result()
            last = answer.text.strip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "closed", answer.text[-300:]
            assert answer.status_code in (
                (200, 503) if (kind, streamed) == ("streams", True) else (503,)
            )
        model.gate.release(99)


# --- the alias ------------------------------------------------------------------------------


def folder_of(version):
    return Path(mlflow.artifacts.download_artifacts(f"models:/stand-in/{version}"))


def test_the_alias_moves_under_load_and_no_request_fails(registry, record_property):
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.05) as server, ThreadPoolExecutor(8) as pool:
        before, old = threading.active_count(), weakref.ref(server.model)
        go_on = threading.Event()
        go_on.set()

        def caller(number):
            seen = []
            with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as client:
                while go_on.is_set():
                    answer = client.post(
                        "/v1/chat/completions", content=body("slow 5", stream=number % 2 == 0)
                    )
                    assert answer.status_code == 200, answer.text
                    answers = events(answer) if number % 2 == 0 else [answer.json()]
                    prints = {chunk["system_fingerprint"] for chunk in answers}
                    # One version makes an answer, from its first to its last chunk.
                    assert len(prints) == 1
                    seen += prints
            return seen

        callers = [pool.submit(caller, number) for number in range(8)]
        wait_for(lambda: server.count("slm_requests_total", outcome="ok") > 16)
        for version in ("2", "1", "2"):
            move_alias(version)
            wait_for_version(server, version)
            assert server.count("slm_model_version", model="stand-in", version=version) == 1
        done = server.count("slm_requests_total", outcome="ok")
        wait_for(lambda: server.count("slm_requests_total", outcome="ok") > done + 16)
        go_on.clear()
        answers = [answer for caller in callers for answer in caller.result()]
        assert set(answers) == {"stand-in/1", "stand-in/2"} and answers[-1] == "stand-in/2"
        outcomes = {
            sample.labels["outcome"]
            for metric in server.service.metrics.requests.collect()
            for sample in metric.samples
        }
        assert outcomes == {"ok"}
        record_property("answers while the alias moved three times, none failed", len(answers))
        wait_for(
            lambda: server.requests() == (0, 0) and (gc.collect() or old() is None),
            "the old version's end",
        )
        assert server.count("slm_model_version", model="stand-in", version="1") == 0
        wait_for(lambda: threading.active_count() <= before + 8)  # the callers' own


def test_the_old_version_is_closed_after_its_last_request_and_not_before(registry):
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.05) as server, ThreadPoolExecutor(1) as pool:
        old = server.model
        last = pool.submit(server.ask, "gated 3")
        wait_for(lambda: old.running == 1)
        move_alias("2")
        wait_for_version(server, "2")
        assert server.ask("words 1").json()["system_fingerprint"] == "stand-in/2"
        assert not old.closed
        old.gate.release(3)
        answer = last.result().json()
        assert answer["system_fingerprint"] == "stand-in/1"
        assert answer["choices"][0]["message"]["content"] == "word word word "
        wait_for(lambda: old.closed)


def test_a_request_that_waited_is_answered_by_the_version_that_serves_then(registry):
    registry("Plain")
    registry("Streams", alias=None)
    with running(URI, poll=0.05) as server, ThreadPoolExecutor(8) as pool:
        old = server.model
        first = pool.submit(server.ask, "gated 1")
        wait_for(lambda: old.running == 1)
        others = [pool.submit(server.ask, "gated 1") for _ in range(5)]
        wait_for(lambda: server.requests() == (1, 5))
        move_alias("2")
        wait_for_version(server, "2")
        old.gate.release()
        # The new one streams, so it takes them all at once.
        wait_for(lambda: server.model.running == 5)
        server.model.gate.release(5)
        assert first.result().json()["system_fingerprint"] == "stand-in/1"
        assert {other.result().json()["system_fingerprint"] for other in others} == {"stand-in/2"}


@pytest.mark.parametrize("kind", ["Exits", "NoChat", "Thinks"])
def test_a_version_that_does_not_load_leaves_the_old_one_serving_and_is_told(kind, registry):
    registry("Streams")
    with running(URI, poll=0.05, timeout=1) as server:
        threads = threading.active_count()
        registry(kind)
        wait_for(lambda: server.readiness().get("failed_version") == "2", "the failure")
        readiness = server.readiness()
        seconds = readiness.pop("retry_seconds")
        # Nobody can end the thread of a model that does not answer, so it is not tried again.
        assert seconds is None if kind == "Thinks" else 0 <= seconds <= active_version.FIRST_PAUSE
        assert readiness == {
            "status": "ready",
            "model": "stand-in",
            "version": "1",
            "failed_version": "2",
        }
        assert server.client.get("/ready").status_code == 200
        assert server.ask("words 1").json()["system_fingerprint"] == "stand-in/1"
        assert server.count("slm_model_failed_version") == 2
        assert server.count("slm_model_version", model="stand-in", version="1") == 1
        address = server.service.active.address
        looks = []
        loads = []
        find, load = address.find_version, address.load
        address.find_version = lambda: looks.append(1) or find()
        address.load = lambda *given: loads.append(1) or load(*given)
        wait_for(lambda: len(looks) > 5)
        assert not loads  # it is not tried at each look
        assert server.count("slm_model_load_failures_total") == 1
        move_alias("1")
        wait_for(lambda: server.readiness()["failed_version"] is None)
        assert server.count("slm_model_failed_version") == 0
        if kind != "Thinks":  # nobody can end its thread
            wait_for(lambda: threading.active_count() <= threads + 1)


def test_an_alias_that_is_deleted_changes_nothing(registry):
    registry("Streams")
    with running(URI, poll=0.02) as server:
        mlflow.MlflowClient().delete_registered_model_alias("stand-in", "champion")
        looks = []
        find = server.service.active.address.find_version
        server.service.active.address.find_version = lambda: looks.append(1) or find()
        wait_for(lambda: len(looks) > 3)
        assert server.ask("words 1").status_code == 200
        assert server.readiness()["version"] == "1"
        registry("Streams")
        wait_for_version(server, "2")


def test_the_models_folder_is_deleted_under_the_server(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(active_version, "FIRST_PAUSE", 1.0)
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.02) as server:
        places = {version: folder_of(version) for version in ("1", "2")}
        for version, place in places.items():
            shutil.move(place, tmp_path / f"moved{version}")
        assert server.ask("words 1").status_code == 200
        move_alias("2")
        wait_for(lambda: server.readiness()["failed_version"] == "2")
        assert server.ask("words 1").json()["system_fingerprint"] == "stand-in/1"
        shutil.move(tmp_path / "moved2", places["2"])
        wait_for_version(server, "2")
        assert server.readiness()["failed_version"] is None


def test_a_store_in_the_temporary_folder_is_never_removed(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.02) as server:
        move_alias("2")
        wait_for_version(server, "2")
        wait_for(lambda: threading.active_count() < 99)
    assert folder_of("1").is_dir() and folder_of("2").is_dir()


# --- with the engine ------------------------------------------------------------------------


@pytest.fixture
def engines(registry, tiny, tmp_path, monkeypatch):
    """Register two versions of the chat model, the second with other code; return how many engines' threads run."""

    def log():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # there is no input example
            logged = mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny))
        return mlflow.register_model(logged.model_uri, "stand-in").version

    before = set(threading.enumerate())
    move_alias(log())
    change_code(monkeypatch, tmp_path)
    log()
    return lambda: sum(
        thread.name == "chat-model-engine" for thread in set(threading.enumerate()) - before
    )


def test_the_old_engine_ends_when_the_alias_moves_to_a_version_with_other_code(engines):
    with running(URI, poll=0.05) as server, ThreadPoolExecutor(8) as pool:
        old = weakref.ref(server.model)
        asked = [
            pool.submit(server.ask, "Hello", max_tokens=60, stream=number % 2 == 0)
            for number in range(8)
        ]
        assert engines() == 1
        move_alias("2")
        wait_for_version(server, "2")
        assert {answer.result().status_code for answer in asked} == {200}
        # Its own code answers.
        assert server.ask("Hello", max_tokens=2).json()["id"].startswith("changed-")
        wait_for(lambda: engines() == 1 and (gc.collect() or old() is None), "the old engine's end")
        assert server.ask("Hello", max_tokens=2).json()["system_fingerprint"] == "stand-in/2"


# --- the traces -----------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [False, True])
def test_traces_hold_sizes_and_times_and_texts_only_where_that_was_asked_for(
    texts, registry, store, tmp_path
):
    registry("Streams")
    with running(URI, traces="the traces", trace_texts=texts) as server:
        server.ask(f"words {SECRET}")
        server.ask(f"words {SECRET}", stream=True)
        failed = server.ask(f"raise {SECRET}")
        assert SECRET not in failed.text
        refused = server.ask(f"words {SECRET}", max_tokens=0)
        assert refused.status_code == 400
    mlflow.flush_trace_async_logging()
    experiment = mlflow.get_experiment_by_name("the traces")
    found = mlflow.search_traces(locations=[experiment.experiment_id], return_type="list")
    assert len(found) == 3  # what was refused never came to a model
    spans = sorted((trace.data.spans[0] for trace in found), key=lambda span: span.start_time_ns)
    for span in spans:
        assert span.attributes["model"] == "stand-in" and span.attributes["version"] == "1"
        assert span.attributes["messages"] == 1
    for span in spans[:2]:
        assert span.attributes["outcome"] == "ok" and span.attributes["finish_reason"] == "stop"
        assert 0 < span.attributes["first_token_seconds"] < 60
        assert span.attributes["mlflow.chat.tokenUsage"] == {
            "input_tokens": 3,
            "output_tokens": 2,
            "total_tokens": 5,
        }
        assert span.outputs == ("word word " if texts else None)
    assert spans[2].attributes["outcome"] == "failed" and spans[2].status.status_code == "ERROR"
    written = json.dumps([trace.to_json() for trace in found])
    assert (SECRET in written) == texts
    stored = b"".join(
        file.read_bytes()
        for folder in (Path(store.removeprefix("sqlite:///")).parent, tmp_path)
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".py"
    )
    assert (SECRET.encode() in stored) == texts


def test_requests_go_on_while_no_trace_can_be_written(registry, store):
    registry("Streams")
    with running(URI, traces="the traces", poll=999) as server:
        assert server.ask("words 2").status_code == 200
        file = sqlite3.connect(store.removeprefix("sqlite:///"), timeout=30, isolation_level=None)
        mlflow.flush_trace_async_logging()
        file.execute("BEGIN EXCLUSIVE")
        for _ in range(20):
            assert server.ask("words 2").status_code == 200
        file.execute("ROLLBACK")
        file.close()
        wait_for(lambda: server.requests() == (0, 0))
