"""Whether a track can load a repository, decided by its file names and small files: one case for each reason.

Run: python -m helpers test tests/unit/helpers/test_usable.py
"""

import json

import pytest
from support import refuses
from support.phi3_layout import AUTO_MAP
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from helpers.models.usable import (
    exportable,
    first_file,
    make_tokenizer,
    refuse_other_engine,
    refuse_other_weights,
    refuse_packed,
    refuse_unexportable,
    refuse_unknown_model,
    weight_files,
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
        (["pytorch_model.bin"], "hub-pickles", "a pickle can run any code"),
        (["consolidated.00.pth"], "hub-pickles", "a pickle can run any code"),
        (["fp16/model.safetensors"], "hub-no-safetensors", "its folder fp16"),
        (["weights.npz"], "hub-no-safetensors", REPO),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_names_that_say_that_there_is_nothing_to_load(names, code, says):
    for base, fix in (("org/base", "hub:org/base"), (None, "")):
        with refuses(code) as refusal:
            refuse_other_weights(REPO, names, base)
        assert says in refusal.value.what
        assert code not in ("hub-adapter", "hub-gguf") or fix in refusal.value.fix


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors", "pytorch_model.bin", "model.gguf"],
        ["model.safetensors.index.json", "adapter_config.json"],
        ["other.safetensors"],
    ],
    ids=lambda names: names[0],
)
def test_weights_as_safetensors_pass_whatever_else_is_there(names):
    refuse_other_weights(REPO, names, None)


SHARDS = [
    "model.safetensors.index.json",
    "a.safetensors",
    "deep/b.safetensors",
    "pytorch_model.bin",
    "x.py",
]


@pytest.mark.parametrize(
    ("names", "config", "index", "files"),
    [
        # As transformers, before an index.
        (["model.safetensors", *SHARDS], {}, {}, ["model.safetensors"]),
        (
            SHARDS,
            {},
            {"weight_map": {"1": "deep/b.safetensors", "2": "a.safetensors", "3": "a.safetensors"}},
            ["a.safetensors", "deep/b.safetensors"],
        ),
        (SHARDS, {"transformers_weights": "a.safetensors"}, {}, ["a.safetensors"]),
    ],
)
def test_the_weights_that_transformers_loads_are_chosen(names, config, index, files):
    assert weight_files(REPO, names, config, index) == files


@pytest.mark.parametrize(
    ("names", "config", "index", "code"),
    [
        *(
            (SHARDS, {}, {"weight_map": weight_map}, "hub-index")
            for weight_map in ({}, ["a.safetensors"], None, {"a": 1})
        ),
        # Whatever an index or a configuration says, nothing but safetensors of this repository comes.
        *(
            (SHARDS, {}, {"weight_map": {"1": "a.safetensors", "2": evil}}, "hub-weights")
            for evil in (
                "pytorch_model.bin",
                "x.py",
                "../a.safetensors",
                "/a.safetensors",
                "gone.safetensors",
            )
        ),
        (SHARDS, {"transformers_weights": "../a.safetensors"}, {}, "hub-weights"),
        (SHARDS, {"transformers_weights": "pytorch_model.bin"}, {}, "hub-weights"),
        (["model.fp16.safetensors"], {}, {}, "hub-no-safetensors"),
    ],
    ids=str,
)
def test_weights_that_are_not_there_or_no_safetensors_are_refused(names, config, index, code):
    with refuses(code):
        weight_files(REPO, names, config, index)


def test_the_file_that_is_opened_first_is_the_one_that_the_configuration_names():
    assert first_file(SHARDS, {"transformers_weights": "a.safetensors"}) == "a.safetensors"
    assert first_file(SHARDS, {"transformers_weights": 5}) == "model.safetensors.index.json"
    assert first_file(["a.safetensors"], {}) is None


# --- track A: by what the small files say -----------------------------------------------------


