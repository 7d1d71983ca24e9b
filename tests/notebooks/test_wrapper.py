"""The lesson's wrapper: the very cell of the notebook, on a toy model, against the engine itself.

Run: python -m helpers test tests/notebooks/test_wrapper.py
"""

import random
from pathlib import Path

import mlflow
import nbformat
import onnxruntime_genai as og
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from support import ROOT
from transformers import AutoTokenizer

PROMPTS = ["The sky is", "1 2 3", "Once upon a time, there was", "x", "日本語 🙂", "A much longer prompt. " * 20]


@pytest.fixture(scope="module")
def wrapper_file(tmp_path_factory):
    """Return the file that the notebook's cell writes."""
    notebook = nbformat.read(ROOT / "notebooks" / "CustomPythonWrapper.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if cell.source.startswith("%%writefile")]
    file = tmp_path_factory.mktemp("wrapper") / "prompt_model.py"
    file.write_text(cell.source.split("\n", 1)[1], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def logged(wrapper_file, tiny, tmp_path_factory):
    """Return the URI of the logged wrapper."""
    folder = tmp_path_factory.mktemp("störe 1")
    mlflow.set_tracking_uri("sqlite:///" + (folder / "mlflow.db").as_posix())
    mlflow.create_experiment("wrapper", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment("wrapper")
    info = mlflow.pyfunc.log_model(
        name="wrapper", python_model=str(wrapper_file), artifacts={"model": str(tiny.onnx_dir)},
        model_config={"provider": "cpu", "context_length": 4096},
        signature=infer_signature({"prompt": "a"}, "b", params={"max_tokens": 16, "temperature": 0.0}),
        pip_requirements=["mlflow", "onnxruntime-genai"])
    return info.model_uri


@pytest.fixture(scope="module")
def model(logged):
    return mlflow.pyfunc.load_model(logged)


@pytest.fixture(scope="module")
def reference(tiny):
    """Return the engine's own greedy answer to a prompt, in the fewest calls."""
    engine = og.Model(str(tiny.onnx_dir))
    tokenizer = og.Tokenizer(engine)
    decoder = AutoTokenizer.from_pretrained(tiny.transformers_dir)

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
    with_nul, without = model.predict({"prompt": ["a\0b", "a"]})
    assert with_nul != without


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40])
def test_max_tokens_bounds_the_answer(model, reference, max_tokens):
    for prompt in PROMPTS:
        text, count = reference(prompt, max_tokens)
        assert model.predict({"prompt": prompt}, params={"max_tokens": max_tokens}) == [text]
        assert count <= max_tokens


def test_temperature_0_repeats_itself_and_temperature_2_does_not(model):
    greedy = {model.predict({"prompt": "The sky is"})[0] for _ in range(3)}
    sampled = {model.predict({"prompt": "The sky is"}, params={"temperature": 2.0})[0] for _ in range(6)}
    assert len(greedy) == 1
    assert len(sampled) > 1


def test_an_answer_holds_no_markup(model):
    # 60 sampled answers of noise: many of them draw a token of markup.
    answers = [model.predict({"prompt": prompt}, params={"temperature": 2.0, "max_tokens": 48})[0]
               for prompt in PROMPTS for _ in range(10)]
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


@pytest.mark.parametrize(("prompts", "params", "says"), [
    (["good", ""], {}, "Give a text"),
    (["good", None], {}, "Give a text"),
    ([], {}, "Give a text"),  # one row, which holds nothing
    ("\ud83d", {}, "surrogates not allowed"),  # by MLflow itself
    (["word " * 5000], {}, r"from 1 to -\d+ "),
    (["good"], {"max_tokens": 0}, r"from 1 to 40\d\d "),
    (["good"], {"max_tokens": -1}, r"from 1 to 40\d\d "),
    (["good"], {"max_tokens": 10**9}, r"from 1 to 40\d\d "),
    (["good"], {"max_tokens": "4"}, "Invalid parameters"),
    (["good"], {"temperature": -1.0}, "temperature from 0 to 2"),
    (["good"], {"temperature": float("nan")}, "temperature from 0 to 2"),
])
def test_bad_input_is_refused_and_the_next_request_is_answered(model, reference, prompts, params, says):
    with pytest.raises(MlflowException, match=says) as refusal:
        model.predict({"prompt": prompts}, params=params)
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE" or "Invalid parameters" in says
    assert "good" not in refusal.value.message
    assert model.predict({"prompt": "The sky is"}) == [reference("The sky is", 16)[0]]


@pytest.mark.slow
def test_it_loads_in_another_process_without_pickles_and_without_the_course(logged, python, tmp_path):
    code = ("import sys, mlflow; sys.modules['helpers'] = None; mlflow.set_tracking_uri(sys.argv[1]); "
            "print(ascii(mlflow.pyfunc.load_model(sys.argv[2]).predict({'prompt': ['a', 'b']})))")
    result = python("-c", code, mlflow.get_tracking_uri(), logged, cwd=tmp_path, network=False,
                    MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    assert result.returncode == 0, result.stderr
    expected = mlflow.pyfunc.load_model(logged).predict({"prompt": ["a", "b"]})
    assert result.stdout.strip() == ascii(expected)
    files = [path for path in Path(mlflow.artifacts.download_artifacts(logged)).rglob("*") if path.is_file()]
    assert "prompt_model.py" in {path.name for path in files}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".joblib")]
