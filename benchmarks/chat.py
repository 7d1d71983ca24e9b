"""Compares the chat model with the other contenders, without HTTP.

It asks the models that the pages have registered, greedily, with as many threads as the machine has
cores.
"""

import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlflow

from benchmarks.contenders import CALLERS, CHAT, Contenders, start_llama
from benchmarks.fidelity import measure_fidelity
from benchmarks.service import measure_service
from benchmarks.spark import measure_spark
from benchmarks.timing import PAUSE, median_seconds, mix
from helpers.models.prepare import prepare_model
from helpers.paths import ROOT

REPEATS = 5
TOKENS = 64
ROWS = 16
TURNS = 5
SENTENCES = 28  # of a user's message: the prompt of the fifth answer has about 1,415 tokens


def bench_chat(
    store: str, model: str = "smollm2-135m", repeats: int = REPEATS, tokens: int = TOKENS
) -> tuple[dict, dict]:
    """Run all comparisons on the champions in a tracking store.

    Parameters
    ----------
    store : str
        The tracking URI of a store in which the pages have registered ``model``.
    model : str
        A name in the catalogue. A model without a GGUF file is compared with neither llama.cpp nor
        OpenVINO GenAI.
    repeats : int
        Each figure is a median of at least this many.
    tokens : int
        The length of a story.

    Returns
    -------
    tuple of dict
        The ratios by name, and the figures behind them.
    """
    mlflow.set_tracking_uri(store)
    ratios = {}
    raw = {"memory": _measure_memory(store, tokens)}
    contenders = Contenders(prepare_model(model), repeats, tokens)
    for measure in (
        _measure_single,
        _measure_rows,
        _measure_callers,
        _measure_conversation,
        _measure_growth,
        measure_fidelity,
        measure_service,
        measure_spark,
    ):
        print(f"measuring: {measure.__name__.partition('measure_')[2]}", flush=True)
        new_ratios, figures = measure(contenders)
        ratios |= new_ratios
        raw |= figures
    return ratios, raw


def _rates(tokens, seconds):
    """Return the figures of a comparison: tokens per second by name."""
    rates = {name: tokens / taken for name, taken in seconds.items()}
    return {"tokens": tokens, "tokens_per_second": rates}


def _measure_single(contenders):
    """Compare one caller's answers."""
    asks = {
        "bare_engine": contenders.ask_bare,
        "chat_model": contenders.ask_chat,
        "chat_model_stream": contenders.ask_stream,
    }
    if contenders.gguf:
        asks["llama_cpp"] = contenders.ask_llama
        asks["openvino"] = contenders.ask_openvino
    works = {
        name: lambda ask=ask: ask(contenders.story(), contenders.tokens)
        for name, ask in asks.items()
    }
    seconds = median_seconds(works, 4 * contenders.repeats)
    ratios = {"single_overhead": seconds["bare_engine"] / seconds["chat_model"]}
    if contenders.gguf:
        ratios["single_llamacpp"] = seconds["llama_cpp"] / seconds["chat_model_stream"]
        ratios["single_openvino"] = seconds["openvino"] / seconds["chat_model_stream"]
    return ratios, {"single": _rates(contenders.tokens, seconds)}


def _measure_rows(contenders):
    """Compare 16 rows in one ``predict`` with 16 calls."""
    tokens = contenders.tokens

    def predict_together():
        contenders.chat.predict(
            [{"messages": contenders.story(), "max_tokens": tokens} for _ in range(ROWS)]
        )

    def predict_one_by_one():
        for _ in range(ROWS):
            contenders.ask_chat(contenders.story(), tokens)

    works = {"one_predict": predict_together, "sixteen_predicts": predict_one_by_one}
    if contenders.gguf:
        works["openvino"] = partial(contenders.load_openvino, ROWS, [tokens] * ROWS)
    seconds = median_seconds(works, contenders.repeats)
    ratios = {"rows16": seconds["sixteen_predicts"] / seconds["one_predict"]}
    if contenders.gguf:
        ratios["rows16_openvino"] = seconds["openvino"] / seconds["one_predict"]
    return ratios, {"rows16": _rates(ROWS * tokens, seconds)}


def _run_callers(contenders, ask, callers, lengths):
    """Let ``callers`` threads ask for stories of these lengths, each again after its answer."""
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda length: ask(contenders.story(), length), lengths))


