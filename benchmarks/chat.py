"""Measures the chat model against the other contenders: a store comes in, ratios go out.

It asks the models that the pages registered, greedy, with two threads. Who is compared takes turns,
so that a machine whose speed drifts drifts for all of them.
"""

import json
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow

from benchmarks.contenders import CALLERS, CHAT, Contenders, start_llama
from benchmarks.fidelity import fidelity
from benchmarks.figures import int8_instructions
from benchmarks.service import service
from benchmarks.spark import spark
from benchmarks.turns import PAUSE, mix, percentile, take_turns, timed
from helpers.files import folder_bytes
from helpers.models.prepare import prepare_model
from helpers.paths import ROOT

REPEATS = 5
TOKENS = 64
ROWS = 16
TURNS = 5
# Sentences that a caller says in each turn: the fifth turn's prompt then has about 1,415 tokens.
DAY = 28
CPUINFO = Path("/proc/cpuinfo")


def bench_chat(
    store: str, model: str = "smollm2-135m", repeats: int = REPEATS, tokens: int = TOKENS
) -> tuple:
    """Run all comparisons on the champions of a tracking store, to which both pages have logged ``model``.

    Every answer of a story has ``tokens`` tokens, and every figure is the median of ``repeats``.
    Returns two dicts: the ratios by name, and the figures behind them. A model without a GGUF file
    is compared with neither llama.cpp nor OpenVINO GenAI.
    """
    mlflow.set_tracking_uri(store)
    prepared = prepare_model(model)
    ratios, raw = {}, {}
    memory = _memory(store, tokens)
    contenders = Contenders(prepared, repeats, tokens)
    for measure in (
        _single,
        _json,
        _rows,
        _callers,
        _newcomer,
        _conversation,
        _growth,
        fidelity,
        service,
        spark,
    ):
        print(f"measuring: {measure.__name__.strip('_')}", flush=True)
        found, figures = measure(contenders)
        ratios |= found
        raw |= figures
    model_bytes = folder_bytes(prepared.onnx_dir)
    logged_bytes = folder_bytes(mlflow.artifacts.download_artifacts(CHAT))
    ratios |= {
        "memory": (memory["load_bytes"] - 200e6) / model_bytes,
        "log_disk": logged_bytes / model_bytes,
    }
    instructions = (
        int8_instructions(CPUINFO.read_text(encoding="utf-8")) if CPUINFO.exists() else None
    )
    raw |= {
        "memory": memory | {"model_bytes": model_bytes},
        "log_disk": {"logged_bytes": logged_bytes},
        "int8_instructions": instructions,
    }
    return ratios, raw


def _rates(tokens, seconds):
    """Return tokens per second by name."""
    return {name: tokens / taken for name, taken in seconds.items()}


def _race(works, repeats):
    """Return the median seconds of each work, by name."""
    taken = take_turns({name: timed(work) for name, work in works.items()}, repeats)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def _single(them):
    asks = {
        "bare_engine": them.ask_bare,
        "chat_model": them.ask_chat,
        "chat_model_stream": them.ask_stream,
    }
    seconds = _race(
        {
            name: lambda ask=ask: ask(them.story(), them.tokens)
            for name, ask in (asks | them.peers).items()
        },
        4 * them.repeats,
    )
    ratios = {"single_overhead": seconds["bare_engine"] / seconds["chat_model"]} | {
        f"single_{name.replace('_', '')}": seconds[name] / seconds["chat_model_stream"]
        for name in them.peers
    }
    return ratios, {
        "single": {"tokens": them.tokens, "tokens_per_second": _rates(them.tokens, seconds)}
    }


def _json(them):
    """Compare answers that a JSON schema binds with free ones, in tokens per second.

    The schema asks for a list that is longer than ``max_tokens`` lets it become. So both answers
    have the same number of tokens, and neither is faster because it has less to say.
    """
    asks = {"free": them.ask_chat, "json_schema": them.ask_json}
    rates = _rates(
        them.tokens,
        _race(
            {name: lambda ask=ask: ask(them.story(), them.tokens) for name, ask in asks.items()},
            2 * them.repeats,
        ),
    )
    return (
        {"json_rate": rates["json_schema"] / rates["free"]},
        {"json_rate": {"tokens": them.tokens, "tokens_per_second": rates}},
    )


def _rows(them):
    def together():
        them.chat.predict(
            [{"messages": them.story(), "max_tokens": them.tokens} for _ in range(ROWS)]
        )

    def one_by_one():
        for _ in range(ROWS):
            them.ask_chat(them.story(), them.tokens)

    works = {"one_predict": together, "sixteen_predicts": one_by_one}
    if them.openvino:
        works["openvino"] = lambda: them.load_openvino(ROWS, [them.tokens] * ROWS)
    seconds = _race(works, them.repeats)
    ratios = {"rows16": seconds["sixteen_predicts"] / seconds["one_predict"]}
    if them.openvino:
        ratios["rows16_openvino"] = seconds["openvino"] / seconds["one_predict"]
    tokens = ROWS * them.tokens
    return ratios, {"rows16": {"tokens": tokens, "tokens_per_second": _rates(tokens, seconds)}}


def _load(them, ask, callers, lengths):
    """Let ``callers`` threads work off requests of these lengths, each as soon as it is free."""
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda length: ask(them.story(), length), lengths))


