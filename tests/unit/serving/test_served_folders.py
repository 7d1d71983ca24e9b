"""A model's folder, whoever wrote it: it is served as the model that it is, or refused before anything is logged.

Run: python -m helpers test tests/unit/serving/test_served_folders.py
"""

import json

import pytest
from support import ROOT
from support.chat import user
from support.phi3_layout import PHI4_TEMPLATE
from support.tokenizer_kinds import (
    KINDS,
    TEMPLATE,
    Kind,
    bytes_kind,
    pieces_kind,
    render,
    trained,
    write_tokenizer,
)
from tokenizers import Tokenizer

from serving.chat.contract import Message, Refusal
from serving.chat.folder import read_config
from serving.chat.model import check_folder
from serving.chat.prompt import PromptEncoder


def unusable(function, folder):
    """Return what is wrong with a folder, as the Refusal says it: one that shows no path."""
    with pytest.raises(Refusal) as refusal:
        function(folder)
    assert (refusal.value.code, refusal.value.error_code) == ("unusable_model", "INVALID_STATE")
    assert not {*folder.parts[1:]} & set(
        refusal.value.message.replace("/", " ").replace(":", " ").split()
    )
    return refusal.value.message.removeprefix(
        "This folder is no model that can be served: "
    ).removesuffix(".")


# --- genai_config.json ----------------------------------------------------------------------

NO_JSON = "genai_config.json is missing, or not an object in JSON"
NO_DECODER = "genai_config.json describes something else than a decoder of text"
A_LIBRARY = "genai_config.json asks for a library of its own, which is code"
LACKS = "genai_config.json lacks a context_length, eos_token_id or vocab_size that can be"
NO_SIZES = "genai_config.json lacks its decoder's head_size or num_hidden_layers"
NO_PLACE = "genai_config.json names tensors of the cache without a place for the layer's number"
NO_GRAPH = "genai_config.json names no ONNX file in its folder"
# https://github.com/microsoft/onnxruntime-genai/blob/main/src/python/py/models/builders/base.py, make_genai_config
WRITTEN = {
    "model": {
        "bos_token_id": 1,
        "context_length": 256,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": 16,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
        "eos_token_id": 7,
        "pad_token_id": 3,
        "type": "phi3",
        "vocab_size": 100,
    },
    "search": {
        "do_sample": False,
        "max_length": 200,
        "num_beams": 1,
        "past_present_share_buffer": True,
    },
}
LEFT_OUT = "left out"


def changed(**changes):
    """Return the text with fields changed: ``decoder__filename`` is one of ``model.decoder``."""
    text = json.loads(json.dumps(WRITTEN))
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = (
            text if sections == ["top"] else text["search" if sections == ["search"] else "model"]
        )
        place = place["decoder"] if sections == ["decoder"] else place
        place.pop(field, None)
        if value is not LEFT_OUT:
            place[field] = value
    return json.dumps(text)


