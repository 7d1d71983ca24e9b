"""Many callers on one engine: they share batches, wait in turn, go away, and lose nothing when something breaks."""

import gc
import json
import os
import queue
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import onnxruntime_genai as og
import pytest
from mlflow.exceptions import MlflowException
from support import ROOT
from support.chat import AS_SHOWN, ASKED, LONG, SECRET, contents, load_chat, mixed_requests, user

from serving import chat_model
from serving.chat_model import GPU_BUILDS, Batch, Engine, Row, Scheduler, TextWriter


def ask(model, request):
    return model.predict(None, request)[0]["choices"]


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "chat-model-engine"]


class Gate:
    """Lets a batch make its steps while it is open, and knows which batches made one."""

    def __init__(self):
        self.open, self.reached, self.steps = threading.Event(), threading.Event(), []
        self.open.set()


@pytest.fixture
def gate(monkeypatch):
    """Return a gate before each step of every batch."""
    gate, step = Gate(), Batch.step

    def wait(batch):
        gate.steps.append(batch)
        gate.reached.set()
        assert gate.open.wait(60)
        step(batch)

    monkeypatch.setattr(Batch, "step", wait)
    yield gate
    gate.open.set()


def rows(count, stream=False, max_tokens=4):
    """Return rows for an engine itself, which need no text."""
    tokenizer = SimpleNamespace(decode=lambda tokens: "x" * len(tokens))
    return [Row([5, 6, 7], max_tokens, TextWriter(tokenizer, []), None, queue.SimpleQueue(), stream)
            for _ in range(count)]


@pytest.fixture
def engine(tiny):
    engine = Engine(tiny.onnx_dir, max_waiting=40)
    yield engine
    engine.close()


def wait_for(row):
    while row.events.get(timeout=60)[1] is not None:
        pass


# --- many callers ---------------------------------------------------------------------------


@pytest.mark.slow
def test_callers_on_many_threads_share_batches_and_get_the_answers_that_they_would_get_alone(fresh, gate):
    requests = mixed_requests() * 2
    expected = [ask(fresh, one) for one in requests]
    gate.steps.clear()
    before = set(engine_threads())
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: ask(fresh, one), requests))
    assert together == expected
    assert set(engine_threads()) == before  # one thread for all of them
    assert len({id(batch) for batch in gate.steps}) < len(requests)


@pytest.mark.slow
def test_200_requests_of_32_threads_with_cancellations_change_no_answer(chat):
    requests = mixed_requests()
    expected = [ask(chat, one) for one in requests]
    chance = random.Random(2)
    jobs = [(chance.randrange(len(requests)), chance.choice(["predict", "stream", "leave", "bad"])) for _ in range(200)]

    def work(job):
        number, kind = job
        if kind == "predict":
            return ask(chat, requests[number]) == expected[number]
        if kind == "bad":
            with pytest.raises(MlflowException):
                ask(chat, requests[number] | {"max_tokens": 0})
            return True
        stream = chat.predict_stream(None, requests[number] | {"max_tokens": 40})
        if kind == "leave":
            for _ in range(number % 5):
                next(stream)
            stream.close()
            return True
        return len(list(stream)) > 1

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(work, jobs))
    assert [ask(chat, one) for one in requests] == expected


class Together(Scheduler):
    """Waits for two rows, and starts them as one batch."""

    def linger_time(self, waiting, last_size):
        return 60.0 if len(waiting) < 2 else 0.0

    def next(self, waiting, running, now):
        return list(waiting)


def test_an_answer_comes_when_it_is_there_and_not_when_its_batch_ends(fresh, gate):
    fresh._engine._scheduler = Together(fresh._engine.context_length)
    with ThreadPoolExecutor(2) as pool:
        short, long = (pool.submit(ask, fresh, {"messages": user("x")} | LONG | {"max_tokens": size})
                       for size in (2, 2000))
        assert short.result()
        assert len({id(batch) for batch in gate.steps}) == 1  # both were in it
        assert not long.done()
        fresh.close()
        with pytest.raises(MlflowException, match="closed before it had answered"):
            long.result()


