"""A conversation becomes tokens: the template's markup is markup, and a message's text is text.

Run: python -m helpers test tests/unit/serving/test_prompt.py
"""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from support.chat import ASKED, FRAGMENTS, user
from support.tokenizer_texts import Encoder, assert_markup_is_text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from serving.chat_model import Message, PromptEncoder, read_request

TEMPLATE = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
MARKUP = ["<s>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|", "\n\n"]
PLAIN = ["<think>", "</think>", "<tool_call>"]  # added, but no special tokens


def write_tokenizer(folder, template=TEMPLATE):
    """Write a tokenizer of one token for each byte, which by itself begins every text with ``<s>``."""
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "<|end|>", "chat_template": template}))
    (folder / "genai_config.json").write_text(json.dumps({"model": {
        "type": "phi3", "context_length": 64, "vocab_size": 266, "bos_token_id": 256, "eos_token_id": 257,
        "pad_token_id": 256, "decoder": {}}, "search": {}}))
    return PromptEncoder(folder)


def alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokens(*parts):
    """Return the tokens of markup and of text, given as bytes."""
    letters = {letter: place for place, letter in enumerate(alphabet())}
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = []
    for part in parts:
        if isinstance(part, bytes):
            ((text, _),) = bytes_as_letters.pre_tokenize_str(part.decode())
            found += [letters[letter] for letter in text]
        else:
            found.append(256 + [*MARKUP, *PLAIN].index(part))
    return found


def conversation(*turns):
    return [Message(role=role, content=content) for role, content in turns]


def refusal_of(encoder, messages, context_length=4096):
    with pytest.raises(MlflowException) as refusal:
        encoder.encode(messages, context_length, "Row 3: ")
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
    return refusal.value.message


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("small"))


def test_the_tokens_are_the_templates_and_nothing_is_added(small):
    messages = conversation(("system", "a"), ("user", "b c"), ("assistant", ""), ("user", "é"))
    assert small.encode(messages, 4096) == tokens(
        "<|system|>", b"a", "<|end|>", "<|user|>", b"b c", "<|end|>", "<|assistant|>", "<|end|>",
        "<|user|>", "é".encode(), "<|end|>", "<|assistant|>")


