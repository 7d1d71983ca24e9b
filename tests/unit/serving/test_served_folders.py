"""A model's folder, whoever wrote it: it is served as the model that it is, or refused before anything is logged.

Three parts: what genai_config.json may say; tiny models with two sets of rotary factors or a sliding window, held
against transformers; and tokenizers and templates of each kind.
"""

import functools
import json
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from support.chat import load_chat, user
from support.phi3_layout import PHI4_TEMPLATE, export_phi3
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from serving.chat_model import Message, PromptEncoder, Refusal, Row, Sampler, check_folder, read_config


def unusable(function, folder):
    """Return what is wrong with a folder, as the Refusal says it: one that shows no path."""
    with pytest.raises(Refusal) as refusal:
        function(folder)
    assert (refusal.value.code, refusal.value.error_code) == ("unusable_model", "INVALID_STATE")
    assert not {*folder.parts[1:]} & set(refusal.value.message.replace("/", " ").replace(":", " ").split())
    return refusal.value.message.removeprefix("This folder is no model that can be served: ").removesuffix(".")


# --- genai_config.json ----------------------------------------------------------------------

NO_JSON = "genai_config.json is missing, or not an object in JSON"
NO_DECODER = "genai_config.json describes something else than a decoder of text"
A_LIBRARY = "genai_config.json asks for a library of its own, which is code"
LACKS = "genai_config.json lacks a context_length, eos_token_id or vocab_size that can be"
NO_GRAPH = "genai_config.json names no ONNX file in its folder"
# https://github.com/microsoft/onnxruntime-genai/blob/main/src/python/py/models/builders/base.py, make_genai_config
WRITTEN = {
    "model": {"bos_token_id": 1, "context_length": 256, "decoder": {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []}, "filename": "model.onnx",
        "head_size": 16, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 4,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask",
                   "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"}},
        "eos_token_id": 7, "pad_token_id": 3, "type": "phi3", "vocab_size": 100},
    "search": {"do_sample": False, "max_length": 200, "num_beams": 1, "past_present_share_buffer": True}}
LEFT_OUT = "left out"


def changed(**changes):
    """Return the text with fields changed: ``decoder__filename`` is one of ``model.decoder``."""
    text = json.loads(json.dumps(WRITTEN))
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = text if sections == ["top"] else text["search" if sections == ["search"] else "model"]
        place = place["decoder"] if sections == ["decoder"] else place
        place.pop(field, None)
        if value is not LEFT_OUT:
            place[field] = value
    return json.dumps(text)


def write_config(folder, text, graph=b"a graph"):
    (folder / "genai_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "model.onnx").write_bytes(graph)
    return folder


WINDOW = {"window_size": 64, "slide_key_value_cache": False, "slide_inputs": False, "layers": [], "cache_slack": 0}
READ = {
    "one end token": ({}, {}),
    "a list of them": ({"eos_token_id": [7, 8]}, {"end_tokens": (7, 8)}),
    "a list with what is none": ({"eos_token_id": [-1, 8]}, {"end_tokens": (8,)}),
    "end token 0": ({"eos_token_id": 0, "pad_token_id": -1}, {"end_tokens": (0,), "pad": 0}),
    "the last of the vocabulary": ({"eos_token_id": 99, "pad_token_id": 99}, {"end_tokens": (99,), "pad": 99}),
    "pad 0": ({"pad_token_id": 0}, {"pad": 0}),
    **{f"pad {pad}": ({"pad_token_id": pad}, {"pad": 7}) for pad in (LEFT_OUT, -1, 100)},
    "a context_length of 1": ({"context_length": 1}, {"context_length": 200}),
    "no search": ({"top__search": LEFT_OUT}, {}),
    "a window": ({"decoder__sliding_window": WINDOW}, {"context_length": 64}),
    "a window without layers": ({"decoder__sliding_window": {"window_size": 64}}, {"context_length": 64}),
    "a window beyond the context": ({"decoder__sliding_window": WINDOW | {"window_size": 4096}}, {}),
    "a window of 0": ({"decoder__sliding_window": WINDOW | {"window_size": 0}}, {}),
    "a window of -1": ({"decoder__sliding_window": WINDOW | {"window_size": -1}}, {}),
    "a graph in a folder": ({"decoder__filename": "onnx/model.onnx"}, {}),
}


@pytest.mark.parametrize("name", READ)
def test_a_config_is_read_as_the_engine_reads_it(tmp_path, name):
    changes, expected = READ[name]
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"a graph")
    config = read_config(write_config(tmp_path, changed(**changes)))
    expected = {"context_length": 256, "end_tokens": (7,), "pad": 3, "vocab_size": 100} | expected
    assert {field: getattr(config, field) for field in expected} == expected
    assert config.rope_switch == config.context_length