def test_a_stream_joins_long_answers_at_work(fresh, gate):
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(fresh.predict, None, [{"messages": user(text)} | LONG for text in ASKED])
        assert gate.reached.wait(60)
        assert len(list(fresh.predict_stream(None, {"messages": user("x"), "max_tokens": 4}))) > 2
        assert not long.done()
        fresh.close()
        with pytest.raises(MlflowException, match="closed before it had answered"):
            long.result()


def test_a_caller_beside_one_stream_does_not_wait_for_its_end(fresh, gate):
    stream = fresh.predict_stream(None, {"messages": user("x")} | LONG)
    next(stream)
    fresh.predict(None, {"messages": user("y"), "max_tokens": 2})
    (row,) = gate.steps[0].rows
    assert row.stream
    assert row.finish_reason is None  # it is still at work
    stream.close()


def test_who_goes_away_costs_nothing_more(fresh, gate):
    for _ in range(6):  # more than may run side by side without patience
        stream = fresh.predict_stream(None, {"messages": user("x")} | LONG)
        next(stream)
        stream.close()
    # Nor does an answer that met its stop string.
    (text,) = contents(fresh.predict(None, {"messages": user("x"), "max_tokens": 5})[0])
    fresh.predict(None, {"messages": user("x"), "max_tokens": 2000, "stop": text[1:3]})
    gone = {id(batch) for batch in gate.steps}
    before = len(gate.steps)
    assert before < 500  # of 14,000
    ask(fresh, AS_SHOWN)
    # At the most they were in the middle of a step.
    assert len([batch for batch in gate.steps[before:] if id(batch) in gone]) <= len(gone)
    assert len(gate.steps) - before > 16


def test_who_went_away_while_waiting_is_never_run(engine, gate):
    gate.open.clear()
    running, gone, here = rows(3)
    engine.submit([running])
    assert gate.reached.wait(60)
    engine.submit([gone])
    gone.end()
    engine.submit([here])
    gate.open.set()
    wait_for(here)
    assert not any(gone in batch.rows for batch in gate.steps)
    assert (gone.tokens, here.tokens) == (0, 4)


# --- the queue ------------------------------------------------------------------------------


def test_the_caller_over_the_cap_gets_an_error_at_once_and_nothing_of_it_is_queued(engine, gate):
    gate.open.clear()
    (first,) = rows(1)
    engine.submit([first])
    assert gate.reached.wait(60)  # it runs; whoever comes now waits
    waiting, more = rows(39), rows(2)
    engine.submit(waiting)
    with pytest.raises(MlflowException) as refusal:
        engine.submit(more)
    assert refusal.value.message == "The model is busy: 39 answers wait, and 40 may. Try again later."
    assert refusal.value.error_code == "RESOURCE_EXHAUSTED"
    engine.submit(more[:1])  # one more may
    with pytest.raises(MlflowException, match="The model is busy: 40 answers wait, and 40 may"):
        engine.submit(more[1:])
    waiting[0].end()  # whoever goes away leaves a place
    engine.submit(more[1:])
    gate.open.set()
    for row in (first, *waiting, *more):
        wait_for(row)
    assert [row.tokens for row in (first, *waiting[1:], *more)] == [4] * 41


def test_rows_get_their_turns_from_the_scheduler(engine, gate):
    gate.open.clear()
    engine.submit(rows(1))
    assert gate.reached.wait(60)
    call, (stream,) = rows(34), rows(1, stream=True)
    start = time.monotonic()
    engine.submit(call)
    engine.submit([stream])
    end = time.monotonic()
    assert start <= call[0].due == call[15].due <= end
    assert [call[place].due - call[0].due for place in (16, 31, 32)] == pytest.approx([3, 3, 6])
    assert start - 3 <= stream.due <= end - 3


