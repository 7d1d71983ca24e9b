"""Measures the chat model against the lesson's wrapper, a bare engine and llama.cpp: a store comes in, ratios go out.

It asks the models that the pages registered, greedy, with two threads. Who is compared takes turns, so that a machine
whose speed drifts drifts for all of them.
"""

import http.client
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import mlflow
import onnxruntime_genai as og
import psutil
import xllamacpp
from transformers import AutoTokenizer

from helpers.errors import CourseError
from helpers.measurement import folder_bytes
from helpers.models.prepare import prepare_model
from helpers.paths import ROOT

REPEATS = 5
TOKENS = 64
CALLERS = 8
PAUSE = 0.3  # seconds, in which the threads of the one before stop looking for work
THREADS = psutil.cpu_count(logical=False)
CHAT, PROMPT = "models:/slm-onnx@champion", "models:/slm-onnx-prompt@champion"


def bench_chat(store: str, model: str = "smollm2-135m", repeats: int = REPEATS, tokens: int = TOKENS) -> tuple:
    """Run all comparisons on the champions of a tracking store, to which both pages have logged ``model``.

    Every answer of a story has ``tokens`` tokens, and every figure is the median of ``repeats``. Returns two dicts:
    the ratios by name, and the figures behind them. A model without a GGUF file is not compared with llama.cpp.
    """
    mlflow.set_tracking_uri(store)
    prepared = prepare_model(model)
    ratios, raw = {}, {}
    memory = _memory(store, tokens)
    contenders = _Contenders(prepared, repeats, tokens)
    for measure in (_single, _rows, _callers, _stream, _growth):
        print(f"measuring: {measure.__name__.strip('_')}", flush=True)
        found, figures = measure(contenders)
        ratios |= found
        raw |= figures
    model_bytes = folder_bytes(prepared.onnx_dir)
    logged_bytes = folder_bytes(mlflow.artifacts.download_artifacts(CHAT))
    ratios |= {"memory": (memory["load_bytes"] - 200e6) / model_bytes, "log_disk": logged_bytes / model_bytes}
    raw |= {"memory": memory | {"model_bytes": model_bytes}, "log_disk": {"logged_bytes": logged_bytes}}
    return ratios, raw


