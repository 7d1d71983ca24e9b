"""Writes a model's folder in Hugging Face's format: from a GGUF file, or with random weights for tiny-phi3.

``helpers.models.sources`` runs this as ``python -m helpers.models.convert``, so that its memory is
free again when the folder is written. If you change what is written, raise CONVERTER_VERSION there.
"""

import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from helpers.paths import ROOT

# https://github.com/openai/gpt-2/blob/master/src/encoder.py. A Split with this pattern means the same
# to all libraries. onnxruntime-genai reads ByteLevel's built-in copy differently beside other splits.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PHI3_MARKUP = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")

# Phi-3's own template,
# https://huggingface.co/microsoft/Phi-3-mini-4k-instruct/blob/main/tokenizer_config.json
PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def _splits(*patterns):
    """Return a pre-tokenizer that cuts text by each pattern in turn, then into bytes."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _special(tokens):
    return [AddedToken(token, special=True, normalized=False) for token in tokens]


def gguf_to_transformers(gguf_file: Path, folder: Path) -> None:
    """Write a GGUF Llama model as a Hugging Face folder with fp32 weights.

    The tokenizer is built from the vocabulary and merges in the GGUF file: the conversion in
    transformers does not split numbers into digits, and takes another token for the end token.
    """
    import gguf
    import torch
    from transformers import (
        AutoModelForCausalLM,
        GenerationConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    quantized = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    config = quantized.config
    # The weights are plain floats now, but transformers still takes the model for a quantized one
    # and does not save it. It does save a new model with the same weights.
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())

    fields = gguf.GGUFReader(gguf_file).fields
    kept = {
        key.removeprefix("tokenizer."): value.contents()
        for key, value in fields.items()
        if key.startswith("tokenizer.")
    }
    tokens = kept["ggml.tokens"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in kept["ggml.merges"]],
        )
    )
    # As llama.cpp's pre-tokenizer "smollm" (src/llama-vocab.cpp): each digit alone, then GPT-2's words.
    tokenizer.pre_tokenizer = _splits(r"\p{N}", GPT2_WORDS)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        _special(
            token
            for token, kind in zip(tokens, kept["ggml.token_type"], strict=True)
            if kind == gguf.TokenType.CONTROL
        )
    )
    special = {
        name: tokens[kept[f"ggml.{key}_token_id"]]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=kept["chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_position_embeddings,
        **special,
    ).save_pretrained(folder)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)


def phi3_tokenizer() -> Tokenizer:
    """Return a tokenizer with Phi-3's markup and a vocabulary of the words of LICENSE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splits(GPT2_WORDS)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        # Any English text will do for a vocabulary, as long as it stays the same.
        (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(),
        trainers.BpeTrainer(
            vocab_size=512,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            special_tokens=_special(PHI3_MARKUP),
        ),
    )
    return tokenizer


def tiny_phi3(folder: Path, seed: int, context_length: int) -> None:
    """Write a model with random weights and Phi-3's architecture, markup and chat template; one seed, one model."""
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

    tokenizer = phi3_tokenizer()
    end_of_text, assistant, _, end, _ = (tokenizer.token_to_id(token) for token in PHI3_MARKUP)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=PHI3_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context_length,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=context_length,
            original_max_position_embeddings=context_length,
            # Wider than Phi-3's own 0.02, so that different prompts get different answers.
            initializer_range=0.2,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            pad_token_id=end_of_text,
        )
    )
    # Phi-3 itself ends an answer at any of these three.
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text,
        eos_token_id=[end, assistant, end_of_text],
        pad_token_id=end_of_text,
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "gguf":
        gguf_to_transformers(*map(Path, rest))
    else:
        tiny_phi3(Path(rest[0]), int(rest[1]), int(rest[2]))
