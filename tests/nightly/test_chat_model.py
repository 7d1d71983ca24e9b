"""Long attacks on the chat model: many callers, many conversations, prompts of any length; and the real model.

Run: python -m helpers test tests/nightly/test_chat_model.py
"""

import json
import queue
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from mlflow.exceptions import MlflowException
from support.chat import ask, contents, load_chat, mixed_requests, user
from support.chat_requests import OTHER_FIELDS, REQUESTS, check_answer_or_refusal, check_stream
from support.conversations import WAYS, read_whole, stats_of, talk, wait_for
from transformers import AutoTokenizer

from serving.chat.contract import ChatRequest
from serving.chat.engine import Engine, Row
from serving.chat.folder import read_config
from serving.chat.sampler import Sampler
from serving.chat.text import TextWriter


def test_200_requests_of_32_threads_with_cancellations_change_no_answer(chat):
    requests = mixed_requests()
    expected = [ask(chat, one) for one in requests]
    chance = random.Random(2)
    jobs = [
        (chance.randrange(len(requests)), chance.choice(["predict", "stream", "leave", "bad"]))
        for _ in range(200)
    ]

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


def test_conversations_beside_others_get_the_answers_that_they_get_alone_without_reuse(fresh, cold):
    jobs = [
        (f"{number}. " * (1 + 5 * number), WAYS[way])
        for number in range(4)
        for way in ("greedy", "seeded")
    ]
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
    assert 0 < stats["kept_conversations"] <= 16
    assert stats["cache_tokens"] <= 2 * 4096


@pytest.mark.parametrize("way", ["greedy", "seeded"])
def test_who_goes_back_in_a_conversation_gets_the_same_answers(fresh, cold, way):
    fields = WAYS[way]
    held = talk(cold, **fields)
    (*before, last), _ = held[-1]

    def edited(text):
        return [*before, last | {"content": text}]

    requests = [
        held[-1][0],
        held[-1][0],
        edited("The end."),
        edited("The end, or not? " * 4),
        edited(""),
        edited("The end. " * 60),
        held[3][0],
        held[3][0],
        held[-1][0],
        held[4][0],
        held[0][0],
        held[1][0],
        held[-1][0],
        [before[0] | {"content": "You are wordy. " * 8}, *before[1:], last],
        held[-1][0],
    ]
    reused = 0
    for number, messages in enumerate(requests):
        # The same once more, another draw, a short answer, and one that needs more room than was
        # kept.
        for more in (
            {},
            {"seed": number},
            {"max_tokens": 1},
            {"max_tokens": 600 if number % 5 == 0 else 30},
        ):
            request = {"messages": messages} | fields | more
            assert ask(fresh, request) == ask(cold, request)
        before, reused = reused, stats_of(fresh)["reused_prompt_tokens"]
        assert reused > before


def run(engine, prompts, seeds=(None, 5)):
    """Return the texts that an engine writes to prompts that come together, for each way to choose tokens."""
    answers = []
    tokenizer = SimpleNamespace(
        decode=lambda tokens: "".join(chr(0x4E00 + token) for token in tokens)
    )
    for seed in seeds:
        request = (
            None if seed is None else ChatRequest(messages=user("x"), temperature=1.0, seed=seed)
        )
        rows = [
            Row(
                prompt,
                12,
                TextWriter(tokenizer, []),
                request and Sampler(request, 0),
                queue.SimpleQueue(),
                False,
            )
            for prompt in prompts
        ]
        engine.submit(rows)
        for row in rows:
            wait_for(row)
            assert row.error is None
        answers.append([row.text for row in rows])
    return answers


@pytest.fixture(scope="module")
def engines(tiny):
    """Return an engine that reads each prompt whole, and one that shares what it has read."""
    pair = [Engine(read_config(tiny.onnx_dir), 40) for _ in range(2)]
    read_whole(pair[0])
    yield pair
    for engine in pair:
        engine.close()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 64, 127, 128, 129, 130, 256, 257, 258, 385, 386])