# What the published folders say of themselves: context, end tokens, pad, vocabulary, and the decoder's other keys.
PUBLISHED = {
    "Phi-3-mini-4k, 2024": ("phi3", 4096, [32000, 32001, 32007], 32000, 32064, {}),
    "Phi-3-mini-128k, one end token": ("phi3", 131072, 32007, 32000, 32064, {}),
    "Phi-3.5-mini": ("phi3", 131072, [32007, 32001, 32000], 32000, 32064, {}),
    "Phi-4-mini": ("phi3", 131072, [200020, 199999], 199999, 200064, {}),
    "Llama-3.2": ("llama", 131072, [128001, 128008, 128009], 128004, 128256, {}),
    "Qwen2.5": ("qwen2", 32768, [151645, 151643], 151643, 151936, {}),
    "DeepSeek-R1-Distill-Qwen": ("qwen2", 131072, 151643, 151643, 151936, {}),
    "Mistral v0.1, a window": ("mistral", 32768, 2, 2, 32000, {"sliding_window": WINDOW | {"window_size": 4096}}),
    "Gemma 2": ("gemma2", 8192, [1, 107], 0, 256000, {}),
    "DirectML": ("phi3", 4096, 32007, 32000, 32064, {"session_options": {"provider_options": [{"dml": {}}]}}),
    "CUDA": ("phi3", 4096, 32007, 32000, 32064, {"session_options": {"provider_options": [
        {"cuda": {"enable_cuda_graph": "0"}}]}}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_folder_is_read(tmp_path, name):
    kind, context_length, ends, pad, vocab_size, decoder = PUBLISHED[name]
    text = json.loads(changed(type=kind, context_length=context_length, eos_token_id=ends, pad_token_id=pad,
                              vocab_size=vocab_size, search__max_length=context_length))
    text["model"]["decoder"] |= decoder
    config = read_config(write_config(tmp_path, json.dumps(text)))
    assert (config.context_length, config.pad, config.vocab_size) == (
        4096 if "sliding_window" in decoder else context_length, pad, vocab_size)
    assert config.end_tokens == tuple(ends if isinstance(ends, list) else [ends])


REFUSED = {
    **{f"{name} in its place": (raw, NO_JSON) for name, raw in {
        "nothing": b"", "a list": b"[]", "a number": b"5", "no JSON": b"model: {}", "half": b'{"model": {',
        "NUL": b"\0" + changed().encode(), "bytes": b'{"a": "\xff"}', "a BOM": b"\xef\xbb\xbf" + changed().encode(),
        "UTF-16": changed().encode("utf-16"), "depth": b"[" * 100_000, "depth that ends":
        b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "digits": changed(zzz=0).replace(
            '"zzz": 0', '"zzz": ' + "1" * 5000).encode()}.items()},
    **{f"{name} of the model": (changed(**{name: {"filename": "model.onnx"}}), NO_DECODER)
       for name in ("encoder", "vision", "speech")},
    **{f"a decoder that is {decoder!r}": (changed(decoder=decoder), NO_DECODER) for decoder in (None, [], "a", 5)},
    "no model": (changed(top__model=LEFT_OUT), NO_DECODER),
    "a model that is a list": (changed(top__model=[]), NO_DECODER),
    **{f"a library, {place}": (changed(**{place: {"custom_ops_library": "evil.so"}}), A_LIBRARY)
       for place in ("top__x", "search__x", "session_options", "decoder__session_options", "decoder__x")},
    "a library in a pipeline": (changed(decoder__pipeline=[{"a": {"session_options": {
        "custom_ops_library": "a"}}}]), A_LIBRARY),
    "a library, written otherwise": (changed(decoder__x=1).replace('"x"', '"custom_ops\\u005flibrary"'), A_LIBRARY),
    **{f"end tokens {ends!r}": (changed(eos_token_id=ends), LACKS) for ends in (
        LEFT_OUT, None, [], -1, [-1], "7", True, 100, [7, 100], 2**40, {"a": 7})},
    **{f"a vocabulary of {size!r}": (changed(vocab_size=size), LACKS) for size in (
        LEFT_OUT, None, 0, -1, 7, "100", True)},
    "no length at all": (changed(context_length=LEFT_OUT, search__max_length=LEFT_OUT), LACKS),
    "two lengths that are none": (changed(context_length=0, search__max_length="200"), LACKS),
    "no graph": (changed(decoder__filename="other.onnx"), NO_GRAPH),
    "no graph in another folder": (changed(decoder__filename="/nowhere/other.onnx"), NO_GRAPH),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_that_cannot_be_served_is_refused_before_anything_is_logged(tmp_path, name):
    text, says = REFUSED[name]
    write_tokenizer(write_config(tmp_path, text), bytes_kind())
    assert unusable(read_config, tmp_path) == unusable(check_folder, tmp_path) == says


def test_a_missing_config_is_refused(tmp_path):
    assert unusable(check_folder, tmp_path) == NO_JSON
    assert unusable(check_folder, tmp_path / "nowhere") == NO_JSON
    (tmp_path / "genai_config.json").mkdir()
    assert unusable(check_folder, tmp_path) == NO_JSON


# Each with why it can't be served.
OPEN = {
    "a graph elsewhere": ({"decoder__filename": "../model.onnx"}, "is not of the folder that is logged"),
    "a graph at an absolute path": ({"decoder__filename": str(ROOT / "LICENSE")}, "is not of the folder"),
    "a name of 300 letters": ({"decoder__filename": "x" * 300}, "OSError, no Refusal"),
    "no name": ({"decoder__filename": ""}, "the sentence shows the folder's own name"),
    "no file's name": ({"decoder__filename": LEFT_OUT}, "the sentence says that None is missing"),
    "a name that is a number": ({"decoder__filename": 5}, "the sentence says that 5 is missing"),
    "a pipeline": ({"decoder": {"pipeline": [{"a": {"filename": "model.onnx"}}]}}, "None is missing"),
    "an embedding": ({"embedding": {"filename": "model.onnx"}}, "the engine refuses it when it loads"),
    "a context beyond 32 bits": ({"context_length": 10**30}, "the engine refuses it when it loads"),
    "a vocabulary beyond 32 bits": ({"vocab_size": 10**30}, "the engine refuses it when it loads"),
    "NaN": ({"search__top_p": float("nan")}, "the engine refuses it when it loads"),
    "a window that is null": ({"decoder__sliding_window": None}, "the engine refuses it when it loads"),
    "layers that are null": ({"decoder__sliding_window": WINDOW | {"layers": None}}, "the engine refuses it"),
    "a window in words": ({"decoder__sliding_window": WINDOW | {"window_size": "64"}}, "the engine refuses it"),
    **{f"a pad of {pad!r}": ({"pad_token_id": pad}, "the engine refuses it") for pad in (None, [3], "3", True)},
    **{f"a context_length of {size!r}": ({"context_length": size}, "the engine refuses it")
       for size in (LEFT_OUT, None, 0, -5, "256", True, [256])},
    "a search that is none": ({"top__search": [1]}, "the engine refuses it"),
    "a field that nobody knows": ({"zzz": {"a": 1}}, "the engine refuses it"),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_the_engine_or_another_machine_would_refuse_is_refused_before_it_is_logged(tmp_path, name):
    folder = tmp_path / "weights"
    folder.mkdir()
    (tmp_path / "model.onnx").write_bytes(b"a graph")
    write_tokenizer(write_config(folder, changed(**OPEN[name][0])), bytes_kind())
    says = unusable(check_folder, folder)
    assert says in (NO_GRAPH, NO_DECODER, LACKS, "onnxruntime-genai can't read its genai_config.json")


@pytest.mark.parametrize(("changes", "expected"), [
    ({"decoder__sliding_window": WINDOW | {"window_size": 64.0}}, 64), ({"context_length": 128.0}, 128)])
def test_a_whole_number_may_be_written_with_a_point(tmp_path, changes, expected):
    assert read_config(write_config(tmp_path, changed(**changes))).context_length == expected


@pytest.mark.parametrize(("graph", "switch"), [
    (b"", 256),
    (b"\n\x1c/model/constants/INT64/64\x12,/model/rope_caches_subgraph/Greater/output_0", 64),
    (b"\n\x1c/model/constants/TensorProto.INT64/0D/64\x12,/model/rope_caches_subgraph/Greater/output_0", 64),
    (b"/model/constants/INT64/4096\x12,/model/rope_caches_subgraph/Greater/output_0", 256),  # beyond the context
    (b"/model/constants/INT64/64\x12,/model/attn/Greater/output_0", 256),
    (b"/model/constants/INT64/9\x12,/x\n/model/constants/INT64/64\x12\x0a/model/rope_caches_subgraph/Greater", 64),
])
def test_the_graph_says_where_its_rotary_factors_change(tmp_path, graph, switch):
    assert read_config(write_config(tmp_path, changed(), graph)).rope_switch == switch


# --- rotary factors and windows -------------------------------------------------------------


class Model:
    """A tiny model: served, and by transformers, without cache."""

    def __init__(self, torch_folder, onnx_folder):
        self.folder, self.config = onnx_folder, read_config(onnx_folder)
        self._model = AutoModelForCausalLM.from_pretrained(torch_folder, dtype=torch.float32).eval()
        self.overhead = len(PromptEncoder(onnx_folder).encode([Message(role="user", content="")], 1000))

    def text(self, size, seed=0, same=0):
        """Return a message that makes a prompt of ``size`` tokens: digits and blanks, a token each.

        Its first ``same`` characters are those of seed 0.
        """
        digits, others = random.Random(seed), random.Random(0)
        letters = [" " if place % 2 else (others if place < same else digits).choice("0123456789")
                   for place in range(size - self.overhead)]
        return "".join(letters)

    def check(self, rows, count):
        """Compare each token of the rows with what transformers finds likeliest, given all before it.

        One reading gives them all: no answer may cross the switch, so all of it is read with the same factors.
        """
        assert len(rows) == count
        for row in rows:
            with torch.no_grad():
                logits = self._model(torch.tensor([row.prompt + row.seen[:-1]]), use_cache=False).logits[0]
            for place, (token, found) in enumerate(zip(row.seen, logits[len(row.prompt) - 1:], strict=True)):
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
    return Model(*export_phi3(
        folder, max_position_embeddings=context_length, original_max_position_embeddings=switch,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1 + n / 10 for n in range(8)]}))


def windowed(folder, *options, context_length=256, window=64, **more):
    return Model(*export_phi3(folder, *options, max_position_embeddings=context_length, sliding_window=window,
                              original_max_position_embeddings=context_length, **more))


@pytest.fixture(scope="module", params=[(64, 256), (160, 512)], ids=["64 of 256", "160 of 512"])
def two_ropes(request, tmp_path_factory):
    """Return a model with two sets of factors; in the longer one, prompts of both are read in chunks."""
    model = longrope(tmp_path_factory.mktemp("longrope"), *request.param)
    assert (model.config.rope_switch, model.config.context_length) == request.param
    return model


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    model = windowed(tmp_path_factory.mktemp("window"))
    assert model.config.context_length == 64
    return model


@pytest.fixture(scope="module")
def ring(tmp_path_factory):
    """Return a model whose cache is a ring of the window's size, which the builder makes where layers are listed."""
    model = windowed(tmp_path_factory.mktemp("ring"), layer_types=True)
    decoder = json.loads((model.folder / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["sliding_window"]["layers"] == [0, 1]
    return model


def sides(model):
    """Return sizes of prompts on both sides of the switch, each with the tokens that may follow, up to 8."""
    switch, context_length = model.config.rope_switch, model.config.context_length
    sizes = [20, switch - 20, switch - 9, switch - 2, switch - 1, switch + 1, switch + 2, switch + 60,
             context_length - 9, context_length - 1]
    return [(size, min(8, (switch if size <= switch else context_length) - size)) for size in sizes]


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 4])
def test_a_prompt_on_either_side_of_the_switch_is_answered_as_by_transformers(two_ropes, served, taken, kept):
    chat = served(two_ropes, kept_conversations=kept)
    for seed, (size, most) in enumerate(sides(two_ropes)):
        usage = ask(chat, two_ropes.text(size, seed), max_tokens=most)["usage"]
        assert usage["prompt_tokens"] == size
    two_ropes.check(taken, len(sides(two_ropes)))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 4])
