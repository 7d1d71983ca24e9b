"""Small tokenizers of each kind that models have, each with a twin.

The twin has the same tokens, but its markup has other names, which no text in a test has. So the
twin shows how a tokenizer reads a text in which no markup is found.
"""

import functools
import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from serving.chat.contract import Message
from serving.chat.prompt import PromptEncoder
from support import ROOT

NAMES = ("s", "/s", "unk", "|user|", "|system|", "|assistant|", "|end|", "think")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def trained(kind, vocab_size=500):
    """Train a tokenizer without markup and return it as JSON."""
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split() + [
        "<think>",
        "<|end|>",
        "x<s>",
    ] * 50
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.train_from_iterator(
            words,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        return tokenizer.to_str()
    if kind == "pieces":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=700, show_progress=False, special_tokens=["<unk>", "<s>", "</s>", *BYTES]
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=400,
            show_progress=False,
            unk_token="<unk>",
            special_tokens=["<unk>", "<s>", "</s>"],
        )
    tokenizer.train_from_iterator(words, trainer)
    written = json.loads(tokenizer.to_str()) | {"added_tokens": []}
    if kind == "unigram":
        written["model"]["vocab"] += [[name, -20.0] for name in BYTES]
        written["model"]["byte_fallback"] = True
    return json.dumps(written)


def without(written, words):
    """Return a tokenizer's JSON without the merges that make or need one of these words."""
    written = json.loads(written)
    written["model"]["merges"] = [
        pair
        for pair in written["model"].get("merges", [])
        if not {*pair, "".join(pair)} & set(words)
    ]
    return json.dumps(written)


def with_markup(written, twin, rstrip=(), lstrip=(), **parts):
    """Return a tokenizer with markup. A ``twin`` has other names for it, and the same ids."""
    if twin:
        written = without(written, [f"<{name}>" for name in NAMES])
        for name in NAMES:
            written = written.replace(json.dumps(f"<{name}>"), json.dumps(f"⟦{name}⟧"))
    tokenizer = Tokenizer.from_str(written)
    for part, value in parts.items():
        setattr(tokenizer, part, value)
    left, right = "⟦⟧" if twin else "<>"
    for name in NAMES:
        token = AddedToken(
            left + name + right,
            normalized=False,
            special=name != "think",
            rstrip=name in rstrip,
            lstrip=name in lstrip,
        )
        (tokenizer.add_tokens if name == "think" else tokenizer.add_special_tokens)([token])
    bos = left + "s" + right
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    return tokenizer


PIECES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
STRIPPED = decoders.Sequence([*PIECES, decoders.Strip(" ", 1, 0)])
ROLES = ("|user|", "|system|", "|assistant|", "|end|")


def bytes_kind(twin=False, prefix=False, **flags):
    return with_markup(
        trained("bytes"),
        twin,
        decoder=decoders.ByteLevel(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=prefix),
        **flags,
    )


def llama3_kind(twin=False):
    written = json.loads(trained("bytes"))
    written["model"]["ignore_merges"] = True
    return with_markup(json.dumps(written), twin, decoder=decoders.ByteLevel())


def pieces_kind(twin=False, **more):
    return with_markup(trained("pieces"), twin, **{"decoder": STRIPPED} | more)


def metaspace_kind(scheme, twin=False):
    return with_markup(
        trained("pieces"),
        twin,
        decoder=STRIPPED,
        normalizer=None,
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
    )


def gemma_kind(twin=False):
    return with_markup(
        trained("pieces"),
        twin,
        decoder=decoders.Sequence(PIECES),
        normalizer=normalizers.Replace(" ", "▁"),
    )


def unigram_kind(twin=False, **more):
    return with_markup(trained("unigram"), twin, decoder=STRIPPED, **more)


# For each kind: how to make it, and whether decoding gives back all white space.
KINDS = {
    "GPT-2's bytes": (bytes_kind, True),
    "bytes, a blank in front": (functools.partial(bytes_kind, prefix=True), False),
    "bytes, markup that swallows blanks": (
        functools.partial(
            bytes_kind, rstrip=("|end|", "|user|", "think"), lstrip=("|assistant|", "|end|")
        ),
        False,
    ),
    "Llama-3's bytes, whole words first": (llama3_kind, True),
    "Phi-3's pieces": (functools.partial(pieces_kind, rstrip=ROLES), False),
    "Mistral's pieces": (pieces_kind, False),
    "Metaspace, first": (functools.partial(metaspace_kind, "first"), False),
    "Metaspace, always": (functools.partial(metaspace_kind, "always"), False),
    "Gemma's pieces": (gemma_kind, True),
    "Unigram": (unigram_kind, False),
    "Unigram, NFKC": (functools.partial(unigram_kind, normalizer=normalizers.NFKC()), False),
}


def write_tokenizer(folder, tokenizer, template=TEMPLATE):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"})
    )


def render(text, left="<", right=">"):
    return f"{left}s{right}{left}|user|{right}{text}{left}|end|{right}\n{left}|assistant|{right}"


class Kind:
    """A tokenizer, its prompt encoder, its twin, and the same tokenizer in transformers."""

    def __init__(self, name, folder):
        make, self.exact = KINDS[name]
        self.tokenizer = make()
        self._twin = make(twin=True)
        assert self._twin.token_to_id("⟦|end|⟧") == self.tokenizer.token_to_id("<|end|>")
        write_tokenizer(folder, self.tokenizer)
        self.encoder = PromptEncoder(folder)
        self.hugging_face = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=TEMPLATE, bos_token="<s>"
        )
        self.control = set(self.tokenizer.get_added_tokens_decoder())

    def tokens(self, text):
        return self.encoder.encode([Message(role="user", content=text)], 10**6)

    def twin(self, text):
        return self._twin.encode(render(text, *"⟦⟧"), add_special_tokens=False).ids

    def check_text(self, text):
        """Fail if a message's text becomes other tokens than the twin's, or decodes to another text."""
        tokens = self.tokens(text)
        read = self.tokenizer.decode(tokens, skip_special_tokens=False)
        assert tokens == self.twin(text)
        assert [token for token in tokens if token in self.control] == [
            self.tokenizer.token_to_id(name)
            for name in ("<s>", "<|user|>", "<|end|>", "<|assistant|>")
        ]
        if self.exact:
            assert read == render(text)
        elif "<0x" not in text:  # Unigram reads <0x41> as a byte
            assert "".join(read.split()) == "".join(render(text).split())