class _Contenders:
    """The ways to ask for a story; each returns when the whole answer is there.

    Every story has another number in it: a server that remembers prompts should not have met it lately. Numbers
    whose answer ends too early to compare are left out before anything is measured.
    """

    def __init__(self, prepared, repeats, tokens):
        self.repeats, self.tokens, self.context_length = repeats, tokens, prepared.entry.context_length
        self.mixed = [max(tokens * eighth // 8, 1) for eighth in range(1, 9)]
        self.chat = mlflow.pyfunc.load_model(CHAT)
        self.lesson = mlflow.pyfunc.load_model(PROMPT)
        config = og.Config(str(prepared.onnx_dir))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
        self.engine = og.Model(config)
        self.tokenizer = og.Tokenizer(self.engine)
        self.template = AutoTokenizer.from_pretrained(prepared.onnx_dir)
        self.lock = threading.Lock()
        numbers = range(1000, 1200)
        found = self.chat.predict([{"messages": self.story(number=number), "max_tokens": tokens} for number in numbers])
        self.numbers = itertools.cycle([number for number, answer in zip(numbers, found, strict=True)
                                        if answer["usage"]["completion_tokens"] == tokens])
        self.llama = self._start_llama(next((prepared.onnx_dir.parent / "gguf").glob("*.gguf"), None))

    def _start_llama(self, gguf):
        if gguf is None:
            return None
        settings = xllamacpp.CommonParams()
        settings.model.path = str(gguf)
        settings.port, settings.verbosity = 0, -1
        settings.n_parallel, settings.n_ctx = CALLERS, CALLERS * 512
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
        return xllamacpp.Server(settings)

    def with_llama(self, *asks):
        """Return some ways to ask, and llama.cpp's, where it runs."""
        return (*asks, self.ask_llama) if self.llama else asks

    def story(self, sentences=0, number=None):
        """Return a conversation, with so many sentences of 7 tokens before the question."""
        return [{"role": "user", "content": "The harbour is full of ships. " * sentences
                 + f"Tell me a long story about {number or next(self.numbers)} ships. Make it as long as you can, with "
                   "many chapters."}]

    def prompt(self, messages):
        return self.template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ask_chat(self, messages, max_tokens):
        (answer,) = self.chat.predict({"messages": messages, "max_tokens": max_tokens})
        _expect(answer["usage"]["completion_tokens"], max_tokens)

    def ask_stream(self, messages, max_tokens):
        """Return the seconds until the first chunk, and from there to the last."""
        started, first = time.perf_counter(), None
        request = {"messages": messages, "max_tokens": max_tokens, "stream_options": {"include_usage": True}}
        chunks = []
        for chunk in self.chat.predict_stream(request):
            first = first or time.perf_counter()
            chunks.append(chunk)
        _expect(chunks[-1]["usage"]["completion_tokens"], max_tokens)
        return first - started, time.perf_counter() - first

    def ask_lesson(self, messages, max_tokens):
        with self.lock:
            self.lesson.predict({"prompt": self.prompt(messages)}, params={"max_tokens": max_tokens})

    def ask_bare(self, messages, max_tokens):
        tokens = self.tokenizer.encode(self.prompt(messages))
        options = og.GeneratorParams(self.engine)
        options.set_search_options(max_length=len(tokens) + max_tokens, do_sample=False)
        generator = og.Generator(self.engine, options)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        answer = generator.get_sequence(0)[len(tokens):]
        self.tokenizer.decode(answer)
        _expect(len(answer), max_tokens)

    def ask_llama(self, messages, max_tokens):
        body = {"prompt": self.prompt(messages), "n_predict": max_tokens, "temperature": 0, "stream": True,
                "ignore_eos": True}
        connection = http.client.HTTPConnection(urlsplit(self.llama.listening_address).netloc, timeout=600)
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        events = [json.loads(line[6:]) for line in connection.getresponse() if line.startswith(b"data: ")]
        connection.close()
        _expect(events[-1]["tokens_predicted"], max_tokens)


def _expect(count, tokens):
    if count != tokens:
        raise CourseError("bench-length", f"An answer has {count} tokens, and {tokens} were asked for.",
                          "The benchmark compares answers of equal length: choose another story.")


def _turns(works, repeats):
    """Time each work after a warm-up, in turns. Return each one's median seconds."""
    seconds = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, taken in zip(works, seconds, strict=True):
            time.sleep(PAUSE)
            started = time.perf_counter()
            work()
            if turn:
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def _rates(tokens, names, seconds):
    """Return tokens per second by name; llama.cpp is the last of the names, and may be missing."""
    return {name: tokens / taken for name, taken in zip(names, seconds, strict=False)}


def _single(them):
    asks = them.with_llama(them.ask_bare, them.ask_chat, them.ask_stream)
    bare, chat, stream, *llama = seconds = _turns(
        [lambda ask=ask: ask(them.story(), them.tokens) for ask in asks], 4 * them.repeats)
    ratios = {"single_overhead": bare / chat} | ({"single_llamacpp": llama[0] / stream} if llama else {})
    names = ("bare_engine", "chat_model", "chat_model_stream", "llama_cpp")
    return ratios, {"single": {"tokens": them.tokens, "tokens_per_second": _rates(them.tokens, names, seconds)}}


def _rows(them):
    def together():
        them.chat.predict([{"messages": them.story(), "max_tokens": them.tokens} for _ in range(16)])

    def one_by_one():
        for _ in range(16):
            them.ask_chat(them.story(), them.tokens)

    batch, alone = seconds = _turns([together, one_by_one], them.repeats)
    rates = _rates(16 * them.tokens, ("one_predict", "sixteen_predicts"), seconds)
    return {"rows16": alone / batch}, {"rows16": {"tokens": 16 * them.tokens, "tokens_per_second": rates}}


def _load(them, ask, callers, lengths):
    """Let ``callers`` threads work off requests of these lengths, each as soon as it is free."""
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda length: ask(them.story(), length), lengths))