def test_rows_on_both_sides_of_the_switch_in_one_call(two_ropes, served, taken, kept):
    chat = served(two_ropes, kept_conversations=kept)
    chat.predict(None, [{"messages": user(two_ropes.text(size, seed)), "max_tokens": most}
                        for seed, (size, most) in enumerate(sides(two_ropes) + sides(two_ropes)[::-1])])
    two_ropes.check(taken, 2 * len(sides(two_ropes)))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "kept"), [
    ((-30, -18, -10), True), ((2, 32, 62), True), ((-12, 20), False), ((30, -6), False), ((-1, 1), False),
    ((1, 2, 40), True)], ids=str)
def test_the_next_turn_of_a_kept_conversation_stays_on_its_side(two_ropes, served, taken, sizes, kept):
    chat, switch = served(two_ropes, kept_conversations=4), two_ropes.config.rope_switch
    for size in sizes:
        ask(chat, two_ropes.text(switch + size), max_tokens=min(8, abs(size)))
    assert [row.reused > 0 for row in taken] == [False] + [kept] * (len(sizes) - 1)
    two_ropes.check(taken, len(sizes))


@pytest.mark.slow
def test_a_kept_conversation_that_differs_late_is_read_anew_from_there(two_ropes, served, taken):
    chat, switch = served(two_ropes, kept_conversations=4), two_ropes.config.rope_switch
    for size, seed, same in ((switch + 10, 0, 0), (switch + 15, 1, switch - 20), (switch + 3, 2, switch - 20)):
        ask(chat, two_ropes.text(size, seed, same), max_tokens=4)
    assert taken[1].reused > 30 and taken[2].reused > 30
    two_ropes.check(taken, 3)


