"""Whether a track can load a repository, decided by its file names and small files: one case for each reason.

Run: python -m helpers test tests/unit/helpers/test_loadable.py
"""

import json

import pytest
from support import refuses
from support.phi3_layout import AUTO_MAP
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from helpers.models.loadable import (
    check_architecture,
    check_genai_config,
    check_safetensors,
    choose_weights,
    load_tokenizer,
    refuse_quantized,
)

REPO = "org/name"
CONFIG = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": AUTO_MAP,
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "max_position_embeddings": 4096,
}


# --- track A: by the names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "code", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "hub-adapter", "adapter (LoRA)"),
        (["model_index.json", "unet/diffusion_pytorch_model.safetensors"], "hub-task", "diffusers"),
        (["modules.json", "model.safetensors"], "hub-task", "sentence-transformers"),
        (["q4/model.gguf"], "hub-gguf", "llama.cpp"),
        (["pytorch_model.bin"], "hub-pickles", "loading a pickle can run any code"),
        (["consolidated.00.pth"], "hub-pickles", "loading a pickle can run any code"),
        (["fp16/model.safetensors"], "hub-no-safetensors", "it has fp16/model.safetensors"),
        (["model.fp16.safetensors"], "hub-no-safetensors", "it has model.fp16.safetensors"),
        (["weights.npz"], "hub-no-safetensors", REPO),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_names_that_say_that_there_is_nothing_to_load(names, code, says):
    for base, fix in (("org/base", "hub:org/base"), (None, "")):
        with refuses(code) as refusal:
            check_safetensors(REPO, names, base)
        assert says in refusal.value.what
        assert code not in ("hub-adapter", "hub-gguf") or fix in refusal.value.fix


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "pytorch_model.bin", "model.gguf"],
        ["model.safetensors.index.json", "adapter_config.json"],
    ],
    ids=lambda names: names[0],
)
def test_weights_as_safetensors_pass_whatever_else_is_there(names):
    check_safetensors(REPO, names, None)


SHARDS = [
    "model.safetensors.index.json",
    "a.safetensors",
    "deep/b.safetensors",
    "pytorch_model.bin",
    "x.py",
]


@pytest.mark.parametrize(
    ("names", "index", "files"),
    [
        (["model.safetensors", *SHARDS], {}, ["model.safetensors"]),
        (
            SHARDS,
            {"weight_map": {"1": "deep/b.safetensors", "2": "a.safetensors", "3": "a.safetensors"}},
            ["a.safetensors", "deep/b.safetensors"],
        ),
    ],
)
def test_the_weights_that_transformers_loads_are_chosen(names, index, files):
    assert choose_weights(REPO, names, index) == files


@pytest.mark.parametrize("weight_map", [{}, ["a.safetensors"], None])
def test_an_index_that_names_no_weights_is_refused(weight_map):
    with refuses("hub-index"):
        choose_weights(REPO, SHARDS, {"weight_map": weight_map})


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "x.py", "../a.safetensors", "/a.safetensors", "gone.safetensors"],
)
def test_an_index_brings_nothing_but_safetensors_of_its_repository(name):
    with refuses("hub-weights") as refusal:
        choose_weights(REPO, SHARDS, {"weight_map": {"1": "a.safetensors", "2": name}})
    assert name in refusal.value.what


# --- track A: by what the small files say -----------------------------------------------------


