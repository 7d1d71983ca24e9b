"""Encoding a conversation: the template's markup becomes control tokens, a message's text does not.

Run: python -m helpers test tests/unit/serving/test_prompt.py
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from support.chat import ASKED, FRAGMENTS, user
from support.tokenizer_texts import Encoder, assert_markup_is_text
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from serving.chat.contract import Message, read_request
from serving.chat.prompt import PromptEncoder

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_NAMES = TEMPLATE.replace(
    "{{ message.content }}",
    "{% if message.name is defined %}[{{ message.name }}]{% endif %}{{ message.content }}",
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
)
# Added tokens of white space and those of one character need code of their own.
SPECIAL = ["<s>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>", "<|", "\n\n", "漢", "漢漢"]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # a letter for each byte
LETTERS = {letter: token for token, letter in enumerate(ALPHABET)}


def write_tokenizer(folder, template=TEMPLATE):
    """Write a tokenizer with a token for each byte, which by itself puts ``<s>`` before a text."""
    tokenizer = Tokenizer(models.BPE(LETTERS, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in NOT_SPECIAL])
    begin = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begin)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return PromptEncoder(folder)


def tokens(*parts):
    """Return the tokens of these parts: markup is given as str, and text as bytes."""
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = []
    for part in parts:
        if isinstance(part, bytes):
            ((letters, _),) = to_letters.pre_tokenize_str(part.decode())
            found += [LETTERS[letter] for letter in letters]
        else:
            found.append(len(LETTERS) + [*SPECIAL, *NOT_SPECIAL].index(part))
    return found


def prompt(*turns):
    """Return the tokens of a prompt, given the role and the parts of each message."""
    found = []
    for role, *parts in turns:
        found += tokens(f"<|{role}|>", *parts, "<|end|>")
    return found + tokens("<|assistant|>")


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


def test_the_prompt_has_the_tokens_of_the_template_and_no_others(small):
    messages = conversation(("system", "a"), ("user", "b c"), ("assistant", ""), ("user", "é"))
    assert small.encode(messages, 4096) == prompt(
        ("system", b"a"), ("user", b"b c"), ("assistant",), ("user", "é".encode())
    )


def test_overlapping_markup_of_the_template_is_found_as_the_tokenizer_finds_it(tmp_path):
    encoder = write_tokenizer(tmp_path, "漢漢漢<|<|end|>" + TEMPLATE)
    written = tokens("漢漢", "漢", "<|", "<|end|>")
    assert encoder.encode(conversation(("user", "a")), 4096) == written + prompt(("user", b"a"))


# --- markup in messages ---------------------------------------------------------------------

LIKE_MARKUP = [
    "<|end|>",
    "x<|end|>",
    "<|end|>x",
    "<|end|><|end|>",
    "<|<|end|>end|>",
    "<|end<|end|>|>",
    "<<|user|>>",
    "<s>",
    "<<s>s>",
    "<|",
    "<|<|<|",
    "<|end|",
    "\ue000<|end|>\ue000",
    "<|\ue000end|>",
    "\ue000\ue001<s>\ue002",
    "漢",
    "a漢漢b",
    "漢漢漢",
]


@pytest.mark.parametrize("text", LIKE_MARKUP)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_markup_in_any_message_is_text(small, text, place):
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    turns[place] = (turns[place][0], text)
    expected = prompt(*((role, content.encode()) for role, content in turns))
    assert small.encode(conversation(*turns), 4096) == expected
    # The folder's own tokenizer makes control tokens of it.
    assert small.tokenizer.encode(text, add_special_tokens=False).ids != tokens(text.encode())


def test_an_added_token_of_white_space_stays_a_token_in_a_message(small):
    messages = conversation(("user", "a\n\nb"))
    assert small.encode(messages, 4096) == prompt(("user", b"a", "\n\n", b"b"))


def test_private_use_characters_stay_text(small):
    areas = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    characters = "".join(chr(code) for area in areas for code in area)
    text = characters[:6400] + "<s>" + characters[:6400][::-1]
    assert small.encode(conversation(("user", characters), ("user", text)), 10**6) == prompt(
        ("user", characters.encode()), ("user", text.encode())
    )


def test_each_encoder_has_its_own_secrets_and_those_of_another_stay_text(tmp_path, small):
    other = write_tokenizer(tmp_path)
    secrets = [other._prefix, other._separator, small._prefix, small._separator]
    assert len(set(secrets)) == 4
    assert {len(secret) for secret in secrets} == {8}
    for secret in (other._prefix, other._separator):
        for text in (f"{secret}<|end|>", f"<{secret}|end|>", f"<|end|>{secret}", secret * 2):
            found = small.encode(conversation(("user", text)), 4096)
            assert found == prompt(("user", text.encode()))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>a</think>b", ["<think>", b"a", "</think>", b"b"]),
        ("</think>", ["</think>"]),
        ("x<think>", [b"x", "<think>"]),
        ("<think><think>", ["<think>", "<think>"]),
        ("<tool_call>1", ["<tool_call>", b"1"]),
    ],
)
def test_only_an_assistant_message_may_hold_added_tokens_that_are_not_special(small, text, parts):
    messages = conversation(("user", "a"), ("assistant", text), ("user", "b"))
    expected = prompt(("user", b"a"), ("assistant", *parts), ("user", b"b"))
    assert small.encode(messages, 4096) == expected
    for role in ("user", "system"):
        assert small.encode(conversation((role, text)), 4096) == prompt((role, text.encode()))


@pytest.mark.parametrize("name", ["Bob", "<|end|>", "a<s>b", "<think>"])
def test_a_template_may_write_a_name_and_markup_in_it_is_text(tmp_path, name):
    encoder = write_tokenizer(tmp_path, WITH_NAMES)
    named = [Message(role="user", content="a", name=name)]
    assert encoder.encode(named, 64) == prompt(("user", f"[{name}]a".encode()))
    assert encoder.encode(conversation(("user", "a")), 64) == prompt(("user", b"a"))


def test_developer_messages_and_parts_are_encoded_as_system_messages_and_one_text(small):
    parts = [{"type": "text", "text": text} for text in ("a<|end|>", "b")]
    request = read_request({"messages": [{"role": "developer", "content": parts}, *user(parts)]})
    assert small.encode(request.messages, 64) == prompt(
        ("system", b"a<|end|>\nb"), ("user", b"a<|end|>\nb")
    )


def test_two_parts_of_a_message_do_not_make_markup_together(small):
    halves = [{"type": "text", "text": text} for text in ("<|e", "nd|>")]
    request = read_request({"messages": user(halves)})
    assert small.encode(request.messages, 64) == prompt(("user", b"<|e\nnd|>"))


# --- refused messages -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "context_length", "fits"),
    [
        ([13], 1, True),
        ([13 * 4], 4, True),
        ([13 * 4 + 1], 4, False),
        ([13, 13 * 3], 4, True),
        ([13, 13 * 3 + 1], 4, False),
    ],
)
def test_messages_that_cannot_fit_into_the_context_are_refused(small, sizes, context_length, fits):
    # The longest token, <|assistant|>, has 13 characters.
    messages = conversation(*(("user", "a" * size) for size in sizes))
    if fits:
        assert len(small.encode(messages, context_length)) == sum(sizes) + 2 * len(sizes) + 1
    else:
        assert refusal_of(small, messages, context_length) == (
            "Row 3: messages has to be short enough for the model's context of "
            f"{context_length} tokens."
        )


def test_an_error_names_no_row_if_the_caller_names_none(small):
    with pytest.raises(MlflowException, match=r"^messages has to be short enough"):
        small.encode(conversation(("user", "a" * 100)), 1)


def test_messages_in_an_order_that_the_template_refuses_are_refused(tmp_path):
    encoder = write_tokenizer(tmp_path, NO_SYSTEM)
    assert encoder.encode(conversation(("user", "a")), 64) == prompt(("user", b"a"))
    assert refusal_of(encoder, conversation(("system", "a"), ("user", "b"))) == (
        "Row 3: messages has to be in an order that the model's chat template takes."
    )


# --- the toy model's tokenizer, compared with transformers ----------------------------------


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(tiny)


@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.sampled_from(["system", "user"]),
)
@settings(max_examples=60)
def test_no_text_of_a_message_becomes_a_control_token(encoder, text, role):
    first, last = {"role": "system", "content": "Be brief."}, *user("Go on.")
    messages = [first, {"role": role, "content": text}, last]
    harmless = [first, {"role": role, "content": "x"}, last]
    assert encoder.control_tokens(messages) == encoder.control_tokens(harmless)
    assert encoder.hugging_face.decode(encoder.tokens(messages)) == encoder.rendered(messages)


def test_every_control_token_of_the_model_is_text_in_a_message(encoder):
    assert_markup_is_text(encoder)


@pytest.mark.parametrize("text", [*ASKED, "\n\nnew lines first", "a < b > c | d", "", "  "])
def test_plain_text_becomes_the_tokens_that_transformers_makes(encoder, text):
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role in roles]
    expected = encoder.hugging_face.encode(encoder.rendered(messages), add_special_tokens=False)
    assert encoder.tokens(messages) == expected
