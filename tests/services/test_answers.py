"""What is answered: on a toy model against the engine itself, alone and with others, whole and in chunks.

Run: python -m helpers test tests/services/test_answers.py
"""

import json
import random

import numpy as np
import onnxruntime_genai as og
import pandas as pd
import pytest
from hypothesis import given, settings
from mlflow.exceptions import MlflowException
from support.chat import (
    AS_SHOWN,
    ASKED,
    HABITS,
    SECRET,
    contents,
    deltas,
    load_chat,
    mixed_requests,
    user,
)
from support.chat_requests import OTHER_FIELDS, REQUESTS, check_answer_or_refusal, check_stream
from transformers import PreTrainedTokenizerFast

from serving.chat import ChatRequest


@pytest.fixture(scope="module")
def reference(tiny):
    """Return the engine's own greedy answer to a message, in the fewest calls."""
    engine = og.Model(str(tiny.onnx_dir))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.transformers_dir)

    def answer(messages, max_tokens):
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        options = og.GeneratorParams(engine)
        options.set_search_options(max_length=len(tokens) + max_tokens, do_sample=False)
        generator = og.Generator(engine, options)
        generator.append_tokens(np.array(tokens, dtype=np.int32))
        new = []
        while not generator.is_done():
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        ended = new[-1] in (0, 1, 3)  # of genai_config.json
        usage = {
            "prompt_tokens": len(tokens),
            "completion_tokens": len(new) - ended,
            "total_tokens": len(tokens) + len(new) - ended,
        }
        return tokenizer.decode(new, skip_special_tokens=True), usage, "stop" if ended else "length"

    return answer


@pytest.fixture
def steps(chat, monkeypatch):
    """Return the number of rows in each step, as they are made."""
    made, decoder = [], chat._loaded.engine._decoder
    step = decoder.step
    monkeypatch.setattr(
        decoder,
        "step",
        lambda tokens, lengths: (made.append(len(tokens)), step(tokens, lengths))[1],
    )
    return made


def ask(model, request):
    (completion,) = model.predict(None, request)
    return completion


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40])
def test_a_greedy_answer_is_the_engines_own(chat, reference, max_tokens):
    for text in ASKED:
        messages = [{"role": "system", "content": "Be brief."}, *user(text)]
        completion = ask(chat, {"messages": messages, "max_tokens": max_tokens})
        expected, usage, reason = reference(messages, max_tokens)
        assert contents(completion) == [expected]
        assert completion["usage"] == usage
        assert completion["choices"][0]["finish_reason"] == reason


def test_a_stop_string_may_span_tokens_and_is_not_shown(chat):
    request = {"messages": user("The sky is"), "max_tokens": 40}
    (text,) = contents(ask(chat, request))
    assert len(text) > 20
    for start in (1, 5, 14):
        for size in (1, 2, 5):
            stop = text[start : start + size]
            completion = ask(chat, request | {"stop": [stop, "never in there"]})
            assert contents(completion) == [text[: text.find(stop)]]
            assert completion["choices"][0]["finish_reason"] == "stop"
            streamed = deltas(chat.predict_stream(None, request | {"stop": stop}))
            assert "".join(piece for piece, _ in streamed) == text[: text.find(stop)]


def test_max_tokens_and_temperature_default_to_the_models_own(tiny, chat):
    completion = ask(chat, AS_SHOWN)
    assert completion["usage"]["completion_tokens"] == 16
    warm = load_chat(tiny.onnx_dir, temperature=2.0, max_tokens=30)
    assert len({contents(ask(warm, AS_SHOWN))[0] for _ in range(4)}) > 1
    assert (
        ask(warm, AS_SHOWN | {"temperature": 0, "max_tokens": 16})["choices"]
        == completion["choices"]
    )
    warm.close()
    # A model's own number gives way to its limit, and a request's to none.
    short = load_chat(tiny.onnx_dir, max_tokens=30, max_tokens_limit=10)
    assert ask(short, AS_SHOWN)["usage"]["completion_tokens"] == 10
    with pytest.raises(
        MlflowException,
        match="max_tokens has to be a whole number from 1 to 10 after these messages",
    ):
        ask(short, AS_SHOWN | {"max_tokens": 11})
    short.close()


# --- rows beside others ---------------------------------------------------------------------


def test_an_answer_is_the_same_alone_and_with_others(chat, steps):
    requests = mixed_requests()
    random.Random(1).shuffle(requests)
    together = [completion["choices"] for completion in chat.predict(None, requests)]
    assert max(steps) > 8
    alone = [ask(chat, one)["choices"] for one in requests]
    assert together == alone
    assert len({json.dumps(choices) for choices in together}) > 6


