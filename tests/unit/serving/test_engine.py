"""Many callers on one engine: answers begin and end at any step, share prompts, wait in order, and survive faults.

The model is a stand-in whose tokens follow from all that its slot holds, so that each mistake with
a slot is a wrong answer. `test_decoder.py` has the ONNX model.

Run: python -m helpers test tests/unit/serving/test_engine.py
"""

import itertools
import os
import queue
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from support.conversations import settle, wait_for
from support.decoder import StandInDecoder, answer

from serving.chat import engine as engine_module
from serving.chat.contract import Refusal
from serving.chat.engine import Engine, Row, count_cores, count_shared, end_piece
from serving.chat.folder import Config
from serving.chat.text import TextWriter

CONFIG = Config(
    Path("model.onnx"),
    context_length=256,
    end_tokens=(0, 1),
    vocab_size=97,
    head_size=16,
    layers=2,
    names={},
)
PIECE = 32  # twice the head size


class Letters:
    """A tokenizer whose tokens are characters by their number."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def row(prompt=(5, 6, 7), max_tokens=10, stop=(), stream=False, sampler=None, cache_key=None):
    writer = TextWriter(Letters(), list(stop))
    return Row(list(prompt), max_tokens, writer, sampler, queue.SimpleQueue(), stream, cache_key)


def events(one):
    """Return the texts that a row's caller was given, None for its end."""
    texts = []
    while not one.events.empty():
        owner, text = one.events.get()
        assert owner is one
        texts.append(text)
    return texts


@pytest.fixture
def start(monkeypatch, request):
    """Return a function that starts an engine on a stand-in decoder."""

    def start(**settings):
        monkeypatch.setattr(engine_module, "Decoder", StandInDecoder)
        engine = Engine(CONFIG, **{"max_waiting": 512} | settings)
        decoder = engine._decoder

        def stop():
            decoder.go()
            engine.close()

        request.addfinalizer(stop)
        return engine, decoder

    return start


def prompt_of(size, seed=0, same=0):
    """Return a prompt; the first ``same`` tokens are those of every other one."""
    chance = random.Random(seed)
    differs = [95 - seed % 50] if size > same else []  # the common ones go on with tokens below 42
    return (
        [2 + place % 40 for place in range(same)]
        + differs
        + [chance.randrange(2, 97) for _ in range(size - same - 1)]
    )


def submit_and_hold(engine, decoder, rows, calls=0):
    """Submit rows to an idle engine, and return when it stands before the next call, after so many."""
    decoder.hold(calls)
    engine.submit(rows)
    assert decoder.reached.wait(60)


def check(*rows):
    """Wait for rows, and see that each has the answer that it would get alone."""
    for one in rows:
        wait_for(one)
        assert one.error is None
        assert [ord(letter) for letter in one.text] == answer(one.prompt, one.max_tokens)


