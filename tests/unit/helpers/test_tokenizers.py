"""Holds the small model's tokenizer as Hugging Face reads it against the same as onnxruntime-genai reads it.

Run: python -m helpers test tests/unit/helpers/test_tokenizers.py
"""

import pytest
from support.tokenizer_texts import (
    all_texts,
    assert_agreement,
    assert_round_trips,
    assert_same_templates,
    load,
)


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny)


def test_tokenizers_agree_on_awkward_strings_markup_random_strings_and_prompts(model):
    assert_agreement(model, all_texts(model))


def test_onnxruntime_genai_renders_the_chat_template_as_hugging_face_does(model):
    assert_same_templates(model)


def test_every_string_is_decoded_back(model):
    assert_round_trips(model)


# --- known limits of the libraries: a test that fails here says that one is gone ---------------


def test_onnxruntime_genai_cuts_a_prompt_at_its_first_nul(model):
    # It takes the text as a C string. The course's wrapper refuses NUL for this reason.
    hugging_face, genai = model.encoders["Hugging Face"], model.encoders["onnxruntime-genai"]
    assert genai("a\0b") == hugging_face("a")
    assert genai("\0a") == []
    assert len(hugging_face("a\0b")) == 3


def test_onnxruntime_genai_cuts_an_answer_at_its_first_bytes_that_are_no_text(model):
    # A model that samples byte by byte can write such an answer. U+FFFF is a code point, and counts
    # as no text too.
    broken = (
        model.hugging_face.encode("a")
        + model.hugging_face.encode("漢")[:-1]
        + model.hugging_face.encode(" b")
    )
    assert model.hugging_face.decode(broken) == "a\ufffd b"
    assert model.genai.decode(broken) == "a\ufffd"
    assert_agreement(model, ["a\uffffb"])
    assert model.hugging_face.decode(model.hugging_face.encode("a\uffffb")) == "a\uffffb"
    assert model.genai.decode(model.genai.encode("a\uffffb")) == "a\ufffd"
