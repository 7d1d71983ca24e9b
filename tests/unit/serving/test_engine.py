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

import mlflow
import numpy as np
import onnxruntime_genai as og
import pytest
from mlflow.exceptions import MlflowException
from support import ROOT
from support.chat import AS_SHOWN, ASKED, LONG, SECRET, contents, load_chat, mixed_requests, user

from serving import chat_model
from serving.chat_model import (
    GPU_BUILDS,
    Batch,
    ChatRequest,
    Engine,
    Row,
    Sampler,
    Scheduler,
    TextWriter,
)


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


def settle(engine):
    """Wait until an engine has nothing to do: its caller has the answer a moment before the engine has put it away."""
    deadline = time.monotonic() + 60
    while not engine._changed._waiters:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stats_of(model):
    """Return what an idle model has counted."""
    settle(model._engine)
    return model.stats()


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

TURNS = ["The sky is", "And at night?", "A longer one. " * 9, "x", "日本語 🙂 " * 5, "The end, or not? " * 4]
WAYS = {"greedy": {"max_tokens": 24}, "seeded": {"max_tokens": 24, "temperature": 1.0, "seed": 7},
        "n": {"max_tokens": 12, "temperature": 0.8, "seed": 3, "n": 2, "top_p": 0.9},
        "penalties": {"max_tokens": 24, "frequency_penalty": 0.5, "presence_penalty": 0.3}}


def talk(model, opening="", turns=TURNS, **fields):
    """Hold a conversation; return each turn's messages and choices."""
    messages, held = [{"role": "system", "content": f"You are brief. {opening}" * 4}], []
    for text in turns:
        messages = [*messages, *user(text)]
        choices = ask(model, {"messages": messages} | fields)
        held.append((messages, choices))
        # What a model of noise writes is no text that a client would send back.
        answer = "".join(letter for letter in choices[0]["message"]["content"] if letter.isprintable())
        messages = [*messages, {"role": "assistant", "content": answer}]
    return held


@pytest.fixture(scope="module")
def cold(tiny):
    """Return a model that keeps nothing: its answers are what the others' have to be."""
    model = load_chat(tiny.onnx_dir, kept_conversations=0)
    yield model
    model.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_conversation_gets_the_same_answers_whether_its_prompts_are_kept_or_not(fresh, cold, way):
    assert talk(fresh, **WAYS[way]) == talk(cold, **WAYS[way])
    stats = stats_of(fresh)
    if way != "n":  # rows side by side read their prompts anew
        assert stats["reused_prompt_tokens"] > stats["prompt_tokens"] / 3
        assert stats["kept_conversations"] == 1  # each turn takes the place of the one before
    assert stats_of(cold)["reused_prompt_tokens"] == cold.stats()["kept_conversations"] == 0


@pytest.mark.slow
def test_conversations_in_company_get_the_answers_that_they_get_alone_without_reuse(fresh, cold):
    jobs = [(f"{number}. " * (1 + 5 * number), WAYS[way]) for number in range(4) for way in ("greedy", "seeded")]
    alone = [talk(cold, opening, **fields) for opening, fields in jobs]
    others = mixed_requests()
    expected = [ask(cold, one) for one in others]
    with ThreadPoolExecutor(10) as pool:
        talks = [pool.submit(talk, fresh, opening, **fields) for opening, fields in jobs]
        beside = list(pool.map(lambda one: ask(fresh, one), others))
        together = [future.result() for future in talks]
    assert beside == expected
    assert together == alone
    # And once more one after the other: what is kept by now came from all of them.
    assert [talk(fresh, opening, **fields) for opening, fields in jobs[:3]] == alone[:3]
    stats = stats_of(fresh)
    assert stats["reused_prompt_tokens"] > 0
    assert 0 < stats["kept_conversations"] <= 4
    assert stats["cache_tokens"] <= 4096  # nothing runs: this is what is kept


@pytest.mark.slow
@pytest.mark.parametrize("way", ["greedy", "seeded"])
def test_who_goes_back_in_a_conversation_gets_the_same_answers(fresh, cold, way):
    held, fields = talk(cold, **WAYS[way]), WAYS[way]
    (*before, last), _ = held[-1]

    def edited(text):
        return [*before, last | {"content": text}]

    requests = [
        held[-1][0], held[-1][0], edited("The end."), edited("The end, or not? " * 4), edited(""),
        edited("The end. " * 60),
        held[3][0], held[3][0], held[-1][0], held[4][0], held[0][0], held[1][0], held[-1][0],
        [before[0] | {"content": "You are wordy. " * 8}, *before[1:], last], held[-1][0]]
    reused = 0
    for number, messages in enumerate(requests):
        # The same once more, another draw, a short answer, and one that needs more room than was kept.
        for more in ({}, {"seed": number}, {"max_tokens": 1}, {"max_tokens": 600 if number % 5 == 0 else 30}):
            request = {"messages": messages} | fields | more
            assert ask(fresh, request) == ask(cold, request)
        before, reused = reused, stats_of(fresh)["reused_prompt_tokens"]
        assert reused > before