# --- a row ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "fields", "text", "count", "reason", "streamed"),
    [
        (
            "ab\0",
            {},
            "ab",
            2,
            "stop",
            ["a", "b", "", None],
        ),  # an end token is no token of the answer
        ("ab\1", {}, "ab", 2, "stop", ["a", "b", "", None]),
        ("\0", {}, "", 0, "stop", ["", None]),
        ("abc", {"max_tokens": 3}, "abc", 3, "length", ["a", "b", "c", "", None]),
        ("ab\0", {"max_tokens": 3}, "ab", 2, "stop", ["a", "b", "", None]),
        ("a", {"max_tokens": 1}, "a", 1, "length", ["a", "", None]),
        ("abcd", {"stop": ["cd"]}, "ab", 4, "stop", ["a", "b", "", "", None]),
        # Also at the last one.
        ("abcd", {"stop": ["cd"], "max_tokens": 4}, "ab", 4, "stop", ["a", "b", "", "", None]),
        # What was held back.
        ("abc", {"stop": ["cd"], "max_tokens": 3}, "abc", 3, "length", ["a", "b", "", "c", None]),
        ("abc\0", {"stop": ["cd"]}, "abc", 3, "stop", ["a", "b", "", "c", None]),
        # Only its end makes the answer's last character certain, and this the stop string.
        (
            "ab\ufffd",
            {"stop": ["b\ufffd"], "max_tokens": 3},
            "a",
            3,
            "stop",
            ["a", "", "", "", None],
        ),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a_row_ends_where_its_answer_does(tokens, fields, text, count, reason, streamed, stream):
    one = row(stream=stream, **fields)
    for place, token in enumerate(tokens):
        assert not one.ended
        assert one.finish_reason is None
        one.take(ord(token), CONFIG.end_tokens)
        assert one.ended == (place == len(tokens) - 1)
    assert (one.text, one.token_count, one.finish_reason, one.error) == (text, count, reason, None)
    assert events(one) == (streamed if stream else [None])


def test_a_row_ends_once_and_keeps_its_first_error():
    one, first = row(), Refusal("first", "closed")
    one.end(first)
    ended = one.times["ended"]
    one.end(Refusal("second", "closed"))
    one.end()
    assert (one.error, one.ended, one.finish_reason, one.times["ended"]) == (
        first,
        True,
        None,
        ended,
    )
    assert events(one) == [None]


class Done:
    """A sampler whose schema is complete after so many tokens."""

    def __init__(self, after):
        self.after = after

    @property
    def complete(self):
        self.after -= 1
        return self.after <= 0


@pytest.mark.parametrize(
    ("after", "fields", "text", "reason"),
    [
        # Complete at the last allowed token.
        (3, {}, "abc", "stop"),
        (3, {"max_tokens": 3}, "abc", "stop"),
        (4, {"max_tokens": 3}, "abc", "length"),
        (9, {"stop": ["c"]}, "ab", "stop"),
        (3, {"stop": ["cd"]}, "abc", "stop"),
    ],
)
def test_a_row_ends_where_its_schema_is_complete(after, fields, text, reason):
    one = row(sampler=Done(after), **fields)
    for token in "abc":
        assert not one.ended
        one.take(ord(token), CONFIG.end_tokens)
    assert (one.text, one.finish_reason, one.ended, one.token_count) == (text, reason, True, 3)


def test_a_row_notes_the_times_of_its_stages(start):
    engine, _ = start()
    one = row()
    assert set(one.times) == {"submitted"}
    engine.submit([one])
    check(one)
    assert list(one.times) == ["submitted", "started", "first", "ended"]
    assert list(one.times.values()) == sorted(one.times.values())


# --- pieces of a prompt ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 3, 31, 32, 33, 34, 63, 64, 65, 66, 97, 129, 200])
@pytest.mark.parametrize("start_at", [0, 1, 8, 30])
def test_the_pieces_of_a_prompt_cover_it_and_none_is_one_token(length, start_at):
    ends = [start_at]
    while ends[-1] < length:
        ends.append(end_piece(ends[-1], length, PIECE))
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    assert sum(sizes) == max(length - start_at, 0)
    if length - start_at > 1:
        assert all(2 <= size <= PIECE for size in sizes)


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ([], [], 0),
        ([1], [], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 9, 3], 1),
        ([4], [5], 0),
    ],
)
def test_prompts_share_the_tokens_with_which_both_begin(one, other, count):
    assert count_shared(one, other) == count_shared(other, one) == count


