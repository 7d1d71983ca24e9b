"""The lesson's wrapper: the very cell of the notebook, on a toy model, against the engine itself.

Run: python -m helpers test tests/services/test_wrapper.py
"""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import mlflow
import nbformat
import onnxruntime_genai as og
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from support import ROOT
from support.wrapper import log_wrapper, write_wrapper
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from helpers import running

PROMPTS = [
    "The sky is",
    "1 2 3",
    "Once upon a time, there was",
    "x",
    "日本語 🙂",
    "A much longer prompt. " * 20,
]


@pytest.fixture(scope="module")
def wrapper_file(tmp_path_factory):
    """Return the file that the notebook's cell writes."""
    return write_wrapper(tmp_path_factory.mktemp("wrapper"))


@pytest.fixture(scope="module")
def model(wrapper_file, tiny, tmp_path_factory):
    """Return the logged wrapper, as MLflow loads it."""
    return mlflow.pyfunc.load_model(
        log_wrapper(wrapper_file, tiny.onnx_dir, tmp_path_factory.mktemp("störe 1"))
    )


@pytest.fixture(scope="module")
def reference(tiny):
    """Return the engine's own greedy answer to a prompt, in the fewest calls."""
    engine = og.Model(str(tiny.onnx_dir))
    tokenizer = og.Tokenizer(engine)
    decoder = PreTrainedTokenizerFast.from_pretrained(tiny.transformers_dir)

    def answer(prompt, max_tokens):
        tokens = tokenizer.encode(prompt)
        settings = og.GeneratorParams(engine)
        settings.set_search_options(max_length=len(tokens) + max_tokens, do_sample=False)
        generator = og.Generator(engine, settings)
        generator.append_tokens(tokens)
        new = []
        while not generator.is_done():
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        return decoder.decode(new, skip_special_tokens=True), len(new)

    return answer


def test_every_row_is_answered_in_order_and_as_if_it_were_alone(model, reference):
    rows = PROMPTS * 2
    random.Random(1).shuffle(rows)
    together = model.predict(pd.DataFrame({"prompt": rows}))
    assert together == [reference(prompt, 16)[0] for prompt in rows]
    assert together == [model.predict({"prompt": prompt})[0] for prompt in rows]
    assert len(set(together)) == len(PROMPTS)


def test_rows_may_come_as_a_table_a_list_of_rows_or_one_list(model):
    expected = model.predict(pd.DataFrame({"prompt": PROMPTS}))
    assert model.predict([{"prompt": prompt} for prompt in PROMPTS]) == expected
    assert model.predict({"prompt": PROMPTS}) == expected
    assert model.predict(pd.DataFrame({"prompt": PROMPTS}, index=[5, 5, 3, 2, 1, 0])) == expected


def test_no_rows_are_no_answers_and_a_nul_is_a_character_like_any_other(model):
    assert model.predict(pd.DataFrame({"prompt": []}, dtype=str)) == []
    assert model.predict({"prompt": []}) == []
    with_nul, without = model.predict({"prompt": ["a\0b", "a"]})
    assert with_nul != without


@pytest.mark.parametrize("max_tokens", [1, 7])
def test_max_tokens_bounds_the_answer(model, reference, max_tokens):
    for prompt in PROMPTS:
        text, count = reference(prompt, max_tokens)
        assert model.predict({"prompt": prompt}, params={"max_tokens": max_tokens}) == [text]
        assert count <= max_tokens


def test_temperature_0_repeats_itself_and_temperature_2_does_not(model):
    greedy = {model.predict({"prompt": "The sky is"})[0] for _ in range(3)}
    sampled = {
        model.predict({"prompt": "The sky is"}, params={"temperature": 2.0})[0] for _ in range(6)
    }
    assert len(greedy) == 1
    assert len(sampled) > 1


def test_an_answer_holds_no_markup(model):
    # 30 sampled answers of noise: many of them draw a token of markup.
    answers = [
        model.predict({"prompt": prompt}, params={"temperature": 2.0, "max_tokens": 48})[0]
        for prompt in PROMPTS
        for _ in range(5)
    ]
    assert any(answers)
    for markup in ("<|end|>", "<|assistant|>", "<|user|>", "<|system|>", "<|endoftext|>"):
        assert not [answer for answer in answers if markup in answer]