def mix(lengths: list[int], count: int) -> list[int]:
    """Return ``count`` lengths, each as often as the others, short and long ones by turns."""
    return [lengths[5 * number % len(lengths)] for number in range(count)]


def _callers(them):
    lengths = mix(them.mixed, 4 * CALLERS)
    chat, lesson, *llama = seconds = _turns(
        [lambda ask=ask: _load(them, ask, CALLERS, lengths) for ask in them.with_llama(them.ask_chat, them.ask_lesson)],
        them.repeats)
    ratios = {"callers8": lesson / chat} | ({"callers8_llamacpp": llama[0] / chat} if llama else {})
    rates = _rates(sum(lengths), ("chat_model", "lesson_behind_a_lock", "llama_cpp_8_slots"), seconds)
    return ratios, {"callers8": {"requests": len(lengths), "tokens": sum(lengths), "tokens_per_second": rates}}


def _stream(them):
    others, few = [them.tokens] * (CALLERS - 1), min(8, them.tokens)
    alone, company = [], []
    (batch,) = _turns([lambda: _load(them, them.ask_chat, len(others), others)], them.repeats)
    for turn in range(them.repeats + 1):
        first_alone, _ = them.ask_stream(them.story(), few)
        crowd = threading.Thread(target=_load, args=(them, them.ask_chat, len(others), others))
        crowd.start()
        time.sleep(batch / 2)  # they are generating now
        first, _ = them.ask_stream(them.story(), few)
        crowd.join()
        if turn:
            alone.append(first_alone)
            company.append(first)
    alone, company = statistics.median(alone), statistics.median(company)
    return ({"stream_ttft": company / (batch + alone)},
            {"stream_ttft": {"alone_seconds": alone, "with_7_others_seconds": company, "batch_of_7_seconds": batch}})


def _growth(them):
    callers, half = {}, max(them.tokens // 2, 1)
    for count in (1, 2, 4, 8, 16):
        (seconds,) = _turns([lambda count=count: _load(them, them.ask_chat, count, [half] * 2 * count)], them.repeats)
        callers[str(count)] = 2 * count * half / seconds
    prompts, new = {}, max(them.tokens // 4, 1) + 1
    for sentences in (0, 4, 13, 32, 68, 142, 288):
        taken = []
        for turn in range(them.repeats + 1):
            # In place of the template's own system message, which is as long as the shortest prompt here.
            messages = [{"role": "system", "content": "Write."}, *them.story(sentences)]
            size = len(them.tokenizer.encode(them.prompt(messages)))
            if size + new > them.context_length:
                break
            seconds = them.ask_stream(messages, new)
            if turn:
                taken.append(seconds)
        if taken:
            first, rest = map(statistics.median, zip(*taken, strict=True))
            prompts[str(size)] = {"first_token_seconds": first, "then_tokens_per_second": (new - 1) / rest}
    return {}, {"growth": {"tokens_per_second_by_callers": callers, "by_prompt_tokens": prompts}}


# In a process that has loaded nothing else.
_MEMORY = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
import mlflow
from helpers.measurement import peak_memory_bytes
store, uri, callers, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
mlflow.set_tracking_uri(store)
model = mlflow.pyfunc.load_model(uri)
load_bytes = peak_memory_bytes()
def ask(number):
    messages = [{"role": "user", "content": f"Tell me a long story about {number} ships."}]
    model.predict({"messages": messages, "max_tokens": tokens})
with ThreadPoolExecutor(callers) as pool:
    list(pool.map(ask, range(2 * callers)))
print(json.dumps({"load_bytes": load_bytes, "callers8_bytes": peak_memory_bytes()}))
"""


def _memory(store, tokens):
    """Return the peak memory, in bytes, of a process that loads the chat model and then serves 8 callers."""
    command = [sys.executable, "-c", _MEMORY, store, CHAT, str(CALLERS), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(result.stdout.splitlines()[-1])