def test_the_engine_tells_the_scheduler_what_waits_and_runs_and_starts_what_it_says(engine, gate, monkeypatch):
    lingered, asked = [], []

    class Seen(Scheduler):
        def linger_time(self, waiting, last_size):
            lingered.append((len(waiting), last_size))
            return super().linger_time(waiting, last_size)

        def next(self, waiting, running, now):
            found = super().next(waiting, running, now)
            asked.append(([*waiting], [*running], now, found))
            return found

    engine._scheduler = Seen(engine.context_length)
    call, late = rows(3), rows(1)
    start = time.monotonic()
    engine.submit(call)
    for row in call:
        wait_for(row)
    engine.submit(late)
    wait_for(late[0])
    end = time.monotonic()
    assert lingered[0] == (3, 1)
    assert (1, 3) in lingered  # three answered together may come again together
    waiting, running, now, found = asked[0]
    assert (set(waiting), running, set(found)) == (set(call), [], set(call))
    assert start <= now <= end
    assert set(gate.steps[0].rows) == set(call)
    waiting, running, now, found = asked[1]
    assert (waiting, [set(batch.rows) for batch in running], found) == ([], [set(call)], [])
    assert [found for *_, found in asked if found][1] == late


def test_a_newcomer_makes_an_idle_engine_wait_anew(engine, gate):
    class Patient(Scheduler):
        def linger_time(self, waiting, last_size):
            arrived.release()
            return 60.0 if len(waiting) < 3 else 0.0

    arrived = threading.Semaphore(0)
    engine._scheduler = Patient(engine.context_length)
    together = rows(3)
    for row in together:
        engine.submit([row])
        assert arrived.acquire(timeout=60)
    for row in together:
        wait_for(row)
    assert {len(batch.rows) for batch in gate.steps} == {3}


def test_of_64_callers_at_once_each_is_answered_or_told_that_the_model_is_busy(tiny, as_shown):
    small = load_chat(tiny.onnx_dir, max_rows=3, max_waiting=3)

    def work(number):
        try:
            return small.predict(None, {"messages": user(f"{SECRET} {number}"), "max_tokens": 100})[0]["object"]
        except MlflowException as error:
            assert SECRET not in error.message
            return error.error_code

    with ThreadPoolExecutor(32) as pool:
        outcomes = list(pool.map(work, range(64)))
    assert set(outcomes) == {"chat.completion", "RESOURCE_EXHAUSTED"}
    assert ask(small, AS_SHOWN) == as_shown
    small.close()


# --- what breaks ----------------------------------------------------------------------------


def test_a_batch_that_fails_takes_nobody_else_along(fresh, as_shown, gate, monkeypatch, caplog):
    step = Batch.step

    def fail(batch):
        if any(row.max_tokens == 13 for row in batch.rows):
            raise RuntimeError(f"{chat_model.__file__} {SECRET}")
        step(batch)

    monkeypatch.setattr(Batch, "step", fail)
    stream = fresh.predict_stream(None, AS_SHOWN | LONG)
    next(stream)
    (beside,) = gate.steps[0].rows
    with pytest.raises(MlflowException) as refusal:
        fresh.predict(None, {"messages": user(SECRET), "max_tokens": 13})
    assert not beside.ended
    assert refusal.value.message == "The engine failed on this request."
    assert refusal.value.error_code == "INTERNAL_ERROR"
    assert SECRET in caplog.text  # whoever runs the model can read why
    assert "A batch of 1 rows failed." in caplog.text
    stream.close()
    assert ask(fresh, AS_SHOWN) == as_shown


def test_where_the_engines_own_thread_fails_its_callers_are_told(fresh, monkeypatch, caplog):
    def fail(scheduler, waiting, running, now):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Scheduler, "next", fail)
    with pytest.raises(MlflowException, match=r"^The model was closed before it had answered\.$") as refusal:
        fresh.predict(None, AS_SHOWN)
    assert refusal.value.error_code == "INVALID_STATE"
    assert "The engine ended." in caplog.text
    with pytest.raises(MlflowException, match=r"^This model is closed\. Load it again\.$"):
        fresh.predict(None, AS_SHOWN)


