"""Holds three tokenizers of the real model against each other: Hugging Face's, onnxruntime-genai's and llama.cpp's.

llama.cpp reads the GGUF itself, so it is the judge of the tokenizer that helpers.models.convert
builds from it. Run: python -m helpers test tests/nightly/test_tokenizers.py
"""

import http.client
import json
from contextlib import closing
from urllib.parse import urlsplit

import pytest
import xllamacpp
from support.tokenizer_texts import (
    all_texts,
    assert_agreement,
    assert_round_trips,
    assert_same_templates,
    load,
)


@pytest.fixture(scope="module")
def smollm2(smol):
    model = load(smol)
    (gguf,) = (model.prepared.onnx_dir.parent / "gguf").glob("*.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.port = 0  # any that is free
    settings.n_ctx = 256
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = -1
    server = xllamacpp.Server(settings)

    def encode(text):
        # http.client asks no proxy, and a connection of its own cannot have gone stale meanwhile.
        with closing(
            http.client.HTTPConnection(urlsplit(server.listening_address).netloc, timeout=60)
        ) as connection:
            body = json.dumps({"content": text, "add_special": False, "parse_special": True})
            connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
            return json.load(connection.getresponse())["tokens"]

    model.encoders["llama.cpp"] = encode
    return model


def test_smollm2_is_judged_by_llama_cpp_too(smollm2):
    assert list(smollm2.encoders) == ["Hugging Face", "onnxruntime-genai", "llama.cpp"]
    assert smollm2.encoders["llama.cpp"]("<|im_start|>") == [1]


def test_three_tokenizers_agree_on_every_text(smollm2):
    assert_agreement(smollm2, all_texts(smollm2))


def test_onnxruntime_genai_renders_the_chat_template_as_hugging_face_does(smollm2):
    assert_same_templates(smollm2)


def test_every_string_is_decoded_back(smollm2):
    assert_round_trips(smollm2)


# --- known limits of the libraries: a test that fails here says that one is gone ---------------


@pytest.mark.parametrize("character", ["\x04", "\x06", "\x13", "\x14", "\x16", "\x1d"])
def test_onnxruntime_genai_gives_minus_one_for_a_byte_that_the_vocabulary_lacks(smollm2, character):
    # The others leave the byte out. To the engine -1 is the last row of the embeddings: a wrong
    # token, and no error.
    text = f"a{character}b"
    hugging_face, genai, llama_cpp = (encode(text) for encode in smollm2.encoders.values())
    a, b = smollm2.hugging_face.encode("a"), smollm2.hugging_face.encode("b")
    assert hugging_face == llama_cpp == a + b
    assert genai == [*a, -1, *b]


def test_hugging_face_merges_across_a_byte_that_the_vocabulary_lacks(smollm2):
    dot, two_dots = smollm2.hugging_face.encode("."), smollm2.hugging_face.encode("..")
    assert len(two_dots) == 1
    assert smollm2.encoders["Hugging Face"](".\x04.") == two_dots
    assert smollm2.encoders["llama.cpp"](".\x04.") == dot + dot


@pytest.mark.parametrize(
    ("character", "knowing"),
    [
        ("\u08be", ["Hugging Face", "onnxruntime-genai", "llama.cpp"]),  # a letter since Unicode 13
        ("\u0870", ["Hugging Face", "llama.cpp"]),  # since Unicode 14
        ("\u1c89", ["Hugging Face"]),  # since Unicode 16
        # Next line: white space in Unicode, and to \s in the pattern.
        ("\x85", ["Hugging Face", "llama.cpp"]),
    ],
)
def test_tokenizers_know_letters_and_spaces_of_different_unicode_versions(
    smollm2, character, knowing
):
    # After a letter or a space, 's is a word of its own; after a sign, the apostrophe belongs to
    # the sign.
    encode = smollm2.hugging_face.encode
    word = encode(character) + encode("'s")
    sign = encode(character) + encode("'") + encode("s")
    assert {name: encode(character + "'s") for name, encode in smollm2.encoders.items()} == {
        name: word if name in knowing else sign for name in smollm2.encoders
    }
