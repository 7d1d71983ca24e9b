"""Holds three tokenizers against each other: Hugging Face's, onnxruntime-genai's and llama.cpp's.

llama.cpp reads the GGUF itself, so it is the judge of the tokenizer that helpers.models.convert builds from it.
Run: python -m helpers test tests/unit/helpers/test_tokenizers.py
"""

import http.client
import json
import random
from contextlib import closing
from types import SimpleNamespace
from urllib.parse import urlsplit

import onnxruntime_genai as og
import pytest
import xllamacpp
from transformers import AutoTokenizer

from helpers import prepare_model

# What a screen does not show is spelled as an escape.
AWKWARD = {
    "empty": [""],
    "digits": [
        "0", "12345", "Hello world 12345", "100,000 $5.00", "3.14e-10", "   12  34", "a  1", "ab1c2",
        "2024-01-31T23:59", "٣٤", "a٣٤b ٥", "１２", "a１b １ １", "१२३", " ১২৩ ৪", "x²+y³", "H₂O ₁₂", "Ⅷ x ⅻ",
        "½ ⅓ 1½", "④⑤ ⑫ x④", "𝟘𝟙 𝟗", "〇一二 ㈠", "௧௨ ൧൨ ๑๒",
    ],
    "spaces": [
        " ", "  ", "   ", " a", "a ", "a  b   c", "\t", "\t\t", "a\tb\t\t1", " \t \t x", "\v\f x", "\x1c\x1f x",
        "x\u00a0y", "\u00a0\u00a0 1", "x\u2003z \u3000", "\u3000x\u3000\u3000y", "\u1680\u202f\u205f 7",
        "\u180ex",
    ],
    "newlines": [
        "\n", "\n\n", " \n \n", "a\nb", "a \n b", "\r", "\r\n", "\r\n\r\n x", "\n\r\n\r", "a\r\n\tb\n\n\n  c\r",
        "x\u2028y", " \u2028 \u2029z", "\n1\n 2\n  3", "a\n\n\td",
    ],
    "emoji": [
        "🙂", "a🙂b", "🙂🙂 🙂", "👩\u200d👩\u200d👧 family", "🏳\ufe0f\u200d🌈", "👨🏽 👋🏿", "👨🏽\u200d💻1",
        "🇪🇸", "🇪🇸🇧🇩🇪", "❤\ufe0f ❤", "1\ufe0f\u20e3 #\ufe0f\u20e3",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    ],
    "scripts": [
        "日本語テキスト 漢字", "我爱北京天安门。你好，世界！", "「引用」、テスト", "ｶﾀｶﾅ ＡＢＣ",
        "নমস্কার বাংলা ভাষা", "আমি ১০টি বই পড়ি।", "नमस्ते दुनिया", "क्षत्रिय ज्ञान", "مرحبا بالعالم", "السَّلَامُ عَلَيْكُم ١٢",
        "שלום עולם", "שָׁלוֹם", "สวัสดีชาวโลก", "น้ำ ๑๒", "안녕하세요 세계", "\u1112\u1161\u11ab\u1100\u1173\u11af",
        "Привет, мир", "Γειά σου Κόσμε", "ქართული", "தமிழ்", "አማርኛ", "İıſß ẞ", "café naïve Ünïcödé",
        "x\u202eabc\u202c y",
    ],
    "combining marks": [
        "e\u0301", "a\u0300\u0301\u0302", "\u0301 x", " \u0301", "Z\u0351\u036b\u0343a\u0334l\u0335g\u0336o",
        "ﬁ ﬂ ﬃ", "\u212b \u00c5 A\u030a", "1\u0301 2\u20dd",
    ],
    "code": [
        "def f(x):\n    return x**2\n", "for i in range(10):\n\tprint(f'{i:>3}')\r\n",
        "x = {'a': [1, 2.5, None], \"b\": True}", '{"key": "va\\"lue", "n": [1, -2e10, null]}',
        "<p class=\"x\">a &amp; b</p><!-- c -->", r"^(\d{3})-[^\s\p{L}]+?(?!\S)$",
        "SELECT * FROM t WHERE a <> 'it''s';", "a->b::c<<1 && d||e", "#include <stdio.h>\nint main(){return 0;}",
        "// TODO\n/* x */\n\n\n", "$ rm -rf /tmp/*; echo \"$HOME\"", "_a__b_ __init__ camelCaseHTTP2",
        "C:\\Users\\x\\n", "\\u0041 \\x00 %00",
    ],
    "contractions": [
        "don't we'll I'M", "I'll've", "'s 'S ’s", "'LL 'Ve 'rE 'D", "it's'", "''s", "1's 's1", "!'s",
        " 'tis the '90s", "\n'm", "y’all’d", "o'clock 'll",
    ],
    "long runs": [
        "a" * 300, " " * 200, "\n" * 100, "1" * 150, "é" * 100, "." * 128, "🙂" * 60, "ab" * 150, "=-" * 80,
        "\t" * 70 + "x", "漢" * 90, "word " * 100, "<|" * 50,
    ],
    "symbols": [
        "∀x∈ℝ: ⌈x⌉ ≥ x", "∑ᵢ₌₁ⁿ aᵢ ≠ ∞", "√2 ± π ∂f/∂x", "\u2212\u00d7\u00f7\u00b7", "… — – “q” „q‟ «q»",
        "£ € ₹ ৳ ¥", "© ® ™ § ¶ †", "─│┌┐ ░▒▓ ◆◇", "→⇒ ↔", "!?!?...,,;;", "\"'`´\"", "ª º ʼn ʰ",
    ],
    "addresses": [
        "https://example.org/a/b?q=1&r=%20x#frag", "http://user:pw@[::1]:8080/", "name+tag@example.co.uk",
        "https://bn.wikipedia.org/wiki/বাংলা", "www.例え.jp", "192.168.0.1/24 fe80::1%eth0",
        "data:text/plain;base64,SGVsbG8=",
    ],
    "hidden": [
        "\u200b", "a\u200bb", "\ufeffx", "x\ufeff 1", "a\u200c\u200db", "\u2060 x\u00ad-y", "\u200e\u200fx",
        "\x01\x02\x7f", "a\x1bb \x1b[31m", "\x9f\x80", "\ue000", "x\uf8ff y", "\U000f0000 \U0010fffd", "\ufffd",
        "𝐀𝕭 𐍈", "𠀀𪜶", "x\U0001f7f0", "\u0378\u0379",
    ],
    "special tokens, whole or not": [
        "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|> x <|im_end|>y", "<|im_start", "|im_end|>",
        "<|im_start|", "<|im_<|im_end|>start|>", "<|im_start|><|im_start|>", "< |im_start|>", "<|IM_START|>",
        "<|endoftext|><|im_end|>\n", "<repo_name>a</s>", "<s>a</s><unk><pad>", "<0x0A>", "[INST] x [/INST]",
        "<|user|>\nhi<|end|>\n<|assistant|>\n", "<|system|>a<|end|>", "a<|end|>b", "<|end", "<|end|><|end|>",
        "<|endof<|end|>text|>", "<|user|>1<|end|>'s", " <|assistant|> ", "<||>", "<|<|user|>|>",
        "<|placeholder1|>",
    ],
}
STRINGS = [text for texts in AWKWARD.values() for text in texts]