def test_prompts_that_differ_in_one_token_get_their_own_answers(fresh, cold):
    text = "abcdefghij" * 30
    for place in (0, 1, 40, 150, 298, 299):
        for letter in "xyz":
            request = {"messages": user(text[:place] + letter + text[place + 1:]), "max_tokens": 12}
            assert ask(fresh, request) == ask(cold, request)
    assert stats_of(fresh)["reused_prompt_tokens"] > 0


class Side(Scheduler):
    """Starts as one batch whatever waits, once there are ``size`` rows."""

    size = 1

    def linger_time(self, waiting, last_size):
        return 60.0 if len(waiting) < self.size else 0.0

    def next(self, waiting, running, now):
        return list(waiting)


def run(engine, prompts, seeds=(None, 5)):
    """Return the tokens that an engine writes to prompts that start together, for each way to choose them."""
    answers = []
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(chr(0x4E00 + token) for token in tokens))
    for seed in seeds:
        request = None if seed is None else ChatRequest(messages=user("x"), temperature=1.0, seed=seed)
        started = [Row(prompt, 12, TextWriter(tokenizer, []), request and Sampler(request, 0), queue.SimpleQueue(),
                       False) for prompt in prompts]
        engine._scheduler = Side(engine.context_length)
        object.__setattr__(engine._scheduler, "size", len(prompts))
        engine.submit(started)
        for row in started:
            wait_for(row)
            assert row.error is None
        answers.append([row.text for row in started])
    return answers


@pytest.fixture(scope="module")
def engines(tiny):
    """Return an engine that keeps nothing, and one that keeps conversations."""
    pair = [Engine(tiny.onnx_dir, 40), Engine(tiny.onnx_dir, 40, kept_conversations=4)]
    yield pair
    for engine in pair:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 31, 32, 64, 127, 128, 129, 130, 256, 257, 258, 385, 386])
