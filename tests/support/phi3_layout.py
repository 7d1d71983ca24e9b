"""Writes a tiny random Phi-3 and Phi-4-mini as the two repositories that each has on the Hub.

The kind of tokenizer, names of files and folders, the two shards, the remote code that nobody may
run, the tokens that swallow what follows, the pieces that begin with a blank:
https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/tree/main and
https://huggingface.co/microsoft/Phi-3-mini-4k-instruct-onnx/tree/main. Phi-4-mini's differ in the
tokenizer, which is one of bytes, in markup without line ends, in tied embeddings, grouped heads and
two sets of rotary factors. Weights are noise that nothing can load, in files of the right names,
unless ``real`` ones are asked for.
"""

import json
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from support import ROOT

TORCH, ONNX = "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct-onnx"
PHI4_TORCH, PHI4_ONNX = "microsoft/Phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct-onnx"
CPU = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
MARKUP = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI4_MARKUP = [
    "<|endoftext|>",
    "<|endofprompt|>",
    "<|assistant|>",
    "<|end|>",
    "<|user|>",
    "<|system|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "<|tool_response|>",
    "<|tag|>",
]
PHI4_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# https://github.com/openai/tiktoken/blob/main/tiktoken_ext/openai_public.py, o200k_base
PHI4_WORDS = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
AUTO_MAP = {
    "AutoConfig": "configuration_phi3.Phi3Config",
    "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
}
REMOTE_CODE = "raise SystemExit('the course ran code of a repository')\n"


def write_phi3(root, real=False):
    """Write both repositories of Phi-3 under ``root``."""
    tokenizer = _sentencepiece()
    config = _tokenizer_config(
        tokenizer,
        TEMPLATE,
        tokenizer_class="LlamaTokenizer",
        bos_token="<s>",
        unk_token="<unk>",
        add_bos_token=False,
        legacy=False,
    )
    more = {"tokenizer.model": "stands for SentencePiece's own file\n"}
    _write(
        root,
        real,
        TORCH,
        ONNX,
        tokenizer,
        config,
        more,
        hidden_size=64,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        sliding_window=2047,
    )
    for other in (
        "cpu_and_mobile/cpu-int4-rtn-block-32",
        "cuda/cuda-fp16",
        "cuda/cuda-int4-rtn-block-32",
        "directml/directml-int4-awq-block-128",
    ):
        shutil.copytree(root / ONNX / CPU, root / ONNX / other)


def write_noise_phi3(root):
    """Write both repositories of Phi-3 with noise for weights; transformers makes a model of their config.json."""
    write_phi3(root)
    # 32,000 by default, which is none of so few tokens.
    change_json(
        root / TORCH / "config.json",
        pad_token_id=0,
        architectures=["Phi3ForCausalLM"],
        num_hidden_layers=2,
    )


def change_json(path, **fields):
    """Set fields of the object in a JSON file."""
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8"
    )


def write_phi4(root, real=False):
    """Write both repositories of Phi-4-mini under ``root``."""
    tokenizer = _bytes()
    config = _tokenizer_config(
        tokenizer,
        PHI4_TEMPLATE,
        tokenizer_class="GPT2Tokenizer",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        add_prefix_space=False,
    )
    names = tokenizer.model.save(str(_folder(root / "vocabulary")))
    more = {Path(name).name: Path(name).read_text(encoding="utf-8") for name in names}
    shutil.rmtree(root / "vocabulary")
    # 24 pairs: three quarters of a head of 64 rotate, and the engine takes these in eights.
    factors = [1 + pair / 10 for pair in range(24)]
    _write(
        root,
        real,
        PHI4_TORCH,
        PHI4_ONNX,
        tokenizer,
        config,
        more,
        hidden_size=256,
        num_key_value_heads=2,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 24, "long_factor": factors},
    )
    shutil.copytree(root / PHI4_ONNX / CPU, root / PHI4_ONNX / "gpu/gpu-int4-rtn-block-32")


def _write(root, real, torch_repo, onnx_repo, tokenizer, tokenizer_config, more, **config):
    """Write a model's repository and that of its ONNX twin."""
    torch_folder, onnx_folder = _folder(root / torch_repo), root / onnx_repo
    special = {
        key: tokenizer_config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    markup = {
        token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    tokenizer.save(str(torch_folder / "tokenizer.json"))
    tokenizer_files = more | {
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2),
        "added_tokens.json": json.dumps(markup),
        "special_tokens_map.json": json.dumps(special),
    }
    _add(torch_folder, tokenizer_files)
    if real:
        _write_model(torch_folder, tokenizer, config)
        _write_onnx(torch_folder, onnx_folder / CPU)
    else:
        _write_noise(torch_folder, onnx_folder / CPU, tokenizer, config)
    for name in ("config.json", "tokenizer.json", *tokenizer_files):
        shutil.copy(torch_folder / name, onnx_folder / CPU / name)
    _add(
        torch_folder,
        {
            "README.md": "---\nlicense: mit\npipeline_tag: text-generation\nlanguage:\n- en\n---\n# A tiny model\n",
            "LICENSE": "MIT\n",
            "NOTICE.md": "None.\n",
            "SECURITY.md": "None.\n",
            ".gitattributes": "*.bin lfs\n",
            "configuration_phi3.py": REMOTE_CODE,
            "modeling_phi3.py": REMOTE_CODE,
            "sample_finetune.py": REMOTE_CODE,
        },
    )
    _add(
        onnx_folder,
        {
            "README.md": "---\nlicense: mit\npipeline_tag: text-generation\n---\n# ONNX\n",
            "config.json": (onnx_folder / CPU / "config.json").read_text(),
            "LICENSE": "MIT\n",
        },
    )


def _folder(path):
    path.mkdir(parents=True)
    return path


def _licence():
    return [
        word
        for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()
        for word in line.split()
    ]


def _add(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _sentencepiece():
    """Return a tokenizer of SentencePiece's kind: pieces begin with a blank, markup swallows the blanks behind it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.train_from_iterator(
        _licence(),
        trainers.BpeTrainer(
            vocab_size=600, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *fallback]
        ),
    )
    # The bytes are ordinary entries of Phi-3's vocabulary, not special tokens.
    tokenizer = Tokenizer.from_str(
        json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []})
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(
                name,
                normalized=False,
                special=True,
                rstrip=name not in ("<unk>", "<s>", "<|endoftext|>"),
            )
            for name in ("<unk>", "<s>", "</s>", *MARKUP)
        ]
    )
    return tokenizer


def _bytes():
    """Return a tokenizer of bytes, cut into words as Phi-4-mini's are."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PHI4_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _licence(),
        trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(name, normalized=False, special=True, rstrip=name != "<|endoftext|>")
            for name in PHI4_MARKUP
        ]
    )
    return tokenizer