@pytest.mark.slow
def test_an_answer_ends_at_the_switch_and_max_tokens_says_where(two_ropes, served, taken):
    chat, switch = served(two_ropes), two_ropes.config.rope_switch
    for size in (switch - 30, switch - 9, switch - 1):
        with pytest.raises(Refusal) as refusal:
            ask(chat, two_ropes.text(size), max_tokens=switch - size + 1)
        assert refusal.value.field == "max_tokens"
        assert refusal.value.message == (
            f"max_tokens has to be a whole number from 1 to {switch - size} after these messages.")
        assert ask(chat, two_ropes.text(size), max_tokens=switch - size)["usage"]["total_tokens"] <= switch
    answer = ask(chat, two_ropes.text(switch - 5))  # 16 where a request does not say
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 5)
    two_ropes.check(taken, 4)


@pytest.mark.slow
def test_a_prompt_of_the_switchs_size_is_answered_or_refused_for_its_size(two_ropes, served):
    try:
        ask(served(two_ropes), two_ropes.text(two_ropes.config.rope_switch))
    except Refusal as refusal:
        assert refusal.field == "messages"


@pytest.mark.slow
def test_a_chunk_size_of_the_folder_cuts_no_prompt(tmp_path, served, taken):
    model = longrope(tmp_path, 64, 256)
    text = json.loads((model.folder / "genai_config.json").read_text())
    text["search"]["chunk_size"] = 16
    (model.folder / "genai_config.json").write_text(json.dumps(text))
    ask(served(model), model.text(100), max_tokens=8)
    model.check(taken, 1)


