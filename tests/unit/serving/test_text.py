"""An answer's text, token by token: no half characters, nothing of a stop sequence.

Run: python -m helpers test tests/unit/serving/test_text.py
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.chat.prompt import PromptEncoder
from serving.chat.text import TextWriter


class Bytes:
    """A tokenizer whose tokens are the bytes of the text."""

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


class Words:
    """A tokenizer that writes a space between two words, and nothing for a token of markup."""

    def __init__(self):
        self.most = 0

    def decode(self, tokens):
        self.most = max(self.most, len(tokens))
        return " ".join(token for token in tokens if token != "<|end|>")


def write(tokens, stop=(), tokenizer=None):
    """Return each token's piece, the text at the end, and whether a stop sequence was found."""
    writer, pieces = TextWriter(tokenizer or Bytes(), list(stop)), []
    for token in tokens:
        pieces.append(writer.write(token))
        if writer.stopped:
            return pieces, None, True
    end = writer.close()
    return pieces, end, writer.stopped


@pytest.mark.parametrize(
    ("text", "pieces", "end"),
    [
        (b"abc", ["a", "b", "c"], ""),
        ("é!".encode(), ["", "é", "!"], ""),
        ("🙂🙂".encode(), ["", "", "", "🙂"] * 2, ""),
        ("🙂".encode()[:3], ["", "", ""], "\ufffd"),  # an answer may end in half a character
        # U+FFFD may also be a character of the text.
        ("a\ufffdb".encode(), ["a", "", "", "", "\ufffdb"], ""),
        ("a\ufffd".encode(), ["a", "", "", ""], "\ufffd"),
        (b"", [], ""),
    ],
)
def test_a_character_comes_whole(text, pieces, end):
    assert write(text) == (pieces, end, False)


def test_a_token_is_read_beside_the_one_before():
    words = Words()
    assert write(["a", "bc", "<|end|>", "d", *"efgh"], tokenizer=words) == (
        ["a", " bc", "", " d", " e", " f", " g", " h"],
        "",
        False,
    )
    assert words.most == 3  # a long answer does not take longer for each of its tokens


@pytest.mark.parametrize(
    ("stop", "text", "pieces", "end"),
    [
        (["cd"], "abcde", ["a", "b", "", ""], None),
        (["cd"], "abce", ["a", "b", "", "ce"], ""),
        (["cd"], "abc", ["a", "b", ""], "c"),  # held back, and then it was no stop sequence
        (["ab"], "abc", ["", ""], None),
        (["d"], "abcde", ["a", "b", "c", ""], None),
        # What is held back grows and shrinks with what may still become a stop sequence.
        (["aab"], "aaab", ["", "", "a", ""], None),
        (["aab"], "aaac", ["", "", "a", "aac"], ""),
        (["ab", "babx"], "babab", ["", "", "b"], None),
        (["abcd", "cx"], "abce", ["", "", "", "abce"], ""),
        (["abcd", "bx"], "abx", ["", "", "a"], None),
        # The first to be complete counts, not the one that begins first.
        (["bcde", "cd"], "abcdef", ["a", "", "", "b"], None),
        (["cd", "bcde"], "abcdef", ["a", "", "", "b"], None),
        # Of two that are complete at once, the longer one.
        (["c", "bc"], "abc", ["a", "", ""], None),
        (["bc", "c"], "abc", ["a", "", ""], None),
        ([], "ab", ["a", "b"], ""),
        (["never in there"], "ab", ["a", "b"], ""),
    ],
)
def test_a_stop_sequence_ends_the_answer_and_is_not_shown(stop, text, pieces, end):
    assert write(text.encode(), stop) == (pieces, end, end is None)


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (["bcde", "cd"], "abcdefg", "ab"),
        (["cd", "bcde"], "abcdefg", "ab"),
        (["cd", "bcd"], "abcdefg", "a"),
        (["e", "bc"], "abcdefg", "a"),
        (["x", "def"], "abcdefg", "abc"),
        (["f", "abcdefg"], "abcdefg", "abcde"),
        (["b"], "abcabc", "a"),
    ],
)
def test_of_stop_sequences_in_one_token_the_first_to_be_complete_counts(stop, text, shown):
    assert write([text], stop, tokenizer=Words()) == ([shown], None, True)


@pytest.mark.parametrize(
    ("cut", "stop"), [("a🙂".encode()[:3], "\ufffd"), ("ab🙂".encode()[:4], "b\ufffd")]
)
def test_half_a_character_at_the_end_of_an_answer_may_be_a_stop_sequence(cut, stop):
    assert write(cut, [stop]) == (["a", *[""] * (len(cut) - 1)], "", True)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return PromptEncoder(tiny.onnx_dir).tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "plain words, no more",
        "日本語テキスト 漢字",
        "é à ü ß",
        "a\u0301\u0302",
        "\ufffd is a character, too",
        "\U0001f469\U0001f3fd\u200d\U0001f4bb, \U0001f3f3\ufe0f\u200d\U0001f308!",
        "  two  spaces\n\n\tand\r\nlines  ",
        "ক্ষ นา้ \u200d\u200b",
        "",
        "\ufffd",
    ],
)
def test_text_is_never_cut_inside_a_character(tokenizer, text):
    pieces, end, stopped = write(
        tokenizer.encode(text, add_special_tokens=False).ids, tokenizer=tokenizer
    )
    assert "".join(pieces) + end == text
    assert not stopped
    if "\ufffd" not in text:
        assert not [piece for piece in pieces if "\ufffd" in piece]


@given(st.data())
@settings(max_examples=60)
def test_any_tokens_are_written_as_the_tokenizer_decodes_them(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30))
    whole = tokenizer.decode(tokens)
    stop = data.draw(
        st.lists(
            st.text(min_size=1, max_size=3)
            | st.sampled_from([*whole, whole, "\ufffd"]).filter(bool),
            max_size=3,
        )
    )
    writer, written = TextWriter(tokenizer, stop), ""
    for token in tokens:
        written += writer.write(token)
        assert whole.startswith(written)
        if writer.stopped:
            break
    if not writer.stopped:
        written += writer.close()
    ends = [(place + len(text), place) for text in stop if (place := whole.find(text)) >= 0]
    assert written == (whole[: min(ends)[1]] if ends else whole)
