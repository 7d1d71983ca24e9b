"""The server with its store: aliases that move, traces, and the program as it is started, stopped and killed."""

import contextlib
import gc
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import mlflow
import psutil
import pytest
from support import ROOT, stand_ins
from support.chat import chat_model_for
from support.service import body, events, raw, read_all, running, wait_for

from serving import openai_server

SECRET = "zqsecret"
URI = "models:/stand-in@champion"


@pytest.fixture
def registry(store, tmp_path):
    """Set a store of this test's own; return a function that registers a stand-in there, and sets ``champion``."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    experiment = mlflow.create_experiment("stand-ins", (tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment)
    yield partial(stand_ins.register, tmp_path)
    mlflow.set_tracking_uri(before)


def move(version, alias="champion"):
    mlflow.MlflowClient().set_registered_model_alias("stand-in", alias, version)


def ready(server):
    return server.client.get("/ready").json()


def serves(server, version):
    wait_for(lambda: ready(server)["version"] == version, f"version {version}")


def folder_of(version):
    return Path(mlflow.artifacts.download_artifacts(f"models:/stand-in/{version}"))


# --- the alias ------------------------------------------------------------------------------


def test_the_alias_moves_under_load_and_no_request_fails(registry, record_property):
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.05) as server, ThreadPoolExecutor(32) as pool:
        before, old = threading.active_count(), weakref.ref(server.model)
        go_on = threading.Event()
        go_on.set()

        def caller(number):
            seen = []
            with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as client:
                while go_on.is_set():
                    answer = client.post("/v1/chat/completions", content=body("slow 5", stream=number % 2 == 0))
                    assert answer.status_code == 200, answer.text
                    answers = events(answer) if number % 2 == 0 else [answer.json()]
                    prints = {chunk["system_fingerprint"] for chunk in answers}
                    assert len(prints) == 1  # one version makes an answer, from its first to its last chunk
                    seen += prints
            return seen

        callers = [pool.submit(caller, number) for number in range(32)]
        wait_for(lambda: server.count("slm_requests_total", outcome="ok") > 64)
        for version in ("2", "1", "2"):
            move(version)
            serves(server, version)
            assert server.count("slm_model_version", model="stand-in", version=version) == 1
        done = server.count("slm_requests_total", outcome="ok")
        wait_for(lambda: server.count("slm_requests_total", outcome="ok") > done + 64)
        go_on.clear()
        answers = [answer for caller in callers for answer in caller.result()]
        assert set(answers) == {"stand-in/1", "stand-in/2"} and answers[-1] == "stand-in/2"
        outcomes = {sample.labels["outcome"] for metric in server.service.figures.requests.collect()
                    for sample in metric.samples}
        assert outcomes == {"ok"}
        record_property("answers while the alias moved three times, none failed", len(answers))
        wait_for(lambda: server.requests() == (0, 0) and (gc.collect() or old() is None), "the old version's end")
        assert server.count("slm_model_version", model="stand-in", version="1") == 0
        wait_for(lambda: threading.active_count() <= before + 32)  # the callers' own


def test_the_old_version_is_closed_after_its_last_request_and_not_before(registry):
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.05) as server, ThreadPoolExecutor(1) as pool:
        old = server.model
        last = pool.submit(server.ask, "gated 3")
        wait_for(lambda: old.running == 1)
        move("2")
        serves(server, "2")
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
        move("2")
        serves(server, "2")
        old.gate.release()
        wait_for(lambda: server.model.running == 5)  # the new one streams, so it takes them all at once
        server.model.gate.release(5)
        assert first.result().json()["system_fingerprint"] == "stand-in/1"
        assert {other.result().json()["system_fingerprint"] for other in others} == {"stand-in/2"}


@pytest.mark.parametrize("kind", ["NoLoad", "Exits", "NoChat", "Thinks"])
def test_a_version_that_does_not_load_leaves_the_old_one_serving_and_is_told(kind, registry):
    registry("Streams")
    with running(URI, poll=0.05, timeout=1) as server:
        threads = threading.active_count()
        registry(kind)
        wait_for(lambda: ready(server).get("failed_version") == "2", "the failure")
        assert ready(server) == {"status": "ready", "model": "stand-in", "version": "1", "failed_version": "2"}
        assert server.client.get("/ready").status_code == 200
        assert server.ask("words 1").json()["system_fingerprint"] == "stand-in/1"
        assert server.count("slm_model_failed_version") == 2
        assert server.count("slm_model_version", model="stand-in", version="1") == 1
        address, looks, loads = server.service.desk.address, [], []
        find, load = address.find_version, address.load
        address.find_version = lambda: looks.append(1) or find()
        address.load = lambda *given: loads.append(1) or load(*given)
        wait_for(lambda: len(looks) > 5)
        assert not loads  # it is not tried at each look
        assert server.count("slm_model_load_failures_total") == 1
        move("1")
        wait_for(lambda: ready(server)["failed_version"] is None)
        assert server.count("slm_model_failed_version") == 0
        if kind != "Thinks":  # nobody can end its thread
            wait_for(lambda: threading.active_count() <= threads + 1)


def test_an_alias_that_is_deleted_changes_nothing(registry):
    registry("Streams")
    with running(URI, poll=0.02) as server:
        mlflow.MlflowClient().delete_registered_model_alias("stand-in", "champion")
        looks, find = [], server.service.desk.address.find_version
        server.service.desk.address.find_version = lambda: looks.append(1) or find()
        wait_for(lambda: len(looks) > 3)
        assert server.ask("words 1").status_code == 200
        assert ready(server)["version"] == "1"
        registry("Streams")
        serves(server, "2")


@pytest.mark.slow  # MLflow waits for the lock for 20 seconds
def test_the_store_is_locked_by_another_writer(registry, store, record_property):
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.02) as server:
        move("2")
        serves(server, "2")
        move("1")
        serves(server, "1")
        file = sqlite3.connect(store.removeprefix("sqlite:///"), timeout=30, isolation_level=None)
        file.execute("UPDATE registered_model_aliases SET version = 2")
        file.execute("BEGIN EXCLUSIVE")
        looks, find = [], server.service.desk.address.find_version
        server.service.desk.address.find_version = lambda: looks.append(1) or find()
        answers = 0
        while len(looks) < 2:
            assert server.ask("words 2").status_code == 200
            answers += 1
        record_property("answers while the store was locked", answers)
        assert ready(server) == {"status": "ready", "model": "stand-in", "version": "1", "failed_version": None}
        file.execute("ROLLBACK")
        file.execute("UPDATE registered_model_aliases SET version = 2")
        file.close()
        serves(server, "2")


def test_the_models_folder_is_deleted_under_the_server(registry, tmp_path):
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.02) as server:
        places = {version: folder_of(version) for version in ("1", "2")}
        for version, place in places.items():
            shutil.move(place, tmp_path / f"moved{version}")
        assert server.ask("words 1").status_code == 200
        move("2")
        wait_for(lambda: ready(server)["failed_version"] == "2")
        assert server.ask("words 1").json()["system_fingerprint"] == "stand-in/1"
        assert server.count("slm_model_load_failures_total") == 1
        shutil.move(tmp_path / "moved2", places["2"])
        serves(server, "2")
        assert ready(server)["failed_version"] is None


def test_a_store_in_the_temporary_folder_is_never_removed(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    registry("Streams")
    registry("Streams", alias=None)
    with running(URI, poll=0.02) as server:
        move("2")
        serves(server, "2")
        wait_for(lambda: threading.active_count() < 99)
    assert folder_of("1").is_dir() and folder_of("2").is_dir()


# --- with the engine ------------------------------------------------------------------------


@pytest.fixture
def engines(registry, tiny):
    """Register the chat model on the toy model; return how many engines' threads there are."""
    def log():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # there is no input example
            logged = mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny))
        return mlflow.register_model(logged.model_uri, "stand-in").version

    before = set(threading.enumerate())
    move(log())
    log()
    return lambda: sum(thread.name == "chat-model-engine" for thread in set(threading.enumerate()) - before)