@pytest.mark.slow
def test_the_token_that_was_chosen_is_the_one_that_is_taken(tmp_path, served, taken, monkeypatch):
    chosen, choose = [], Sampler.choose

    def note(sampler, logits):
        chosen.append(choose(sampler, logits))
        return chosen[-1]

    monkeypatch.setattr(Sampler, "choose", note)
    model = Model(*export_phi3(tmp_path, max_position_embeddings=8192, original_max_position_embeddings=8192))
    ask(served(model), model.text(4090), max_tokens=12, temperature=1.5, seed=1)
    assert taken[0].seen == chosen


@pytest.mark.slow
def test_within_its_window_a_model_answers_as_by_transformers(window, served, taken):
    chat = served(window, kept_conversations=0)
    sizes = (20, 40, 50, 56, 60, 62, 63)
    for size in sizes:
        ask(chat, window.text(size, size), max_tokens=min(14, 64 - size))
    chat.predict(None, [{"messages": user(window.text(size, size)), "max_tokens": min(8, 64 - size)} for size in sizes])
    window.check(taken, 2 * len(sizes))
    chat = served(window, kept_conversations=4)
    for size in (40, 50, 56, 63):
        ask(chat, window.text(size), max_tokens=min(14, 64 - size))
    assert [row.reused > 0 for row in taken[-4:]] == [False, True, True, True]
    window.check(taken[-4:], 4)


@pytest.mark.slow
def test_nothing_goes_beyond_a_window_that_the_graph_does_not_know(window, served):
    chat = served(window)
    for size in (64, 65, 80, 81, 100, 255):
        with pytest.raises(Refusal, match=r"^messages has to be fewer than 64 tokens, the model's context\.$"):
            ask(chat, window.text(size))
    for size in (20, 50, 63):
        with pytest.raises(Refusal, match=f"^max_tokens has to be a whole number from 1 to {64 - size} after"):
            ask(chat, window.text(size), max_tokens=65 - size)
    assert ask(chat, window.text(60))["usage"] == {"prompt_tokens": 60, "completion_tokens": 4, "total_tokens": 64}


@pytest.mark.slow
def test_a_window_that_the_graph_knows_is_no_bound(tmp_path, served, taken):
    model = windowed(tmp_path, "windowed_kv_cache=false", layer_types=True)  # as helpers export it
    assert model.config.context_length == 256
    chat = served(model, kept_conversations=4)
    chat.predict(None, [{"messages": user(model.text(size, size)), "max_tokens": 14} for size in (20, 30, 63, 100, 60)])
    for size in (100, 150, 200, 180):
        ask(chat, model.text(size), max_tokens=14)
    model.check(taken, 9)
    assert [row.reused > 0 for row in taken[-3:]] == [True] * 3


@pytest.mark.slow
def test_a_ring_answers_lone_prompts_as_transformers_does(ring, served, taken):
    chat = served(ring, kept_conversations=0)
    for size in (50, 60, 64, 65, 100, 129, 200, 240):
        ask(chat, ring.text(size, size), max_tokens=15)
    ring.check(taken, 8)