@pytest.mark.parametrize("text", [
    "<|end|>", "x<|end|>", "<|end|>x", "<|end|><|end|>", "<|<|end|>end|>", "<|end<|end|>|>", "<<|user|>>", "<|end|",
    "<s>", "<<s>s>", "<|", "<|<|<|", "a\ue000b", "\ue000<|end|>\ue000", "<|\ue000end|>", "\ue000\ue001<s>\ue002"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_markup_in_any_message_is_text(small, text, place):
    turns = [("system", b"a"), ("user", b"b"), ("assistant", b"c"), ("user", b"d")]
    turns[place] = (turns[place][0], text.encode())
    expected = itertools.chain(*((f"<|{role}|>", content, "<|end|>") for role, content in turns), ["<|assistant|>"])
    messages = conversation(*((role, content.decode()) for role, content in turns))
    assert small.encode(messages, 4096) == tokens(*expected)
    # Of this the tokenizer itself, left alone, makes other tokens.
    assert "<" not in text or small.tokenizer.encode(text, add_special_tokens=False).ids != tokens(text.encode())


def test_white_space_is_no_markup_and_stays_what_the_model_knows(small):
    assert small.encode(conversation(("user", "a\n\nb")), 4096) == tokens(
        "<|user|>", b"a", "\n\n", b"b", "<|end|>", "<|assistant|>")


@pytest.mark.parametrize(("sizes", "context_length", "fits"), [
    ([13], 1, True), ([13 * 4], 4, True), ([13 * 4 + 1], 4, False), ([13, 13 * 3], 4, True),
    ([13, 13 * 3 + 1], 4, False)])
def test_messages_longer_than_any_tokens_of_the_context_are_refused_unread(small, sizes, context_length, fits):
    # The longest token, <|assistant|>, has 13 characters.
    messages = conversation(*(("user", "a" * size) for size in sizes))
    if fits:
        assert len(small.encode(messages, context_length)) == sum(sizes) + 2 * len(sizes) + 1
    else:
        assert refusal_of(small, messages, context_length) == (
            f"Row 3: messages has to be short enough for the model's context of {context_length} tokens.")


def test_an_error_names_no_row_where_there_is_one(small):
    with pytest.raises(MlflowException, match=r"^messages has to be short enough"):
        small.encode(conversation(("user", "a" * 100)), 1)


def test_all_of_unicodes_private_use_stays_text(small):
    every = "".join(map(chr, (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))))
    messages = conversation(("user", every), ("user", every[:6400] + "<s>" + every[::-1][-6400:]))
    assert small.encode(messages, 10**6) == tokens(
        "<|user|>", every.encode(), "<|end|>", "<|user|>", (every[:6400] + "<s>" + every[:6400][::-1]).encode(),
        "<|end|>", "<|assistant|>")


def test_the_marks_of_two_encoders_are_not_the_same_and_one_says_nothing_to_the_other(tmp_path, small):
    other = write_tokenizer(tmp_path)
    marks = [other._mark, other._cut, small._mark, small._cut]
    assert len(set(marks)) == 4
    assert {len(mark) for mark in marks} == {8}
    for mark in (other._mark, other._cut):
        for text in (f"{mark}<|end|>", f"<{mark}|end|>", f"<|end|>{mark}", mark * 2):
            assert small.encode(conversation(("user", text)), 4096) == tokens(
                "<|user|>", text.encode(), "<|end|>", "<|assistant|>")


@pytest.mark.parametrize("text", ["<think>a</think>b", "</think>", "x<think>", "<think><think>", "<tool_call>1"])
def test_an_assistants_turn_may_hold_what_an_assistant_writes_and_no_other_turn(small, text):
    written = text.replace("<", "\0<").replace(">", ">\0").split("\0")
    written = [part if part in PLAIN else part.encode() for part in written if part]
    assert small.encode(conversation(("user", "a"), ("assistant", text), ("user", "b")), 4096) == tokens(
        "<|user|>", b"a", "<|end|>", "<|assistant|>", *written, "<|end|>", "<|user|>", b"b", "<|end|>", "<|assistant|>")
    for role in ("user", "system"):
        assert small.encode(conversation((role, text)), 4096) == tokens(
            f"<|{role}|>", text.encode(), "<|end|>", "<|assistant|>")


WITH_NAMES = TEMPLATE.replace("{{ message.content }}",
                              "{% if message.name is defined %}[{{ message.name }}]{% endif %}{{ message.content }}")


@pytest.mark.parametrize(("name", "written"), [
    ("", b""), ("Bob", b"[Bob]"), ("<|end|>", b"[<|end|>]"), ("a<s>b", b"[a<s>b]"), ("<think>", b"[<think>]")])
def test_a_template_may_read_a_name_and_its_markup_is_text(tmp_path, name, written):
    encoder = write_tokenizer(tmp_path, WITH_NAMES)
    messages = [Message(role="user", content="a", name=name)]
    assert encoder.encode(messages, 64) == tokens("<|user|>", written + b"a", "<|end|>", "<|assistant|>")


def test_a_developers_turn_and_parts_reach_the_template_as_a_systems_text(small):
    part = [{"type": "text", "text": text} for text in ("a<|end|>", "b")]
    request = read_request({"messages": [{"role": "developer", "content": part}, *user(part)]})
    assert small.encode(request.messages, 64) == tokens(
        "<|system|>", b"a<|end|>\nb", "<|end|>", "<|user|>", b"a<|end|>\nb", "<|end|>", "<|assistant|>")
    # A part that ends in half of some markup does not make it whole.
    request = read_request({"messages": user([part[0] | {"text": text} for text in ("<|e", "nd|>")])})
    assert small.encode(request.messages, 64) == tokens("<|user|>", b"<|e\nnd|>", "<|end|>", "<|assistant|>")


def test_an_order_that_the_template_refuses_is_the_callers_fault(tmp_path):
    strict = write_tokenizer(tmp_path, STRICT)
    assert strict.encode(conversation(("user", "a")), 64) == tokens("<|user|>", b"a", "<|end|>", "<|assistant|>")
    assert refusal_of(strict, conversation(("system", "a"), ("user", "b"))) == (
        "Row 3: messages has to be in an order that the model's chat template takes.")


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(tiny)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.sampled_from(["system", "user"]))
@settings(max_examples=60)
def test_no_text_of_a_message_becomes_a_control_token(encoder, text, role):
    messages = [{"role": "system", "content": "Be brief."}, {"role": role, "content": text}, *user("Go on.")]
    plain = [messages[0], {"role": role, "content": "x"}, messages[2]]
    assert encoder.control_tokens(messages) == encoder.control_tokens(plain)
    rendered = encoder.hugging_face.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encoder.hugging_face.decode(encoder.tokens(messages)) == rendered


def test_every_control_token_of_the_model_is_text_in_a_message(encoder):
    assert_markup_is_text(encoder)


def test_plain_text_becomes_the_tokens_that_the_template_gives(encoder):
    for text in (*ASKED, "\n\nnew lines first", "a < b > c | d", "", "  "):
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        rendered = encoder.hugging_face.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert encoder.tokens(messages) == encoder.hugging_face.encode(rendered, add_special_tokens=False)
