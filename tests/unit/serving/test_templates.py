"""Chat templates: read from where transformers reads them, rendered as it does, or refused.

Run: python -m helpers test tests/unit/serving/test_templates.py
"""

import concurrent.futures
import json

import pytest
from mlflow.exceptions import MlflowException
from support.chat import user
from support.templates import (
    CHOICE,
    CONVERSATIONS,
    TOKENS,
    assert_same_prompt,
    expected,
    rendered,
    write_folder,
)
from transformers import PreTrainedTokenizerFast

from serving.chat.prompt import MAX_TEMPLATE_CHARACTERS, PromptEncoder

SPECIAL_TOKENS = CHOICE["context"].read_text(encoding="utf-8")  # a template that writes them all


@pytest.mark.parametrize("name", CHOICE)
def test_the_prompt_is_that_of_transformers(tmp_path, name):
    encoder = PromptEncoder(write_folder(tmp_path, CHOICE[name].read_text(encoding="utf-8")))
    for messages in CONVERSATIONS.values():
        assert_same_prompt(encoder, name, messages)


@pytest.mark.parametrize("name", ["qwen3", "minicpm3", "generation", "loop-controls", "order"])
def test_threads_can_share_an_encoder(tmp_path, name):
    encoder = PromptEncoder(write_folder(tmp_path, CHOICE[name].read_text(encoding="utf-8")))
    conversations = [*CONVERSATIONS.values()]
    one_by_one = [rendered(encoder, messages) for messages in conversations]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda messages: rendered(encoder, messages), conversations * 3)
    assert list(found) == one_by_one * 3


# --- where the template and its special tokens are read from --------------------------------

ADDED_TOKEN = {
    "__type": "AddedToken",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}


@pytest.mark.parametrize(
    "tokens",
    [
        TOKENS,
        {name: {"content": token} for name, token in TOKENS.items()},
        {name: ADDED_TOKEN | {"content": token} for name, token in TOKENS.items()},
        TOKENS | {"bos_token": None, "pad_token": None},
        {"eos_token": "<eos>"},
        {},
        TOKENS | {"bos_token": ""},
        TOKENS | {"sep_token": "<unk>", "mask_token": "<pad>"},
        TOKENS | {"additional_special_tokens": ["<bos>"]},
    ],
    ids=["texts", "content", "added", "null", "one", "none", "empty", "others", "additional"],
)
def test_special_tokens_are_read_from_the_configuration(tmp_path, tokens):
    encoder = PromptEncoder(write_folder(tmp_path, SPECIAL_TOKENS, tokens))
    texts = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in tokens.items()
    }
    folder = write_folder(tmp_path / "reference", SPECIAL_TOKENS, texts)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert rendered(encoder, user("Hi")) == expected(tokenizer, user("Hi"))


