"""A row takes its tokens, and a batch feeds an engine that stands in the test: what goes in, in what pieces."""

import queue
from types import SimpleNamespace

import numpy as np
import pytest

from serving import chat_model
from serving.chat_model import Batch, Row, TextWriter, _error

END = {0, 1}  # end tokens
PAD = 9


class Letters:
    """A tokenizer whose tokens are characters by their number."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def row(prompt=(), max_tokens=10, stop=(), stream=False, sampler=None):
    return Row(list(prompt), max_tokens, TextWriter(Letters(), list(stop)), sampler, queue.SimpleQueue(), stream)


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
    one, error = row(), _error("first")
    one.end(error)
    one.end(_error("second"))
    one.end()
    assert (one.error, one.ended, one.finish_reason) == (error, True, None)
    assert events(one) == [None]


class Generator:
    """Stands in for ``og.Generator``: keeps what it is given, and takes the likeliest tokens of ``LOGITS``."""

    def __init__(self, model, params):
        self.model, self.options, self.chunks, self.set = model, params.options, [], []
        self.logits = np.tile(np.array(LOGITS, dtype=np.float32), (self.options["batch_size"], 1, 1))

    def append_tokens(self, tokens):
        assert tokens.dtype == np.int32
        self.chunks.append(tokens.tolist())

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


@pytest.fixture
def engine(monkeypatch):
    """Let batches make stand-ins of the engine; return them."""
    made = []
    monkeypatch.setattr(chat_model, "og", SimpleNamespace(
        GeneratorParams=Params, Generator=lambda *arguments: made.append(Generator(*arguments)) or made[-1]))
    return made


@pytest.mark.parametrize(("length", "sizes"), [
    (1, [1]), (2, [2]), (127, [127]), (128, [128]),
    (129, [129]),  # a last chunk of one token is computed another way
    (130, [128, 2]), (256, [128, 128]), (257, [128, 129]), (258, [128, 128, 2]), (385, [128, 128, 129]),
    (700, [128] * 5 + [60])])
def test_a_lone_rows_prompt_is_read_in_chunks_none_of_one_token(engine, length, sizes):
    prompt = list(range(length))
    batch = Batch("the model", [row(prompt, 5)], PAD, END)
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
    batch = Batch("the model", rows, PAD, END)
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

    def __init__(self, token):
        self.token, self.given = token, []

    def choose(self, logits):
        self.given.append(logits.tolist())
        return self.token


def test_each_row_gets_a_token_and_who_has_a_sampler_gets_its_own(engine):
    rows = [row([5]), row([5], sampler=Always(2)), row([5], sampler=Always(4)), row([5])]
    batch = Batch(None, rows, PAD, END)
    batch.step()
    batch.step()
    assert [one.text for one in rows] == ["\3", "\2", "\4", "\3"]
    assert [sampler.given for sampler in (rows[1].sampler, rows[2].sampler)] == [[LOGITS]] * 2
    (logits,) = engine[0].set
    assert logits[:, 0].tolist() == [LOGITS, [0, 0, 1, 0, 0], [0, 0, 0, 0, 1], LOGITS]


def test_a_row_that_has_ended_is_left_alone_while_the_others_go_on(engine):
    gone, short, long = row([5], sampler=Always(2)), row([5], max_tokens=2), row([5], max_tokens=4)
    batch = Batch(None, [gone, short, long], PAD, END)
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
    done, open_row, error = row(max_tokens=1), row(), _error("closed")
    done.take(50, END)
    batch = Batch(None, [done, open_row], PAD, END)
    assert batch.alive
    batch.end(error)
    assert not batch.alive
    assert (done.error, open_row.error) == (None, error)
    assert done.finish_reason == "length"