def test_a_prompt_of_any_length_gets_the_same_answer_alone_in_a_batch_and_as_a_continuation(engines, length):
    plain, keeping = engines
    prompt = np.random.default_rng(length).integers(4, 512, length).tolist()
    alone = run(plain, [prompt])
    assert run(keeping, [prompt]) == alone
    assert run(keeping, [prompt]) == alone  # the same prompt again
    other = np.random.default_rng(1000).integers(4, 512, 400).tolist()
    for company in ([prompt], [other[:5]], [other[:length]], [other[:length + 1]], [other[:129]],
                    [other, other[:50], [9]]):
        expected = [run(plain, [one]) for one in company]
        for way, texts in enumerate(run(plain, [prompt, *company])):
            assert texts == [*alone[way], *(one[way][0] for one in expected)]
    for cut in {*range(length - 3, length), 1, length // 2, 127, 128, 129, 130}:
        if 32 <= cut < length:
            for beginning in (prompt[:cut], [*prompt[:cut], *other[:cut // 2]]):
                settle(keeping)
                keeping._kept.all = []
                run(keeping, [beginning], seeds=(None,))
                settle(keeping)
                assert keeping._kept.find(prompt)[0] == cut
                assert run(keeping, [prompt]) == alone, cut


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


@pytest.mark.slow
def test_of_many_conversations_the_last_few_are_kept_within_one_context(tiny):
    for most, length, left in ((2, 200, 2), (4, 200, 4), (4, 2500, 1), (0, 200, 0)):
        model = load_chat(tiny.onnx_dir, kept_conversations=most)
        for number in range(5):
            ask(model, {"messages": user(f"{number}" * length), "max_tokens": 2})
            assert stats_of(model)["cache_tokens"] <= 4096
        assert model.stats()["kept_conversations"] == len(model._engine._kept.all) == left
        model.close()


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


# --- what it tells MLflow's tracing -------------------------------------------------------------


@pytest.fixture
def traced(store, monkeypatch):
    """Let MLflow keep traces in a store of this test's own, in no experiment of another one."""
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    yield
    mlflow.set_tracking_uri(before)


def children(span):
    """Return the spans below one, of a trace that has ended."""
    trace = mlflow.get_trace(span.trace_id, flush=True)
    return sorted((one for one in trace.data.spans if one.parent_id == span.span_id), key=lambda one: one.start_time_ns)


def own(span):
    return {name: value for name, value in span.attributes.items() if not name.startswith("mlflow.")}


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_under_a_span_each_row_tells_what_it_spent_its_time_on(fresh, traced, stream):
    request = {"messages": user(SECRET * 20), "max_tokens": 6, "temperature": 1.0, "seed": 2}
    started = time.time_ns()
    with mlflow.start_span("caller") as caller:
        if stream:
            *_, last = fresh.predict_stream(None, request | {"stream_options": {"include_usage": True}})
        else:
            (last,) = fresh.predict(None, request)
    ended = time.time_ns()
    spans = children(caller)
    assert [span.name for span in spans] == ["read", "wait", "prefill", "decode"]
    prompt, completion = last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]
    assert [own(span) for span in spans] == [
        {}, {}, {"prompt_tokens": prompt, "reused_prompt_tokens": 0},
        {"completion_tokens": completion, "finish_reason": "length" if completion == 6 else "stop"}]
    # One begins where the other ends.
    times = [started, *(span.start_time_ns for span in spans), spans[-1].end_time_ns, ended]
    assert times == sorted(times)
    assert [span.end_time_ns for span in spans[:-1]] == [span.start_time_ns for span in spans[1:]]
    assert all(span.inputs is None and span.outputs is None for span in spans)
    text = json.dumps([span.to_dict() for span in spans])
    assert SECRET not in text
    assert request["messages"][0]["role"] not in text.replace("user_id", "")


@pytest.mark.slow
def test_each_row_of_a_call_has_its_spans_and_a_continuation_says_what_it_reused(fresh, traced):
    held = talk(fresh, turns=TURNS[:2])
    with mlflow.start_span("caller") as caller:
        fresh.predict(None, {"messages": held[-1][0], "max_tokens": 3})
    reused = children(caller)[2].attributes["reused_prompt_tokens"]
    assert reused == children(caller)[2].attributes["prompt_tokens"] - 2
    with mlflow.start_span("caller") as caller:
        fresh.predict(None, [AS_SHOWN | {"n": 2, "max_tokens": 3}, {"messages": user("y"), "max_tokens": 4}])
    names = [span.name for span in children(caller)]
    assert sorted(names) == sorted(["read", "wait", "prefill", "decode"] * 3)


@pytest.mark.slow
def test_a_row_that_is_left_or_refused_has_spans_that_end(fresh, traced):
    with mlflow.start_span("caller") as caller:
        stream = fresh.predict_stream(None, {"messages": user("x")} | LONG)
        next(stream)
        stream.close()
    spans = children(caller)
    assert [span.name for span in spans] == ["read", "wait", "prefill", "decode"]
    assert own(spans[-1])["finish_reason"] is None
    fresh.close()
    with mlflow.start_span("caller") as caller, pytest.raises(MlflowException, match="This model is closed"):
        fresh.predict(None, AS_SHOWN)
    assert sorted(span.name for span in children(caller)) == ["decode", "prefill", "read", "wait"]
    with mlflow.start_span("caller") as caller, pytest.raises(MlflowException, match="temperature"):
        fresh.predict(None, AS_SHOWN | {"temperature": 3})  # refused before there is a row
    assert children(caller) == []


def test_without_a_callers_span_none_is_made(fresh, traced, monkeypatch):
    made = []
    monkeypatch.setattr(mlflow, "start_span_no_context", lambda *arguments, **named: made.append(arguments))
    ask(fresh, AS_SHOWN)
    list(fresh.predict_stream(None, AS_SHOWN))
    with mlflow.start_span("before"):
        pass
    ask(fresh, AS_SHOWN)
    assert made == []


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


FORK = """
import gc, multiprocessing, sys, threading, warnings
warnings.simplefilter("ignore")
from support.chat import load_chat
from mlflow.exceptions import MlflowException
from pathlib import Path
model, idle = (load_chat(Path(sys.argv[1]), threads=2) for _ in range(2))  # one is asked in the child alone
request = {"messages": [{"role": "user", "content": "The sky is " * 20}], "max_tokens": 8}
ask = lambda model: model.predict(None, request)[0]["choices"][0]["message"]["content"]
def child(results, grandchild):
    global idle
    assert ask(idle) == expected[0]
    # What the parent kept is not here: it was the parent's memory.
    assert model.stats()["kept_conversations"] == 0
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
while not model.stats()["kept_conversations"]:
    pass
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
