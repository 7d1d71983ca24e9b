"""Every chat template at hand becomes the prompt that transformers makes of it; no attack by a template does harm.

Run: python -m helpers test tests/nightly/test_templates.py
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import subprocess
import sys
import time

import psutil
import pytest
from support import ROOT
from support.templates import CONVERSATIONS, FILES, check, expected, hugging_face, rendered, turns, write_folder

from serving.chat_model import PromptEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Return the encoder for a template, by its name."""
    return functools.cache(lambda name: PromptEncoder(write_folder(
        tmp_path_factory.mktemp("template"), FILES[name].read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", FILES)
def test_the_prompt_is_that_of_transformers(encoder, name):
    for messages in CONVERSATIONS.values():
        check(encoder, name, messages)


@pytest.mark.parametrize("messages", [
    turns(*(f"{place}: a text that is neither long nor short." for place in range(999))),
    turns("Hi", f"<think>\n{'a thought, ' * 10_000}\n</think>\n\nYes.", "a long text\n" * 10_000),
], ids=["many", "long"])
@pytest.mark.parametrize("name", FILES)
def test_a_long_conversation_is_not_taken_for_an_attack(encoder, name, messages):
    check(encoder, name, messages)


def test_many_threads_may_use_one_encoder(encoder):
    names = ["qwen3", "glm-4", "minicpm3", "generation", "loop-controls", "order"]
    asked = [(name, messages) for name in names for messages in CONVERSATIONS.values()] * 3
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda pair: rendered(encoder(pair[0]), pair[1]), asked))
    assert found == [expected(hugging_face(name), messages) for name, messages in asked]


# --- what a template must not do --------------------------------------------------------------

SECONDS = 30  # far more than a refusal takes on a slow machine
MEMORY = 2**30  # bytes that a refusal may cost; an attack that succeeds would take ten times that
MB = 2**20
DOUBLE = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x BY ns.x %}{% endfor %}{{ ns.x }}"
NESTED = "".join(f"{{% for {name} in range(90000) %}}" for name in "abcd")
ATTACKS = {
    "class": "{{ ''.__class__.__mro__ }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class by filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "globals of a function": "{{ raise_exception.__globals__.os }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "globals of a jinja class": "{{ cycler.__init__.__globals__.os }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "format of an attribute": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "subclasses by map": "{{ [''] | map(attribute='__class__.__mro__') | list }}",
    "append to messages": "{{ messages.append(1) }}",
    "change a message": "{{ messages[0].update({'content': 'x'}) }}",
    "clear the messages": "{% do messages.clear() %}",
    "pop": "{{ messages[0].pop('content') }}",
    "include": "{% include '/etc/passwd' %}",
    "include what may be missing": "{% include ['/etc/passwd', '../tokenizer.json'] %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "from import": "{% from 'chat_template.jinja' import x %}{{ x }}",
    "extends": "{% extends 'chat_template.jinja' %}",
    "long range": "{% for i in range(1000000000) %}x{% endfor %}",
    "nested loops": f"{NESTED}{'{% endfor %}' * 4}",
    "nested loops that write": f"{NESTED}x{'{% endfor %}' * 4}",
    "nested loops over the text": "{% for a in range(90000) %}{% set x = messages[0].content.split() | join %}"
                                  "{% for b in range(90000) %}{% set y = x.strip('H') %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "long text": "{{ 'a' * 10000000000 }}",
    "long text the other way": "{{ 10000000000 * 'a' }}",
    "long list": "{{ ([0] * 10000000000) | length }}",
    "long text by repeating": "{{ 'a' * 90000 * 90000 }}",
    "long text by join": "{{ (('x' * 90000).join(('x' * 90000) | list)) | length }}",
    "long text by a table": "{{ ('x' * 90000).translate({120: 'x' * 90000}) | length }}",
    "long tuple": "{{ ((1, 2) * 10000000000) | length }}",
    "lists of ranges": "{{ ((range(90000) | list) * 90000) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power of a variable": "{% set x = 9 %}{{ x ** (x ** x) > 1 }}",
    "power too large for a float": "{{ 2.0**10000 }}",
    "power by products": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}"
                         "{{ ns.x > 1 }}",
    "long number as text": "{{ " + "9" * 5000 + " }}",
    "doubled text": DOUBLE.replace("BY", "~"),
    "doubled sum": DOUBLE.replace("BY", "+"),
    "doubled list": DOUBLE.replace("'x'", "[1]").replace("BY", "+"),
    "doubled join": DOUBLE.replace("ns.x BY ns.x", "[ns.x, ns.x] | join"),
    "doubled format": DOUBLE.replace("ns.x BY ns.x", "'%s%s' | format(ns.x, ns.x)"),
    "doubled sign": DOUBLE.replace("ns.x BY ns.x", "'%s%s' % (ns.x, ns.x)"),
    "doubled method": DOUBLE.replace("ns.x BY ns.x", "'{}{}'.format(ns.x, ns.x)"),
    "doubled sum of lists": DOUBLE.replace("'x'", "[1]").replace("ns.x BY ns.x", "[ns.x, ns.x] | sum(start=[])"),
    "doubled nesting": DOUBLE.replace("'x'", "[1]").replace("ns.x BY ns.x", "[ns.x, ns.x]"),
    "doubled nesting as text": DOUBLE.replace("'x'", "[1]").replace("ns.x BY ns.x", "[ns.x, ns.x]").replace(
        "{{ ns.x }}", "{{ ns.x | string | length }}"),
    "doubled nesting as JSON": DOUBLE.replace("'x'", "[1]").replace("ns.x BY ns.x", "[ns.x, ns.x]").replace(
        "{{ ns.x }}", "{{ ns.x | tojson | length }}"),
    "doubled nesting compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
                                "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
                                "{{ ns.x == ns.y }}",
    "many large lists": "{% set ns = namespace(x=[]) %}{% for i in range(1000) %}"
                        "{% set ns.x = ns.x + [[0] * 9000000] %}{% endfor %}{{ ns.x | length }}",
    "many large texts": "{% set ns = namespace(x=[]) %}{% for i in range(2000) %}"
                        "{% set ns.x = ns.x + ['x' * 9000000] %}{% endfor %}{{ ns.x | length }}",
    "doubled replace": DOUBLE.replace("ns.x BY ns.x", "ns.x.replace('x', 'xx')"),
    "wide text by a sign": "{{ '%10000000000d' % 1 }}",
    "wide text by a star": "{{ '%*d' % (10000000000, 1) }}",
    "wide text by digits": "{{ '%.2000000000d' % 1 }}",
    "wide text by a nested width": "{{ '{:>{w}}'.format(1, w=10000000000) }}",
    "wide text by the filter": "{{ '%10000000000d' | format(1) }}",
    "wide text by the method": "{{ '{:10000000000}'.format(1) }}",
    "wide text by center": "{{ 'x' | center(10000000000) }}",
    "wide text by map": "{{ messages | map(attribute='role') | map('center', 10000000000) | list }}",
    "wide text by ljust": "{{ 'x'.ljust(10000000000) }}",
    "wide text by zfill": "{{ 'x'.zfill(10000000000) }}",
    "wide text by tabs": "{{ '\t'.expandtabs(2000000000) * 5 }}",
    "wide text by indent": "{{ 'a\nb' | indent(10000000000) }}",
    "wide text by JSON": "{{ messages | tojson(indent=2000000000) }}",
    "wide list by batch": "{{ [1] | batch(10000000000, 0) | list | length }}",
    "wide list by slice": "{{ [1] | slice(10000000000) | list | length }}",
    "many words": "{{ lipsum(n=1000000000) }}",
    "long replace": "{{ ('a' * 90000).replace('a', 'b' * 90000) | length }}",
    "macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
                                     "{{ m(60) }}",
    "two macros": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "deep blocks": "{% if true %}" * 5000 + "x" + "{% endif %}" * 5000,
    "deep loops": "{% for a in [1] %}" * 100 + "x" + "{% endfor %}" * 100,
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "deep signs": "{{ " + "-" * 20_000 + "1 }}",
    "deep data": "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}"
                 "{{ ns.x | tojson }}",
    "large template": "x" * MB + "{{ messages[0].content }}",
    "large comment": "{#" + "x" * MB + "#}{{ messages[0].content }}",
    "many statements": "{{ 1 }}" * (MB // 7 + 1),
    "large output": "{% for i in range(11) %}{{ 'x' * 1048576 }}{% endfor %}",
    "large output in small pieces": "{% for i in range(60000) %}{{ messages[0].content * 100 }}{% endfor %}",
    "no syntax": "{% for %}",
    "unknown tag": "{% exec 'x' %}",
    "unknown filter": "{{ messages | popen }}",
    "division by zero": "{{ 1 / 0 }}",
    "no such index": "{{ messages[10].content.text }}",
    "not a text": "{{ messages + 1 }}",
    "half a surrogate pair": "{{ '\\ud800' }}",
}
WORKER = """
import json, sys
from pathlib import Path
from mlflow.exceptions import MlflowException
from serving.chat_model import PromptEncoder
print("ready", flush=True)
for line in sys.stdin:
    try:
        answer = {"text": PromptEncoder(Path(json.loads(line))).render([{"role": "user", "content": "Hi"}])[:100]}
    except MlflowException as refusal:
        answer = {"refusal": refusal.message}
    print(json.dumps(answer), flush=True)
"""


class Renderer:
    """Renders in another process, which is ended where a template takes too long or too much memory."""

    def __init__(self, log):
        self._log, self._process = log, None

    def render(self, folder):
        """Return what came of a folder's template: its text or its refusal, or why there is neither."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self._log.open("w", encoding="utf-8"), text=True, encoding="utf-8")
            assert self._read(120) == "ready\n"
        print(json.dumps(str(folder)), file=self._process.stdin, flush=True)
        answer = self._read(SECONDS, self._memory() + MEMORY)
        if answer is None:
            return {"harm": f"took over {SECONDS} seconds or over {MEMORY} bytes"}
        if not answer:
            self.close()
            return {"harm": self._log.read_text(encoding="utf-8")[-2000:]}
        return json.loads(answer)

    def _read(self, seconds, memory=math.inf):
        """Return the process's next line, "" where it has ended, or end it and return None where it asks too much."""
        end = time.monotonic() + seconds
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            line = reader.submit(self._process.stdout.readline)
            while not concurrent.futures.wait([line], timeout=0.05).done:
                if time.monotonic() > end or self._memory() > memory:
                    self.close()
                    return None
            return line.result()

    def _memory(self):
        """Return the bytes that the process and its children hold."""
        try:
            process = psutil.Process(self._process.pid)
            return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
        except psutil.NoSuchProcess:
            return 0

    def close(self):
        if self._process:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self._process.pid).children(recursive=True):
                    child.kill()
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    renderer = Renderer(tmp_path_factory.mktemp("renderer") / "stderr.log")
    yield renderer
    renderer.close()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_that_would_do_harm_is_refused(renderer, tmp_path, attack):
    answer = renderer.render(write_folder(tmp_path, ATTACKS[attack]))
    assert list(answer) == ["refusal"], answer
    assert str(ROOT) not in answer["refusal"]


def test_a_template_that_does_no_harm_is_rendered_there(renderer, tmp_path):
    text = "{% for i in range(1000) %}{{ i % 49 }}{% endfor %}" + "{{ messages[0].content }}" * 1000
    assert renderer.render(write_folder(tmp_path, text))["text"].startswith("0123456789101112")