# Left out are the characters of the tests of known limits, at the end.
ALPHABET = [
    *"abcXYZsdmt  \t\n\r\v.,;'’!?<>|_-/\\{}()[]\"0123456789éßſı\u212a½²Ⅷ٣१１④あ漢한কখ\u09be\u094dไ🙂👩🇪🇸🏽𝟘𐍈",
    *"\u0301\u200b\u200d\u00a0\u3000\u2028\ufeff\ufe0f\ue000\x01\x1b\x7f",
    *("<|", "|>", "'s", "'LL", "'ve", "\r\n", "    ", " the", "im_start"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|user|>", "<|end|>", "<|assistant|>"),
]

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ],
    [
        {"role": "user", "content": "বাংলায় বলো 🙂 — «été» 漢字"},
        {"role": "assistant", "content": "ঠিক আছে 👩\u200d👧\u00a0!"},
        {"role": "user", "content": "x\u2028y 𝟘"},
    ],
    [{"role": "user", "content": "  two\n\nlines\t\r\n  "}, {"role": "assistant", "content": " ok \n"}],
    [{"role": "user", "content": "{{ messages }} {% if x %} \\n \"q\" 'q' <b>&amp;</b>"}],
    [{"role": "user", "content": "<|im_end|>\n<|im_start|>system\n<|end|><|system|>"}, {"role": "user", "content": ""}],
]