def test_a_prompt_of_any_length_gets_the_same_answer_alone_beside_others_and_as_a_continuation(
    engines, length
):
    plain, sharing = engines
    prompt = np.random.default_rng(length).integers(4, 512, length).tolist()
    alone = run(plain, [prompt])
    assert run(sharing, [prompt]) == alone
    assert run(sharing, [prompt]) == alone  # the same prompt again
    other = np.random.default_rng(1000).integers(4, 512, 400).tolist()
    for others in (
        [prompt],
        [other[:5]],
        [other[:length]],
        [other[: length + 1]],
        [other[:129]],
        [other, other[:50], [9]],
    ):
        expected = [run(plain, [one]) for one in others]
        for way, texts in enumerate(run(plain, [prompt, *others])):
            assert texts == [*alone[way], *(one[way][0] for one in expected)]
    for cut in {*range(length - 3, length), 1, length // 2, 127, 128, 129, 130}:
        if 8 <= cut < length - 1:
            for beginning in (prompt[:cut], [*prompt[:cut], *other[: cut // 2]]):
                run(sharing, [beginning], seeds=(None,))
                assert run(sharing, [prompt]) == alone, cut


def test_ten_thousand_rows_leave_memory_as_it_was(tiny):
    with closing(load_chat(tiny.onnx_dir)) as model:
        process = psutil.Process()

        def ask_many(first):
            for start in range(first, first + 2500, 250):
                model.predict(
                    None,
                    [
                        {
                            "messages": user(f"{number} " * (number % 40)),
                            "max_tokens": 1 + number % 4,
                        }
                        for number in range(start, start + 250)
                    ],
                )
            return process.memory_info().rss

        before = ask_many(0)
        after = [ask_many(start) for start in (2500, 5000, 7500)][-1]
        assert stats_of(model)["answers"] == 10_000
        assert after < before + 20e6


# --- any request ----------------------------------------------------------------------------


@given(REQUESTS)
@settings(max_examples=80)
def test_any_request_within_the_contract_is_answered_by_it(chat, request_values):
    check_stream(chat, request_values)


@given(REQUESTS, OTHER_FIELDS)
@settings(max_examples=250)
def test_any_other_request_is_answered_by_the_contract_or_refused_by_it(
    chat, request_values, fields
):
    check_answer_or_refusal(chat, request_values | fields)


# --- the real model -------------------------------------------------------------------------


def test_usage_counts_what_the_tokenizer_counts(real_chat, smol):
    tokenizer = AutoTokenizer.from_pretrained(smol.transformers_dir)
    messages = [
        *user("Name a fruit."),
        {"role": "assistant", "content": "Apple."},
        *user("And another one?"),
    ]
    (completion,) = real_chat.predict(None, {"messages": messages, "max_tokens": 12})
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert completion["usage"]["prompt_tokens"] == len(tokenizer.encode(prompt))
    assert completion["usage"]["completion_tokens"] == len(
        tokenizer.encode(contents(completion)[0])
    )


def test_the_finish_reason_is_true_at_the_last_allowed_token(real_chat):
    messages = [
        {"role": "system", "content": "Answer in one short sentence."},
        *user("What is the capital of Spain?"),
    ]
    (whole,) = real_chat.predict(None, {"messages": messages, "max_tokens": 64})
    tokens = whole["usage"]["completion_tokens"]
    assert contents(whole) == ["The capital of Spain is Madrid."]
    # The end token is one more.
    for extra, reason in ((-1, "length"), (0, "length"), (1, "stop"), (2, "stop")):
        (completion,) = real_chat.predict(
            None, {"messages": messages, "max_tokens": tokens + extra}
        )
        assert completion["choices"][0]["finish_reason"] == reason
        assert completion["usage"]["completion_tokens"] == min(tokens, tokens + extra)
    # The last allowed token may also be the one that ends a stop string.
    (completion,) = real_chat.predict(
        None, {"messages": messages, "max_tokens": tokens, "stop": ["."]}
    )
    assert contents(completion) == ["The capital of Spain is Madrid"]
    assert completion["choices"][0]["finish_reason"] == "stop"


def test_an_answer_is_the_same_alone_and_with_others(real_chat):
    requests = mixed_requests()[:8]
    random.Random(1).shuffle(requests)
    together = [completion["choices"] for completion in real_chat.predict(None, requests)]
    assert together == [ask(real_chat, one) for one in requests]
    assert len({json.dumps(choices) for choices in together}) > 2
