"""Many callers on one engine: they share batches, wait in turn, go away, and lose nothing when something breaks.

Run: python -m helpers test tests/unit/serving/test_engine.py
"""

import json
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import onnxruntime_genai as og
import pytest
from mlflow.exceptions import MlflowException
from support.chat import AS_SHOWN, ASKED, LONG, SECRET, ask, contents, load_chat, mixed_requests, user
from support.conversations import TURNS, WAYS, Together, engine_threads, settle, stats_of, talk, wait_for

from serving import chat_model
from serving.chat_model import (
    GPU_BUILDS,
    Batch,
    Engine,
    Row,
    Scheduler,
    TextWriter,
)


class Gate:
    """Lets a batch make its steps while it is open, and knows which batches made one."""

    def __init__(self):
        self.open = threading.Event()
        self.reached = threading.Event()
        self.steps = []
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


# --- many callers ---------------------------------------------------------------------------


def test_callers_on_many_threads_share_batches_and_get_the_answers_that_they_would_get_alone(fresh, gate):
    requests = mixed_requests()
    expected = [ask(fresh, one) for one in requests]
    gate.steps.clear()
    before = set(engine_threads())
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda one: ask(fresh, one), requests))
    assert together == expected
    assert set(engine_threads()) == before  # one thread for all of them
    assert len({id(batch) for batch in gate.steps}) < len(requests)


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


def test_a_stream_that_nobody_reads_along_waits_for_company(fresh, gate):
    stream = fresh.predict_stream(None, {"messages": user("x")} | LONG | {"stream": False})
    chunks = [next(stream) for _ in range(3)]
    (row,) = gate.steps[0].rows
    assert not row.urgent
    assert row.finish_reason is None  # its chunks come all the same, so that it can be ended
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    stream.close()
    assert row.ended


def test_who_goes_away_costs_nothing_more(fresh, gate):
    for _ in range(9):  # more than may run side by side without patience
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


# --- conversations that are kept --------------------------------------------------------------


@pytest.mark.parametrize("way", ["greedy", "seeded", "n"])
def test_a_conversation_gets_the_same_answers_whether_its_prompts_are_kept_or_not(fresh, cold, way):
    assert talk(fresh, **WAYS[way]) == talk(cold, **WAYS[way])
    stats = stats_of(fresh)
    if way != "n":  # rows side by side read their prompts anew
        assert stats["reused_prompt_tokens"] > stats["prompt_tokens"] / 3
        assert stats["kept_conversations"] == 1  # each turn takes the place of the one before
    assert stats_of(cold)["reused_prompt_tokens"] == cold.stats()["kept_conversations"] == 0


def test_prompts_that_differ_in_one_token_get_their_own_answers(fresh, cold):
    text = "abcdefghij" * 30
    for place in (1, 150, 299):
        for letter in "xy":
            request = {"messages": user(text[:place] + letter + text[place + 1:]), "max_tokens": 12}
            assert ask(fresh, request) == ask(cold, request)
    assert stats_of(fresh)["reused_prompt_tokens"] > 0


def test_an_engine_that_is_closed_keeps_nothing(fresh):
    talk(fresh, turns=TURNS[:2])
    assert stats_of(fresh)["kept_conversations"] == 1
    assert fresh.stats()["cache_tokens"] > 0
    fresh.close()
    assert fresh._engine._kept.all == []
    assert (fresh.stats()["kept_conversations"], fresh.stats()["cache_tokens"]) == (0, 0)


def fails(monkeypatch, times):
    """Let the next generators fail, as they do where memory is short; return what is left of them."""
    left, generator = [RuntimeError("no memory")] * times, og.Generator

    def make(*arguments):
        if left:
            raise left.pop()
        return generator(*arguments)

    monkeypatch.setattr(og, "Generator", make)
    return left


@pytest.mark.parametrize("times", [1, 2])
def test_where_memory_is_short_what_is_kept_is_given_up_first(fresh, as_shown, monkeypatch, caplog, times):
    talk(fresh, turns=TURNS[:2])
    assert stats_of(fresh)["kept_conversations"] == 1
    left = fails(monkeypatch, times)
    if times == 1:
        assert ask(fresh, AS_SHOWN) == as_shown
        assert "failed" not in caplog.text
    else:  # and then there is nothing to give up
        with pytest.raises(MlflowException, match=r"^The engine failed on this request\.$"):
            fresh.predict(None, AS_SHOWN)
        assert stats_of(fresh)["kept_conversations"] == 0
        assert "no memory" in caplog.text
    assert left == []
    settle(fresh._engine)
    assert fresh._engine._kept.all == []  # the answer that came is too short to be kept
    assert ask(fresh, AS_SHOWN) == as_shown