def test_a_row_has_its_own_parameters_and_a_gap_is_the_default(chat):
    table = pd.DataFrame(
        [
            {"messages": user("x"), "max_tokens": 3},
            {"messages": user("x"), "temperature": 0.5, "seed": 1},
            {"messages": user("x"), "stop": ["a"], "n": 2, "top_k": 7},
            {"messages": user("x")},
        ]
    )
    assert table["max_tokens"].dtype == float  # pandas: a number with gaps is a float
    answers = chat.predict(None, table)
    assert answers[0]["usage"]["completion_tokens"] == 3
    assert [len(row["choices"]) for row in answers] == [1, 1, 2, 1]
    assert answers[3]["choices"] == ask(chat, {"messages": user("x")})["choices"]


def test_n_answers_differ_and_a_seed_repeats_them(chat):
    request = {"messages": user("The sky is"), "n": 3, "temperature": 1.0}
    one, two = (ask(chat, request | {"seed": 7}) for _ in range(2))
    other = ask(chat, request | {"seed": 8})
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2]
    assert len(set(contents(one))) == 3
    assert one["choices"] == two["choices"] != other["choices"]
    assert (
        len({contents(ask(chat, {"messages": user("x"), "temperature": 2}))[0] for _ in range(5)})
        > 1
    )
    assert one["usage"]["completion_tokens"] > 16


def test_top_k_1_and_a_small_top_p_take_the_likeliest(chat):
    greedy = ask(chat, AS_SHOWN)["choices"]
    for field in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}):
        assert ask(chat, AS_SHOWN | {"temperature": 1.0} | field)["choices"] == greedy


def test_penalties_act_at_temperature_0_too(chat):
    request = AS_SHOWN | {"max_tokens": 40}
    fields = [
        {},
        *(
            {name: value}
            for name in ("frequency_penalty", "presence_penalty")
            for value in (-2.0, 2.0)
        ),
    ]
    answers = [contents(ask(chat, request | more))[0] for more in fields]
    assert len(set(answers)) > 3
    assert answers[0] not in answers[1:]


def test_max_completion_tokens_is_max_tokens_by_its_new_name(chat):
    for size in (1, 5, 40):
        expected = ask(chat, AS_SHOWN | {"max_tokens": size})["choices"]
        for fields in (
            {"max_completion_tokens": size},
            {"max_completion_tokens": size, "max_tokens": size},
        ):
            assert ask(chat, AS_SHOWN | fields)["choices"] == expected


def test_what_clients_send_by_habit_changes_no_answer(chat, as_shown):
    assert (
        ask(chat, AS_SHOWN | {name: harmless[-1] for name, _, harmless, _ in HABITS})["choices"]
        == as_shown
    )
    assert ask(chat, AS_SHOWN | {"response_format": {"type": "text"}})["choices"] == as_shown


@pytest.mark.parametrize("length", [128, 129, 257, 700])
def test_a_prompt_that_is_read_in_pieces_gets_the_same_answer(chat, reference, length):
    # Around the edges of a piece, the last one would be of one token.
    def tokens(messages):
        return len(chat._loaded._encoder.encode(ChatRequest(messages=messages).messages, 4096))

    messages = next(one for size in range(length) if tokens(one := user("1" * size)) == length)
    completion = ask(chat, {"messages": messages, "max_tokens": 8})
    assert completion["usage"]["prompt_tokens"] == length
    assert contents(completion) == [reference(messages, 8)[0]]


def test_a_prompt_may_fill_the_context_to_the_last_token(chat):
    messages = user("a b" * 1250)
    completion = ask(chat, {"messages": messages, "max_tokens": 1})
    left = 4096 - completion["usage"]["prompt_tokens"]
    assert 0 < left < 500
    assert (
        ask(chat, {"messages": messages, "max_tokens": left})["usage"]["completion_tokens"] <= left
    )
    with pytest.raises(
        MlflowException, match=f"max_tokens has to be a whole number from 1 to {left} after"
    ):
        ask(chat, {"messages": messages, "max_tokens": left + 1})


# --- streams --------------------------------------------------------------------------------


def test_a_stream_says_what_predict_says(chat):
    for request in mixed_requests()[:8]:
        pieces = deltas(chat.predict_stream(None, request), request.get("n", 1))
        for index, content in enumerate(contents(ask(chat, request))):
            assert "".join(text for text, place in pieces if place == index) == content


