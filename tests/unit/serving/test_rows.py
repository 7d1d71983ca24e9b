"""A row takes its tokens, and a batch feeds an engine that stands in the test: what goes in, in what pieces.

Run: python -m helpers test tests/unit/serving/test_rows.py
"""

import itertools
import queue
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import chat_model
from serving.chat_model import CHUNK, Batch, Config, Kept, KeptConversations, Refusal, Row, TextWriter, cut_points

END = {0, 1}  # end tokens
PAD = 9
CONFIG = Config(context_length=8192, rope_switch=8192, end_tokens=(0, 1), pad=PAD, vocab_size=200, block=128,
                ring=0)


class Letters:
    """A tokenizer whose tokens are characters by their number."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def row(prompt=(), max_tokens=10, stop=(), stream=False, sampler=None):
    return Row(list(prompt), max_tokens, TextWriter(Letters(), list(stop)), sampler, queue.SimpleQueue(), stream)


def error(sentence):
    return Refusal(sentence, "closed")


def events(one):
    """Return the texts that a row's caller was given, None for its end."""
    texts = []
    while not one.events.empty():
        owner, text = one.events.get()
        assert owner is one
        texts.append(text)
    return texts


@pytest.mark.parametrize(("tokens", "fields", "text", "count", "reason", "streamed"), [
    ("ab\0", {}, "ab", 2, "stop", ["a", "b", "", None]),  # an end token is no token of the answer
    ("ab\1", {}, "ab", 2, "stop", ["a", "b", "", None]),
    ("\0", {}, "", 0, "stop", ["", None]),
    ("abc", {"max_tokens": 3}, "abc", 3, "length", ["a", "b", "c", "", None]),
    ("ab\0", {"max_tokens": 3}, "ab", 2, "stop", ["a", "b", "", None]),
    ("a", {"max_tokens": 1}, "a", 1, "length", ["a", "", None]),
    ("abcd", {"stop": ["cd"]}, "ab", 4, "stop", ["a", "b", "", "", None]),
    ("abcd", {"stop": ["cd"], "max_tokens": 4}, "ab", 4, "stop", ["a", "b", "", "", None]),  # also at the last one
    ("abc", {"stop": ["cd"], "max_tokens": 3}, "abc", 3, "length", ["a", "b", "", "c", None]),  # what was held back
    ("abc\0", {"stop": ["cd"]}, "abc", 3, "stop", ["a", "b", "", "c", None]),
    # Only its end makes the answer's last character certain, and this the stop string.
    ("ab\ufffd", {"stop": ["b\ufffd"], "max_tokens": 3}, "a", 3, "stop", ["a", "", "", "", None]),
])
@pytest.mark.parametrize("stream", [True, False])
def test_a_row_ends_where_its_answer_does(tokens, fields, text, count, reason, streamed, stream):
    one = row(stream=stream, **fields)
    for place, token in enumerate(tokens):
        assert not one.ended
        assert one.finish_reason is None
        one.take(ord(token), END)
        assert one.ended == (place == len(tokens) - 1)
    assert (one.text, one.tokens, one.finish_reason, one.error) == (text, count, reason, None)
    assert events(one) == (streamed if stream else [None])


def test_a_row_ends_once_and_keeps_its_first_error():
    one, first = row(), error("first")
    one.end(first)
    ended = one.times["ended"]
    one.end(error("second"))
    one.end()
    assert (one.error, one.ended, one.finish_reason, one.times["ended"]) == (first, True, None, ended)
    assert events(one) == [None]


class Done:
    """A sampler whose schema is complete after so many tokens."""

    def __init__(self, after):
        self.after = after

    @property
    def complete(self):
        self.after -= 1
        return self.after <= 0


@pytest.mark.parametrize(("after", "fields", "text", "reason"), [
    (3, {}, "abc", "stop"), (3, {"max_tokens": 3}, "abc", "stop"),  # complete at the last allowed token
    (4, {"max_tokens": 3}, "abc", "length"), (9, {"stop": ["c"]}, "ab", "stop"), (3, {"stop": ["cd"]}, "abc", "stop")])
