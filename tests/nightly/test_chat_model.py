"""Long attacks on the chat model: many callers, many conversations, prompts of any length, a fork; and the real model.

Run: python -m helpers test tests/nightly/test_chat_model.py
"""

import json
import os
import queue
import random
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from mlflow.exceptions import MlflowException
from support import ROOT
from support.chat import ask, contents, load_chat, mixed_requests, user
from support.chat_requests import OTHER_FIELDS, REQUESTS, check_answer_or_refusal, check_stream
from support.conversations import WAYS, Together, settle, stats_of, talk, wait_for
from transformers import AutoTokenizer

from serving.chat_model import ChatRequest, Engine, Row, Sampler, TextWriter


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


@pytest.mark.parametrize("way", ["greedy", "seeded"])
def test_who_goes_back_in_a_conversation_gets_the_same_answers(fresh, cold, way):
    fields = WAYS[way]
    held = talk(cold, **fields)
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


def run(engine, prompts, seeds=(None, 5)):
    """Return the tokens that an engine writes to prompts that start together, for each way to choose them."""
    answers = []
    tokenizer = SimpleNamespace(decode=lambda tokens: "".join(chr(0x4E00 + token) for token in tokens))
    for seed in seeds:
        request = None if seed is None else ChatRequest(messages=user("x"), temperature=1.0, seed=seed)
        started = [Row(prompt, 12, TextWriter(tokenizer, []), request and Sampler(request, 0), queue.SimpleQueue(),
                       False) for prompt in prompts]
        engine._scheduler = Together(engine.context_length)
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


def test_of_many_conversations_the_last_few_are_kept_within_one_context(tiny):
    for most, length, left in ((2, 200, 2), (4, 200, 4), (4, 2500, 1), (0, 200, 0)):
        model = load_chat(tiny.onnx_dir, kept_conversations=most)
        for number in range(5):
            ask(model, {"messages": user(f"{number}" * length), "max_tokens": 2})
            assert stats_of(model)["cache_tokens"] <= 4096
        assert model.stats()["kept_conversations"] == len(model._engine._kept.all) == left
        model.close()


# --- any request ----------------------------------------------------------------------------


@given(REQUESTS)
@settings(max_examples=80)
def test_any_request_within_the_contract_is_answered_by_it(chat, request_values):
    check_stream(chat, request_values)


@given(REQUESTS, OTHER_FIELDS)
@settings(max_examples=250)
def test_any_other_request_is_answered_by_the_contract_or_refused_by_it(chat, request_values, fields):
    check_answer_or_refusal(chat, request_values | fields)


# --- after a fork ---------------------------------------------------------------------------

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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_it_answers_after_a_fork(tiny, python):
    result = python("-c", FORK, tiny.onnx_dir, PYTHONPATH=str(ROOT / "tests"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "same"


# --- the real model -------------------------------------------------------------------------


def test_usage_counts_what_the_tokenizer_counts(real_chat, smol):
    tokenizer = AutoTokenizer.from_pretrained(smol.transformers_dir)
    messages = [*user("Name a fruit."), {"role": "assistant", "content": "Apple."}, *user("And another one?")]
    (completion,) = real_chat.predict(None, {"messages": messages, "max_tokens": 12})
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert completion["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt))
    assert completion["usage"]["completion_tokens"] == len(tokenizer.encode(contents(completion)[0]))


def test_the_finish_reason_is_true_at_the_last_allowed_token(real_chat):
    messages = [{"role": "system", "content": "Answer in one short sentence."}, *user("What is the capital of Spain?")]
    (whole,) = real_chat.predict(None, {"messages": messages, "max_tokens": 64})
    tokens = whole["usage"]["completion_tokens"]
    assert contents(whole) == ["The capital of Spain is Madrid."]
    for extra, reason in ((-1, "length"), (0, "length"), (1, "stop"), (2, "stop")):  # the end token is one more
        (completion,) = real_chat.predict(None, {"messages": messages, "max_tokens": tokens + extra})
        assert completion["choices"][0]["finish_reason"] == reason
        assert completion["usage"]["completion_tokens"] == min(tokens, tokens + extra)
    # The last allowed token may also be the one that ends a stop string.
    (completion,) = real_chat.predict(None, {"messages": messages, "max_tokens": tokens, "stop": ["."]})
    assert contents(completion) == ["The capital of Spain is Madrid"]
    assert completion["choices"][0]["finish_reason"] == "stop"


def test_an_answer_is_the_same_alone_and_in_company(real_chat):
    requests = mixed_requests()[:8]
    random.Random(1).shuffle(requests)
    together = [completion["choices"] for completion in real_chat.predict(None, requests)]
    assert together == [ask(real_chat, one) for one in requests]
    assert len({json.dumps(choices) for choices in together}) > 2