def _callers(them):
    lengths = mix(them.mixed, 4 * CALLERS)
    asks = {"chat_model": them.ask_chat, "lesson_behind_a_lock": them.ask_lesson}
    if them.llama:
        asks["llama_cpp_8_slots"] = them.ask_llama
    works = {name: lambda ask=ask: _load(them, ask, CALLERS, lengths) for name, ask in asks.items()}
    if them.openvino:
        works["openvino"] = lambda: them.load_openvino(CALLERS, lengths)
    seconds = _race(works, them.repeats)
    names = {
        "callers8": "lesson_behind_a_lock",
        "callers8_llamacpp": "llama_cpp_8_slots",
        "callers8_openvino": "openvino",
    }
    ratios = {
        ratio: seconds[name] / seconds["chat_model"]
        for ratio, name in names.items()
        if name in seconds
    }
    return ratios, {
        "callers8": {
            "requests": len(lengths),
            "tokens": sum(lengths),
            "tokens_per_second": _rates(sum(lengths), seconds),
        }
    }


def _newcomer(them):
    """Time the first token of a stream that comes while 7 other answers are being written."""
    few = min(8, them.tokens)
    model = them.chat.unwrap_python_model()
    beside = []
    alone = [them.ask_stream(them.story(), few)[0] for _ in range(them.repeats + 1)][1:]
    for _ in range(them.repeats):
        others = threading.Thread(
            target=them.ask_json, args=(them.story(), 8 * them.tokens), kwargs={"n": CALLERS - 1}
        )
        others.start()
        time.sleep(4 * PAUSE)  # their prompts are read by then
        beside.append(them.ask_stream(them.story(), few))
        while model.stats()["running"] == CALLERS - 1:
            beside.append(them.ask_stream(them.story(), few))
        others.join()
    firsts, steps = zip(*((first, rest / max(few - 1, 1)) for first, rest in beside), strict=True)
    alone, step, p95 = statistics.median(alone), statistics.median(steps), percentile(firsts, 0.95)
    return (
        {"newcomer_ttft": p95 / (3 * step + alone)},
        {
            "newcomer_ttft": {
                "alone_seconds": alone,
                "step_seconds": step,
                "p95_seconds": p95,
                "median_seconds": statistics.median(firsts),
                "streams": len(beside),
            }
        },
    )


def _conversation(them):
    """Time the first token of each turn of a conversation, which begins anew in each repeat.

    Each contender hears its own answers again. llama.cpp has a server with one slot for it, which
    keeps what it has read, as a server for one caller would.
    """
    talks = {"chat_model": them.talk_chat}
    if them.gguf:
        server = start_llama(them.gguf, 1, 2048)
        talks["llama_cpp"] = lambda messages, tokens: them.talk_llama(server, messages, tokens)
    taken = {name: [] for name in talks}
    for repeat in range(them.repeats + 1):
        number = next(them.numbers)
        for name, talk in talks.items():
            time.sleep(PAUSE)
            turns = _talk(them, talk, number)
            if repeat:
                taken[name].append(turns)
    figures = {
        name: {
            str(turn): dict(
                zip(
                    ("prompt_tokens", "first_token_seconds"),
                    map(statistics.median, zip(*found, strict=True)),
                    strict=True,
                )
            )
            for turn, found in enumerate(zip(*all_turns, strict=True), 1)
        }
        for name, all_turns in taken.items()
    }
    last = {name: turns[str(TURNS)]["first_token_seconds"] for name, turns in figures.items()}
    return ({"turn5_llamacpp": last["chat_model"] / last["llama_cpp"]} if them.gguf else {}), {
        "conversation": figures
    }


def _talk(them, talk, number):
    """Hold one conversation; return the tokens of each turn's prompt, and the seconds to the first of its answer."""
    messages, turns = [], []
    for turn in range(1, TURNS + 1):
        messages.append(
            {
                "role": "user",
                "content": f"Day {turn} of {number}. "
                + "The harbour is full of ships. " * DAY
                + "Please tell me a very long story about this day.",
            }
        )
        seconds, text = talk(messages, them.tokens)
        turns.append((len(them.encode(messages)), seconds))
        messages.append({"role": "assistant", "content": text})
    return turns


def _growth(them):
    callers, half = {}, max(them.tokens // 2, 1)
    for count in (1, 2, 4, 8, 16):
        works = {"load": lambda count=count: _load(them, them.ask_chat, count, [half] * 2 * count)}
        callers[str(count)] = 2 * count * half / _race(works, them.repeats)["load"]
    prompts, new = {}, max(them.tokens // 4, 1) + 1
    for sentences in (0, 4, 13, 32, 68, 142, 288):
        taken = []
        for turn in range(them.repeats + 1):
            # In place of the template's own system message, which is as long as the shortest prompt
            # here.
            messages = [{"role": "system", "content": "Write."}, *them.story(sentences)]
            size = len(them.tokenizer.encode(them.prompt(messages)))
            if size + new > them.prepared.entry.context_length:
                break
            seconds = them.ask_stream(messages, new)
            if turn:
                taken.append(seconds)
        if taken:
            first, rest = map(statistics.median, zip(*taken, strict=True))
            prompts[str(size)] = {
                "first_token_seconds": first,
                "then_tokens_per_second": (new - 1) / rest,
            }
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