def test_a_stream_comes_token_by_token_and_counts_if_asked(chat):
    request = {"messages": user("The sky is"), "max_tokens": 20, "stream": True}
    assert len(deltas(chat.predict_stream(None, request))) > 10
    *chunks, last = chat.predict_stream(None, request | {"stream_options": {"include_usage": True}})
    assert last["choices"] == []
    assert last["usage"] == ask(chat, request | {"stream": False})["usage"]
    assert not any("usage" in chunk for chunk in chunks)
    assert {chunk["model"] for chunk in (*chunks, last)} == {"toy"}
    assert all(
        "usage" not in chunk
        for chunk in chat.predict_stream(
            None, request | {"stream_options": {"include_usage": False}}
        )
    )


def test_a_stream_takes_one_conversation_as_a_dict_a_list_or_a_table(chat):
    expected = deltas(chat.predict_stream(None, AS_SHOWN))
    for one in ([AS_SHOWN], pd.DataFrame([AS_SHOWN])):
        assert deltas(chat.predict_stream(None, one)) == expected
    for none_or_two in ([], [AS_SHOWN] * 2, pd.DataFrame([AS_SHOWN] * 2)):
        with pytest.raises(
            MlflowException, match=r"^A stream answers exactly one conversation\.$"
        ) as refusal:
            chat.predict_stream(None, none_or_two)
        assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"


# --- what a model refuses after reading -----------------------------------------------------

STREAM = "stream has to be true, for predict_stream alone, false or left out."
WORD = f"{SECRET} "


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"messages": user(WORD * 200_000)},
            "messages has to be short enough for the model's context of 4096 tokens.",
        ),
        (
            {"messages": user(WORD * 3_000)},
            "messages has to be fewer than 4096 tokens, the model's context.",
        ),
        (
            {"max_tokens": 2049},
            "max_tokens has to be a whole number from 1 to 2048 after these messages.",
        ),
        (
            {"max_tokens": 10**30},
            "max_tokens has to be a whole number from 1 to 2048 after these messages.",
        ),
        ({"stream": True}, STREAM),
        (
            {"stream_options": {"include_usage": False}},
            "stream_options has to be left out where the answer comes whole.",
        ),
        ({"temperature": 3}, "temperature has to be a number from 0 to 2."),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_row_is_named_and_no_row_runs(chat, as_shown, steps, fields, says):
    bad = {"messages": user(SECRET)} | fields
    for request, prefix in (
        (bad, ""),
        ([bad], ""),
        ([bad, AS_SHOWN], "Row 0: "),
        ([AS_SHOWN] * 2 + [bad], "Row 2: "),
        (pd.DataFrame([AS_SHOWN, bad]), "Row 1: "),
    ):
        with pytest.raises(MlflowException) as refusal:
            chat.predict(None, request)
        assert refusal.value.message == prefix + says
        assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
        assert (
            refusal.value.message
            == f"{prefix}{refusal.value.field} has to be {refusal.value.allowed}."
        )
        assert refusal.value.code == (
            "context_length_exceeded" if "context" in says else "invalid_value"
        )
    if "stream" not in says:  # each of these is right for a stream
        with pytest.raises(MlflowException) as refusal:
            chat.predict_stream(None, bad)  # before its first chunk is asked for
        assert refusal.value.message == says
    assert steps == []
    assert ask(chat, AS_SHOWN)["choices"] == as_shown


@pytest.mark.parametrize("limit", ["max_rows", "max_waiting"])
def test_a_call_that_asks_for_too_many_answers_is_refused(tiny, limit):
    small = load_chat(tiny.onnx_dir, **{limit: 3})
    for request in (
        {"messages": user(SECRET), "n": 4},
        [AS_SHOWN] * 4,
        [AS_SHOWN | {"n": 2}] * 2,
        [{"messages": SECRET}] * 4,
    ):
        with pytest.raises(MlflowException) as refusal:
            small.predict(None, request)
        assert refusal.value.message == "This call asks for 4 answers, and one call may ask for 3."
        assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
    assert len(small.predict(None, [AS_SHOWN] * 3)) == 3
    assert len(ask(small, AS_SHOWN | {"n": 3})["choices"]) == 3
    assert small.predict(None, []) == []
    small.close()


@given(REQUESTS)
@settings(max_examples=12)
def test_any_request_within_the_contract_is_answered_by_it(chat, request_values):
    check_stream(chat, request_values)


@given(REQUESTS, OTHER_FIELDS)
@settings(max_examples=40)
def test_any_other_request_is_answered_by_the_contract_or_refused_by_it(
    chat, request_values, fields
):
    check_answer_or_refusal(chat, request_values | fields)