def test_200_clients_that_leave_free_the_engine(engines, record_property):
    with running(URI, concurrent=200) as server:
        threads = threading.active_count()
        asked = {"max_tokens": 2000, "frequency_penalty": -2.0}
        clients = [server.connect(raw(body(f"{number}", stream=number % 2 == 0, **asked))) for number in range(200)]
        wait_for(lambda: server.requests() == (200, 0) and server.service.desk.current.rows(), "200 requests")
        for client in clients:
            client.close()
        wait_for(lambda: server.count("slm_requests_total", outcome="cancelled") == 200)
        made = server.model.stats()["completion_tokens"]
        wait_for(lambda: server.requests() == (0, 0) and server.service.desk.current.rows() == 0)
        made = server.model.stats()["completion_tokens"] - made
        record_property("tokens per answer that the engine made for clients that had left", made / 200)
        assert server.model.stats()["waiting"] == 0
        wait_for(lambda: threading.active_count() <= threads, "the end of the threads")
        assert server.ask("Hello", max_tokens=2).status_code == 200


def test_the_old_engine_ends_when_the_alias_moves(engines):
    with running(URI, poll=0.05) as server, ThreadPoolExecutor(8) as pool:
        old = weakref.ref(server.model)
        asked = [pool.submit(server.ask, "Hello", max_tokens=60, stream=number % 2 == 0) for number in range(8)]
        assert engines() == 1
        move("2")
        serves(server, "2")
        assert {answer.result().status_code for answer in asked} == {200}
        wait_for(lambda: engines() == 1 and (gc.collect() or old() is None), "the old engine's end")
        assert server.ask("Hello", max_tokens=2).json()["system_fingerprint"] == "stand-in/2"