def test_where_memory_is_short_a_running_answer_goes_on(fresh, cold, gate, monkeypatch):
    talk(fresh, turns=TURNS[:2])
    request = {"messages": user("x"), "max_tokens": 300}
    stream = fresh.predict_stream(None, request)
    text = "".join(choice["delta"].get("content", "") for _ in range(3) for choice in next(stream)["choices"])
    fails(monkeypatch, 1)
    assert ask(fresh, AS_SHOWN) == ask(cold, AS_SHOWN)
    text += "".join(choice["delta"].get("content", "") for chunk in stream for choice in chunk["choices"])
    assert [text] == contents(cold.predict(None, request)[0])


def test_nothing_is_kept_of_a_batch_that_failed(fresh, cold, monkeypatch):
    held = talk(fresh, turns=TURNS[:3])
    again, step = {"messages": held[-1][0], "max_tokens": 24}, Batch.step
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", lambda batch: step(batch) if not batch.rows[0].tokens else 1 / 0)
        with pytest.raises(MlflowException, match="The engine failed"):
            fresh.predict(None, again)
    assert stats_of(fresh)["kept_conversations"] == 0  # it went on with the one that was
    assert ask(fresh, again) == ask(cold, again)
    assert stats_of(fresh)["kept_conversations"] == 1


def test_a_batch_that_fails_at_work_leaves_what_is_kept_alone(fresh, monkeypatch):
    talk(fresh, turns=TURNS[:2])
    settle(fresh._engine)
    step, failed = Batch.step, []

    def fail(batch):
        if batch.rows[0].tokens == 2:
            failed.append(batch)
            raise RuntimeError
        step(batch)

    monkeypatch.setattr(Batch, "step", fail)
    with pytest.raises(MlflowException, match="The engine failed"):
        fresh.predict(None, {"messages": user("x"), "max_tokens": 9, "frequency_penalty": -2.0})
    assert len(failed) == 1  # it is not tried again
    assert stats_of(fresh)["kept_conversations"] == 1


def test_what_a_waiting_row_would_reuse_is_looked_up_when_something_is_kept(fresh, gate):
    held = talk(fresh, turns=[*TURNS[:2], "a text " * 60])
    gate.open.clear()
    gate.reached.clear()
    seen = []

    class Alone(Scheduler):
        def next(self, waiting, running, now):
            if running:
                return []
            seen.extend(row.kept for row in waiting)
            return super().next(waiting, running, now)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, fresh, {"messages": held[-1][0], "max_tokens": 4})
        assert gate.reached.wait(60)  # the kept conversation is handed out
        second = pool.submit(ask, fresh, {"messages": held[-1][0], "max_tokens": 4})
        while not fresh.stats()["waiting"]:
            time.sleep(0.001)
        fresh._engine._scheduler = Alone(4096, 4096)
        gate.open.set()
        assert first.result() == second.result()
    length = len(gate.steps[-1].rows[0].prompt)
    assert seen == [length]
    assert gate.steps[-1].rows[0].reused == length - 2


def test_a_prompt_that_begins_in_another_way_reuses_nothing(fresh, cold):
    talk(fresh, "a secret", turns=TURNS[:3])
    reused = stats_of(fresh)["reused_prompt_tokens"]
    request = {"messages": user("abcdefghij" * 30), "max_tokens": 8}
    assert ask(fresh, request) == ask(cold, request)
    assert stats_of(fresh)["reused_prompt_tokens"] == reused
    assert fresh.stats()["kept_conversations"] == 2


# --- what it counts ---------------------------------------------------------------------------


def test_stats_count_what_waits_runs_and_was_done(engine, gate):
    def stats():
        found = engine.stats()
        assert before <= found.pop("since") <= time.time()
        return found

    before = engine._since
    nothing = {"waiting": 0, "running": 0, "answers": 0, "prompt_tokens": 0, "reused_prompt_tokens": 0,
               "completion_tokens": 0, "cache_tokens": 0, "kept_conversations": 0}
    assert stats() == nothing
    assert time.time() - 60 < before <= time.time()
    gate.open.clear()
    first, *later = rows(3)
    engine.submit([first])
    assert gate.reached.wait(60)
    running = {"running": 1, "prompt_tokens": 3, "cache_tokens": 3 + 4}
    assert stats() == nothing | running
    engine.submit(later)
    assert stats() == nothing | running | {"waiting": 2}
    later[0].end()  # whoever went away waits no more
    assert stats() == nothing | running | {"waiting": 1}
    gate.open.set()
    for row in (first, later[1]):
        wait_for(row)
    settle(engine)
    assert stats() == nothing | {"answers": 2, "prompt_tokens": 6, "completion_tokens": 8}
    engine.close()
    assert stats() == nothing | {"answers": 2, "prompt_tokens": 6, "completion_tokens": 8}


