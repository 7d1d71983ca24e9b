"""A model's chat template becomes the prompt that transformers makes of it, and cannot do harm.

Run: python -m helpers test tests/unit/serving/test_templates.py
"""

import json

import pytest
from mlflow.exceptions import MlflowException
from support.chat import user
from support.templates import CHOICE, CONVERSATIONS, TOKENS, check, expected, rendered, turns, write_folder
from transformers import PreTrainedTokenizerFast

from serving import chat_model
from serving.chat_model import PromptEncoder, Template, TooMuch

# --- the prompt -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOICE)
def test_the_prompt_is_that_of_transformers(tmp_path, name):
    encoder = PromptEncoder(write_folder(tmp_path, CHOICE[name].read_text(encoding="utf-8")))
    for messages in CONVERSATIONS.values():
        check(lambda name: encoder, name, messages)


@pytest.mark.parametrize("tokens", [
    TOKENS, {name: {"content": token} for name, token in TOKENS.items()},
    {name: {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True} for name, token in TOKENS.items()},
    TOKENS | {"bos_token": None, "pad_token": None}, {"eos_token": "<eos>"}, {}, TOKENS | {"bos_token": ""},
    TOKENS | {"sep_token": "<unk>", "mask_token": "<pad>"}, TOKENS | {"additional_special_tokens": ["<bos>"]},
], ids=["texts", "contents", "added tokens", "null", "one", "none", "empty", "others", "additional"])
def test_special_tokens_are_those_of_the_tokenizers_configuration(tmp_path, tokens):
    source = CHOICE["context"].read_text(encoding="utf-8")
    folder = write_folder(tmp_path, source, tokens)
    reference = write_folder(tmp_path / "reference", source, {
        key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items()})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(reference)
    assert rendered(PromptEncoder(folder), user("Hi")) == expected(tokenizer, user("Hi"))


def test_a_template_that_needs_a_token_which_the_configuration_lacks_takes_no_conversation(tmp_path):
    folder = write_folder(tmp_path, CHOICE["llama-2"].read_text(encoding="utf-8"), {})
    with pytest.raises(MlflowException, match="its chat template takes no conversation"):
        PromptEncoder(folder)


@pytest.mark.parametrize("beside", [
    {"bos_token": "<bos>"}, {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "<eos>"},
    {"eos_token": "<pad>"}, {"additional_special_tokens": ["<pad>"]}], ids=["text", "content", "another", "additional"])
@pytest.mark.parametrize("tokens", [{}, {"bos_token": None, "eos_token": "<eos>"}, TOKENS],
                         ids=["no tokens", "null", "all tokens"])
def test_special_tokens_of_an_older_file_beside_count_as_in_transformers(tmp_path, tokens, beside):
    folder = write_folder(tmp_path, CHOICE["context"].read_text(encoding="utf-8"), tokens)
    (folder / "special_tokens_map.json").write_text(json.dumps(beside), encoding="utf-8")
    prompt = expected(PreTrainedTokenizerFast.from_pretrained(folder), user("Hi"))
    assert rendered(PromptEncoder(folder), user("Hi")) == prompt


SHORT = "{% for message in messages %}<NAME>{{ message.content }}{% endfor %}"
NAMED = [{"name": "tool_use", "template": SHORT.replace("NAME", "tools")},
         {"name": "default", "template": SHORT.replace("NAME", "default")}]