# --- the traces -----------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [False, True])
def test_traces_hold_sizes_and_times_and_texts_only_where_that_was_asked_for(texts, registry, store, tmp_path):
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
        assert span.attributes["mlflow.chat.tokenUsage"] == {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
        assert span.outputs == ("word word " if texts else None)
    assert spans[2].attributes["outcome"] == "failed" and spans[2].status.status_code == "ERROR"
    written = json.dumps([trace.to_json() for trace in found])
    assert (SECRET in written) == texts
    stored = b"".join(file.read_bytes() for folder in (Path(store.removeprefix("sqlite:///")).parent, tmp_path)
                      for file in folder.rglob("*") if file.is_file() and file.suffix != ".py")
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


# --- the program's beginning ----------------------------------------------------------------


@pytest.fixture
def main(monkeypatch, capsys):
    """Return a function that runs the program in this process, and returns its exit code and what it complained of."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}

    def run(*words):
        capsys.readouterr()
        code = openai_server.main([str(word) for word in words])
        return code, capsys.readouterr().err

    yield run
    for name, handler in handlers.items():
        signal.signal(name, handler)


def two_sentences(said):
    what, fix = said.strip().split("\n")
    assert what.startswith("error: ") and what.endswith(".") and fix.startswith("       ") and fix.endswith((".", "1"))
    assert "Traceback" not in said
    return what.removeprefix("error: ") + " " + fix.strip()


def test_a_port_that_is_taken(main):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = main("--port", port)
    assert code == 1 and two_sentences(said) == f"Port {port} is taken. Choose another one: --port {port + 1}."


@pytest.mark.parametrize("words, says", [
    (["--model", "models:/stand-in@nobody"], "names no version at models:/stand-in@nobody"),
    (["--model", "models:/nobody@champion"], "names no version at models:/nobody@champion"),
    (["--model", "models:/stand-in/99"], "does not load"), (["--model", "models:/stand-in"], "does not load"),
    (["--model", "/nowhere"], "does not load"), (["--model", ""], "does not load"),
    (["--host", "203.0.113.7", "--allowed-host", "x"], "no token"), (["--host", "0.0.0.0"], "no token"),
    (["--model", "models:/stand-in/1", "--traces", "deleted"], "No traces can be written to deleted"),
])
def test_what_the_program_cannot_begin_with(words, says, registry, main):
    if "--traces" in words:
        registry("Streams")
        mlflow.MlflowClient().delete_experiment(mlflow.create_experiment("deleted"))
    code, said = main("--port", 0, *words)
    assert code == 1 and says in two_sentences(said)


@pytest.mark.parametrize("kind, says", [("NoLoad", "ValueError: This model is broken"), ("Exits", "SystemExit"),
                                        ("NoChat", "no chat completion"), ("Thinks", "TimeoutError")])
def test_a_model_that_cannot_serve(kind, says, registry, main):
    registry(kind)
    code, said = main("--model", URI, "--port", 0, "--timeout", 1)
    assert code == 1 and says in two_sentences(said)


@pytest.mark.slow
def test_a_store_that_is_locked_when_the_program_starts(registry, store, main):
    registry("Streams")
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"), isolation_level=None)) as file:
        file.execute("BEGIN EXCLUSIVE")
        code, said = main("--model", URI, "--port", 0)
        file.execute("ROLLBACK")
    said = "\n".join(said.splitlines()[-2:])  # MLflow has its say, too
    assert code == 1 and "locked" in two_sentences(said)


def test_a_password_of_the_store_is_not_shown(main, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"http://user:{SECRET}@127.0.0.1:9")
    try:
        code, said = main("--model", URI, "--port", 0)
    finally:
        mlflow.set_tracking_uri(before)
    assert code == 1 and "The store http://127.0.0.1:9 names no version" in two_sentences(said)
    assert SECRET not in said


@pytest.mark.parametrize("words", [["--timeout", "nan"], ["--timeout", "0"], ["--waiting", "-1"], ["--port", "x"],
                                   ["--max-body", "1e9"], ["--mode", "x"], ["--drain", "inf"]])
def test_options_that_are_none(words, main):
    with pytest.raises(SystemExit) as refusal:
        main(*words)
    assert refusal.value.code == 2


# --- the program's end ----------------------------------------------------------------------


class Program:
    """The server as a program of its own."""

    def __init__(self, log: Path, *words):
        self.log = log
        with log.open("w", encoding="utf-8") as output:
            self.process = subprocess.Popen(
                [sys.executable, "serving/openai_server.py", "--model", URI, *map(str, words)], cwd=ROOT,
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

    def wait(self):
        """Wait until it is ready; return its address."""
        wait_for(lambda: "Serving" in self.said() or self.process.poll() is not None, "the program", 120)
        assert self.process.poll() is None, self.said()
        return self.said().partition(" at ")[2].split("/v1\n")[0]

    def said(self):
        return self.log.read_text(encoding="utf-8")


@pytest.fixture
def program(registry, store, tmp_path, monkeypatch):
    """Return a function that starts the program on this test's store."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started = []

    def start(*words):
        started.append(Program(tmp_path / f"program{len(started)}.log", *words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def ask(address, text, **fields):
    return get(f"{address}/v1/chat/completions", "POST", content=body(text, **fields))


def get(url, method="GET", **fields):
    # httpx reads all certificates of the system for a client of its own, which takes longer than the answer.
    return httpx.request(method, url, timeout=120, trust_env=False, verify=False, **fields)


@pytest.mark.slow
def test_kill_9_under_load_and_started_again_at_the_same_port(program, registry, store, record_property):
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
    record_property("how the clients' requests ended", {name: ended.count(name) for name in set(ended)})
    assert len(ended) == 32
    second = program("--port", address.rpartition(":")[2])
    assert second.wait() == address
    assert ask(address, "words 2").json()["system_fingerprint"] == "stand-in/1"
    with contextlib.closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    second.process.send_signal(signal.SIGTERM)
    assert second.process.wait(60) == 0


@pytest.mark.slow
def test_sigterm_finishes_what_began_and_takes_nothing_new(program, registry, tmp_path):
    registry("Streams")
    server = program("--port", 0, "--drain", 60, "--concurrent", 8)
    address = server.wait()
    with ThreadPoolExecutor(16) as pool:
        callers = [pool.submit(ask, address, "slow 100", stream=number % 2 == 0) for number in range(16)]
        wait_for(lambda: "slm_requests_waiting 8.0" in get(f"{address}/metrics").text)
        server.process.send_signal(signal.SIGTERM)

        def refused():
            with contextlib.suppress(httpx.ConnectError):
                ask(address, "words 1")
                return False
            return True

        wait_for(refused, "the refusal of new requests")
        server.process.send_signal(signal.SIGTERM)  # whoever is impatient changes nothing
        for number, caller in enumerate(callers):
            answer = caller.result()
            assert answer.status_code == 200 and answer.text.count("word ") == 100
            assert number % 2 or answer.text.endswith("data: [DONE]\n\n")
    assert server.process.wait(60) == 0
    assert server.said().splitlines()[-1].startswith("Serving stand-in") and not list(tmp_path.glob("openai-server-*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Streams", "Plain"])
def test_a_short_drain_ends_answers_with_an_error_even_of_a_model_that_does_not_end(kind, program, registry):
    registry(kind)
    server = program("--port", 0, "--drain", 1, "--concurrent", 4)
    address = server.wait()
    with ThreadPoolExecutor(4) as pool:
        texts = ["slow 5000", "slow 5000", "sleep 600", "sleep 600"]
        callers = [pool.submit(ask, address, text, stream=number % 2 == 0) for number, text in enumerate(texts)]
        wait_for(lambda: "slm_requests_running 4.0" in get(f"{address}/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        for number, caller in enumerate(callers):
            answer = caller.result()
            last = answer.text.strip().rpartition("data: ")[2]
            assert json.loads(last)["error"]["code"] == "closed", answer.text[-300:]
            assert answer.status_code == (200 if (kind, number) == ("Streams", 0) else 503)
    assert "Traceback" not in server.said()


@pytest.mark.slow
@pytest.mark.parametrize("name, code", [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_while_the_model_loads(name, code, program, registry):
    registry("Thinks")
    server = program("--port", 0)
    wait_for(lambda: "thinking" in server.said(), "the model's first thought", 120)
    server.process.send_signal(getattr(signal, name))
    assert server.process.wait(60) == code
    assert "Traceback" not in server.said()


@pytest.mark.slow
def test_a_client_of_a_loading_server_is_told_to_come_again(program, registry):
    registry("Thinks")
    server = program("--port", 0)
    process = psutil.Process(server.process.pid)
    wait_for(lambda: any(place.status == "LISTEN" for place in process.net_connections()), "the listener", 120)
    port = next(place.laddr.port for place in process.net_connections() if place.status == "LISTEN")
    answer = ask(f"http://127.0.0.1:{port}", "words 1")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "loading"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(raw(b"{}", "Connection: close"))
        assert b" 400 " in read_all(connection)[:20]
    assert get(f"http://127.0.0.1:{port}/health").status_code == 200
    assert get(f"http://127.0.0.1:{port}/ready").status_code == 503
