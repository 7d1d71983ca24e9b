"""Writes a tiny random Phi-3 as the two repositories that Phi-3 has on the Hub, with its kind of tokenizer.

Names of files and folders, the two shards, the remote code that nobody may run, the tokens that swallow what
follows, the pieces that begin with a blank: https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/tree/main
and https://huggingface.co/microsoft/Phi-3-mini-4k-instruct-onnx/tree/main.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

TORCH, ONNX = "microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct-onnx"
CPU = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
MARKUP = ["<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>",
          "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
REMOTE_CODE = "raise SystemExit('the course ran code of a repository')\n"


def write_phi3(root):
    """Write both repositories under ``root``."""
    torch_folder, onnx_folder = root / TORCH, root / ONNX
    torch_folder.mkdir(parents=True)
    tokens = _write_tokenizer(torch_folder)
    _write_model(torch_folder, tokens)
    _write_onnx(torch_folder, onnx_folder / CPU)
    _add(torch_folder, {
        "README.md": "---\nlicense: mit\npipeline_tag: text-generation\nlanguage:\n- en\n---\n# Phi-3, tiny\n",
        "LICENSE": "MIT\n", "NOTICE.md": "None.\n", "SECURITY.md": "None.\n", ".gitattributes": "*.bin lfs\n",
        "configuration_phi3.py": REMOTE_CODE, "modeling_phi3.py": REMOTE_CODE, "sample_finetune.py": REMOTE_CODE,
    })
    for other in ("cpu_and_mobile/cpu-int4-rtn-block-32", "cuda/cuda-fp16", "cuda/cuda-int4-rtn-block-32",
                  "directml/directml-int4-awq-block-128"):
        shutil.copytree(onnx_folder / CPU, onnx_folder / other)
    _add(onnx_folder, {"README.md": "---\nlicense: mit\npipeline_tag: text-generation\n---\n# ONNX\n",
                       "config.json": (onnx_folder / CPU / "config.json").read_text(), "LICENSE": "MIT\n"})


def _add(folder, files):
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_tokenizer(folder):
    """Write a tokenizer of SentencePiece's kind; return its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        [word for line in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines() for word in line.split()],
        trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *fallback]))
    # The bytes are ordinary entries of Phi-3's vocabulary, not special tokens.
    model = json.loads(tokenizer.to_str())["model"]
    tokenizer.model = models.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]], unk_token="<unk>",
                                 fuse_unk=True, byte_fallback=True)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>")])
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False, special=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True, rstrip=name != "<|endoftext|>")
                                  for name in MARKUP])
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(number): {"content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                           "rstrip": token.rstrip, "single_word": False, "special": token.special}
             for number, token in tokenizer.get_added_tokens_decoder().items()}
    config = {"add_bos_token": False, "add_eos_token": False, "added_tokens_decoder": added, "bos_token": "<s>",
              "chat_template": TEMPLATE, "clean_up_tokenization_spaces": False, "eos_token": "<|endoftext|>",
              "legacy": False, "model_max_length": 4096, "pad_token": "<|endoftext|>", "padding_side": "left",
              "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>",
              "use_default_system_prompt": False}
    _add(folder, {
        "tokenizer_config.json": json.dumps(config, indent=2),
        "added_tokens.json": json.dumps({token: tokenizer.token_to_id(token) for token in MARKUP}),
        "special_tokens_map.json": json.dumps({"bos_token": "<s>", "eos_token": "<|endoftext|>",
                                               "pad_token": "<|endoftext|>", "unk_token": "<unk>"}),
        "tokenizer.model": "stands for SentencePiece's own file\n",
    })
    return tokenizer


def _write_model(folder, tokenizer):
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    end_of_text, assistant, end = map(tokenizer.token_to_id, ("<|endoftext|>", "<|assistant|>", "<|end|>"))
    torch.manual_seed(1)
    model = Phi3ForCausalLM(Phi3Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, sliding_window=2047,
        original_max_position_embeddings=4096, initializer_range=0.2, bos_token_id=1, eos_token_id=end_of_text,
        pad_token_id=end_of_text)).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[end_of_text, assistant, end],
                                               pad_token_id=end_of_text)
    model.save_pretrained(folder, max_shard_size="200KB")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config",
                          "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _write_onnx(source, folder):
    scratch = folder.parents[3] / "scratch"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local", "-i", source, "-o", scratch,
               "-p", "int4", "-e", "cpu", "-c", scratch / "cache", "--extra_options", "int4_block_size=32",
               "int4_accuracy_level=4"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)
    folder.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        shutil.move(scratch / name, folder / name)
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json",
                 "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    (folder / "configuration_phi3.py").write_text(REMOTE_CODE)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    write_phi3(Path(sys.argv[1]))