# --- many callers ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_begin_and_end_at_random_get_the_answers_that_they_get_alone(start, seed):
    engine, decoder = start(cache_tokens=(512, 1000, 4096)[seed % 3])
    chance, rows, gone = random.Random(seed), [], []
    for number in range(150):
        size = chance.choice((3, 20, 33, 64, 65, 120))
        same = chance.choice((0, 2, size // 2, size - 1, size))
        one = row(
            prompt_of(size, chance.choice((number, 1)), same),
            chance.randrange(1, 60),
            stream=number % 2 == 0,
        )
        engine.submit([one])
        if chance.random() < 0.2:
            for _ in range(chance.randrange(3)):
                if one.stream and not one.ended:
                    one.events.get(timeout=60)
            one.end()
            gone.append(one)
        else:
            rows.append(one)
        if chance.random() < 0.1:
            time.sleep(0.002)
    check(*rows)
    settle(engine)
    stats = engine.stats()
    assert (stats["answers"], stats["waiting"], stats["running"]) == (
        len(rows) + sum("started" in one.times for one in gone),
        0,
        0,
    )
    assert stats["reused_prompt_tokens"] > 500
    assert max(rows for kind, rows, *_ in decoder.calls if kind == "step") > 4
    assert decoder.most_held <= engine._cache_tokens
    assert stats["cache_tokens"] == sum(decoder.held)


def test_callers_on_many_threads_share_steps(start):
    engine, decoder = start(cache_tokens=4096)
    rows = [row(prompt_of(20 + number, number), 40) for number in range(24)]
    decoder.hold()
    threads = [threading.Thread(target=engine.submit, args=([one],)) for one in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoder.go()
    check(*rows)
    steps = [call for call in decoder.calls if call[0] == "step"]
    assert len(steps) < 24 * 39 / 4
    assert ("step", 16) in steps


def test_a_row_joins_long_answers_at_work_and_leaves_before_they_end(start):
    engine, decoder = start(cache_tokens=4096)
    long = [row(prompt_of(20, seed), 200, stream=True) for seed in range(3)]
    submit_and_hold(engine, decoder, long, calls=9)
    short = row(prompt_of(30, 9), 3)
    engine.submit([short])
    decoder.go()
    check(short)
    # It waits for the step at work, its prompt is read at once, and two steps later it has ended.
    assert decoder.calls[9:14] == [
        ("step", 3),
        ("read", 3, 30),
        ("step", 4),
        ("step", 4),
        ("step", 3),
    ]


def test_between_two_steps_no_more_than_a_piece_is_read(start):
    engine, decoder = start()
    submit_and_hold(engine, decoder, [row(prompt_of(10), 200)], calls=3)
    rows = [row(prompt_of(size, size), 2) for size in (200, 10, 12, 14, 30, 2)]
    engine.submit(rows)
    decoder.calls.clear()
    decoder.go()
    check(*rows)
    read = 0
    for kind, _, *size in decoder.calls:
        read = read + size[0] if kind == "read" else 0
        assert read <= PIECE
    # Several short prompts are read together: 10, 12; 14; 30, 2.
    assert [size for kind, _, *size in decoder.calls if kind == "read"][-5:] == [
        [10],
        [12],
        [14],
        [30],
        [2],
    ]


def test_rows_begin_in_the_order_in_which_they_came(start):
    engine, decoder = start()
    decoder.hold()
    rows = [row(prompt_of(10 + number % 7, number), 1 + number % 5) for number in range(40)]
    for one in rows:
        engine.submit([one])
    decoder.go()
    check(*rows)
    assert [one.times["started"] for one in rows] == sorted(one.times["started"] for one in rows)


# --- memory ---------------------------------------------------------------------------------


def test_rows_fill_the_cache_exactly_and_the_others_wait(start):
    engine, decoder = start(cache_tokens=400)
    decoder.hold()
    rows = [row(prompt_of(60, number), 40) for number in range(64)]  # four of them fill it
    engine.submit(rows)
    decoder.go()
    check(*rows)
    assert max(count for kind, count, *_ in decoder.calls if kind == "step") == 4
    assert decoder.most_held <= 400


def test_a_prompt_of_the_whole_context_runs_beside_short_ones(start):
    engine, decoder = start()
    whole, short = (
        row(prompt_of(255, 1), 1),
        [row(prompt_of(10, number), 5) for number in range(2, 17)],
    )
    engine.submit([whole, *short])
    check(whole, *short)
    assert decoder.most_held <= 512


def test_a_row_that_needs_the_whole_cache_waits_for_it_and_keeps_its_place(start):
    engine, decoder = start(cache_tokens=256)
    running = row(prompt_of(10), 200, stream=True)
    engine.submit([running])
    running.events.get(timeout=60)
    whole, after = row(prompt_of(200, 1), 56), row(prompt_of(10, 2), 2)
    engine.submit([whole])
    engine.submit([after])
    check(running, whole, after)
    assert (
        running.times["ended"]
        <= whole.times["started"]
        <= whole.times["ended"]
        <= after.times["started"]
    )
    assert decoder.most_held <= 256


def test_what_ten_thousand_rows_leave_is_bounded(start):
    engine, decoder = start(max_waiting=10_000)
    rows = [row(prompt_of(4 + number % 50, number), 2) for number in range(10_000)]
    engine.submit(rows)
    check(*rows)
    settle(engine)
    assert decoder.most_held <= 512
    assert len(engine._waiting) == 0
    assert engine.stats()["answers"] == 10_000
    assert not any(slot.row for slot in engine._slots)


# --- prompts that are shared ----------------------------------------------------------------


def test_the_next_turn_of_a_conversation_reads_only_what_is_new(start):
    engine, decoder = start()
    prompt = prompt_of(50)
    for turn in range(4):
        one = row(prompt, 5)
        engine.submit([one])
        check(one)
        settle(engine)
        assert one.reused_tokens == (0 if turn == 0 else len(prompt) - 20)
        prompt = [*prompt, *prompt_of(20, turn)]
    assert (
        sum(size for kind, _, *rest in decoder.calls if kind == "read" for size in rest)
        == 50 + 3 * 20
    )
    # Each turn goes on in the slot of the one before.
    assert engine.stats()["kept_conversations"] == 1


@pytest.mark.parametrize(
    ("same", "reused"), [(0, 0), (7, 0), (8, 8), (30, 30), (48, 48), (49, 48), (50, 48)]
)
def test_a_prompt_copies_what_another_one_begins_with(start, same, reused):
    engine, _ = start()
    first, second = row(prompt_of(50, 1, same=50), 100, stream=True), row(prompt_of(50, 2, same), 4)
    engine.submit([first])
    first.events.get(timeout=60)
    engine.submit([second])  # while the first one runs
    check(first, second)
    assert second.reused_tokens == reused
    third = row(prompt_of(50, 3, same), 4)
    engine.submit([third])
    check(third)
    assert third.reused_tokens == reused


def test_prompts_of_different_keys_are_not_shared(start):
    engine, _ = start()
    reused = []
    for key in ("a", "a", "b", None, "b"):
        one = row(prompt_of(50), 4, cache_key=key)
        engine.submit([one])
        check(one)
        reused.append(one.reused_tokens)
    assert reused == [0, 48, 0, 0, 48]


def test_an_answer_is_never_shared(start):
    engine, _ = start()
    first = row(prompt_of(20), 30)
    engine.submit([first])
    check(first)
    again = row([*first.prompt, *map(ord, first.text), 5, 6], 4)  # as a client sends an answer back
    engine.submit([again])
    check(again)
    assert again.reused_tokens == 20


def test_the_least_recently_used_prompts_are_given_up_first(start):
    engine, _ = start(cache_tokens=256)
    prompts = [prompt_of(50, seed) for seed in range(1, 6)]
    for place in (0, 1, 2, 3, 0, 4):  # there is no memory for five of them
        one = row([*prompts[place], 3, 4], 8)
        engine.submit([one])
        check(one)
    settle(engine)
    kept = [slot.prompt[:50] for slot in engine._slots if slot.prompt]
    assert prompts[0] in kept
    assert prompts[4] in kept
    assert prompts[1] not in kept


def test_where_memory_is_short_a_conversation_goes_on_in_its_slot(start):
    engine, decoder = start(cache_tokens=200)
    prompt = prompt_of(100)
    for size, reused in ((0, 0), (20, 100), (50, 120)):
        one = row([*prompt, *prompt_of(size, 3)], 20)  # twice as many tokens would not fit
        engine.submit([one])
        check(one)
        settle(engine)
        assert one.reused_tokens == reused
    other = row([*prompt[:40], *prompt_of(110, 4)], 45)  # there is no memory for a second slot
    engine.submit([other])
    check(other)
    assert other.reused_tokens == 40
    assert decoder.most_held <= 200


def test_a_slot_that_held_a_long_answer_does_not_count_as_much_for_a_short_one(start):
    engine, decoder = start(cache_tokens=256)
    for size in (200, 10, 10):
        one = row(prompt_of(size, size), 4)
        engine.submit([one])
        check(one)
    settle(engine)
    decoder.hold(calls=2)
    rows = [row(prompt_of(60, seed), 40) for seed in (7, 8)]
    engine.submit(rows)
    decoder.go()
    check(*rows)
    assert ("step", 2) in decoder.calls  # there is memory for both


# --- callers who go away, and the queue -------------------------------------------------------


def test_a_caller_who_leaves_frees_the_slot_at_once(start):
    engine, decoder = start(cache_tokens=4096)
    left = [row(prompt_of(20, seed), 230, stream=True) for seed in range(16)]
    submit_and_hold(engine, decoder, left, calls=40)
    for one in left:
        one.end()
    after = row(prompt_of(20, 99), 4)
    engine.submit([after])
    decoder.go()
    check(after)
    settle(engine)
    assert [(kind, size) for kind, *_, size in decoder.calls[41:]] == [
        ("read", 20),
        *[("step", 1)] * 3,
    ]
    stats = engine.stats()
    assert (stats["running"], stats["answers"]) == (0, 17)


def test_a_caller_who_leaves_while_the_prompt_is_read_stops_the_reading(start):
    engine, decoder = start()
    gone, beside = row(prompt_of(200, 1), 50), row(prompt_of(20, 2), 5)
    submit_and_hold(engine, decoder, [gone, beside])
    gone.end()
    decoder.go()
    check(beside)
    assert [call[2] for call in decoder.calls if call[0] == "read"] == [PIECE, 20]
    again = row(prompt_of(200, 1), 5)  # what was read of it is there
    engine.submit([again])
    check(again)
    assert again.reused_tokens == PIECE


def test_a_caller_who_leaves_while_waiting_is_never_run(start):
    engine, decoder = start()
    first, gone, here = (row(prompt_of(20, seed), 4) for seed in range(3))
    submit_and_hold(engine, decoder, [first])
    engine.submit([gone, here])
    gone.end()
    decoder.go()
    check(first, here)
    assert (gone.token_count, "started" in gone.times) == (0, False)


def test_the_caller_over_the_limit_gets_an_error_at_once_and_nothing_of_it_is_queued(start):
    engine, decoder = start(max_waiting=40)
    first = row(max_tokens=4)
    submit_and_hold(engine, decoder, [first])  # it is read; the next ones wait
    waiting, more = [row(max_tokens=4) for _ in range(39)], [row(max_tokens=4) for _ in range(2)]
    engine.submit(waiting)
    with pytest.raises(Refusal) as refusal:
        engine.submit(more)
    assert (
        refusal.value.message == "The model is busy: 39 answers wait, and 40 may. Try again later."
    )
    assert (refusal.value.code, refusal.value.error_code) == ("busy", "RESOURCE_EXHAUSTED")
    engine.submit(more[:1])
    with pytest.raises(Refusal, match="The model is busy: 40 answers wait, and 40 may"):
        engine.submit(more[1:])
    waiting[0].end()  # a caller who leaves makes room
    engine.submit(more[1:])
    decoder.go()
    check(first, *waiting[1:], *more)


def test_a_row_that_is_cancelled_while_it_gets_a_slot_takes_no_other_along(start, monkeypatch):
    engine, _ = start()
    gone, here, choose = row(prompt_of(20, 1), 4), row(prompt_of(20, 2), 4), engine._choose_slot

    def cancel(one):
        if one is gone:
            gone.end()
            engine.submit([here])
        return choose(one)

    monkeypatch.setattr(engine, "_choose_slot", cancel)
    engine.submit([gone])
    check(here)
    settle(engine)
    assert engine.stats()["waiting"] == engine.stats()["running"] == 0


# --- what it counts -------------------------------------------------------------------------


def test_stats_count_what_waits_and_runs_and_was_done(start):
    def stats():
        found = engine.stats()
        assert before - 60 < found.pop("since") <= time.time()
        return found

    before = time.time()
    engine, decoder = start()
    nothing = {
        "closed": False,
        "waiting": 0,
        "running": 0,
        "answers": 0,
        "prompt_tokens": 0,
        "reused_prompt_tokens": 0,
        "completion_tokens": 0,
        "cache_tokens": 0,
        "kept_conversations": 0,
    }
    assert stats() == nothing
    first, *later = (row(prompt_of(3, seed), 4) for seed in range(3))
    submit_and_hold(engine, decoder, [first])
    running = {"running": 1, "prompt_tokens": 3, "cache_tokens": 3 + 4}
    assert stats() == nothing | running
    engine.submit(later)
    assert stats() == nothing | running | {"waiting": 2}
    later[0].end()
    assert stats() == nothing | running | {"waiting": 1}
    decoder.go()
    check(first, later[1])
    settle(engine)
    done = {"answers": 2, "prompt_tokens": 6, "completion_tokens": 8}
    # The last token of an answer is never in the cache.
    assert stats() == nothing | done | {"cache_tokens": 2 * (3 + 3), "kept_conversations": 2}
    engine.close()
    assert stats() == nothing | done | {"closed": True}


# --- what breaks ----------------------------------------------------------------------------


class Failing(StandInDecoder):
    """Fails to read a prompt with the token 96 in it, and in a step of three rows."""

    def read(self, slot, tokens, start):
        if 96 in tokens:
            raise MemoryError("no memory at /a/path")
        return super().read(slot, tokens, start)

    def step(self, tokens, lengths):
        if len(tokens) == 3:
            raise RuntimeError("no memory at /a/path")
        return super().step(tokens, lengths)


@pytest.fixture
def failing(start, monkeypatch):
    def begin(**settings):
        monkeypatch.setitem(globals(), "StandInDecoder", Failing)
        return start(**settings)

    return begin


def test_a_prompt_that_fails_takes_no_other_answer_along(failing, caplog):
    engine, _ = failing()
    beside = row([5] * 10, 100, stream=True)
    engine.submit([beside])
    beside.events.get(timeout=60)
    bad = row([*range(2, 50), 96, 3], 4)
    engine.submit([bad])
    wait_for(bad)
    assert bad.error.message == "The engine failed on this request."
    assert (bad.error.code, bad.error.error_code) == ("failed", "INTERNAL_ERROR")
    assert "no memory at /a/path" in caplog.text  # for whoever runs the model
    check(beside)
    good = row([*range(2, 50), 3], 4)
    engine.submit([good])
    check(good)
    assert good.reused_tokens == PIECE  # what was read before the failure


def test_a_step_that_fails_ends_its_answers_and_the_next_ones_are_answered(failing):
    engine, decoder = failing()
    decoder.hold()
    rows = [row([5 + seed] * 10, 100) for seed in range(3)]
    engine.submit(rows)
    decoder.go()
    for one in rows:
        wait_for(one)
        assert one.error.message == "The engine failed on this request."
    good = row([5] * 12, 4)
    engine.submit([good])
    check(good)


@pytest.mark.parametrize("ends", ["by an end token", "by its length", "by an error"])
def test_an_answer_that_ends_with_its_first_token_takes_no_other_along(start, ends):
    class Ends:
        complete = False

        def choose(self, logits):
            if ends == "by an error":
                raise ValueError
            return 0 if ends == "by an end token" else int(logits.argmax())

    engine, decoder = start()
    beside = row(prompt_of(10, 1), 40)
    submit_and_hold(engine, decoder, [beside], calls=3)
    short = row(prompt_of(10, 2), 1, sampler=Ends())
    engine.submit([short])
    decoder.go()
    wait_for(short)
    assert bool(short.error) == (ends == "by an error")
    check(beside)
    assert ("step", 2) not in decoder.calls  # it takes part in no step


@pytest.mark.parametrize(
    "error", [Refusal("The schema grew.", "invalid_value"), ValueError("a mistake of ours")]
)
def test_an_answer_whose_sampler_fails_takes_no_other_along(start, error):
    class Fails:
        complete = False

        def choose(self, logits):
            if failed.token_count == 3:
                raise error
            return int(logits.argmax())

    engine, decoder = start()
    decoder.hold()
    failed, *others = (
        row(prompt_of(10, seed), 20, sampler=Fails() if seed == 0 else None) for seed in range(4)
    )
    engine.submit([failed, *others])
    decoder.go()
    check(*others)
    wait_for(failed)
    says = error.message if isinstance(error, Refusal) else "The engine failed on this request."
    assert failed.error.message == says
    assert failed.token_count == 3


def test_where_the_engines_own_thread_fails_its_callers_are_told(start, monkeypatch, caplog):
    engine, _ = start()
    monkeypatch.setattr(engine, "_choose_slot", lambda row: 1 / 0)
    one = row()
    engine.submit([one])
    wait_for(one)
    assert one.error.message == "The model was closed before it had answered."
    assert "The engine ended." in caplog.text
    with pytest.raises(Refusal, match=r"^This model is closed\. Load it again\.$"):
        engine.submit([row()])


# --- its end --------------------------------------------------------------------------------


def test_closing_ends_rows_in_every_state_with_an_error(start):
    engine, decoder = start()
    running, reading = row(prompt_of(10, 1), 200, stream=True), row(prompt_of(200, 2), 4)
    waiting, gone = (
        [row(prompt_of(10, seed), 4) for seed in range(3, 40)],
        row(prompt_of(10, 50), 4),
    )
    submit_and_hold(engine, decoder, [running], calls=3)
    engine.submit([reading, gone, *waiting])
    gone.end()
    decoder.hold(calls=2)  # the step that it stands before, and a first piece of the long prompt
    assert decoder.reached.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        time.sleep(0.001)
    decoder.go()
    closing.join(60)
    assert not engine._thread.is_alive()
    for one in (running, reading, *waiting):
        wait_for(one)
        assert (one.error.message, one.error.code) == (
            "The model was closed before it had answered.",
            "closed",
        )
    assert gone.error is None
    with pytest.raises(MlflowException, match=r"^This model is closed\. Load it again\.$"):
        engine.submit([row()])
    engine.close()  # a second time is no error
    assert engine._decoder is None  # its memory is free


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_is_told_that_the_model_is_closed(start):
    engine, _ = start()
    settle(engine)
    child = os.fork()
    if not child:  # a fork leaves the engine's thread behind
        try:
            engine.submit([row()])
        except Refusal as refusal:
            os._exit(0 if refusal.code == "closed" else 1)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("logical", "physical", "cores"),
    [
        (8, 4, 4),  # two threads on each core
        (8, 8, 8),
        (1, 1, 1),
        (2, 8, 2),  # an affinity or a container's quota leaves fewer
        (8, None, 8),
        (1, None, 1),  # some boards and containers report no physical cores
        (3, 0, 3),
    ],
)
def test_an_engine_takes_one_thread_for_each_core_that_it_may_use(
    monkeypatch, logical, physical, cores
):
    def count(logical):
        assert not logical
        return physical

    monkeypatch.setattr(engine_module, "joblib", SimpleNamespace(cpu_count=lambda: logical))
    monkeypatch.setattr(engine_module, "psutil", SimpleNamespace(cpu_count=count))
    assert count_cores() == cores