def test_a_row_ends_where_its_schema_has_all_that_it_may_have(after, fields, text, reason):
    one = row(sampler=Done(after), **fields)
    for token in "abc":
        assert not one.ended
        one.take(ord(token), END)
    assert (one.text, one.finish_reason, one.ended, one.tokens) == (text, reason, True, 3)


def test_a_row_notes_the_times_of_its_steps():
    one = row()
    assert set(one.times) == {"submitted"}
    batch = Batch(None, [one], CONFIG)
    assert set(one.times) == {"submitted", "started"}
    one.take(ord("a"), END)
    first = one.times["first"]
    one.take(ord("b"), END)
    one.end()
    assert list(one.times) == ["submitted", "started", "first", "ended"]
    assert list(one.times.values()) == sorted(one.times.values())
    assert (one.times["first"], batch.alive) == (first, False)
    none = row()
    none.take(0, END)  # an answer without a token has no first one
    assert set(none.times) == {"submitted", "ended"}


# --- where a prompt is cut --------------------------------------------------------------------


def steps(start, stop, block, least=0):
    """Return where reading begins, and the number of tokens in each step."""
    begin, cuts = cut_points(start, stop, block, least)
    return begin, [after - before for before, after in itertools.pairwise([begin, *cuts, stop])]


@pytest.mark.parametrize(("start", "stop", "block", "least", "begin", "sizes"), [
    (0, 1, 128, 0, 0, [1]), (0, 2, 128, 0, 0, [2]), (0, 127, 128, 0, 0, [127]), (0, 128, 128, 0, 0, [128]),
    (0, 129, 128, 0, 0, [127, 2]),  # neither 129 nor a last one alone
    (0, 130, 128, 0, 0, [128, 2]), (0, 256, 128, 0, 0, [128] * 2), (0, 257, 128, 0, 0, [127, 128, 2]),
    (0, 385, 128, 0, 0, [127, 128, 128, 2]), (0, 700, 128, 0, 0, [128] * 5 + [60]),
    # The rest of a prompt, cut where the whole would be.
    (50, 52, 128, 0, 50, [2]), (100, 150, 128, 0, 100, [28, 22]), (100, 357, 128, 0, 100, [28, 128, 101]),
    (126, 300, 128, 0, 126, [2, 128, 44]), (127, 300, 128, 0, 127, [128, 45]), (128, 257, 128, 0, 128, [127, 2]),
    # A block smaller or larger than a step.
    (0, 65, 32, 0, 0, [31, 32, 2]), (0, 100, 32, 0, 0, [32, 32, 32, 4]), (50, 83, 32, 0, 50, [14, 19]),
    (0, 300, 80, 0, 0, [80, 80, 80, 60]), (0, 400, 256, 0, 0, [128, 128, 128, 16]),
    # A first step that reaches beyond a switch of the rotary factors.
    (0, 300, 128, 129, 0, [256, 44]), (0, 300, 128, 200, 0, [256, 44]), (0, 200, 128, 199, 0, [200]),
    (0, 200, 128, 300, 0, [200]),
])
def test_a_prompt_is_cut_in_steps_none_of_which_ends_in_a_token_alone(start, stop, block, least, begin, sizes):
    assert steps(start, stop, block, least) == (begin, sizes)


@given(st.integers(0, 3000), st.integers(2, 3000), st.sampled_from([32, 64, 128, 160, 256]),
       st.just(0) | st.integers(0, 4000))
def test_the_steps_cover_any_prompt_in_order(start, count, block, least):
    stop = start + count
    begin, sizes = steps(start, stop, block, least)
    assert max(start - 2, 0) <= begin <= start
    assert sum(sizes) == stop - begin
    assert min(sizes) >= 1
    assert max(sizes[1:], default=0) <= CHUNK
    assert len(sizes) == 1 or begin + sizes[0] >= least
    assert not [size for size in sizes if size % block == 1] or least > stop - CHUNK


# --- a batch ----------------------------------------------------------------------------------


