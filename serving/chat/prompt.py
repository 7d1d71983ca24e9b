"""Turn the messages of a conversation into prompt tokens, by the model's chat template.

This file knows where a model's folder keeps its chat template and its tokenizer, renders the
template as transformers does, and keeps the text of a message from becoming control tokens. It
does not know what a request may hold (`contract`), and it never runs the model.
"""

import json
import re
import secrets
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .contract import Message, Refusal, invalid
from .folder import read_json, unusable

# Compiling a template of this size takes about a second. For comparison, Kimi K3's has 15,000.
MAX_TEMPLATE_CHARACTERS = 100_000
SPECIAL_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


class PromptEncoder:
    """Encodes conversations with the chat template and the tokenizer of a model's folder.

    A tokenizer makes a control token of ``<|end|>`` wherever it stands, even in a message's text.
    So the encoder has two tokenizers. ``tokenizer`` is the folder's, and decodes answers. The
    other one encodes prompts: in it, the name of each added token begins with a secret prefix.
    The encoder puts this prefix before the markup that the template writes. What looks like
    markup in a message gets no prefix, and so it stays text.

    An assistant message may hold added tokens that are not special, such as ``<think>``: an
    assistant writes them itself, and templates look for them.

    Parameters
    ----------
    folder : Path
        The model's folder, with ``tokenizer.json`` and a chat template.

    Attributes
    ----------
    tokenizer : Tokenizer
        The folder's tokenizer, without truncation, padding and dropout.

    Raises
    ------
    Refusal
        A file is missing or unreadable, or the template renders no conversation at all.
    """

    def __init__(self, folder: Path):
        data = read_json(folder / "tokenizer.json")
        self._template = compile_template(_read_template(folder))
        self._special_tokens = _read_special_tokens(folder)
        self._prefix = _secret_text()
        self._separator = _secret_text()
        try:
            data = _without_training_options(data)
            self.tokenizer = Tokenizer.from_str(json.dumps(data))
            # Added tokens of white space, such as "\n\n", are no markup: any message may hold them.
            added = [token for token in data["added_tokens"] if token["content"].strip()]
            names = [token["content"] for token in added]
            special_names = [token["content"] for token in added if token["special"]]
            self._prompt_tokenizer = _prefixed_tokenizer(data, names, self._prefix)
        except Exception:  # tokenizers raises nothing narrower
            raise unusable("tokenizer.json is no tokenizer that can be read") from None
        self._markup_start = {
            "system": _first_characters(names),
            "user": _first_characters(names),
            "assistant": _first_characters(special_names),
        }
        self._whole_markup = _whole_names(names, self._separator)
        self._longest_token = max(len(token) for token in self.tokenizer.get_vocab())
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except Refusal:
            raise unusable("its chat template takes no conversation") from None

    def render(self, turns: list[dict], where: str = "") -> str:
        """Return the prompt as text, up to where the assistant's answer begins.

        Parameters
        ----------
        turns : list of dict
            The messages as templates read them, each with ``role`` and ``content``.
        where : str, optional
            The beginning of an error's sentence, such as ``"Row 2: "``.

        Raises
        ------
        Refusal
            The template raised an error, or wrote half of a surrogate pair, which is no text.
        """
        variables = {
            "messages": turns,
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **self._special_tokens,
        }
        try:
            prompt = self._template.render(variables)
            prompt.encode()
        except Exception:  # a template can raise anything: 1 / 0 is a valid expression
            allowed = "in an order that the model's chat template takes"
            raise invalid("messages", allowed, where) from None
        return prompt

    def encode(self, messages: list[Message], context_length: int, where: str = "") -> list[int]:
        """Return the prompt as tokens, up to where the assistant's answer begins.

        Messages that can't fit into the context are refused before they are rendered. A returned
        prompt can still be too long: the caller has to count its tokens.

        Parameters
        ----------
        messages : list of Message
            The messages of a request that `read_request` has checked.
        context_length : int
            The model's context length, in tokens.
        where : str, optional
            The beginning of an error's sentence, such as ``"Row 2: "``.

        Raises
        ------
        Refusal
            The messages are too long, or the template raised an error.
        """
        characters = sum(len(message.content) for message in messages)
        if characters > context_length * self._longest_token:
            allowed = f"short enough for the model's context of {context_length} tokens"
            raise invalid("messages", allowed, where, "context_length_exceeded")
        turns = []
        for message in messages:
            content = self._break_markup(message.content, message.role)
            turn = {"role": message.role, "content": content}
            if message.name:
                turn["name"] = self._break_markup(message.name, message.role)
            turns.append(turn)
        prompt = self.render(turns, where)
        # The markup in messages is broken, so all markup that is whole is the template's.
        prompt = self._whole_markup.sub(lambda found: self._prefix + found[0], prompt)
        prompt = prompt.replace(self._separator, "")
        return self._prompt_tokenizer.encode(prompt, add_special_tokens=False).ids

    def _break_markup(self, text, role):
        """Put the separator behind the first character of whatever looks like markup."""
        start = self._markup_start[role]
        return start.sub(lambda found: found[0] + self._separator, text)


