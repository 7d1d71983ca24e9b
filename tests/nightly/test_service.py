"""Long attacks on the service: a store that is locked for long, 200 clients at the engine, kill -9, invented requests.

Run: python -m helpers test tests/nightly/test_service.py
"""

import contextlib
import json
import signal
import sqlite3
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import mlflow
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from support.chat import LONG, chat_model_for
from support.served_program import URI, ask, get
from support.service import body, raw, running, wait_for, wait_for_version
from support.stand_ins import move_alias

from serving.service import command_line


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """Serve the chat model on the toy model, with 16 tokens where a request says nothing."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    mlflow.pyfunc.save_model(folder, **chat_model_for(tiny, max_tokens=16))
    with running(folder, max_body=1 << 23) as served:
        yield served


@pytest.mark.parametrize(
    ("mode", "rules"),
    [(GenerationMode.POSITIVE, []), (GenerationMode.NEGATIVE, [checks.negative_data_rejection])],
    ids=["as described", "otherwise"],
)
def test_requests_made_from_the_description_get_an_answer_or_a_refusal(server, mode, rules):
    description = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    rules = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.response_schema_conformance,
        checks.content_type_conformance,
        *rules,
    ]
    statuses = Counter()
    answers = server.count("slm_requests_total", outcome="ok")

    def ask(case):
        statuses[case.operation.path, case.call_and_validate(checks=rules).status_code] += 1

    operations = [found.ok() for found in description.get_all_operations()]
    assert {operation.path for operation in operations} == {
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/health",
        "/ready",
        "/metrics",
    }
    for operation in operations:
        # The others take nothing that may be wrong.
        if mode is GenerationMode.POSITIVE or operation.method == "post":
            examples = settings(
                max_examples=40 if operation.method == "post" else 1,
                suppress_health_check=list(HealthCheck),
            )
            examples(given(operation.as_strategy(generation_mode=mode))(ask))()
    answered = statuses["/v1/chat/completions", 200]
    assert server.count("slm_requests_total", outcome="ok") - answers == answered
    assert statuses["/v1/chat/completions", 400] > 5
    assert (answered > 2) == (mode is GenerationMode.POSITIVE)


def test_the_store_is_locked_by_another_writer(registry, store, record_property):
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.02) as server:
        move_alias("2")
        wait_for_version(server, "2")
        move_alias("1")
        wait_for_version(server, "1")
        file = sqlite3.connect(store.removeprefix("sqlite:///"), timeout=30, isolation_level=None)
        file.execute("UPDATE registered_model_aliases SET version = 2")
        file.execute("BEGIN EXCLUSIVE")
        looks = []
        find = server.service.active.address.find_version
        server.service.active.address.find_version = lambda: looks.append(1) or find()
        answers = 0
        while len(looks) < 2:
            assert server.ask("words 2").status_code == 200
            answers += 1
        record_property("answers while the store was locked", answers)
        assert server.readiness() == {
            "status": "ready",
            "model": "stand-in",
            "version": "1",
            "failed_version": None,
            "retry_seconds": None,
        }
        file.execute("ROLLBACK")
        file.execute("UPDATE registered_model_aliases SET version = 2")
        file.close()
        wait_for_version(server, "2")


def test_a_store_that_is_locked_when_the_program_starts(registry, store, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    registry("Streams")
    with contextlib.closing(
        sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None)
    ) as file:
        file.execute("BEGIN EXCLUSIVE")
        code = command_line.main(["--model", URI, "--port", "0"])
        file.execute("ROLLBACK")
    what, fix = capsys.readouterr().err.splitlines()[-2:]  # MLflow has its say, too
    assert (
        code == 1 and what.startswith("error: ") and "locked" in what and fix.endswith("--model.")
    )


def test_200_clients_that_leave_free_the_engine(tiny, tmp_path, record_property):
    mlflow.pyfunc.save_model(tmp_path / "model", **chat_model_for(tiny))
    with running(tmp_path / "model", concurrent=200) as server:
        threads = threading.active_count()
        clients = [
            server.connect(raw(body(f"{number}", stream=number % 2 == 0, **LONG)))
            for number in range(200)
        ]
        model = server.service.active.current.model
        wait_for(lambda: server.requests() == (200, 0) and model.stats()["running"], "200 requests")
        for client in clients:
            client.close()
        wait_for(lambda: server.count("slm_requests_total", outcome="cancelled") == 200)
        made = server.model.stats()["completion_tokens"]
        wait_for(lambda: server.requests() == (0, 0) and model.stats()["running"] == 0)
        made = server.model.stats()["completion_tokens"] - made
        record_property(
            "tokens per answer that the engine made for clients that had left", made / 200
        )
        assert server.model.stats()["waiting"] == 0
        wait_for(lambda: threading.active_count() <= threads, "the end of the threads")
        assert server.ask("Hello", max_tokens=2).status_code == 200


def test_kill_9_under_load_and_started_again_at_the_same_port(
    program, registry, store, record_property
):
    registry("Streams")
    first = program("--port", 0)
    address = first.wait()
    ended = []

    def caller(number):
        try:
            while True:
                answer = ask(address, "slow 20", stream=number % 2 == 0)
                assert answer.status_code == 200
        except httpx.TransportError as error:
            ended.append(type(error).__name__)

    with ThreadPoolExecutor(32) as pool:
        callers = [pool.submit(caller, number) for number in range(32)]
        metrics = partial(get, f"{address}/metrics")
        wait_for(lambda: "slm_requests_running 32.0" in metrics().text)
        first.process.kill()
        for one in callers:
            one.result()
    record_property(
        "how the clients' requests ended", {name: ended.count(name) for name in set(ended)}
    )
    assert len(ended) == 32
    second = program("--port", address.rpartition(":")[2])
    assert second.wait() == address
    assert ask(address, "words 2").json()["system_fingerprint"] == "stand-in/1"
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(60) == 0


@pytest.mark.parametrize("kind", ["Streams", "Plain"])
def test_a_short_drain_ends_answers_with_an_error_even_of_a_model_that_does_not_end(
    kind, program, registry
):
    registry(kind)
    server = program("--port", 0, "--drain", 1, "--concurrent", 4)
    address = server.wait()
    with ThreadPoolExecutor(4) as pool:
        texts = ["slow 5000", "slow 5000", "sleep 600", "sleep 600"]
        callers = [
            pool.submit(ask, address, text, stream=number % 2 == 0)
            for number, text in enumerate(texts)
        ]
        wait_for(lambda: "slm_requests_running 4.0" in get(f"{address}/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        for number, caller in enumerate(callers):
            answer = caller.result()
            last = answer.text.strip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "closed", answer.text[-300:]
            assert answer.status_code == (200 if (kind, number) == ("Streams", 0) else 503)
    assert "Traceback" not in server.said()


@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_while_the_model_loads(name, code, program, registry):
    registry("Thinks")
    server = program("--port", 0)
    wait_for(lambda: "thinking" in server.said(), "the model's first thought", 120)
    server.process.send_signal(getattr(signal, name))
    assert server.process.wait(60) == code
    assert "Traceback" not in server.said()