@pytest.mark.parametrize(("in_config", "files", "prompt"), [
    (SHORT.replace("NAME", "config"), {}, "<config>Hi"),
    (SHORT.replace("NAME", "config"), {"chat_template.jinja": SHORT.replace("NAME", "file")}, "<file>Hi"),
    (None, {"chat_template.jinja": SHORT.replace("NAME", "file")}, "<file>Hi"),
    (NAMED, {}, "<default>Hi"),
    (NAMED[::-1], {}, "<default>Hi"),
    (NAMED, {"chat_template.jinja": SHORT.replace("NAME", "file")}, "<file>Hi"),
    (None, {"chat_template.jinja": SHORT.replace("NAME", "file"),
            "additional_chat_templates/tool_use.jinja": SHORT.replace("NAME", "tools")}, "<file>Hi"),
    (None, {"chat_template.jinja": "{{ 'ä日' }}\r\n\r\n{% for message in messages %}\r\n{{ message.content }}\r\n"
                                   "{% endfor %}\r\n\r\n"}, "ä日\n\nHi\n"),
], ids=["config", "file wins", "file alone", "names", "names turned", "file wins over names", "more files beside",
        "line ends of Windows"])
def test_the_template_is_found_where_transformers_finds_it(tmp_path, in_config, files, prompt):
    folder = write_folder(tmp_path, in_config)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    assert expected(PreTrainedTokenizerFast.from_pretrained(folder), user("Hi")) == prompt
    assert PromptEncoder(folder).render(user("Hi")) == prompt


# --- what a template must not do --------------------------------------------------------------

DOUBLE = "{% set ns = namespace(x='x') %}{% for i in range(12) %}{% set ns.x = ns.x BY ns.x %}{% endfor %}"
LIST = DOUBLE.replace("'x'", "[1]")
# Each makes a text of over 1,000 characters, a list of over 1,000 items or a number over 1,000 in a way of its own.
TOO_MUCH = {
    "a product": "{% set x = messages[0].content * 600 %}",
    "a product the other way": "{% set x = 600 * messages[0].content %}",
    "a list by a product": "{% set x = (messages * 1001) %}",
    "a power": "{% set x = 9 %}{{ x ** x ** x > 1 }}",
    "a sum": DOUBLE.replace("BY", "+"),
    "a sum of lists": LIST.replace("BY", "+"),
    "a chain of texts": DOUBLE.replace("BY", "~"),
    "a join": DOUBLE.replace("ns.x BY ns.x", "[ns.x, ns.x] | join"),
    "a join by a long text": "{% set x = ('x' * 600).join(messages[0].content) %}",
    "a format by the filter": DOUBLE.replace("ns.x BY ns.x", "'%s%s' | format(ns.x, ns.x)"),
    "a format by the sign": DOUBLE.replace("ns.x BY ns.x", "'%s%s' % (ns.x, ns.x)"),
    "a format by the method": DOUBLE.replace("ns.x BY ns.x", "'{}{}'.format(ns.x, ns.x)"),
    "a list in a list": LIST.replace("ns.x BY ns.x", "[ns.x, ns.x]"),
    "a tuple in a tuple": LIST.replace("ns.x BY ns.x", "(ns.x, ns.x)"),
    "a table in a table": LIST.replace("ns.x BY ns.x", "{'a': ns.x, 'b': ns.x}"),
    "a replacement": "{% set x = ('Hi' * 99).replace('i', 'x' * 99) %}",
    "a translation": "{% set x = ('x' * 99).translate({120: 'x' * 99}) %}",
    "a width by the sign": "{% set x = '%90000d' % 1 %}",
    "a width by a star": "{% set x = '%*d' % (600, 1) %}",
    "a width by the filter": "{% set x = '%90000d' | format(1) %}",
    "a width by the method": "{% set x = '{:90000}'.format(1) %}",
    **{f"a width by {name}": f"{{% set x = messages[0].content.{name}(1001) %}}"
       for name in ("center", "ljust", "rjust", "zfill")},
    "tabs": "{% set x = '\t\t\t'.expandtabs(600) %}",
    "a filter that widens": "{% set x = messages[0].content | center(1001) %}",
    "a filter by its name": "{% set x = messages | map(attribute='role') | map('center', 1001) | list %}",
    "an indent of JSON": "{% set x = messages | tojson(indent=1001) %}",
    "a list of slices": "{% set x = messages | slice(1001) | list %}",
    "a macro's text": "{% macro m() %}{{ 'x' * 990 }}{{ 'x' * 990 }}{% endmacro %}{% set x = m() %}",
    # Each of these is small, and all of them together are more than 9,000.
    "many small ones": "{% for i in range(99) %}{% set x = messages[0].content * 99 %}{% endfor %}",
}