def _measure_callers(contenders):
    """Compare 8 callers, whose answers have mixed lengths."""
    lengths = mix(contenders.mixed_lengths, 4 * CALLERS)
    asks = {"chat_model": contenders.ask_chat, "lesson_behind_a_lock": contenders.ask_track_b}
    if contenders.gguf:
        asks["llama_cpp_8_slots"] = contenders.ask_llama
    works = {
        name: partial(_run_callers, contenders, ask, CALLERS, lengths) for name, ask in asks.items()
    }
    if contenders.gguf:
        works["openvino"] = partial(contenders.load_openvino, CALLERS, lengths)
    seconds = median_seconds(works, contenders.repeats)
    ratios = {"callers8": seconds["lesson_behind_a_lock"] / seconds["chat_model"]}
    if contenders.gguf:
        ratios["callers8_llamacpp"] = seconds["llama_cpp_8_slots"] / seconds["chat_model"]
        ratios["callers8_openvino"] = seconds["openvino"] / seconds["chat_model"]
    return ratios, {"callers8": {"requests": len(lengths)} | _rates(sum(lengths), seconds)}


def _measure_conversation(contenders):
    """Time the first token of each answer in a conversation, which starts anew in each repeat.

    Each contender gets its own answers back. llama.cpp has a server with one slot for this, as a
    server for one caller would.
    """
    talks = {"chat_model": contenders.talk_chat}
    if contenders.gguf:
        talks["llama_cpp"] = partial(contenders.talk_llama, start_llama(contenders.gguf, 1, 2048))
    conversations = {name: [] for name in talks}
    for repeat in range(contenders.repeats + 1):
        number = next(contenders.numbers)
        for name, talk in talks.items():
            time.sleep(PAUSE)
            turns = _hold_conversation(contenders, talk, number)
            if repeat:  # the first is a warm-up
                conversations[name].append(turns)
    figures = {}
    for name, repeats in conversations.items():
        figures[name] = {}
        for turn, measured in enumerate(zip(*repeats, strict=True), 1):
            sizes, seconds = zip(*measured, strict=True)
            figures[name][str(turn)] = {
                "prompt_tokens": statistics.median(sizes),
                "first_token_seconds": statistics.median(seconds),
            }
    ratios = {}
    if contenders.gguf:
        last = {name: turns[str(TURNS)]["first_token_seconds"] for name, turns in figures.items()}
        ratios["turn5_llamacpp"] = last["chat_model"] / last["llama_cpp"]
    return ratios, {"conversation": figures}


def _hold_conversation(contenders, talk, number):
    """Return the prompt's tokens and the seconds to the first token of each answer."""
    messages = []
    turns = []
    for turn in range(1, TURNS + 1):
        content = (
            f"Day {turn} of {number}. "
            + "The harbour is full of ships. " * SENTENCES
            + "Please tell me a very long story about this day."
        )
        messages.append({"role": "user", "content": content})
        seconds, text = talk(messages, contenders.tokens)
        turns.append((len(contenders.encode(messages)), seconds))
        messages.append({"role": "assistant", "content": text})
    return turns


def _measure_growth(contenders):
    """Time the chat model alone: with more callers, then with longer prompts."""
    by_callers = {}
    half = max(contenders.tokens // 2, 1)
    for callers in (1, 2, 4, 8, 16):
        lengths = [half] * 2 * callers
        work = partial(_run_callers, contenders, contenders.ask_chat, callers, lengths)
        seconds = median_seconds({"load": work}, contenders.repeats)["load"]
        by_callers[str(callers)] = sum(lengths) / seconds
    by_prompt_tokens = {}
    tokens = max(contenders.tokens // 4, 1) + 1
    for sentences in (0, 4, 13, 32, 68, 142, 288):
        # A short system message: the template's own one is as long as the shortest prompt here.
        prompts = [
            [{"role": "system", "content": "Write."}, *contenders.story(sentences)]
            for _ in range(contenders.repeats + 1)
        ]
        size = len(contenders.encode(prompts[-1]))
        if size + tokens > contenders.prepared.entry.context_length:
            break
        pairs = [contenders.ask_stream(messages, tokens) for messages in prompts]
        firsts, rests = zip(*pairs[1:], strict=True)  # the first is a warm-up
        by_prompt_tokens[str(size)] = {
            "first_token_seconds": statistics.median(firsts),
            "then_tokens_per_second": (tokens - 1) / statistics.median(rests),
        }
    growth = {"tokens_per_second_by_callers": by_callers, "by_prompt_tokens": by_prompt_tokens}
    return {}, {"growth": growth}


# Runs in a process that has loaded nothing else.
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


def _measure_memory(store, tokens):
    """Return the peak memory, in bytes, after loading the chat model and after 8 callers."""
    command = [sys.executable, "-c", _MEMORY, store, CHAT, str(CALLERS), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(result.stdout.splitlines()[-1])
