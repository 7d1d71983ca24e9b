"""The real model answers on each track: its type, counts and bounds have to be right, its words are only looked at.

Run: python -m helpers test tests/services/test_real_model.py
"""

import warnings

import numpy as np
import onnxruntime_genai as og
import pytest
import transformers
from support.chat import load_chat
from support.tokenizer_texts import (
    Encoder,
    all_texts,
    assert_agreement,
    assert_markup_is_text,
    load,
)
from transformers import AutoTokenizer

MESSAGES = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "What is the capital of Spain?"},
]
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def tokenizer(smol):
    return AutoTokenizer.from_pretrained(smol.transformers_dir)


def look_at(text):
    """Warn where an answer names another city: a new version of a library may round in another way."""
    if "Madrid" not in text:
        warnings.warn(f"The real model says of Spain's capital: {text!r}", stacklevel=2)


def check_text(text, tokenizer):
    assert isinstance(text, str)
    assert text.strip() == text != ""
    assert "<|" not in text
    assert 0 < len(tokenizer.encode(text)) < MAX_TOKENS  # it ended by itself
    look_at(text)


def test_a_transformers_pipeline_answers(smol, tokenizer):
    pipeline = transformers.pipeline(
        "text-generation", str(smol.transformers_dir), device="cpu", trust_remote_code=False
    )
    (answer,) = pipeline(MESSAGES, max_new_tokens=MAX_TOKENS, do_sample=False)
    *asked, turn = answer["generated_text"]
    assert (asked, turn["role"]) == (MESSAGES, "assistant")
    check_text(turn["content"], tokenizer)


def test_the_onnx_engine_answers(smol, tokenizer):
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    engine = og.Model(str(smol.onnx_dir))
    settings = og.GeneratorParams(engine)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + MAX_TOKENS)
    generator = og.Generator(engine, settings)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens = generator.get_sequence(0).tolist()
    assert tokens[: len(prompt)] == prompt
    check_text(tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True), tokenizer)


def test_the_chat_model_answers_and_streams_and_keeps_a_schema(smol, tokenizer):
    model = load_chat(smol.onnx_dir)
    try:
        request = {"messages": MESSAGES, "max_tokens": MAX_TOKENS}
        (answer,) = model.predict(None, request)
        text = answer["choices"][0]["message"]["content"]
        check_text(text, tokenizer)
        prompt = tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        size = len(tokenizer.encode(text))
        assert answer["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": size,
            "total_tokens": len(prompt) + size,
        }
        # The end token is one more than the answer's own: without it, the answer was cut.
        (cut,) = model.predict(None, request | {"max_tokens": size})
        assert [one["choices"][0]["finish_reason"] for one in (answer, cut)] == ["stop", "length"]
        assert cut["choices"][0]["message"]["content"] == text
        chunks = list(model.predict_stream(None, request))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
        schema = {
            "type": "object",
            "properties": {"capital": {"enum": ["Lisbon", "Madrid"]}},
            "required": ["capital"],
            "additionalProperties": False,
        }
        (bound,) = model.predict(
            None,
            request
            | {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": schema},
                }
            },
        )
        assert bound["choices"][0]["message"]["content"] in (
            '{"capital": "Lisbon"}',
            '{"capital": "Madrid"}',
        )
        look_at(bound["choices"][0]["message"]["content"])
    finally:
        model.close()


def test_every_control_token_of_the_model_is_text_in_a_message(smol):
    assert_markup_is_text(Encoder(smol))


def test_both_tracks_read_a_text_as_the_same_tokens(smol):
    model = load(smol)
    assert list(model.encoders) == ["Hugging Face", "onnxruntime-genai"]
    assert_agreement(model, all_texts(model))