@pytest.mark.parametrize(
    ("names", "config", "types", "says"),
    [
        *(
            ([name], {}, {}, name)
            for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
        ),
        ([], {"quantization": {"group_size": 64, "bits": 4}}, {}, "the key quantization"),  # MLX
        ([], {}, {"I32": 25_000_000, "F16": 136_000_000}, "I32"),
        ([], {}, {"F8_E4M3": 9, "BF16": 1}, "F8_E4M3"),
        ([], {}, {"F32": 124_000_000, "U8": 12_000_000}, None),  # masks
        ([], {}, {"BF16": 10_000, "I64": 512, "I32": 1}, None),
        ([], {}, {}, None),
        (["quantize_config.json"], {"quantization_config": {"quant_method": "x"}}, {}, None),
    ],
)
def test_packed_weights_that_transformers_would_read_as_plain_are_refused(
    names, config, types, says
):
    if says is None:  # or transformers itself is asked
        refuse_packed(REPO, names, config, types)
    else:
        with refuses("hub-quantized") as refusal:
            refuse_packed(REPO, names, config, types)
        assert says in refusal.value.what


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a config.json and returns its folder and content."""

    def write(**fields):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | fields), encoding="utf-8")
        return tmp_path, CONFIG | fields

    return write


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        # Needs a package that is not here.
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ""),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ""),
        (
            {
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
                "activation_scheme": "dynamic",
            },
            "",
        ),
        ({"quant_method": "mxfp4"}, ""),
        ({"quant_method": "exl2", "bits": 4.0}, "transformers does not know 'exl2'"),
        ({"group_size": 64, "bits": 4}, ""),
        ({"quant_method": ["gptq"]}, ""),
    ],
    ids=str,
)
def test_quantized_weights_that_cannot_be_loaded_and_saved_here_are_refused(written, packed, says):
    with refuses("hub-quantized") as refusal:
        refuse_unknown_model(REPO, *written(quantization_config=packed))
    assert says in refusal.value.what


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "hub-architecture",
            "t5",
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
        ({"model_type": "homemade", "auto_map": None}, "hub-architecture", "'homemade'"),
        ({"model_type": None, "auto_map": None}, "hub-architecture", "None"),
        ({"model_type": "homemade"}, "hub-code", REPO),
        ({"model_type": ["phi3"]}, "hub-code", REPO),
        ({"num_attention_heads": "four"}, "hub-config", "config.json"),
        ({"hidden_act": "magic"}, "hub-config", "magic"),
        ({"dtype": "float8_e4m3fn"}, "hub-dtype", "float8_e4m3fn"),
        ({"torch_dtype": "int8"}, "hub-dtype", "int8"),
        ({"quantization_config": "int4"}, "hub-config", "config.json"),
    ],
    ids=str,
)
def test_what_transformers_makes_no_language_model_of_is_refused(written, fields, code, says):
    with refuses(code) as refusal:
        refuse_unknown_model(REPO, *written(**fields))
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
    refuse_unknown_model(REPO, *written(**fields))


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
        make_tokenizer(REPO, folder)


def test_a_tokenizer_of_other_files_is_made_where_all_of_them_are_there(tiny, tmp_path):
    tokens = Tokenizer.from_file(str(tiny.transformers_dir / "tokenizer.json"))
    tokens.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8"
    )
    assert make_tokenizer(REPO, tmp_path).encode("Hello")
    (tmp_path / "vocab.json").unlink()
    with refuses("hub-no-tokenizer"):
        make_tokenizer(REPO, tmp_path)


# --- track B ----------------------------------------------------------------------------------


def change(**fields):
    return lambda model: model.update(fields)


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (change(type="homemade"), "hub-engine", "homemade"),
        (change(news=1), "hub-engine", "news"),
        (change(vision={"filename": "vision.onnx"}), "hub-engine", "vision"),
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
            "provider_options for cuda",
        ),
        (
            lambda model: model.update(x={"provider_options": "ops"}),
            "hub-library",
            "provider_options, which",
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
    refuse_other_engine(REPO, tmp_path, config, "model.onnx")
    change(config["model"])
    (tmp_path / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    with refuses(code) as refusal:
        refuse_other_engine(REPO, tmp_path, config, "model.onnx")
    assert says in refusal.value.what
    assert str(tmp_path) not in str(refusal.value)


# --- an export --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "None"),
        ({"architectures": ["PhiMoEForCausalLM"]}, "PhiMoEForCausalLM"),  # for CUDA alone
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantized"),
    ],
    ids=str,
)
def test_what_the_builder_cannot_export_is_refused(fields, says):
    with refuses("hub-export") as refusal:
        refuse_unexportable(REPO, CONFIG | fields)
    assert says in refusal.value.what
    refuse_unexportable(REPO, CONFIG)


def test_what_the_builder_exports_is_read_in_the_builder():
    assert {
        "LlamaForCausalLM",
        "Phi3ForCausalLM",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
        "ChatGLMModel",
    } <= exportable()