def load(name):
    """Return one model's tokenizers, and by name the functions that turn text into tokens."""
    prepared = prepare_model(name)
    hugging_face = AutoTokenizer.from_pretrained(prepared.transformers_dir)
    genai = og.Tokenizer(og.Model(str(prepared.onnx_dir)))
    encoders = {"Hugging Face": hugging_face.encode, "onnxruntime-genai": lambda text: genai.encode(text).tolist()}
    return SimpleNamespace(prepared=prepared, hugging_face=hugging_face, genai=genai, encoders=encoders)


@pytest.fixture(scope="module")
def tiny_phi3():
    return load("tiny-phi3")


@pytest.fixture(scope="module")
def smollm2():
    model = load("smollm2-135m")
    (gguf,) = (model.prepared.onnx_dir.parent / "gguf").glob("*.gguf")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.port = 0  # any that is free
    settings.n_ctx = 256
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = -1
    server = xllamacpp.Server(settings)

    def encode(text):
        # http.client asks no proxy, and a connection of its own cannot have gone stale meanwhile.
        with closing(http.client.HTTPConnection(urlsplit(server.listening_address).netloc, timeout=60)) as connection:
            body = json.dumps({"content": text, "add_special": False, "parse_special": True})
            connection.request("POST", "/tokenize", body, {"Content-Type": "application/json"})
            return json.load(connection.getresponse())["tokens"]

    model.encoders["llama.cpp"] = encode
    return model


@pytest.fixture(params=[pytest.param("smollm2", marks=pytest.mark.slow), "tiny_phi3"])
def model(request):
    return request.getfixturevalue(request.param)


def markup_strings(model):
    """Return each of the model's own special tokens alone, glued to text, doubled, nested and broken off."""
    return [
        text
        for token in model.hugging_face.get_added_vocab()
        for text in (token, f"a{token}b", f"1 {token} 's", f"\n{token}\n", token * 2, f"<|{token}|>",
                     token[:3] + token + token[3:], token[:-1], token[1:], token.upper())
    ]


def random_strings():
    generator = random.Random(0)
    return ["".join(generator.choices(ALPHABET, k=generator.randint(1, 40))) for _ in range(300)]


def assert_agreement(model, texts):
    """Fail with every text that two tokenizers read differently, and with what each makes of it."""
    differing = []
    for text in texts:
        tokens = {name: encode(text) for name, encode in model.encoders.items()}
        if any(found != tokens["Hugging Face"] for found in tokens.values()):
            differing.append("\n    ".join([ascii(text), *(f"{name}: {found}" for name, found in tokens.items())]))
    assert not differing, f"{len(differing)} of {len(texts)} strings differ:\n" + "\n".join(differing)


def assert_round_trip(decode, encode, texts):
    changed = {text: found for text in texts if (found := decode(encode(text))) != text}
    assert not changed, "\n".join(f"{text!a} came back as {found!a}" for text, found in changed.items())


def test_awkward_strings_are_at_least_a_hundred_and_all_different():
    assert len(set(STRINGS)) == len(STRINGS) >= 100


@pytest.mark.slow
def test_smollm2_is_judged_by_llama_cpp_too(smollm2):
    assert list(smollm2.encoders) == ["Hugging Face", "onnxruntime-genai", "llama.cpp"]
    assert smollm2.encoders["llama.cpp"]("<|im_start|>") == [1]


def test_tokenizers_agree_on_awkward_strings(model):
    assert_agreement(model, STRINGS)


def test_tokenizers_agree_on_special_tokens_alone_glued_nested_and_broken(model):
    assert_agreement(model, markup_strings(model))


def test_tokenizers_agree_on_random_strings(model):
    assert_agreement(model, random_strings())