def test_a_prompt_may_fill_the_context_to_the_last_token(model, tiny):
    tokenizer = og.Tokenizer(og.Model(str(tiny.onnx_dir)))
    prompt = "a b" * 1300
    room = 4096 - len(tokenizer.encode(prompt))
    assert room > 0
    assert isinstance(model.predict({"prompt": prompt}, params={"max_tokens": room})[0], str)
    with pytest.raises(MlflowException, match=f"from 1 to {room} "):
        model.predict({"prompt": prompt}, params={"max_tokens": room + 1})


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        (["good", ""], {}, "Give a text"),
        (["good", None], {}, "Give a text"),
        (float("nan"), {}, "Give a text"),
        (["good", float("nan")], {}, "Give a text"),
        ([5, "good"], {}, "Give a text"),
        (True, {}, "Give a text"),
        (["good", {"x": 1}], {}, "Give a text"),  # the keys are no prompts
        ([["good", None]], {}, "Give a text"),
        ("\ud83d", {}, "surrogates not allowed"),  # by MLflow itself
        (["word " * 5000], {}, r"from 1 to -\d+ "),
        (["good"], {"max_tokens": 0}, r"from 1 to 40\d\d "),
        (["good"], {"max_tokens": -1}, r"from 1 to 40\d\d "),
        (["good"], {"max_tokens": 10**9}, r"from 1 to 40\d\d "),
        (["good"], {"max_tokens": "4"}, "Invalid parameters"),
        (["good"], {"temperature": -1.0}, "temperature from 0 to 2"),
        (["good"], {"temperature": float("nan")}, "temperature from 0 to 2"),
    ],
)
def test_bad_input_is_refused_and_the_next_request_is_answered(
    model, reference, prompts, params, says
):
    with pytest.raises(MlflowException, match=says) as refusal:
        model.predict({"prompt": prompts}, params=params)
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE" or "Invalid parameters" in says
    assert "good" not in refusal.value.message
    assert model.predict({"prompt": "The sky is"}) == [reference("The sky is", 16)[0]]


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"prompt": None}},
        {"inputs": {"prompt": [None]}},
        {"inputs": {"prompt": ["good", None]}},
        {"inputs": [{"prompt": "good"}, {"prompt": None}]},
        {"instances": [{"prompt": None}]},
        {"instances": ["good", None]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["good"], [None]]}},
        {"dataframe_records": [{"prompt": "good"}, {}]},
        {"inputs": {"prompt": 5}},
        {"inputs": {"prompt": True}},
        {"inputs": {"prompt": ["good", 1.5]}},
    ],
)
def test_what_is_no_text_is_refused_by_mlflows_server_too(server, body):
    reply = httpx.post(server, json=body, timeout=60, trust_env=False)
    assert (reply.status_code, "Error: Give a text" in reply.json()["message"]) == (400, True)
    # It quotes the request. The page says so: when this fails, the sentence goes.
    assert reply.json()["message"].startswith("Failed to predict data '")
    cells = nbformat.read(ROOT / "notebooks" / "CustomPythonWrapper.ipynb", as_version=4).cells
    (text,) = [cell.source for cell in cells if "To keep it up" in cell.source]
    assert "Failed to predict data" in text


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": {"prompt": "a"}},
        {"inputs": {"prompt": ["a"]}},
        {"inputs": ["a"]},
        {"inputs": [{"prompt": "a"}]},
        {"instances": ["a"]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["a"]]}},
    ],
)
def test_a_prompt_may_come_to_mlflows_server_in_each_of_its_forms(server, model, body):
    reply = httpx.post(server, json=body, timeout=60, trust_env=False)
    assert reply.json() == {"predictions": model.predict({"prompt": "a"})}


@pytest.fixture(scope="module")
def server(model):
    """Return the address of MLflow's own server of the wrapper."""
    with running(scoring_server.init(model)) as address:
        yield f"{address}/invocations"


def load(wrapper_file, folder):
    """Return the wrapper, as MLflow loads it on a model's folder."""
    loaded = []
    code = wrapper_file.read_text(encoding="utf-8").replace(
        "mlflow.models.set_model(", "loaded.append("
    )
    exec(code, {"loaded": loaded})
    settings = {"provider": "cpu", "context_length": 4096}
    loaded[0].load_context(SimpleNamespace(artifacts={"model": str(folder)}, model_config=settings))
    return loaded[0]


def test_a_limit_and_a_padding_that_training_has_left_are_not_obeyed(wrapper_file, tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.onnx_dir, tmp_path / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompts = ["x", "A much longer prompt. " * 20]
    whole = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    tokenizer.enable_truncation(max_length=64)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(folder / "tokenizer.json"))
    wrapper = load(wrapper_file, folder)
    assert [wrapper.encode(prompt, 1, 0.0) for prompt in prompts] == whole


@pytest.mark.parametrize(
    ("usable", "physical", "threads"),
    [
        (8, 4, 4),  # two threads in each core
        (2, 4, 2),  # a container's share
        (4, None, 4),  # a board that does not say
    ],
)
def test_the_engine_takes_the_cores_that_there_are(
    wrapper_file, tiny, monkeypatch, usable, physical, threads
):
    monkeypatch.setattr("joblib.cpu_count", lambda: usable)
    monkeypatch.setattr("psutil.cpu_count", lambda logical: physical)
    overlays = []
    monkeypatch.setattr(
        og,
        "Config",
        lambda folder: SimpleNamespace(
            overlay=overlays.append, append_provider=lambda provider: None
        ),
    )
    monkeypatch.setattr(og, "Model", lambda config: None)
    load(wrapper_file, tiny.onnx_dir)
    assert [json.loads(overlay) for overlay in overlays] == [
        {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    ]