def test_where_the_system_has_no_thread_left_the_caller_is_told(fresh, as_shown, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(MlflowException) as refusal:
            fresh.predict(None, AS_SHOWN)
    assert refusal.value.message == "The system has no thread left for the model. Try again later."
    assert refusal.value.error_code == "RESOURCE_EXHAUSTED"
    assert ask(fresh, AS_SHOWN) == as_shown


# --- life -----------------------------------------------------------------------------------


def test_a_closed_engine_ends_its_thread_and_every_answer_with_an_error(engine, gate):
    others = set(engine_threads())
    running, waiting, late = rows(3)
    gate.open.clear()
    engine.submit([running])
    assert gate.reached.wait(60)
    engine.submit([waiting])
    assert len(set(engine_threads()) - others) == 1
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        time.sleep(0.001)
    gate.open.set()
    closing.join()
    assert set(engine_threads()) <= others
    for row in (running, waiting):
        wait_for(row)
        assert row.error.message == "The model was closed before it had answered."
        assert row.error.error_code == "INVALID_STATE"
    with pytest.raises(MlflowException, match=r"^This model is closed\. Load it again\.$"):
        engine.submit([late])
    engine.close()  # twice is no harm
    with pytest.raises(MlflowException, match=r"^The model was closed before it had answered\.$"):
        engine.check(os.getpid())


def test_closing_a_model_ends_its_stream_with_an_error(fresh):
    stream = fresh.predict_stream(None, {"messages": user("x")} | LONG)
    next(stream)
    fresh.close()
    with pytest.raises(MlflowException, match=r"^The model was closed before it had answered\.$"):
        list(stream)
    fresh.close()


def test_a_model_closed_before_its_first_answer_is_closed(fresh):
    fresh.close()
    with pytest.raises(MlflowException, match=r"^This model is closed\. Load it again\.$"):
        fresh.predict(None, AS_SHOWN)


def test_an_answer_of_the_parent_process_is_not_waited_for(fresh):
    fresh._engine.check(os.getpid())
    with pytest.raises(MlflowException, match=r"^This answer is the parent process's\. Ask again\.$"):
        fresh._engine.check(os.getpid() + 1)


def test_a_forgotten_model_ends_its_thread(tiny, monkeypatch):
    running = set(engine_threads())
    model = load_chat(tiny.onnx_dir)
    ask(model, AS_SHOWN)
    assert len(set(engine_threads()) - running) == 1
    # Not even a failed answer holds on to its model.
    monkeypatch.setattr(Batch, "step", None)
    with pytest.raises(MlflowException, match="The engine failed"):
        model.predict(None, AS_SHOWN)
    engine = weakref.ref(model._engine)
    del model
    gc.collect()
    assert engine() is None or engine()._closed
    assert set(engine_threads()) <= running


def test_a_model_that_is_loaded_again_closes_its_first_engine(fresh, tiny, as_shown):
    first = fresh._engine
    fresh.load_context(SimpleNamespace(artifacts={"model": str(tiny.onnx_dir)}, model_config={"max_tokens": 16}))
    assert first._closed
    assert ask(fresh, AS_SHOWN) == as_shown


def test_the_providers_are_the_engines_builds():
    assert list(GPU_BUILDS) == ["cuda", "dml"]
    assert GPU_BUILDS["cuda"] == ("onnxruntime-genai-cuda", og.is_cuda_available)
    assert GPU_BUILDS["dml"] == ("onnxruntime-genai-directml", og.is_dml_available)


@pytest.mark.parametrize(("provider", "package"), [
    ("cuda", "onnxruntime-genai-cuda"), ("dml", "onnxruntime-genai-directml")])
def test_a_provider_that_is_not_installed_is_refused_at_load(tiny, monkeypatch, provider, package):
    monkeypatch.setitem(GPU_BUILDS, provider, (package, lambda: False))
    with pytest.raises(MlflowException) as refusal:
        load_chat(tiny.onnx_dir, provider=provider)
    assert refusal.value.message == (
        f"The provider is {provider}, and the onnxruntime-genai that is installed runs without it. "
        f"Install {package} in its place, or load with the provider cpu.")


@pytest.mark.parametrize(("settings", "threads", "providers"), [
    ({}, chat_model._cores(), []),
    ({"threads": 3}, 3, []),
    ({"threads": 1, "provider": "cuda"}, 1, ["cleared", "cuda"]),
    ({"provider": "dml"}, chat_model._cores(), ["cleared", "dml"]),
])
def test_threads_and_provider_reach_the_engine(tiny, monkeypatch, settings, threads, providers):
    overlays, chosen = [], []

    class Config:
        def __init__(self, folder):
            assert folder == str(tiny.onnx_dir)

        def overlay(self, text):
            overlays.append(text)

        def clear_providers(self):
            chosen.append("cleared")

        def append_provider(self, name):
            chosen.append(name)

    monkeypatch.setattr(og, "Config", Config)
    monkeypatch.setattr(og, "Model", lambda config: config)
    monkeypatch.setitem(GPU_BUILDS, "cuda", ("a package", lambda: True))
    monkeypatch.setitem(GPU_BUILDS, "dml", ("a package", lambda: True))
    model = load_chat(tiny.onnx_dir, **settings)
    assert [json.loads(text) for text in overlays] == [
        {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}]
    assert chosen == providers
    assert model._engine._end_tokens == {0, 1, 3}
    model.close()


def test_an_engine_may_have_one_end_token(tmp_path, monkeypatch):
    config = {"context_length": 50, "eos_token_id": 7, "pad_token_id": 8}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": config}))
    monkeypatch.setattr(Engine, "_load", lambda engine: None)
    engine = Engine(tmp_path, 4)
    assert (engine.context_length, engine._end_tokens, engine._pad) == (50, {7}, 8)
    assert engine._scheduler == Scheduler(50)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_process_keeps_nothing_of_its_parents_engine_running(fresh, as_shown):
    assert ask(fresh, AS_SHOWN) == as_shown
    engine = fresh._engine
    child = os.fork()
    if not child:  # no more than a look: the test's own process goes on in it
        anew = (engine._thread, engine._model, engine._waiting, engine._closed) == (None, None, [], False)
        os._exit(0 if anew and chat_model._models_of_parents else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert engine._model is not None
    assert ask(fresh, AS_SHOWN) == as_shown


FORK = """
import gc, multiprocessing, sys, threading, warnings
warnings.simplefilter("ignore")
from support.chat import load_chat
from mlflow.exceptions import MlflowException
from pathlib import Path
model, idle = (load_chat(Path(sys.argv[1]), threads=2) for _ in range(2))  # one is asked in the child alone
request = {"messages": [{"role": "user", "content": "The sky is"}], "max_tokens": 8}
ask = lambda model: model.predict(None, request)[0]["choices"][0]["message"]["content"]
def child(results, grandchild):
    global idle
    assert ask(idle) == expected[0]
    if not grandchild:
        idle.close()
        del idle
        gc.collect()
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(model))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if grandchild:
        again = context.Process(target=child, args=(results, False))
        again.start()
        again.join(60)
    try:
        list(stream)
        results.put("the parent's stream went on")
    except MlflowException:
        results.put(answers)
context = multiprocessing.get_context("fork")
results = context.Queue()
# A stream is open in the parent while it forks.
stream = model.predict_stream(None, request | {"max_tokens": 2000, "frequency_penalty": -2.0})
next(stream)
expected = [ask(model)] * 4
process = context.Process(target=child, args=(results, True))
process.start()
found = [results.get(timeout=120) for _ in range(2)]
process.join(60)
assert process.exitcode == 0, process.exitcode
assert found == [expected] * 2, found
assert len(list(stream)) > 1
assert ask(model) == expected[0]
print("same")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_it_answers_after_a_fork(tiny, python):
    result = python("-c", FORK, tiny.onnx_dir, PYTHONPATH=str(ROOT / "tests"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same"