@pytest.mark.parametrize(
    ("names", "config", "says"),
    [
        ([], {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(gptq)"),
        ([], {"quantization_config": "int4"}, REPO),
        ([], {"quantization": {"group_size": 64, "bits": 4}}, REPO),  # MLX
        (["quantize_config.json"], {}, REPO),  # old GPTQ
    ],
    ids=str,
)
def test_quantized_weights_are_refused(names, config, says):
    refuse_quantized(REPO, ["config.json"], CONFIG)
    with refuses("hub-quantized") as refusal:
        refuse_quantized(REPO, names, CONFIG | config)
    assert says in refusal.value.what


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a config.json and returns its folder and content."""

    def write(**fields):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields), encoding="utf-8")
        return tmp_path, CONFIG | fields

    return write


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "auto_map": {}},
            "hub-architecture",
            "T5Config",
        ),
        (
            {"model_type": "bert", "architectures": ["BertModel"], "auto_map": {}},
            "hub-architecture",
            "BertModel",
        ),
        (
            {"architectures": ["Phi3ForSequenceClassification"]},
            "hub-architecture",
            "Phi3ForSequenceClassification",
        ),
        ({"model_type": "homemade", "auto_map": {}}, "hub-architecture", "homemade"),
        ({"model_type": None, "auto_map": {}}, "hub-architecture", "model type"),
        ({"model_type": "homemade"}, "hub-code", REPO),
        ({"num_attention_heads": "four"}, "hub-config", "num_attention_heads"),
        ({"hidden_act": "magic"}, "hub-config", "magic"),
        ({"dtype": "float8_e4m3fn"}, "hub-config", "Float8"),
        ({"torch_dtype": "int8"}, "hub-config", "int8"),
    ],
    ids=str,
)
def test_what_transformers_makes_no_language_model_of_is_refused(written, fields, code, says):
    with refuses(code) as refusal:
        check_architecture(REPO, *written(**fields))
    assert says in refusal.value.what


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"torch_dtype": "bfloat16"},
        {"architectures": None},
        {"architectures": ["PHI3ForCausalLM"]},
    ],
    ids=str,
)
def test_what_transformers_loads_passes(written, fields):
    check_architecture(REPO, *written(**fields))


@pytest.mark.parametrize(
    "content",
    ["{}", "{", Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).to_str()],
    ids=["empty", "no JSON", "of one piece"],
)
def test_a_tokenizer_that_transformers_cannot_make_is_refused(written, content):
    folder, _ = written()
    (folder / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}', encoding="utf-8")
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    with refuses("hub-no-tokenizer"):
        load_tokenizer(REPO, folder)


def test_a_tokenizer_of_other_files_is_made_where_all_of_them_are_there(tiny, tmp_path):
    tokens = Tokenizer.from_file(str(tiny.transformers_dir / "tokenizer.json"))
    tokens.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8"
    )
    assert load_tokenizer(REPO, tmp_path).encode("Hello")
    (tmp_path / "vocab.json").unlink()
    with refuses("hub-no-tokenizer"):
        load_tokenizer(REPO, tmp_path)


# --- track B ----------------------------------------------------------------------------------


def change(**fields):
    return lambda model: model.update(fields)


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (change(type="homemade"), "hub-engine", "homemade"),
        (change(news=1), "hub-engine", "news"),
        (change(type="phi3v", vision={"filename": "vision.onnx"}), "hub-engine", "vision"),
        (change(type="whisper", encoder={"filename": "encoder.onnx"}), "hub-engine", "encoder"),
        (change(context_length=0), "hub-engine", "context_length"),
        (
            lambda model: model["decoder"]["session_options"].update(custom_ops_library="ops.so"),
            "hub-library",
            "custom_ops_library",
        ),
        (
            lambda model: model["decoder"]["session_options"].update(
                provider_options=[{"cuda": {}}]
            ),
            "hub-library",
            "provider_options",
        ),
        (
            lambda model: model.update(x={"provider_options": "ops"}),
            "hub-library",
            "provider_options",
        ),
    ],
    ids=[
        "unknown type",
        "new key",
        "vision",
        "whisper",
        "no context",
        "library",
        "provider",
        "anywhere",
    ],
)
def test_what_the_engine_does_not_load_or_would_run_code_for_is_refused(
    tmp_path, change, code, says
):
    config = {
        "model": {
            "type": "phi3",
            "context_length": 64,
            "decoder": {"filename": "model.onnx", "session_options": {"provider_options": []}},
        }
    }
    (tmp_path / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    check_genai_config(REPO, tmp_path, config, "model.onnx")
    change(config["model"])
    (tmp_path / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    with refuses(code) as refusal:
        check_genai_config(REPO, tmp_path, config, "model.onnx")
    assert says in refusal.value.what
    assert str(tmp_path) not in str(refusal.value)