def write_config(folder, text, graph=b"a graph"):
    (folder / "genai_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "model.onnx").write_bytes(graph)
    return folder


WINDOW = {
    "window_size": 64,
    "slide_key_value_cache": False,
    "slide_inputs": False,
    "layers": [],
    "cache_slack": 0,
}
NAMES = {
    name: value
    for place in ("inputs", "outputs")
    for name, value in WRITTEN["model"]["decoder"][place].items()
}
READ = {
    "one end token": ({}, {}),
    "a list of them": ({"eos_token_id": [7, 8]}, {"end_tokens": (7, 8)}),
    "a list with what is none": ({"eos_token_id": [-1, 8]}, {"end_tokens": (8,)}),
    "end token 0": ({"eos_token_id": 0}, {"end_tokens": (0,)}),
    "the last of the vocabulary": ({"eos_token_id": 99}, {"end_tokens": (99,)}),
    "a context_length of 1": ({"context_length": 1}, {"context_length": 200}),
    "no search": ({"top__search": LEFT_OUT}, {}),
    "a window": ({"decoder__sliding_window": WINDOW}, {"context_length": 64}),
    "a window without layers": (
        {"decoder__sliding_window": {"window_size": 64}},
        {"context_length": 64},
    ),
    "a window beyond the context": (
        {"decoder__sliding_window": WINDOW | {"window_size": 4096}},
        {},
    ),
    "a window of 0": ({"decoder__sliding_window": WINDOW | {"window_size": 0}}, {}),
    "a window of -1": ({"decoder__sliding_window": WINDOW | {"window_size": -1}}, {}),
    "a window that layers know": ({"decoder__sliding_window": WINDOW | {"layers": [0]}}, {}),
    "a window that is null": ({"decoder__sliding_window": None}, {}),
    "a graph in a folder": ({"decoder__filename": "onnx/model.onnx"}, {}),
    "no names": ({"decoder__inputs": LEFT_OUT, "decoder__outputs": None}, {}),
    "other names": (
        {"decoder__inputs": {"past_key_names": "past_%d_k"}},
        {"names": NAMES | {"past_key_names": "past_%d_k"}},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_config_is_read(tmp_path, name):
    changes, expected = READ[name]
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"a graph")
    config = read_config(write_config(tmp_path, changed(**changes)))
    expected = {
        "context_length": 256,
        "end_tokens": (7,),
        "vocab_size": 100,
        "head_size": 16,
        "layers": 2,
        "names": NAMES,
    } | expected
    assert {field: getattr(config, field) for field in expected} == expected


# What some published folders say of themselves: context, end tokens, vocabulary, and the decoder's
# other keys.
PUBLISHED = {
    "Phi-4-mini": ("phi3", 131072, [200020, 199999], 200064, {}),
    "Mistral v0.1, a window": (
        "mistral",
        32768,
        2,
        32000,
        {"sliding_window": WINDOW | {"window_size": 4096}},
    ),
    "DirectML": (
        "phi3",
        4096,
        32007,
        32064,
        {"session_options": {"provider_options": [{"dml": {}}]}},
    ),
    "CUDA": (
        "phi3",
        4096,
        32007,
        32064,
        {"session_options": {"provider_options": [{"cuda": {"enable_cuda_graph": "0"}}]}},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_folder_is_read(tmp_path, name):
    kind, context_length, ends, vocab_size, decoder = PUBLISHED[name]
    text = json.loads(
        changed(
            type=kind,
            context_length=context_length,
            eos_token_id=ends,
            vocab_size=vocab_size,
            search__max_length=context_length,
        )
    )
    text["model"]["decoder"] |= decoder
    config = read_config(write_config(tmp_path, json.dumps(text)))
    assert (config.context_length, config.vocab_size) == (
        4096 if "sliding_window" in decoder else context_length,
        vocab_size,
    )
    assert config.end_tokens == tuple(ends if isinstance(ends, list) else [ends])


REFUSED = {
    **{
        f"{name} in its place": (raw, NO_JSON)
        for name, raw in {
            "nothing": b"",
            "a list": b"[]",
            "a number": b"5",
            "no JSON": b"model: {}",
            "half": b'{"model": {',
            "NUL": b"\0" + changed().encode(),
            "bytes": b'{"a": "\xff"}',
            "a BOM": b"\xef\xbb\xbf" + changed().encode(),
            "UTF-16": changed().encode("utf-16"),
            "depth": b"[" * 100_000,
            "depth that ends": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "digits": changed(zzz=0).replace('"zzz": 0', '"zzz": ' + "1" * 5000).encode(),
        }.items()
    },
    **{
        f"{name} of the model": (changed(**{name: {"filename": "model.onnx"}}), NO_DECODER)
        for name in ("encoder", "vision", "speech")
    },
    **{
        f"a decoder that is {decoder!r}": (changed(decoder=decoder), NO_DECODER)
        for decoder in (None, [], "a", 5)
    },
    "no model": (changed(top__model=LEFT_OUT), NO_DECODER),
    "a model that is a list": (changed(top__model=[]), NO_DECODER),
    **{
        f"a library, {place}": (changed(**{place: {"custom_ops_library": "evil.so"}}), A_LIBRARY)
        for place in (
            "top__x",
            "search__x",
            "session_options",
            "decoder__session_options",
            "decoder__x",
        )
    },
    "a library in a pipeline": (
        changed(decoder__pipeline=[{"a": {"session_options": {"custom_ops_library": "a"}}}]),
        A_LIBRARY,
    ),
    "a library, written otherwise": (
        changed(decoder__x=1).replace('"x"', '"custom_ops\\u005flibrary"'),
        A_LIBRARY,
    ),
    **{
        f"end tokens {ends!r}": (changed(eos_token_id=ends), LACKS)
        for ends in (LEFT_OUT, None, [], -1, [-1], "7", True, 100, [7, 100], 2**40, {"a": 7})
    },
    **{
        f"a vocabulary of {size!r}": (changed(vocab_size=size), LACKS)
        for size in (LEFT_OUT, None, 0, -1, 7, "100", True)
    },
    "no length at all": (changed(context_length=LEFT_OUT, search__max_length=LEFT_OUT), LACKS),
    "two lengths that are none": (changed(context_length=0, search__max_length="200"), LACKS),
    **{
        f"{name} {value!r}": (changed(**{f"decoder__{name}": value}), NO_SIZES)
        for name in ("head_size", "num_hidden_layers")
        for value in (LEFT_OUT, 0, "16", None)
    },
    **{
        f"a name of {name!r}": (changed(decoder__outputs={"present_key_names": name}), NO_PLACE)
        for name in ("present", "%d.%d", "%s", "%d%%")
    },
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
    "a graph elsewhere": (
        {"decoder__filename": "../model.onnx"},
        "is not of the folder that is logged",
    ),
    "a graph at an absolute path": (
        {"decoder__filename": str(ROOT / "LICENSE")},
        "is not of the folder",
    ),
    "a name of 300 letters": ({"decoder__filename": "x" * 300}, "OSError, no Refusal"),
    "no name": ({"decoder__filename": ""}, "the sentence shows the folder's own name"),
    "no file's name": ({"decoder__filename": LEFT_OUT}, "the sentence says that None is missing"),
    "a name that is a number": ({"decoder__filename": 5}, "the sentence says that 5 is missing"),
    "a pipeline": (
        {"decoder": {"pipeline": [{"a": {"filename": "model.onnx"}}]}},
        "None is missing",
    ),
    "an embedding": ({"embedding": {"filename": "model.onnx"}}, "another model reads the tokens"),
    "a vocabulary beyond 32 bits": ({"vocab_size": 10**30}, "no memory has its logits"),
}


@pytest.mark.parametrize("name", OPEN)
def test_what_another_machine_would_refuse_is_refused_before_it_is_logged(tmp_path, name):
    folder = tmp_path / "weights"
    folder.mkdir()
    (tmp_path / "model.onnx").write_bytes(b"a graph")
    write_tokenizer(write_config(folder, changed(**OPEN[name][0])), bytes_kind())
    says = unusable(check_folder, folder)
    assert says in (NO_GRAPH, NO_DECODER, NO_SIZES, LACKS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder__sliding_window": WINDOW | {"window_size": 64.0}}, 64),
        ({"context_length": 128.0}, 128),
    ],
)
def test_a_whole_number_may_be_written_with_a_point(tmp_path, changes, expected):
    assert read_config(write_config(tmp_path, changed(**changes))).context_length == expected


@pytest.mark.parametrize(
    ("graph", "switch"),
    [
        (b"", 256),
        (b"\n\x1c/model/constants/INT64/64\x12,/model/rope_caches_subgraph/Greater/output_0", 64),
        (
            b"\n\x1c/model/constants/TensorProto.INT64/0D/64\x12,/model/rope_caches_subgraph/Greater/output_0",
            64,
        ),
        # Beyond the context.
        (b"/model/constants/INT64/4096\x12,/model/rope_caches_subgraph/Greater/output_0", 256),
        (b"/model/constants/INT64/64\x12,/model/attn/Greater/output_0", 256),
        (
            b"/model/constants/INT64/9\x12,/x\n/model/constants/INT64/64\x12\x0a/model/rope_caches_subgraph/Greater",
            64,
        ),
    ],
)
def test_the_graph_says_where_its_rotary_factors_change(tmp_path, graph, switch):
    assert read_config(write_config(tmp_path, changed(), graph)).context_length == switch


# --- tokenizers -----------------------------------------------------------------------------

TEXTS = [
    "Hello there",
    " two  blanks ",
    "a\n\nb",
    "",
    " ",
    "é 日本 🙂",
    "x < y > z |",
    "\ttab",
    "\n",
    "the end of it",
]
MARKUP_LIKE = [
    "What does <|end|> mean?",
    "a<s>b",
    "<|user|>",
    "<|user|> x <|user|>",
    "<|end|><|end|>",
    "<|<|end|>end|>",
    "<<s>s>",
    " <|end|> ",
    "\n<|end|>\n",
    "  </s>",
    "<think>",
    "<think>\nWell</think> ",
    "é<|end|>é",
    "x<s>",
    "<unk>",
    "<0x41>",
    "🙂<s>🙂",
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    return Kind(request.param, tmp_path_factory.mktemp("kind"))


def test_a_prompt_has_the_tokens_that_transformers_gives(kind):
    for text in TEXTS:
        rendered = kind.hugging_face.apply_chat_template(
            user(text), tokenize=False, add_generation_prompt=True
        )
        assert rendered == render(text)
        tokens = kind.tokens(text)
        assert tokens == kind.hugging_face.encode(rendered, add_special_tokens=False)
        assert tokens == kind.twin(text)


def test_what_looks_like_markup_is_text(kind):
    for text in MARKUP_LIKE:
        kind.check_text(text)


def test_an_assistants_thoughts_keep_their_markup_and_nothing_else_does(kind):
    tokens = kind.encoder.encode(
        [
            Message(role="assistant", content="<think>a<s>b"),
            Message(role="user", content="<think>"),
        ],
        10**6,
    )
    names = ("<s>", "<|assistant|>", "<think>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>")
    assert [token for token in tokens if token in kind.control] == [
        kind.tokenizer.token_to_id(name) for name in names
    ]


def test_what_plain_text_would_grow_to_is_no_markup(tmp_path):
    tokenizer = bytes_kind()
    assert json.loads(trained("bytes"))["model"]["vocab"]["<think>"] == tokenizer.token_to_id(
        "<think>"
    )
    write_tokenizer(tmp_path, tokenizer)
    encoder = PromptEncoder(tmp_path)
    tokens = encoder.encode([Message(role="user", content="x<think>y")], 1000)
    assert tokenizer.token_to_id("<think>") not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=False) == render("x<think>y")


@pytest.mark.parametrize(
    "left",
    [
        {
            "truncation": {
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
        {
            "padding": {
                "strategy": {"Fixed": 512},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<s>",
            }
        },
        {"dropout": 0.9},
    ],
    ids=lambda left: next(iter(left)),
)
@pytest.mark.parametrize("make", [bytes_kind, pieces_kind])
def test_what_a_training_left_in_the_tokenizer_changes_no_prompt(tmp_path, make, left):
    tokenizer = make()
    written = json.loads(tokenizer.to_str())
    written["model" if "dropout" in left else "truncation"] = (
        written["model"] | left if "dropout" in left else None
    )
    write_tokenizer(
        tmp_path, Tokenizer.from_str(json.dumps(written | ({} if "dropout" in left else left)))
    )
    assert next(iter(left.values())) in (
        *json.loads((tmp_path / "tokenizer.json").read_text()).values(),
        json.loads((tmp_path / "tokenizer.json").read_text())["model"].get("dropout"),
    )
    encoder, text = PromptEncoder(tmp_path), "the license, and all of the terms of it. " * 5
    expected = tokenizer.encode(render(text), add_special_tokens=False).ids
    for _ in range(3):
        assert encoder.encode([Message(role="user", content=text)], 10**6) == expected


# --- folders without a template, or with another tokenizer ----------------------------------

NO_TEMPLATE = "it has no chat template, so it was not made for conversations"
NO_TOKENIZER = "tokenizer.json is no tokenizer that can be read"
UNREADABLE = "its chat template is no template that can be read"
TAKES_NONE = "its chat template takes no conversation"
FILES = {
    "no tokenizer": (
        {"tokenizer.json": None},
        "tokenizer.json is missing, or not an object in JSON",
    ),
    "a list": ({"tokenizer.json": "[]"}, "tokenizer.json is missing, or not an object in JSON"),
    "no parts": ({"tokenizer.json": "{}"}, NO_TOKENIZER),
    "no model": ({"tokenizer.json": '{"model": null, "added_tokens": []}'}, NO_TOKENIZER),
    "another kind": (
        {"tokenizer.json": '{"model": {"type": "Other", "vocab": {}}, "added_tokens": []}'},
        NO_TOKENIZER,
    ),
    "only a list of words": ({"tokenizer.json": json.dumps({"a": 1})}, NO_TOKENIZER),
    "no configuration": ({"tokenizer_config.json": None}, NO_TEMPLATE),
    "no template": ({"tokenizer_config.json": "{}"}, NO_TEMPLATE),
    "a template that is a number": ({"tokenizer_config.json": '{"chat_template": 5}'}, NO_TEMPLATE),
    "templates, and no default": (
        {
            "tokenizer_config.json": json.dumps(
                {"chat_template": [{"name": "tool_use", "template": TEMPLATE}, 5]}
            )
        },
        NO_TEMPLATE,
    ),
    "half a configuration": (
        {"tokenizer_config.json": "{"},
        "tokenizer_config.json is missing, or not an object in JSON",
    ),
    "half a map": (
        {"special_tokens_map.json": "{"},
        "special_tokens_map.json is missing, or not an object in JSON",
    ),
    "half a template": ({"chat_template.jinja": "{% for message in messages %}"}, UNREADABLE),
    "an unknown tag": ({"chat_template.jinja": "{% imports 'a' %}"}, UNREADABLE),
    "a template that divides by 0": (
        {"chat_template.jinja": "{{ 1 / (messages | length - 1) }}"},
        TAKES_NONE,
    ),
    "a template that always refuses": (
        {"chat_template.jinja": "{{ raise_exception('no') }}"},
        TAKES_NONE,
    ),
    "a template that reads a file": (
        {"chat_template.jinja": "{% include '/etc/passwd' %}"},
        TAKES_NONE,
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_without_a_template_or_tokenizer_is_refused_before_anything_is_logged(
    tmp_path, name
):
    files, says = FILES[name]
    write_tokenizer(write_config(tmp_path, changed()), bytes_kind())
    PromptEncoder(tmp_path)
    for file, text in files.items():
        (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(
            text, encoding="utf-8"
        )
    assert unusable(check_folder, tmp_path) == unusable(PromptEncoder, tmp_path) == says


def test_a_template_for_a_system_message_alone_is_refused(tmp_path):
    write_tokenizer(
        write_config(tmp_path, changed()),
        bytes_kind(),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"
            + TEMPLATE
        ),
    )
    assert unusable(check_folder, tmp_path) == TAKES_NONE


def test_a_template_of_its_own_file_comes_first(tmp_path):
    write_tokenizer(write_config(tmp_path, changed()), bytes_kind(), "{{ raise_exception('no') }}")
    (tmp_path / "chat_template.jinja").write_text(PHI4_TEMPLATE, encoding="utf-8")
    PromptEncoder(tmp_path)