@pytest.mark.parametrize(
    "tokens",
    [{}, {"bos_token": None, "eos_token": "<eos>"}, TOKENS],
    ids=["no tokens", "null", "all tokens"],
)
@pytest.mark.parametrize(
    "older",
    [
        {"bos_token": "<bos>"},
        {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>"},
        {"eos_token": "<pad>"},
        {"additional_special_tokens": ["<pad>"]},
    ],
    ids=["text", "content", "another", "additional"],
)
def test_special_tokens_are_read_from_the_older_file_too(tmp_path, tokens, older):
    folder = write_folder(tmp_path, SPECIAL_TOKENS, tokens)
    (folder / "special_tokens_map.json").write_text(json.dumps(older), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert rendered(PromptEncoder(folder), user("Hi")) == expected(tokenizer, user("Hi"))


def source(name):
    return f"{{% for message in messages %}}<{name}>{{{{ message.content }}}}{{% endfor %}}"


NAMED = [
    {"name": "tool_use", "template": source("tools")},
    {"name": "default", "template": source("default")},
]
FILE = {"chat_template.jinja": source("file")}
WINDOWS = (
    "{{ 'ä日' }}\r\n\r\n{% for message in messages %}\r\n"
    "{{ message.content }}\r\n{% endfor %}\r\n\r\n"
)


@pytest.mark.parametrize(
    ("in_config", "files", "prompt"),
    [
        (source("config"), {}, "<config>Hi"),
        (source("config"), FILE, "<file>Hi"),
        (None, FILE, "<file>Hi"),
        (NAMED, {}, "<default>Hi"),
        (NAMED[::-1], {}, "<default>Hi"),
        (NAMED, FILE, "<file>Hi"),
        (None, FILE | {"additional_chat_templates/tool_use.jinja": source("tools")}, "<file>Hi"),
        (None, {"chat_template.jinja": WINDOWS}, "ä日\n\nHi\n"),
    ],
    ids=[
        "config",
        "file before config",
        "file",
        "default of several",
        "default first",
        "file before several",
        "more files",
        "line ends of Windows",
    ],
)
def test_the_template_is_read_from_where_transformers_reads_it(tmp_path, in_config, files, prompt):
    folder = write_folder(tmp_path, in_config)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    assert expected(PreTrainedTokenizerFast.from_pretrained(folder), user("Hi")) == prompt
    assert PromptEncoder(folder).render(user("Hi")) == prompt


# --- templates that are refused -------------------------------------------------------------

UNREADABLE = "its chat template is no template that can be read"
TAKES_NONE = "its chat template takes no conversation"
# Endless loops and growing texts are not in this table: as in transformers, nothing limits them.
REFUSED = {
    "one character too many": ("x" * (MAX_TEMPLATE_CHARACTERS + 1), UNREADABLE),
    "syntax": ("{% for %}", UNREADABLE),
    "unknown tag": ("{% exec 'x' %}", UNREADABLE),
    "unknown filter": ("{{ messages | popen }}", UNREADABLE),
    "deep brackets": ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", UNREADABLE),
    "deep blocks": ("{% if true %}" * 1000 + "{% endif %}" * 1000, UNREADABLE),
    "class": ("{{ ''.__class__.__mro__ }}", TAKES_NONE),
    "class by item": ("{{ ''['__class__']['__mro__'] }}", TAKES_NONE),
    "class by attr": ("{{ (messages | attr('__class__')).__mro__ }}", TAKES_NONE),
    "class by map": ("{{ [''] | map(attribute='__class__.__mro__') | list }}", TAKES_NONE),
    "class by format": ("{{ '{0.__class__.__mro__}'.format('') }}", TAKES_NONE),
    "class by format_map": ("{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}", TAKES_NONE),
    "globals of a function": ("{{ raise_exception.__globals__.os }}", TAKES_NONE),
    "globals of jinja2": ("{{ cycler.__init__.__globals__.os }}", TAKES_NONE),
    "globals of a macro": (
        "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
        TAKES_NONE,
    ),
    "environment": ("{{ self._TemplateReference__context.environment }}", TAKES_NONE),
    "append to messages": ("{{ messages.append(1) }}", TAKES_NONE),
    "change a message": ("{{ messages[0].update({'content': 'x'}) }}", TAKES_NONE),
    "pop from a message": ("{{ messages[0].pop('content') }}", TAKES_NONE),
    "include": ("{% include '/etc/passwd' %}", TAKES_NONE),
    "import": ("{% import 'os' as os %}{{ os }}", TAKES_NONE),
    "extends": ("{% extends 'chat_template.jinja' %}", TAKES_NONE),
    "half a surrogate pair": ("{{ '\\ud800' }}", TAKES_NONE),
    "endless recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", TAKES_NONE),
    "division by zero": ("{{ 1 / 0 }}", TAKES_NONE),
    "missing special token": (CHOICE["llama-2"].read_text(encoding="utf-8"), TAKES_NONE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_is_no_chat_template_or_leaves_the_sandbox_is_refused(tmp_path, name):
    template, reason = REFUSED[name]
    with pytest.raises(MlflowException) as refusal:
        PromptEncoder(write_folder(tmp_path, template, tokens={}))
    assert refusal.value.message == f"This folder is no model that can be served: {reason}."


def test_a_template_of_the_largest_size_is_read(tmp_path):
    folder = write_folder(tmp_path, "x" * MAX_TEMPLATE_CHARACTERS)
    assert len(PromptEncoder(folder).render(user("Hi"))) == MAX_TEMPLATE_CHARACTERS
