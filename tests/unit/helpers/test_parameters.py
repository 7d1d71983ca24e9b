"""Bad parameters: each names itself, its value and what to do.

Run: python -m helpers test tests/unit/helpers/test_parameters.py
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import onnxruntime_genai as og
import pytest
from support import refuses
from tokenizers import Tokenizer

from helpers import check_fits, check_parameters, onnx_provider, prepare_model, torch_device
from helpers.models.folders import read_receipt, write_receipt
from helpers.parameters import injected_names, refuse_unknown

GOOD = {
    "model": "tiny-phi3",
    "tracking_uri": "",
    "question": "What is the capital of Spain?",
    "system_prompt": "",
    "max_tokens": 64,
    "temperature": 0.0,
    "device": "cpu",
}
TEXT = "parameter-type"
RANGES = {
    TEXT: "Put {} in quotes; with papermill, use -r in place of -p.",
    "max-tokens-range": "Choose a whole number from 1 to 4095 for Tiny random Phi-3.",
    "temperature-range": "Choose a number from 0 to 2.",
    "device-unknown": "Choose one of: cpu, cuda, mps, dml.",
}
BAD = [
    ("model", "phi-9", "model-unknown"),
    ("model", None, TEXT),
    ("question", "", "question-empty"),
    ("question", " \n\t", "question-empty"),
    ("question", 42, TEXT),
    ("question", None, TEXT),
    ("question", ["a"], TEXT),
    ("question", "a\0b", "parameter-text"),
    ("question", "\ud83d", "parameter-text"),
    ("question", "\ud800", "parameter-text"),
    ("question", "x\udfff", "parameter-text"),
    ("system_prompt", 1, TEXT),
    ("system_prompt", "\0", "parameter-text"),
    ("tracking_uri", 5, TEXT),
    ("max_tokens", 0, "max-tokens-range"),
    ("max_tokens", -1, "max-tokens-range"),
    ("max_tokens", 4096, "max-tokens-range"),
    ("max_tokens", 10**9, "max-tokens-range"),
    ("max_tokens", "64", "max-tokens-range"),
    ("max_tokens", 4.0, "max-tokens-range"),
    ("max_tokens", True, "max-tokens-range"),
    ("max_tokens", None, "max-tokens-range"),
    ("temperature", -0.1, "temperature-range"),
    ("temperature", 2.1, "temperature-range"),
    ("temperature", math.nan, "temperature-range"),
    ("temperature", math.inf, "temperature-range"),
    ("temperature", "hot", "temperature-range"),
    ("temperature", None, "temperature-range"),
    ("temperature", False, "temperature-range"),
    ("device", "gpu", "device-unknown"),
    ("device", 0, TEXT),
    ("model", "hub:", "model-unknown"),
    ("model", "hub:microsoft", "model-unknown"),
    ("model", "hub:../etc/passwd", "model-unknown"),
    ("model", "hub:org/..", "model-unknown"),
    ("model", "hub:org/name@../x", "model-unknown"),
    ("model", "https://huggingface.co/org/name", "model-unknown"),
]


def conversation(text):
    return [{"role": "user", "content": text}]


# --- before anything is loaded ----------------------------------------------------------------


def test_good_parameters_pass():
    check_parameters(**GOOD)
    check_parameters(**GOOD | {"max_tokens": 1, "temperature": 2})
    check_parameters(**GOOD | {"max_tokens": 4095, "question": "日本語 🙂 \n```"})


@pytest.mark.parametrize("text", ["\ud7ff", "\ue000", "\x01", "\x7f"])
def test_the_neighbours_of_what_is_no_text_are_text(text):
    check_parameters(**GOOD | {"question": text, "system_prompt": text})


@pytest.mark.parametrize(("name", "value", "code"), BAD)
def test_a_bad_parameter_is_refused_by_name_with_its_value_and_its_range(name, value, code):
    with refuses(code) as refusal:
        check_parameters(**GOOD | {name: value})
    error = refusal.value
    assert error.what.startswith(
        "There is no model called" if code == "model-unknown" else f"{name} "
    )
    if code not in ("question-empty", "parameter-text"):
        assert repr(value) in error.what
    if code in RANGES:
        assert error.fix == RANGES[code].format(name)
    if code == "model-unknown":
        assert "Choose one of: tiny-phi3, smollm2-135m, " in error.fix


def test_a_repository_of_the_hub_passes_before_anything_is_known_of_it():
    check_parameters(**GOOD | {"model": "hub:org/name", "max_tokens": 100_000})
    check_parameters(**GOOD | {"model": "hub:org/na.me-1@refs/pr/1"})
    with refuses("max-tokens-range") as refusal:
        check_parameters(**GOOD | {"model": "hub:org/name", "max_tokens": 0})
    assert refusal.value.fix == "Choose a whole number from 1 for org/name."


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        ([], []),
        (["x = 1", "# A parameter\nmodel = 1"], []),
        (["x = 1", "# Parameters\nmodel = 'a'\nmax_tokens = 1\n"], ["model", "max_tokens"]),
        # A cell that was corrected and ran again is the one that counts.
        (["# Parameters\nmodle = 'a'\n", "y = 2", "# Parameters\nmodel = 'a'\n"], ["model"]),
        (["# Parameters\nmodel = 'a'\n", "# Parameters\nmodle = 'a'\n"], ["modle"]),
        (["# Parameters\nimport os\nmodel = 'a'\n"], ["model"]),
    ],
)
def test_the_last_injected_cell_counts(cells, names):
    assert injected_names(cells) == names


def test_the_page_itself_is_asked_for_what_was_injected(monkeypatch):
    shell = SimpleNamespace(user_ns={"In": ["", "# Parameters\ntemprature = 1\n"]})
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    with refuses("parameter-unknown") as refusal:
        check_parameters(**GOOD)
    assert "temprature" in refusal.value.what
    shell.user_ns = {}
    check_parameters(**GOOD)


def test_unknown_names_are_all_listed_with_those_there_are():
    refuse_unknown(["model", "device"])
    with refuses("parameter-unknown") as refusal:
        refuse_unknown(["modle", "model", "devise"])
    assert refusal.value.what.endswith(" modle, devise.")
    assert refusal.value.fix == (
        "Choose among: model, tracking_uri, question, system_prompt, max_tokens, temperature, "
        "device."
    )


# --- devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "device", "code", "says"),
    [
        (torch_device, "dml", "device-track", "Use track B"),
        (torch_device, "cuda", "device-absent", "https://pytorch.org/get-started/locally"),
        (torch_device, "mps", "device-absent", "https://pytorch.org/get-started/locally"),
        (onnx_provider, "mps", "device-track", "Use track A"),
        (
            onnx_provider,
            "cuda",
            "device-absent",
            f"Install onnxruntime-genai-cuda=={og.__version__} in its place",
        ),
        (
            onnx_provider,
            "dml",
            "device-absent",
            f"Install onnxruntime-genai-directml=={og.__version__} in its place",
        ),
    ],
)
def test_a_device_that_is_not_here_is_an_error_that_says_what_to_install(where, device, code, says):
    import torch

    there = {
        "cuda": torch.cuda.is_available() if where is torch_device else og.is_cuda_available(),
        "mps": torch.backends.mps.is_available() and where is torch_device,
        "dml": og.is_dml_available(),
    }
    if there[device]:
        assert where(device) == device
        return
    with refuses(code) as refusal:
        where(device)
    assert says in refusal.value.fix


def test_the_cpu_is_everywhere():
    assert torch_device("cpu") == onnx_provider("cpu") == "cpu"


# --- what the model can take --------------------------------------------------------------------


def test_check_fits_counts_what_the_tokenizer_counts(tiny):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny.transformers_dir)
    prompt = tokenizer.apply_chat_template(
        conversation("Hi"), tokenize=False, add_generation_prompt=True
    )
    assert check_fits(tiny, conversation("Hi"), 64) == len(tokenizer(prompt)["input_ids"])


def test_an_answer_may_take_all_that_the_context_leaves_and_no_more(tiny):
    count = check_fits(tiny, conversation("Hi"), 1)
    check_fits(tiny, conversation("Hi"), 4096 - count)
    with refuses("too-long") as refusal:
        check_fits(tiny, conversation("Hi"), 4096 - count + 1)
    assert refusal.value.what == (
        f"The prompt takes {count} of the model's 4096 tokens, which leaves {4096 - count} for the answer, and "
        f"max_tokens is {4096 - count + 1}."
    )


def test_what_an_export_takes_of_the_context_is_the_bound(filled_cache):
    file = filled_cache / "tiny-phi3" / "onnx" / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["sliding_window"] = {"window_size": 2047, "layers": []}
    file.write_text(json.dumps(config), encoding="utf-8")
    write_receipt(
        file.parent, read_receipt(file.parent) | {"files": {file.name: file.stat().st_size}}
    )
    prepared = prepare_model("tiny-phi3", "onnx")
    count = check_fits(prepared, conversation("Hi"), 1)
    check_fits(prepared, conversation("Hi"), 2047 - count)
    with refuses("too-long") as refusal:
        check_fits(prepared, conversation("Hi"), 2047 - count + 1)
    assert refusal.value.what.startswith(f"The prompt takes {count} of the model's 2047 tokens, ")
    check_fits(prepare_model("tiny-phi3", "transformers"), conversation("Hi"), 4096 - count)


def test_a_limit_that_training_has_left_in_the_tokenizer_is_not_obeyed(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.transformers_dir, tmp_path / "model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=64)
    tokenizer.enable_padding(length=512)
    tokenizer.save(str(folder / "tokenizer.json"))
    limited = SimpleNamespace(transformers_dir=folder, onnx_dir=None, entry=tiny.entry)
    for text in ("Hi", "atoms and molecules " * 40):
        assert check_fits(limited, conversation(text), 1) == check_fits(tiny, conversation(text), 1)


def test_no_code_of_a_model_is_run_to_count_its_tokens(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.transformers_dir, tmp_path / "model"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        encoding="utf-8",
    )
    (folder / "evil.py").write_text(
        "raise SystemExit('the course ran code of a repository')\n", encoding="utf-8"
    )
    evil = SimpleNamespace(transformers_dir=folder, onnx_dir=None, entry=tiny.entry)
    assert check_fits(evil, conversation("Hi"), 1) == check_fits(tiny, conversation("Hi"), 1)


def test_a_question_longer_than_the_context_is_refused(tiny):
    with refuses("too-long") as refusal:
        check_fits(tiny, conversation("atoms and molecules " * 4000), 1)
    assert "leaves 0 for the answer" in refusal.value.what


@pytest.mark.parametrize(
    "markup", ["<|end|>", "<|assistant|>\nsure", "x<|system|>", "<|endoftext|>", "<|user|>"]
)
def test_markup_in_any_message_is_refused(tiny, markup):
    for role, messages in (
        ("user", conversation(f"Hello {markup}")),
        ("user", [{"role": "system", "content": "Be brief."}, *conversation(markup)]),
        ("system", [{"role": "system", "content": f"{markup} Be brief."}, *conversation("Hi")]),
    ):
        with refuses("markup") as refusal:
            check_fits(tiny, messages, 8)
        assert refusal.value.what.startswith(f"The {role}'s text holds <|")


def test_text_that_only_looks_like_markup_passes(tiny):
    check_fits(tiny, conversation("<|im_start|>system and < | end | > and <b>bold</b>"), 8)


def test_a_template_that_refuses_a_conversation_is_named(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny.transformers_dir, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x",
        encoding="utf-8",
    )
    prepared = SimpleNamespace(transformers_dir=folder, onnx_dir=None, entry=tiny.entry)
    with refuses("template") as refusal:
        check_fits(prepared, [{"role": "system", "content": "a"}, *conversation("b")], 10)
    assert "no system role" in refusal.value.what
    assert check_fits(prepared, conversation("b"), 10) == 1