def test_a_row_that_has_ended_runs_no_more_though_its_batch_does(engine, gate):
    gate.open.clear()
    (gone,) = rows(1)
    engine.submit([gone])
    assert gate.reached.wait(60)
    gone.end()
    stats = engine.stats()
    assert (stats["running"], stats["answers"], stats["cache_tokens"]) == (0, 1, 7)


def test_stats_of_a_conversation_tell_what_it_did_not_read_again(fresh):
    held = talk(fresh, turns=[*TURNS[:2], "x"], max_tokens=10)
    stats = stats_of(fresh)
    tokens = [len(fresh._encoder.encode(chat_model.read_request({"messages": messages}).messages, 4096))
              for messages, _ in held]
    (kept,) = fresh._engine._kept.all
    assert len(kept.prompt) == tokens[-1]
    assert stats["answers"] == 3
    assert stats["prompt_tokens"] == sum(tokens)
    assert stats["completion_tokens"] <= 30
    assert stats["reused_prompt_tokens"] == tokens[0] + tokens[1]  # each prompt begins with the one before
    assert stats["cache_tokens"] == kept.room
    assert (stats["waiting"], stats["running"], stats["kept_conversations"]) == (0, 0, 1)


def test_who_goes_away_is_counted_with_what_was_written(fresh):
    stream = fresh.predict_stream(None, {"messages": user("x")} | LONG)
    for _ in range(4):
        next(stream)
    assert fresh.stats()["running"] == 1
    stream.close()
    stats = stats_of(fresh)
    assert (stats["running"], stats["answers"]) == (0, 1)
    assert 3 <= stats["completion_tokens"] < 2000


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
    ({}, chat_model._cores(), ["cleared"]),  # of what a folder asks for, too
    ({"threads": 3}, 3, ["cleared"]),
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
        {"model": {"type": "llama", "decoder": {"session_options": {"intra_op_num_threads": threads}}},
         "search": {"chunk_size": 0}}]
    assert chosen == providers
    assert set(model._engine.config.end_tokens) == {0, 1, 3}
    model.close()


@pytest.mark.parametrize(("logical", "physical", "cores"), [
    (8, 4, 4),  # two threads on each core
    (8, 8, 8), (1, 1, 1),
    (2, 8, 2),  # an affinity or a container's quota leaves fewer
    (8, None, 8), (1, None, 1),  # some boards and containers tell no physical cores
    (3, 0, 3),
])
def test_an_engine_takes_one_thread_for_each_core_that_it_may_use(monkeypatch, logical, physical, cores):
    def count(logical):
        assert not logical
        return physical

    monkeypatch.setattr(chat_model, "joblib", SimpleNamespace(cpu_count=lambda: logical))
    monkeypatch.setattr(chat_model, "psutil", SimpleNamespace(cpu_count=count))
    assert chat_model._cores() == cores


def test_an_engine_may_have_one_end_token(tmp_path, monkeypatch):
    config = {"context_length": 50, "eos_token_id": 7, "pad_token_id": 8, "vocab_size": 9,
              "decoder": {"filename": "model.onnx"}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": config}))
    (tmp_path / "model.onnx").write_bytes(b"a graph without a switch")
    monkeypatch.setattr(Engine, "_load", lambda engine: None)
    engine = Engine(tmp_path, 4)
    assert (engine.context_length, engine.config.end_tokens, engine.config.pad) == (50, (7,), 8)
    assert engine._scheduler == Scheduler(50, 50)
    assert engine._kept.most == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_process_keeps_nothing_of_its_parents_engine_running(fresh, as_shown):
    assert ask(fresh, AS_SHOWN) == as_shown
    talk(fresh, turns=TURNS[:1])
    engine = fresh._engine
    settle(engine)
    assert engine._kept.all
    child = os.fork()
    if not child:  # no more than a look: the test's own process goes on in it
        anew = (engine._thread, engine._model, engine._waiting, engine._kept.all, engine._closed) == (
            None, None, [], [], False)
        os._exit(0 if anew and chat_model._models_of_parents else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert engine._model is not None
    assert engine._kept.all
    assert ask(fresh, AS_SHOWN) == as_shown