def _tokenizer_config(tokenizer, template, **more):
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": False,
            "special": token.special,
        }
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    return {
        "added_tokens_decoder": added,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
    } | more


def _write_model(folder, tokenizer, config):
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    end_of_text, assistant, end = map(
        tokenizer.token_to_id, ("<|endoftext|>", "<|assistant|>", "<|end|>")
    )
    torch.manual_seed(1)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=tokenizer.get_vocab_size(),
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            original_max_position_embeddings=4096,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
            **config,
        )
    ).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=[end_of_text, assistant, end], pad_token_id=end_of_text
    )
    model.save_pretrained(folder, max_shard_size="200KB")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"auto_map": AUTO_MAP}, indent=2))


def _write_noise(torch_folder, onnx_folder, tokenizer, config):
    """Write what stands for the two models."""
    noise = random.Random(1).randbytes
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (torch_folder / name).write_bytes(noise(200_000))
    files = {
        "model.safetensors.index.json": {"weight_map": {"embed": names[0], "lm_head": names[1]}},
        "config.json": {
            "model_type": "phi3",
            "vocab_size": tokenizer.get_vocab_size(),
            "num_attention_heads": 4,
            "bos_token_id": 1,
            "eos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            "auto_map": AUTO_MAP,
        }
        | config,
        "generation_config.json": {"bos_token_id": 1},
    }
    _add(torch_folder, {name: json.dumps(content) for name, content in files.items()})
    _folder(onnx_folder)
    (onnx_folder / "model.onnx").write_bytes(noise(1_000))
    (onnx_folder / "model.onnx.data").write_bytes(noise(200_000))
    decoder = {"filename": "model.onnx", "session_options": {"provider_options": []}}
    genai = {
        "model": {
            "type": "phi3",
            "context_length": config["max_position_embeddings"],
            "decoder": decoder,
        }
    }
    _add(
        onnx_folder, {"genai_config.json": json.dumps(genai), "configuration_phi3.py": REMOTE_CODE}
    )


def _write_onnx(source, folder):
    scratch = folder.parents[3] / "scratch"
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-m",
        "local",
        "-i",
        source,
        "-o",
        scratch,
        "-p",
        "int4",
        "-e",
        "cpu",
        "-c",
        scratch / "cache",
        "--extra_options",
        "int4_block_size=32",
        "int4_accuracy_level=4",
    ]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    folder.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        shutil.move(scratch / name, folder / name)
    (folder / "configuration_phi3.py").write_text(REMOTE_CODE)
    shutil.rmtree(scratch)


def export_phi3(folder, *options, layer_types=False, **config):
    """Write a tiny random Phi-3 and its fp32 export by the builder; return the folders of both.

    With ``layer_types``, its configuration says which layers have the window.
    """
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    torch_folder, onnx_folder = _folder(folder / "torch"), folder / "onnx"
    tokenizer = _bytes()
    end_of_text, end = map(tokenizer.token_to_id, ("<|endoftext|>", "<|end|>"))
    torch.manual_seed(1)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.2,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
            **config,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=[end_of_text, end], pad_token_id=end_of_text
    )
    model.save_pretrained(torch_folder)
    written = json.loads((torch_folder / "config.json").read_text())
    if layer_types:
        written["layer_types"] = ["sliding_attention"] * 2
    tokenizer.save(str(torch_folder / "tokenizer.json"))
    _add(
        torch_folder,
        {
            "config.json": json.dumps(written),
            "tokenizer_config.json": json.dumps(
                _tokenizer_config(
                    tokenizer,
                    PHI4_TEMPLATE,
                    tokenizer_class="GPT2Tokenizer",
                    bos_token="<|endoftext|>",
                    unk_token="<|endoftext|>",
                    add_prefix_space=False,
                )
            ),
        },
    )
    command = [
        "builder",
        "-m",
        "local",
        "-i",
        torch_folder,
        "-o",
        onnx_folder,
        "-p",
        "fp32",
        "-e",
        "cpu",
        "-c",
        folder / "cache",
        *(["--extra_options", *options] if options else []),
    ]
    # In this process: to import torch takes its time.
    with mock.patch.object(sys, "argv", list(map(str, command))):
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
    return torch_folder, onnx_folder