class _GenerationTag(jinja2.ext.Extension):
    """Renders the inside of ``{% generation %}``, a tag that marks the text to train on."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the tag, its inside and its end. Jinja2 calls this method."""
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(inside).set_lineno(line)


def compile_template(source: str) -> jinja2.Template:
    """Compile a chat template in jinja2's sandbox, set up as transformers sets it up.

    In the sandbox, a template can't reach Python's internals and can't change the messages. Its
    time and memory are not limited: transformers does not limit them either, and the course's
    pages render the same template there first.

    Source: ``transformers.utils.chat_template_utils``.

    Raises
    ------
    Refusal
        The template has over ``MAX_TEMPLATE_CHARACTERS`` characters, or does not compile.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError("The template is too long.")
        return environment.from_string(source)
    except Exception:  # besides syntax errors: RecursionError, and what constants raise
        raise unusable("its chat template is no template that can be read") from None


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Write JSON as transformers does. Jinja2's own filter would escape ``<``, ``>`` and ``&``."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _read_template(folder):
    """Return the source of the folder's chat template, from where transformers reads it."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    source = read_json(folder / "tokenizer_config.json", needed=False).get("chat_template")
    if isinstance(source, list):  # several templates, each with a name
        entries = [entry for entry in source if isinstance(entry, dict)]
        default = [entry for entry in entries if entry.get("name") == "default"]
        source = default[0].get("template") if default else None
    if not isinstance(source, str):
        raise unusable("it has no chat template, so it was not made for conversations")
    return source


def _read_special_tokens(folder):
    """Return the special tokens, such as ``bos_token``, that the template can write by name."""
    config = read_json(folder / "tokenizer_config.json", needed=False)
    # In folders that older versions of transformers saved, this file overrides the other one.
    config |= read_json(folder / "special_tokens_map.json", needed=False)
    texts = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts


def _without_training_options(data):
    """Return a tokenizer's data without options that a training set, and that change prompts."""
    model = data["model"]
    if "dropout" in model:  # only some kinds of model have this option
        model = model | {"dropout": None}
    return data | {"truncation": None, "padding": None, "model": model}


def _prefixed_tokenizer(data, names, prefix):
    """Build the tokenizer with a prefix before the names of these added tokens."""
    renamed = {name: prefix + name for name in names}
    model = dict(data["model"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(name, name): token for name, token in model["vocab"].items()}
    else:  # a Unigram model has a list of names and scores
        model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        # The vocabulary has lost the old names, so drop the merges that need or make one of them.
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if renamed.keys().isdisjoint([*pair, "".join(pair)])
        ]
    added = []
    for token in data["added_tokens"]:
        name = token["content"]
        added.append(token | {"content": renamed.get(name, name)})
    tokenizer = Tokenizer.from_str(json.dumps(data | {"model": model, "added_tokens": added}))
    for token in added:
        name = token["content"]
        ids = tokenizer.encode(name, add_special_tokens=False).ids
        if name.startswith(prefix) and ids != [token["id"]]:
            raise ValueError("The tokenizer does not find an added token by its new name.")
    return tokenizer


def _secret_text():
    """Return 8 random characters that nobody can guess, so no message holds them.

    Unicode reserves these characters for private use and gives them no meaning. So templates do
    not look for them, and tokenizers do not change them.
    """
    return "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(8))


def _first_characters(names):
    """Compile a pattern for the first character of each name, also where names overlap."""
    return _any_of(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)


def _whole_names(names, separator):
    """Compile a pattern for each name, the longest first, because the tokenizer finds that one.

    A name of one character can't be broken inside: it counts as broken if the separator follows.
    """
    longest_first = sorted(names, key=len, reverse=True)
    return _any_of(f"{re.escape(name)}(?!{separator})" for name in longest_first)


def _any_of(patterns):
    """Compile a pattern that matches any of these patterns, or nothing if there are none."""
    return re.compile("|".join(patterns) or "(?!)")