def test_tokenizers_agree_on_chat_prompts(model):
    assert_agreement(model, [
        model.hugging_face.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in CONVERSATIONS
    ])


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_onnxruntime_genai_renders_the_chat_template_as_hugging_face_does(model, messages, add_generation_prompt):
    rendered = model.genai.apply_chat_template(json.dumps(messages), add_generation_prompt=add_generation_prompt)
    assert rendered == model.hugging_face.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def test_hugging_face_decodes_every_string_back(model):
    def decode(tokens):
        return model.hugging_face.decode(tokens, skip_special_tokens=False)

    assert_round_trip(decode, model.hugging_face.encode, STRINGS + markup_strings(model) + random_strings())


def test_onnxruntime_genai_decodes_every_string_without_special_tokens_back(model):
    special = model.hugging_face.get_added_vocab()
    texts = [text for text in STRINGS + random_strings() if not any(token in text for token in special)]
    assert_round_trip(model.genai.decode, model.genai.encode, texts)


# --- known limits of the libraries: a test that fails here says that one is gone ---------------


def test_onnxruntime_genai_cuts_a_prompt_at_its_first_nul(model):
    # It takes the text as a C string. The course's wrapper refuses NUL for this reason.
    hugging_face, genai = model.encoders["Hugging Face"], model.encoders["onnxruntime-genai"]
    assert genai("a\0b") == hugging_face("a")
    assert genai("\0a") == []
    assert len(hugging_face("a\0b")) == 3


def test_onnxruntime_genai_cuts_an_answer_at_its_first_bytes_that_are_no_text(model):
    # A model that samples byte by byte can write such an answer. U+FFFF is a code point, and counts as no text too.
    broken = model.hugging_face.encode("a") + model.hugging_face.encode("漢")[:-1] + model.hugging_face.encode(" b")
    assert model.hugging_face.decode(broken) == "a\ufffd b"
    assert model.genai.decode(broken) == "a\ufffd"
    assert_agreement(model, ["a\uffffb"])
    assert model.hugging_face.decode(model.hugging_face.encode("a\uffffb")) == "a\uffffb"
    assert model.genai.decode(model.genai.encode("a\uffffb")) == "a\ufffd"


@pytest.mark.slow
@pytest.mark.parametrize("character", ["\x04", "\x06", "\x13", "\x14", "\x16", "\x1d"])
def test_onnxruntime_genai_gives_minus_one_for_a_byte_that_the_vocabulary_lacks(smollm2, character):
    # The others leave the byte out. To the engine -1 is the last row of the embeddings: a wrong token, and no error.
    text = f"a{character}b"
    hugging_face, genai, llama_cpp = (encode(text) for encode in smollm2.encoders.values())
    a, b = smollm2.hugging_face.encode("a"), smollm2.hugging_face.encode("b")
    assert hugging_face == llama_cpp == a + b
    assert genai == [*a, -1, *b]


@pytest.mark.slow
def test_hugging_face_merges_across_a_byte_that_the_vocabulary_lacks(smollm2):
    dot, two_dots = smollm2.hugging_face.encode("."), smollm2.hugging_face.encode("..")
    assert len(two_dots) == 1
    assert smollm2.encoders["Hugging Face"](".\x04.") == two_dots
    assert smollm2.encoders["llama.cpp"](".\x04.") == dot + dot


@pytest.mark.slow
@pytest.mark.parametrize(("character", "knowing"), [
    ("\u08be", ["Hugging Face", "onnxruntime-genai", "llama.cpp"]),  # a letter since Unicode 13
    ("\u0870", ["Hugging Face", "llama.cpp"]),  # since Unicode 14
    ("\u1c89", ["Hugging Face"]),  # since Unicode 16
    ("\x85", ["Hugging Face", "llama.cpp"]),  # next line: white space in Unicode, and to \s in the pattern
])
def test_tokenizers_know_letters_and_spaces_of_different_unicode_versions(smollm2, character, knowing):
    # After a letter or a space, 's is a word of its own; after a sign, the apostrophe belongs to the sign.
    encode = smollm2.hugging_face.encode
    word, sign = encode(character) + encode("'s"), encode(character) + encode("'") + encode("s")
    assert {name: encode(character + "'s") for name, encode in smollm2.encoders.items()} == {
        name: word if name in knowing else sign for name in smollm2.encoders
    }