class Generator:
    """Stands in for ``og.Generator``: keeps what it is given, and takes the likeliest tokens of ``LOGITS``."""

    def __init__(self, model, params):
        self.model = model
        self.options = params.options
        self.chunks = []
        self.set = []
        self.rewound = []
        self.logits = np.tile(np.array(LOGITS, dtype=np.float32), (self.options["batch_size"], 1, 1))

    def append_tokens(self, tokens):
        assert tokens.dtype == np.int32
        self.chunks.append(tokens.tolist())

    def rewind_to(self, length):
        self.rewound.append((length, len(self.chunks)))

    def get_logits(self):
        return self.logits.copy()

    def set_logits(self, logits):
        self.set.append(logits)
        self.logits = logits

    def generate_next_token(self):
        pass

    def get_next_tokens(self):
        return self.logits[:, 0].argmax(axis=1)


LOGITS = [0.0, 0.0, 5.0, 7.0, 6.0]


class Params:
    def __init__(self, model):
        self.options = {"model": model}

    def set_search_options(self, **options):
        self.options |= options

    def with_size(self, size):
        self.options["batch_size"] = size
        return self


@pytest.fixture
def engine(monkeypatch):
    """Let batches make stand-ins of the engine; return them."""
    made = []
    monkeypatch.setattr(chat_model, "og", SimpleNamespace(
        GeneratorParams=Params, Generator=lambda *arguments: made.append(Generator(*arguments)) or made[-1]))
    return made


@pytest.mark.parametrize(("length", "sizes"), [
    (1, [1]), (2, [2]), (127, [127]), (128, [128]),
    (129, [127, 2]),  # a last one alone is computed another way, and so it is in a chunk of 129
    (130, [128, 2]), (256, [128, 128]), (257, [127, 128, 2]), (258, [128, 128, 2]), (385, [127, 128, 128, 2]),
    (700, [128] * 5 + [60])])
def test_a_lone_rows_prompt_is_read_in_chunks_none_of_one_token(engine, length, sizes):
    prompt = list(range(length))
    batch = Batch("the model", [row(prompt, 5)], CONFIG)
    for _ in sizes:
        batch.step()
        assert batch.rows[0].tokens == 0
    chunks = engine[0].chunks
    assert [len(chunk[0]) for chunk in chunks] == sizes
    assert [len(chunk) for chunk in chunks] == [1] * len(sizes)
    assert [token for chunk in chunks for token in chunk[0]] == prompt
    batch.step()
    assert batch.rows[0].tokens == 1
    assert len(engine) == 1