@pytest.mark.slow
def test_a_ring_answers_a_short_prompt(ring, served, taken):
    ask(served(ring, kept_conversations=0), ring.text(20), max_tokens=5)
    ring.check(taken, 1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(30, 40), (60, 66), (100, 101)])
def test_a_ring_answers_several_prompts(ring, served, taken, sizes):
    chat = served(ring, kept_conversations=0)
    chat.predict(None, [{"messages": user(ring.text(size, size)), "max_tokens": 26} for size in sizes])
    ring.check(taken, len(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(100, 130), (150, 190), (150, 110)])
def test_a_ring_answers_the_next_turn(ring, served, taken, sizes):
    chat = served(ring, kept_conversations=4)
    for size in sizes:
        ask(chat, ring.text(size), max_tokens=14)
    ring.check(taken, len(sizes))


# --- tokenizers -----------------------------------------------------------------------------

NAMES = ("s", "/s", "unk", "|user|", "|system|", "|assistant|", "|end|", "think")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = ("{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@functools.cache
def trained(kind, vocab_size=500):
    """Return a tokenizer's parts as JSON, before it has any markup."""
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split() + ["<think>", "<|end|>", "x<s>"] * 50
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.train_from_iterator(words, trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return tokenizer.to_str()
    if kind == "pieces":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=["<unk>", "<s>", "</s>",
                                                                                          *BYTES])
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(vocab_size=400, show_progress=False, unk_token="<unk>",
                                          special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(words, trainer)
    written = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    if kind == "unigram":
        written["model"]["vocab"] += [[name, -20.0] for name in BYTES]
        written["model"]["byte_fallback"] = True
    return json.dumps(written)


def without(written, words):
    """Return a tokenizer's parts without the merges that make one of these words, or go on from one."""
    written = json.loads(written)
    written["model"]["merges"] = [
        pair for pair in written["model"].get("merges", []) if not {*pair, "".join(pair)} & set(words)]
    return json.dumps(written)


def with_markup(written, twin, rstrip=(), lstrip=(), **parts):
    """Return a tokenizer with markup. A ``twin`` has it under names that no text holds, by the same numbers."""
    if twin:
        written = without(written, [f"<{name}>" for name in NAMES])
        for name in NAMES:
            written = written.replace(json.dumps(f"<{name}>"), json.dumps(f"⟦{name}⟧"))
    tokenizer = Tokenizer.from_str(written)
    for part, value in parts.items():
        setattr(tokenizer, part, value)
    left, right = "⟦⟧" if twin else "<>"
    for name in NAMES:
        token = AddedToken(left + name + right, normalized=False, special=name != "think", rstrip=name in rstrip,
                           lstrip=name in lstrip)
        (tokenizer.add_tokens if name == "think" else tokenizer.add_special_tokens)([token])
    bos = left + "s" + right
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


PIECES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIPPED = decoders.Sequence([*PIECES, decoders.Strip(" ", 1, 0)])
ROLES = ("|user|", "|system|", "|assistant|", "|end|")


def bytes_kind(twin=False, prefix=False, **flags):
    return with_markup(trained("bytes"), twin, decoder=decoders.ByteLevel(),
                       pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix), **flags)


def llama3_kind(twin=False):
    written = json.loads(trained("bytes"))
    written["model"]["ignore_merges"] = True
    return with_markup(json.dumps(written), twin, decoder=decoders.ByteLevel())


def pieces_kind(twin=False, **more):
    return with_markup(trained("pieces"), twin, **{"decoder": STRIPPED} | more)


def metaspace_kind(scheme, twin=False):
    return with_markup(trained("pieces"), twin, decoder=STRIPPED, normalizer=None,
                       pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))


def gemma_kind(twin=False):
    return with_markup(trained("pieces"), twin, decoder=decoders.Sequence(PIECES),
                       normalizer=normalizers.Replace(" ", "▁"))


def unigram_kind(twin=False, **more):
    return with_markup(trained("unigram"), twin, decoder=STRIPPED, **more)


# Each kind, and whether its decoder gives back every blank.
KINDS = {
    "GPT-2's bytes": (bytes_kind, True),
    "bytes, a blank in front": (functools.partial(bytes_kind, prefix=True), False),
    "bytes, markup that swallows blanks": (functools.partial(
        bytes_kind, rstrip=("|end|", "|user|", "think"), lstrip=("|assistant|", "|end|")), False),
    "Llama-3's bytes, whole words first": (llama3_kind, True),
    "Phi-3's pieces": (functools.partial(pieces_kind, rstrip=ROLES), False),
    "Mistral's pieces": (pieces_kind, False),
    "Metaspace, first": (functools.partial(metaspace_kind, "first"), False),
    "Metaspace, always": (functools.partial(metaspace_kind, "always"), False),
    "Gemma's pieces": (gemma_kind, True),
    "Unigram": (unigram_kind, False),
    "Unigram, NFKC": (functools.partial(unigram_kind, normalizer=normalizers.NFKC()), False),
}
TEXTS = ["Hello there", " two  blanks ", "a\n\nb", "", " ", "é 日本 🙂", "x < y > z |", "\ttab", "\n", "the end of it"]
MARKUP_LIKE = ["What does <|end|> mean?", "a<s>b", "<|user|>", "<|user|> x <|user|>", "<|end|><|end|>",
               "<|<|end|>end|>", "<<s>s>", " <|end|> ", "\n<|end|>\n", "  </s>", "<think>", "<think>\nWell</think> ",
               "é<|end|>é", "x<s>", "<unk>", "<0x41>", "🙂<s>🙂"]