@pytest.mark.parametrize("source", TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_a_template_puts_together_is_bounded(monkeypatch, source):
    # With bounds so small, a template that gets through them does no harm here.
    template = Template(source)
    monkeypatch.setattr(chat_model, "MAX_TEXT", 1000)
    monkeypatch.setattr(chat_model, "MAX_TOTAL", 9000)
    with pytest.raises(TooMuch):
        template.render({"messages": user("Hi")})


@pytest.fixture
def pieces():
    """Return a long list of texts, and those that a template has taken from it."""
    taken = []
    return (taken.append("x" * 90) or taken[-1] for _ in range(10_000)), taken


@pytest.mark.parametrize(("source", "taken"), [
    ("{% for piece in pieces %}{% endfor %}", 1), ("{% for i in messages %}{% set x = next(pieces) %}{% endfor %}", 0),
    ("{% set x = next(pieces) %}", 0)], ids=["a loop", "a call in a loop", "a call"])
def test_a_template_has_seconds_and_no_more(monkeypatch, pieces, source, taken):
    template = Template(source)
    monkeypatch.setattr(chat_model, "MAX_SECONDS", -1.0)
    with pytest.raises(TooMuch):
        template.render({"messages": user("Hi"), "pieces": pieces[0], "next": next})
    assert len(pieces[1]) == taken


def test_what_a_template_writes_is_bounded_while_it_writes(monkeypatch, pieces):
    monkeypatch.setattr(chat_model, "MAX_TOTAL", 9000)
    with pytest.raises(TooMuch):
        Template("{% for piece in pieces %}{{ piece }}{% endfor %}").render({"pieces": pieces[0]})
    assert len(pieces[1]) == 101


FORBIDDEN = {
    "a class": "{{ ''.__class__.__mro__ }}", "a class by its item": "{{ ''['__class__']['__mro__'] }}",
    "a class by the filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "globals": "{{ raise_exception.__globals__.os }}", "globals of jinja": "{{ cycler.__init__.__globals__.os }}",
    "a class by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "change the messages": "{{ messages.append(1) }}", "change a message": "{{ messages[0].pop('content') }}",
    "include a file": "{% include '/etc/passwd' %}", "import a module": "{% import 'os' as os %}{{ os }}",
    "long texts of jinja's own": "{{ lipsum() }}", "half a surrogate pair": "{{ '\ud800' }}",
    "no conversation": "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("source", FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_template_reaches_nothing_but_its_conversation(tmp_path, source):
    guarded = "{% if messages[0].content == 'Hi' %}" + source + "{% endif %}"
    encoder = PromptEncoder(write_folder(tmp_path, guarded))
    messages = user("Hi")
    with pytest.raises(MlflowException, match="messages has to be in an order that the model's chat template takes"):
        encoder.render(messages)
    assert messages == user("Hi")


@pytest.mark.parametrize("source", ["x" * 2**20, "{% for %}", "{% exec 'x' %}", "{{ messages | popen }}",
                                    "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}"],
                         ids=["size", "syntax", "tag", "filter", "depth"])
def test_a_template_that_cannot_be_read_is_refused(source):
    with pytest.raises(MlflowException, match="its chat template is no template that can be read"):
        Template(source)


def test_a_long_conversation_is_not_taken_for_an_attack(tmp_path):
    source = CHOICE["qwen3"].read_text(encoding="utf-8")
    encoder = PromptEncoder(write_folder(tmp_path, source))
    many = turns(*["a text of some words " * 50] * 199)
    check(lambda name: encoder, "qwen3", many)