def test_several_prompts_are_read_in_one_call_padded_on_the_right(engine):
    rows = [row([1, 2, 3], 4), row(range(200), 5), row([7], 6)]
    batch = Batch("the model", rows, CONFIG)
    assert engine == []  # it takes no memory before its first step
    batch.step()
    assert engine[0].chunks == [[[1, 2, 3] + [PAD] * 197, list(range(200)), [7] + [PAD] * 199]]
    assert engine[0].model == "the model"
    # Of each row the cache holds the longest prompt and the longest answer.
    assert engine[0].options == {
        "model": "the model", "batch_size": 3, "max_length": 206, "min_length": 0, "do_sample": False, "num_beams": 1,
        "num_return_sequences": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    assert batch.cache_tokens == 3 * 206


class Always:
    """A sampler that takes one token, and keeps the logits that it was given."""

    complete = False

    def __init__(self, token):
        self.token, self.given = token, []

    def choose(self, logits):
        self.given.append(logits.tolist())
        return self.token


def test_each_row_gets_a_token_and_who_has_a_sampler_gets_its_own(engine):
    rows = [row([5]), row([5], sampler=Always(2)), row([5], sampler=Always(4)), row([5])]
    batch = Batch(None, rows, CONFIG)
    batch.step()
    batch.step()
    assert [one.text for one in rows] == ["\3", "\2", "\4", "\3"]
    assert [sampler.given for sampler in (rows[1].sampler, rows[2].sampler)] == [[LOGITS]] * 2
    (logits,) = engine[0].set
    assert logits[:, 0].tolist() == [LOGITS, [0, 0, 1, 0, 0], [0, 0, 0, 0, 1], LOGITS]


def test_a_row_that_has_ended_is_left_alone_while_the_others_go_on(engine):
    gone = row([5], sampler=Always(2))
    short = row([5], max_tokens=2)
    long = row([5], max_tokens=4)
    batch = Batch(None, [gone, short, long], CONFIG)
    gone.end()
    batch.step()
    batch.step()
    assert engine[0].set == []  # nobody is left who samples
    assert gone.sampler.given == []
    batch.step()
    assert events(short) == [None]  # its answer is there, and the batch goes on
    assert (short.finish_reason, batch.alive, long.ended) == ("length", True, False)
    batch.step()
    batch.step()
    assert not batch.alive
    assert [one.tokens for one in (gone, short, long)] == [0, 2, 4]


def test_a_batch_ends_the_rows_that_have_not_ended():
    done = row(max_tokens=1)
    open_row = row()
    closed = error("closed")
    done.take(50, END)
    batch = Batch(None, [done, open_row], CONFIG)
    assert batch.alive
    batch.end(closed)
    assert not batch.alive
    assert (done.error, open_row.error) == (None, closed)
    assert done.finish_reason == "length"


@pytest.mark.parametrize(("lengths", "width"), [
    ([1], 1), ([129], 129),  # a lone row is not padded
    ([1, 1], 2), ([2, 1], 2), ([128, 3], 128), ([129, 3], 130), ([3, 129], 130), ([130, 129], 130), ([257, 5], 258),
    ([385, 385], 386), ([200, 7], 200)])
def test_a_batch_of_several_rows_is_never_as_wide_as_reads_its_last_token_in_another_way(engine, lengths, width):
    batch = Batch(None, [row([5] * length, 6) for length in lengths], CONFIG)
    while not batch._unread and not batch.opened:
        batch.step()
    read = [sum(len(chunk[place]) for chunk in engine[0].chunks) for place in range(len(lengths))]
    read = [tokens + sum(part.shape[1] for part in batch._unread) for tokens in read]
    assert read == [width] * len(lengths)
    assert engine[0].options["max_length"] == width + 6  # which the cache has, too
    assert batch.cache_tokens == len(lengths) * (width + 6)


@pytest.mark.parametrize(("length", "sizes"), [
    (150, [128, 22]),  # on the near side
    (151, [151]), (152, [152]), (200, [200]), (280, [256, 24]), (400, [256, 128, 16])])
def test_the_first_step_beyond_a_rope_switch_reaches_beyond_it(engine, length, sizes):
    config = Config(8192, 150, (0, 1), PAD, 200, 128, 0)
    batch = Batch(None, [row(range(length), 5)], config)
    for _ in sizes:
        batch.step()
    assert [len(chunk[0]) for chunk in engine[0].chunks] == sizes


def test_a_row_whose_schema_grows_too_much_ends_and_the_others_go_on(engine):
    class Fails(Always):
        def choose(self, logits):
            raise refusal

    refusal = error("simpler")
    failed = row([5], sampler=Fails(0))
    here = row([5])
    drawn = row([5], sampler=Always(4))
    batch = Batch(None, [failed, here, drawn], CONFIG)
    batch.step()
    batch.step()
    assert (failed.error, failed.ended, failed.tokens) == (refusal, True, 0)
    assert (here.text, drawn.text) == ("\3", "\4")
    batch.step()
    assert events(failed) == [None]
    assert (here.tokens, drawn.tokens) == (2, 2)


# --- kept conversations ---------------------------------------------------------------------


def kept(prompt, room=500, generator=None):
    return Kept(list(prompt), generator or object(), room)


def store(*conversations, most=4, max_tokens=4096, rope_switch=4096):
    held = KeptConversations(most, max_tokens, rope_switch)
    for one in conversations:
        held.put(one)
    return held


TALK = list(range(1000, 1100))  # 100 tokens


@pytest.mark.parametrize(("prompt", "common"), [
    (TALK, 100), ([*TALK, 1], 100), (TALK + TALK, 100), (TALK[:99], 99), (TALK[:50], 50),
    (TALK[:49], 0),  # less than half: the other conversation may yet go on
    ([*TALK[:99], 1], 99), ([*TALK[:50], 1, *TALK[51:]], 50), ([*TALK[:49], 1, *TALK[50:]], 0),
    ([*TALK[:60], 1, *TALK[60:]], 60),  # one token more, and nothing behind it is the same
    ([1, *TALK[1:]], 0), (TALK[1:], 0), ([*TALK[:31], 1, *TALK[32:]], 0), ([], 0), (TALK[:1], 0), ([1] * 100, 0)])
def test_a_prompt_has_in_common_with_a_kept_one_what_both_begin_with(prompt, common):
    one = kept(TALK)
    found = store(one).find(prompt)
    assert found[0] == common
    assert store(one).take(prompt) == ((common, one) if common else (0, None))


@pytest.mark.parametrize(("length", "prompt", "common"), [
    (31, 100, 0), (32, 100, 32), (33, 100, 33), (40, 32, 32), (40, 31, 0), (63, 32, 32), (64, 32, 32), (65, 32, 0)])
def test_fewer_tokens_than_32_are_not_worth_keeping(length, prompt, common):
    held = store(kept(TALK[:length]))
    assert len(held.all) == (length >= KeptConversations.MIN_COMMON == 32)
    assert held.find(TALK[:prompt])[0] == common


@pytest.mark.parametrize(("length", "prompt", "common"), [
    (60, 60, 60), (60, 61, 0), (61, 60, 0), (61, 61, 61), (61, 100, 61), (100, 61, 61), (100, 60, 0), (40, 60, 40)])
def test_a_prompt_goes_on_only_on_its_side_of_the_rope_switch(length, prompt, common):
    assert store(kept(TALK[:length]), rope_switch=60).find(TALK[:prompt])[0] == common


def test_of_several_the_one_is_found_that_saves_most():
    short = kept(TALK[:50])
    long = kept(TALK[:80])
    other = kept(range(50))
    for order in ((short, long, other), (other, long, short), (long, short, other)):
        held = store(*order)
        assert held.find(TALK) == (80, long)
        assert held.find(TALK[:60]) == (60, long)
        assert held.find(list(range(60))) == (50, other)
        assert held.all == list(order)  # to look changes nothing


def test_a_conversation_is_handed_out_once():
    one, same = kept(TALK), kept(TALK)
    held = store(one)
    assert held.take(TALK) == (100, one)
    assert (held.all, held.tokens) == ([], 0)
    assert held.take(TALK) == (0, None)
    held = store(one, same)  # two of one prompt: each for one row
    assert {id(held.take(TALK)[1]) for _ in range(2)} == {id(one), id(same)}
    assert held.take(TALK) == (0, None)
    assert store(one).take([1] * 100) == (0, None)


def different(number):
    return [number, *TALK]


@pytest.mark.parametrize(("most", "max_tokens", "rooms", "left"), [
    (4, 4096, [500] * 4, [0, 1, 2, 3]),
    (4, 4096, [500] * 6, [2, 3, 4, 5]),
    (1, 4096, [500] * 3, [2]),
    (0, 4096, [500] * 3, []),  # it keeps none
    (4, 1000, [500, 500], [0, 1]),
    (4, 1000, [500, 501], [1]),
    (4, 1000, [100, 100, 900], [1, 2]),
    (4, 1000, [100, 200, 1000], [2]),
    (4, 1000, [100, 200, 1001], [0, 1]),  # too large by itself: the others stay
    (4, 499, [500], []),
])
def test_number_and_tokens_are_bounded_and_the_least_recently_used_goes_first(most, max_tokens, rooms, left):
    all_of_them = [kept(different(number), room) for number, room in enumerate(rooms)]
    held = store(*all_of_them, most=most, max_tokens=max_tokens)
    assert held.all == [all_of_them[place] for place in left]
    assert held.tokens == sum(rooms[place] for place in left)
    for number in range(len(rooms)):
        assert held.find(different(number))[0] == (101 if number in left else 0)


def test_who_is_taken_and_put_back_is_the_last_to_go():
    held = store(*(kept(different(number)) for number in range(3)), most=3)
    _, first = held.take(different(0))
    held.put(first)
    held.put(kept(different(3)))
    assert [one.prompt[0] for one in held.all] == [2, 0, 3]


@pytest.mark.parametrize(("length", "max_tokens", "common", "room", "reused"), [
    (120, 30, 100, 150, 100),  # just enough room
    (120, 31, 100, 150, None),  # and too little: it opens anew
    (151, 1, 100, 151, None),
    (120, 30, 118, 500, 118), (120, 30, 119, 500, 118),  # two tokens are read, at least
    (120, 30, 120, 500, 118),  # the same prompt again
    (102, 10, 100, 500, 100), (101, 10, 100, 500, 99),
    (50, 10, 50, 500, 48),  # a part of the kept one
])
def test_a_lone_row_goes_on_with_a_kept_conversation_where_its_room_suffices(
        engine, length, max_tokens, common, room, reused):
    generator = Generator(None, Params(None).with_size(1))
    prompt = list(range(length))
    one = row(prompt, max_tokens)
    batch = Batch("the model", [one], CONFIG, 8192, common, kept(range(common), room, generator))
    assert engine == generator.rewound == []  # nothing happens before its first step
    while one.tokens == 0:
        batch.step()
    if reused is None:
        assert (generator.rewound, generator.chunks, one.reused) == ([], [], 0)
        assert engine[0].options["max_length"] == batch.cache_tokens == 2 * (length + max_tokens)
        assert [token for chunk in engine[0].chunks for token in chunk[0]] == prompt
    else:
        assert engine == []
        assert generator.rewound == [(reused, 0)]  # once, before it reads
        assert [token for chunk in generator.chunks for token in chunk[0]] == prompt[reused:]
        assert one.reused == reused
        assert batch.cache_tokens == room
    again = batch.keep()
    assert again == Kept(prompt, engine[0] if reused is None else generator, batch.cache_tokens)


@pytest.mark.parametrize(("length", "sizes"), [
    (150, [28, 22]), (228, [28, 100]), (229, [28, 101]), (102, [2]), (357, [28, 128, 101]), (128, [28])])
def test_a_continuation_is_read_in_steps_like_a_prompt(engine, length, sizes):
    generator = Generator(None, Params(None).with_size(1))
    batch = Batch(None, [row(range(length))], CONFIG, 8192, 100, kept(range(100), 1000, generator))
    for _ in sizes:
        batch.step()
    assert [len(chunk[0]) for chunk in generator.chunks] == sizes


@pytest.mark.parametrize(("rows", "most_tokens", "max_length"), [
    (1, 8192, 300), (1, 300, 300), (1, 299, 299), (1, 200, 200),
    (1, 150, 150), (1, 100, 150), (1, 0, 150), (1, -500, 150),  # what the answer needs, in any case
    (2, 8192, 150),  # of several, none is kept
])
def test_a_lone_row_takes_twice_its_room_where_that_is_left(engine, rows, most_tokens, max_length):
    batch = Batch(None, [row(range(100), 50) for _ in range(rows)], CONFIG, most_tokens)
    batch.step()
    assert engine[0].options["max_length"] == max_length
    assert batch.cache_tokens == rows * max_length


def test_kept_is_a_lone_row_that_has_read_its_prompt_and_has_not_failed(engine):
    lone = Batch(None, [row(range(300))], CONFIG)
    for _ in range(3):  # its prompt takes as many steps
        assert lone.keep() is None
        lone.step()
    assert lone.keep() == Kept(list(range(300)), engine[0], 310)
    lone.step()
    lone.rows[0].end()  # whoever went away may come back
    assert lone.keep() == Kept(list(range(300)), engine[0], 310)
    lone.end(error("failed"))
    assert lone.keep() is None
    several = Batch(None, [row(range(40)), row(range(40))], CONFIG)
    several.step()
    several.step()
    assert several.keep() is None