FRAGMENTS = ["<|end|>", "<s>", "<|user|>", "<|assistant|>", "<think>", "</s>", "<unk>", "<|", "|>", "<", ">", "s>",
             "<|en", "d|>", "think", " ", "  ", "\n", "\t", "x", "é", "🙂", "\ue000"]


def write_tokenizer(folder, tokenizer, template=TEMPLATE):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}))


def render(text, left="<", right=">"):
    return f"{left}s{right}{left}|user|{right}{text}{left}|end|{right}\n{left}|assistant|{right}"


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """Return a tokenizer's encoder, itself as transformers has it, and its twin."""
    make, exact = KINDS[request.param]
    folder, tokenizer = tmp_path_factory.mktemp("kind"), make()
    write_tokenizer(folder, tokenizer)
    encoder = PromptEncoder(folder)
    hugging_face = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=TEMPLATE,
                                           bos_token="<s>")
    twin = make(twin=True)
    assert twin.token_to_id("⟦|end|⟧") == tokenizer.token_to_id("<|end|>")
    return SimpleNamespace(
        tokenizer=tokenizer, hugging_face=hugging_face, exact=exact, control=set(tokenizer.get_added_tokens_decoder()),
        tokens=lambda text: encoder.encode([Message(role="user", content=text)], 10**6), encoder=encoder,
        twin=lambda text: twin.encode(render(text, *"⟦⟧"), add_special_tokens=False).ids)


def test_a_prompt_has_the_tokens_that_transformers_gives(kind):
    for text in TEXTS:
        rendered = kind.hugging_face.apply_chat_template(user(text), tokenize=False, add_generation_prompt=True)
        assert rendered == render(text)
        tokens = kind.tokens(text)
        assert tokens == kind.hugging_face.encode(rendered, add_special_tokens=False)
        assert tokens == kind.twin(text)


def check_text(kind, text):
    """Check that a text of a message is text: to the token, and as it is read back."""
    tokens, read = kind.tokens(text), kind.tokenizer.decode(kind.tokens(text), skip_special_tokens=False)
    assert tokens == kind.twin(text)
    assert [token for token in tokens if token in kind.control] == [
        kind.tokenizer.token_to_id(name) for name in ("<s>", "<|user|>", "<|end|>", "<|assistant|>")]
    if kind.exact:
        assert read == render(text)
    elif "<0x" not in text:  # which Unigram reads as a byte, markup or not
        assert "".join(read.split()) == "".join(render(text).split())


def test_what_looks_like_markup_is_text(kind):
    for text in MARKUP_LIKE:
        check_text(kind, text)


@pytest.mark.slow
@given(text=st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
@settings(max_examples=60)
def test_any_text_is_text(kind, text):
    check_text(kind, text)


def test_an_assistants_thoughts_keep_their_markup_and_nothing_else_does(kind):
    tokens = kind.encoder.encode([Message(role="assistant", content="<think>a<s>b"),
                                  Message(role="user", content="<think>")], 10**6)
    names = ("<s>", "<|assistant|>", "<think>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>")
    assert [token for token in tokens if token in kind.control] == [kind.tokenizer.token_to_id(name) for name in names]


def test_what_plain_text_would_grow_to_is_no_markup(tmp_path):
    tokenizer = bytes_kind()
    assert json.loads(trained("bytes"))["model"]["vocab"]["<think>"] == tokenizer.token_to_id("<think>")
    write_tokenizer(tmp_path, tokenizer)
    encoder = PromptEncoder(tmp_path)
    tokens = encoder.encode([Message(role="user", content="x<think>y")], 1000)
    assert tokenizer.token_to_id("<think>") not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=False) == render("x<think>y")


