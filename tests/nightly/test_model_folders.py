"""Tiny models with two sets of rotary factors or a window, held against transformers; any text in any tokenizer.

Run: python -m helpers test tests/nightly/test_model_folders.py
"""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat import load_chat, user
from support.conversations import share_nothing
from support.phi3_layout import export_phi3
from support.tokenizer_kinds import KINDS, Kind
from transformers import AutoModelForCausalLM

from serving.chat.contract import Message, Refusal
from serving.chat.engine import Row
from serving.chat.folder import read_config
from serving.chat.prompt import PromptEncoder


class Model:
    """A tiny model: served, and by transformers, without cache."""

    def __init__(self, torch_folder, onnx_folder):
        self.folder = onnx_folder
        self.config = read_config(onnx_folder)
        self._model = AutoModelForCausalLM.from_pretrained(torch_folder, dtype=torch.float32).eval()
        self.overhead = len(
            PromptEncoder(onnx_folder).encode([Message(role="user", content="")], 1000)
        )

    def text(self, size, seed=0, same=0):
        """Return a message that makes a prompt of ``size`` tokens: digits and blanks, a token each.

        Its first ``same`` characters are those of seed 0.
        """
        digits, others = random.Random(seed), random.Random(0)
        letters = [
            " " if place % 2 else (others if place < same else digits).choice("0123456789")
            for place in range(size - self.overhead)
        ]
        return "".join(letters)

    def check(self, rows, count):
        """Compare each token of the rows with what transformers finds likeliest, given all before it.

        One reading gives them all: no answer may cross the switch, so all of it is read with the
        same factors.
        """
        assert len(rows) == count
        for row in rows:
            with torch.no_grad():
                logits = self._model(
                    torch.tensor([row.prompt + row.seen[:-1]]), use_cache=False
                ).logits[0]
            for place, (token, found) in enumerate(
                zip(row.seen, logits[len(row.prompt) - 1 :], strict=True)
            ):
                assert found[token] >= found.max() - 1e-3, f"token {place} behind {len(row.prompt)}"


@pytest.fixture
def taken(monkeypatch):
    """Return the rows that took a token, each with the tokens ``seen``."""
    rows, take = [], Row.take

    def note(row, token, end_tokens):
        if row not in rows:
            row.seen = []
            rows.append(row)
        row.seen.append(token)
        take(row, token, end_tokens)

    monkeypatch.setattr(Row, "take", note)
    return rows


@pytest.fixture
def served(request):
    """Return what loads a chat model on a folder for one test."""

    def load(model, **settings):
        chat = load_chat(model.folder, **settings)
        request.addfinalizer(chat.close)
        return chat

    return load


def ask(chat, text, **fields):
    (completion,) = chat.predict(None, {"messages": user(text)} | fields)
    return completion


def longrope(folder, switch, context_length):
    return Model(
        *export_phi3(
            folder,
            max_position_embeddings=context_length,
            original_max_position_embeddings=switch,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1 + n / 10 for n in range(8)],
            },
        )
    )


def windowed(folder, *options, context_length=256, window=64, **more):
    return Model(
        *export_phi3(
            folder,
            *options,
            max_position_embeddings=context_length,
            sliding_window=window,
            original_max_position_embeddings=context_length,
            **more,
        )
    )


@pytest.fixture(scope="module", params=[(64, 256), (160, 512)], ids=["64 of 256", "160 of 512"])
def two_ropes(request, tmp_path_factory):
    """Return a model with two sets of rotary factors, which is served up to the length where they change."""
    model = longrope(tmp_path_factory.mktemp("longrope"), *request.param)
    assert model.config.context_length == request.param[0]
    return model


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    model = windowed(tmp_path_factory.mktemp("window"))
    assert model.config.context_length == 64
    return model