@pytest.mark.parametrize("left", [
    {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    {"padding": {"strategy": {"Fixed": 512}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<s>"}},
    {"dropout": 0.9}], ids=lambda left: next(iter(left)))
@pytest.mark.parametrize("make", [bytes_kind, pieces_kind])
def test_what_a_training_left_in_the_tokenizer_changes_no_prompt(tmp_path, make, left):
    tokenizer = make()
    written = json.loads(tokenizer.to_str())
    written["model" if "dropout" in left else "truncation"] = written["model"] | left if "dropout" in left else None
    write_tokenizer(tmp_path, Tokenizer.from_str(json.dumps(written | ({} if "dropout" in left else left))))
    assert next(iter(left.values())) in (*json.loads((tmp_path / "tokenizer.json").read_text()).values(),
                                         json.loads((tmp_path / "tokenizer.json").read_text())["model"].get("dropout"))
    encoder, text = PromptEncoder(tmp_path), "the license, and all of the terms of it. " * 5
    expected = tokenizer.encode(render(text), add_special_tokens=False).ids
    for _ in range(3):
        assert encoder.encode([Message(role="user", content=text)], 10**6) == expected


def test_usage_counts_the_whole_prompt_whatever_the_tokenizer_would_cut(tmp_path, served):
    model = Model(*export_phi3(tmp_path, max_position_embeddings=256, original_max_position_embeddings=256))
    file = model.folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"truncation": {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}), encoding="utf-8")
    assert ask(served(model), model.text(100), max_tokens=1)["usage"]["prompt_tokens"] == 100


# --- folders without a template, or with another tokenizer ----------------------------------

NO_TEMPLATE = "it has no chat template, so it was not made for conversations"
NO_TOKENIZER = "tokenizer.json is no tokenizer that can be read"
UNREADABLE = "its chat template is no template that can be read"
TAKES_NONE = "its chat template takes no conversation"
FILES = {
    "no tokenizer": ({"tokenizer.json": None}, "tokenizer.json is missing, or not an object in JSON"),
    "a list": ({"tokenizer.json": "[]"}, "tokenizer.json is missing, or not an object in JSON"),
    "no parts": ({"tokenizer.json": "{}"}, NO_TOKENIZER),
    "no model": ({"tokenizer.json": '{"model": null, "added_tokens": []}'}, NO_TOKENIZER),
    "another kind": ({"tokenizer.json": '{"model": {"type": "Other", "vocab": {}}, "added_tokens": []}'}, NO_TOKENIZER),
    "only a list of words": ({"tokenizer.json": json.dumps({"a": 1})}, NO_TOKENIZER),
    "no configuration": ({"tokenizer_config.json": None}, NO_TEMPLATE),
    "no template": ({"tokenizer_config.json": "{}"}, NO_TEMPLATE),
    "a template that is a number": ({"tokenizer_config.json": '{"chat_template": 5}'}, NO_TEMPLATE),
    "templates, and no default": ({"tokenizer_config.json": json.dumps({"chat_template": [
        {"name": "tool_use", "template": TEMPLATE}, 5]})}, NO_TEMPLATE),
    "half a configuration": ({"tokenizer_config.json": "{"},
                             "tokenizer_config.json is missing, or not an object in JSON"),
    "half a map": ({"special_tokens_map.json": "{"}, "special_tokens_map.json is missing, or not an object in JSON"),
    "half a template": ({"chat_template.jinja": "{% for message in messages %}"}, UNREADABLE),
    "an unknown tag": ({"chat_template.jinja": "{% imports 'a' %}"}, UNREADABLE),
    "a template that divides by 0": ({"chat_template.jinja": "{{ 1 / (messages | length - 1) }}"}, TAKES_NONE),
    "a template that always refuses": ({"chat_template.jinja": "{{ raise_exception('no') }}"}, TAKES_NONE),
    "a template without end": ({"chat_template.jinja": "{{ 'x' * 10**9 }}"}, TAKES_NONE),
    "a template that reads a file": ({"chat_template.jinja": "{% include '/etc/passwd' %}"}, TAKES_NONE),
}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_without_a_template_or_tokenizer_is_refused_before_anything_is_logged(tmp_path, name):
    files, says = FILES[name]
    write_tokenizer(write_config(tmp_path, changed()), bytes_kind())
    check_folder(tmp_path)
    for file, text in files.items():
        (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text, encoding="utf-8")
    assert unusable(check_folder, tmp_path) == unusable(PromptEncoder, tmp_path) == says


def test_a_template_for_a_system_message_alone_is_refused(tmp_path):
    write_tokenizer(write_config(tmp_path, changed()), bytes_kind(), (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}" + TEMPLATE))
    assert unusable(check_folder, tmp_path) == TAKES_NONE


def test_a_template_of_its_own_file_comes_first(tmp_path):
    write_tokenizer(write_config(tmp_path, changed()), bytes_kind(), "{{ raise_exception('no') }}")
    (tmp_path / "chat_template.jinja").write_text(PHI4_TEMPLATE, encoding="utf-8")
    check_folder(tmp_path)