@pytest.fixture(scope="module")
def windowed_cache(tmp_path_factory):
    """Return a model whose folder asks for a cache of the window's size: the builder does so where layers are listed.

    Here its cache has room for all tokens, and the graph looks at those in the window.
    """
    model = windowed(tmp_path_factory.mktemp("windowed-cache"), layer_types=True)
    decoder = json.loads((model.folder / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["sliding_window"]["layers"] == [0, 1]
    return model


def test_up_to_the_switch_of_its_rotary_factors_a_model_answers_as_by_transformers(
    two_ropes, served, taken
):
    chat, switch = served(two_ropes), two_ropes.config.context_length
    sizes = [20, switch - 20, switch - 9, switch - 2, switch - 1]
    for seed, size in enumerate(sizes):
        usage = ask(chat, two_ropes.text(size, seed), max_tokens=min(8, switch - size))["usage"]
        assert usage["prompt_tokens"] == size
    chat.predict(
        None,
        [
            {"messages": user(two_ropes.text(size, seed)), "max_tokens": min(8, switch - size)}
            for seed, size in enumerate(sizes)
        ],
    )
    two_ropes.check(taken, 2 * len(sizes))


def test_beyond_the_switch_a_prompt_and_an_answer_are_refused_by_name(two_ropes, served, taken):
    chat, switch = served(two_ropes), two_ropes.config.context_length
    for size in (switch, switch + 1, switch + 60):
        with pytest.raises(
            Refusal, match=f"^messages has to be fewer than {switch} tokens, the model's context"
        ):
            ask(chat, two_ropes.text(size))
    for size in (switch - 30, switch - 1):
        with pytest.raises(
            Refusal, match=f"^max_tokens has to be a whole number from 1 to {switch - size} after"
        ):
            ask(chat, two_ropes.text(size), max_tokens=switch - size + 1)
        assert (
            ask(chat, two_ropes.text(size), max_tokens=switch - size)["usage"]["total_tokens"]
            <= switch
        )
    answer = ask(chat, two_ropes.text(switch - 5))  # 16 where a request does not say
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == (
        "length",
        5,
    )
    two_ropes.check(taken, 3)


def test_within_its_window_a_model_answers_as_by_transformers(window, served, taken):
    chat = share_nothing(served(window))
    sizes = (20, 40, 50, 56, 60, 62, 63)
    for size in sizes:
        ask(chat, window.text(size, size), max_tokens=min(14, 64 - size))
    chat.predict(
        None,
        [
            {"messages": user(window.text(size, size)), "max_tokens": min(8, 64 - size)}
            for size in sizes
        ],
    )
    window.check(taken, 2 * len(sizes))
    chat = served(window)
    for size in (40, 50, 56, 63):
        ask(chat, window.text(size), max_tokens=min(14, 64 - size))
    assert [row.reused_tokens > 0 for row in taken[-4:]] == [False, True, True, True]
    window.check(taken[-4:], 4)


def test_nothing_goes_beyond_a_window_that_the_graph_does_not_know(window, served):
    chat = served(window)
    for size in (64, 65, 80, 81, 100, 255):
        with pytest.raises(
            Refusal, match=r"^messages has to be fewer than 64 tokens, the model's context\.$"
        ):
            ask(chat, window.text(size))
    for size in (20, 50, 63):
        with pytest.raises(
            Refusal, match=f"^max_tokens has to be a whole number from 1 to {64 - size} after"
        ):
            ask(chat, window.text(size), max_tokens=65 - size)
    assert ask(chat, window.text(60))["usage"] == {
        "prompt_tokens": 60,
        "completion_tokens": 4,
        "total_tokens": 64,
    }


def test_a_window_that_the_graph_knows_is_no_bound(tmp_path, served, taken):
    model = windowed(tmp_path, "windowed_kv_cache=false", layer_types=True)  # as helpers export it
    assert model.config.context_length == 256
    chat = served(model)
    chat.predict(
        None,
        [
            {"messages": user(model.text(size, size)), "max_tokens": 14}
            for size in (20, 30, 63, 100, 60)
        ],
    )
    for size in (100, 150, 200, 180):
        ask(chat, model.text(size), max_tokens=14)
    model.check(taken, 9)
    assert [row.reused_tokens > 0 for row in taken[-3:]] == [True] * 3


def test_a_folder_with_a_windowed_cache_answers_lone_prompts_as_transformers_does(
    windowed_cache, served, taken
):
    chat = served(windowed_cache)
    for size in (50, 60, 64, 65, 100, 129, 200, 240):
        ask(chat, windowed_cache.text(size, size), max_tokens=15)
    windowed_cache.check(taken, 8)


def test_a_folder_with_a_windowed_cache_answers_a_short_prompt(windowed_cache, served, taken):
    ask(served(windowed_cache), windowed_cache.text(20), max_tokens=5)
    windowed_cache.check(taken, 1)


@pytest.mark.parametrize("sizes", [(30, 40), (60, 66), (100, 101)])
def test_a_folder_with_a_windowed_cache_answers_several_prompts(
    windowed_cache, served, taken, sizes
):
    chat = served(windowed_cache)
    chat.predict(
        None,
        [{"messages": user(windowed_cache.text(size, size)), "max_tokens": 26} for size in sizes],
    )
    windowed_cache.check(taken, len(sizes))


@pytest.mark.parametrize("sizes", [(100, 130), (150, 190), (150, 110)])
def test_a_folder_with_a_windowed_cache_answers_the_next_turn(windowed_cache, served, taken, sizes):
    chat = served(windowed_cache)
    for size in sizes:
        ask(chat, windowed_cache.text(size), max_tokens=14)
    windowed_cache.check(taken, len(sizes))


def test_usage_counts_the_whole_prompt_whatever_the_tokenizer_would_cut(tmp_path, served):
    model = Model(
        *export_phi3(tmp_path, max_position_embeddings=256, original_max_position_embeddings=256)
    )
    file = model.folder / "tokenizer.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text(encoding="utf-8"))
            | {
                "truncation": {
                    "direction": "Right",
                    "max_length": 8,
                    "strategy": "LongestFirst",
                    "stride": 0,
                }
            }
        ),
        encoding="utf-8",
    )
    assert ask(served(model), model.text(100), max_tokens=1)["usage"]["prompt_tokens"] == 100


FRAGMENTS = [
    "<|end|>",
    "<s>",
    "<|user|>",
    "<|assistant|>",
    "<think>",
    "</s>",
    "<unk>",
    "<|",
    "|>",
    "<",
    ">",
    "s>",
    "<|en",
    "d|>",
    "think",
    " ",
    "  ",
    "\n",
    "\t",
    "x",
    "é",
    "🙂",
    "\ue000",
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    return Kind(request.param, tmp_path_factory.mktemp("kind"))


@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
@settings(max_examples=60)
def test_any_text_is_text(kind, text):
    kind.check_text(text)
