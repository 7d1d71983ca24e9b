"""Measures the server in front of the chat model: contenders come in, ratios and figures go out.

Its rivals are the model called directly, llama.cpp's own HTTP server on the same model, and
``mlflow models serve`` on the lesson's wrapper. The clients are one and the same program for all of
them.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from types import MappingProxyType

import mlflow
import psutil

from benchmarks.clients import Clients
from benchmarks.contenders import CALLERS, CHAT, PROMPT, Contenders, expect, start_llama
from benchmarks.turns import mix, percentile, take_turns, timed
from helpers.operations.programs import Program, free_port, start_program
from helpers.paths import BUILD

SERVICE = "serving.service"
LOGS = BUILD / "bench"
CROWDS = (CALLERS, 32)
ROUNDS = 4  # requests of each client
GROWTH = (1, 2, 4, 8, 16, 32, 64)
LLAMA_SLOTS = 32  # of llama.cpp beside its 8: a client of a crowd need not wait for a slot
SOAK = 10_000
SETTLED = 10  # of the soak's requests, the first of so many parts: after them nothing should grow


def service(them: Contenders) -> tuple[dict, dict]:
    """Run all comparisons. Return two dicts: the ratios by name, and the figures behind them."""
    ratios, raw, repeats = {}, {}, them.repeats // 2 + 1
    with Clients() as clients, _ours() as ours, _mlflow() as mlflow_server:
        rivals = {
            "openai_server": Rival(them, clients, f"{ours.address}/chat/completions"),
            "mlflow": MlflowRival(them, clients, f"{mlflow_server.address}/invocations"),
        }
        if them.gguf:
            crowd = start_llama(them.gguf, LLAMA_SLOTS, 512)
            rivals |= {
                "llama_cpp": LlamaRival(them, clients, _llama_url(them.llama)),
                "llama_cpp_crowd": LlamaRival(them, clients, _llama_url(crowd)),
            }
        for measure in (_overhead, _crowds, _first_token, _growth):
            found, figures = measure(them, rivals, repeats)
            ratios |= found
            raw |= figures
    with Clients() as clients, _ours() as ours:
        found, figures = _soak(Greeter(them, clients, f"{ours.address}/chat/completions"))
    return ratios | found, {"service": raw | figures}


@contextlib.contextmanager
def _running(command: list, ready: str, log: str) -> Iterator[Program]:
    program = start_program(
        command, ready, LOGS / log, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri()
    )
    try:
        yield program
    finally:
        program.stop()


def _ours():
    """Serve the chat model with the server of this course."""
    return _running(
        [sys.executable, "-m", SERVICE, "--model", CHAT, "--port", "0"],
        r" at (http://\S+)$",
        "serve.log",
    )


def _mlflow():
    """Serve the lesson's wrapper with MLflow's own server."""
    port = str(free_port())
    return _running(
        [
            sys.executable,
            "-m",
            "mlflow",
            "models",
            "serve",
            "--model-uri",
            PROMPT,
            "--env-manager",
            "local",
            "--host",
            "127.0.0.1",
            "--port",
            port,
        ],
        f"http://127.0.0.1:{port}/ping",
        "mlflow-serve.log",
    )


def _llama_url(server):
    return f"{server.listening_address}/v1/chat/completions"


class Rival:
    """A server that speaks OpenAI's protocol, and what a request to it looks like."""

    fields = MappingProxyType({})  # beside those that every request has

    def __init__(self, them: Contenders, clients: Clients, url: str):
        self.them, self._clients, self._url = them, clients, url

    def ask(self, lengths: list[int], callers: int, streamed: list[bool]) -> dict:
        """Let ``callers`` clients ask for answers of these lengths. Return ``rate``, ``seconds`` and ``firsts``.

        ``rate`` is in tokens per second. ``seconds`` has those of each request, and ``firsts``
        those of each stream's first token.
        """
        bodies = [
            self.body(length, stream) for length, stream in zip(lengths, streamed, strict=True)
        ]
        seconds, replies = self._clients.ask(self._url, bodies, callers)
        for reply, length in zip(replies, lengths, strict=True):
            self.check(reply, length)
        return {
            "rate": sum(lengths) / seconds,
            "seconds": [reply["seconds"] for reply in replies],
            "firsts": [
                reply["first_token_seconds"]
                for reply, stream in zip(replies, streamed, strict=True)
                if stream
            ],
        }

    def body(self, length: int, stream: bool) -> dict:
        """Return a request for a story."""
        streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return (
            {"messages": self.them.story(), "max_tokens": length, "temperature": 0}
            | streaming
            | dict(self.fields)
        )

    def check(self, reply: dict, length: int) -> None:
        """Refuse an answer of another length."""
        expect(reply["tokens"], length)


class LlamaRival(Rival):
    """llama.cpp's server. Its weights are rounded in another way, and its stories may end elsewhere."""

    fields = MappingProxyType({"ignore_eos": True})


class MlflowRival(Rival):
    """MLflow's own server in front of the lesson's wrapper, which takes a prompt, and whose answers are texts."""

    def body(self, length: int, stream: bool) -> dict:
        """Return a request for a story; it can't be streamed."""
        return {
            "inputs": {"prompt": self.them.prompt(self.them.story())},
            "params": {"max_tokens": length},
        }

    def check(self, reply: dict, length: int) -> None:
        """Refuse an answer without text: its tokens are not told, and those of a text cut anew may be others."""
        if not reply["texts"][0]:
            expect(0, length)


class Greeter(Rival):
    """The server again, asked for one token at a time: of very many requests, only their number is of interest."""

    def body(self, length: int, stream: bool) -> dict:
        """Return a request that is as short as can be."""
        return super().body(length, stream) | {
            "messages": [
                {"role": "system", "content": "Greet."},
                {"role": "user", "content": "Hello"},
            ]
        }


def halves(count: int, period: int) -> list[bool]:
    """Say for ``count`` requests, whose lengths come again after ``period``, which of them are streams.

    Every other one is, and the next time the others: each length is streamed as often as not.
    """
    return [(place // period + place) % 2 == 0 for place in range(count)]


def _overhead(them, rivals, repeats):
    """Time one caller's whole answers and streams, of the model in this process and through the server."""
    few, asks = min(8, them.tokens), 4
    ours = rivals["openai_server"]

    def direct():
        whole = [timed(lambda: them.ask_chat(them.story(), few))() for _ in range(asks)]
        return {
            "seconds": whole,
            "firsts": [them.ask_stream(them.story(), few)[0] for _ in range(asks)],
        }

    def served():
        return ours.ask([few] * 2 * asks, 1, [False] * asks + [True] * asks)

    found = take_turns({"direct": direct, "served": served}, 4 * repeats)
    medians = {
        name: {
            "seconds": statistics.median(
                second for turn in turns for second in turn["seconds"][:asks]
            ),
            "first_token_seconds": statistics.median(
                first for turn in turns for first in turn["firsts"]
            ),
        }
        for name, turns in found.items()
    }
    added = medians["served"]["seconds"] - medians["direct"]["seconds"]
    return {}, {"overhead": medians | {"tokens": few, "added_seconds": added}}


def _crowds(them, rivals, repeats):
    """Compare tokens per second of 8 and of 32 clients, with answers of mixed length, half of them streamed."""
    ratios, raw = {}, {}
    for callers in CROWDS:
        lengths = mix(them.mixed, ROUNDS * callers)
        streamed = halves(len(lengths), len(them.mixed))
        racing = {
            name: rival
            for name, rival in rivals.items()
            if name != "llama_cpp_crowd" or callers > CALLERS
        }
        found = take_turns(
            {
                name: partial(rival.ask, lengths, callers, streamed)
                for name, rival in racing.items()
            },
            repeats,
        )
        rates = {
            name: statistics.median(turn["rate"] for turn in turns) for name, turns in found.items()
        }
        ratios[f"service{callers}_mlflow"] = rates["openai_server"] / rates["mlflow"]
        if them.gguf:  # the better of its two settings
            ratios[f"service{callers}_llamacpp"] = rates["openai_server"] / max(
                rate for name, rate in rates.items() if name.startswith("llama_cpp")
            )
        raw[str(callers)] = {
            "requests": len(lengths),
            "tokens": sum(lengths),
            "tokens_per_second": rates,
        }
    return ratios, {"crowds": raw}


def _first_token(them, rivals, repeats):
    """Compare the seconds to the first token of 8 clients' streams, at the 95th percentile."""
    lengths = mix(them.mixed, ROUNDS * CALLERS)
    racing = {name: rivals[name] for name in ("openai_server", "llama_cpp") if name in rivals}
    found = take_turns(
        {
            name: partial(rival.ask, lengths, CALLERS, [True] * len(lengths))
            for name, rival in racing.items()
        },
        repeats,
    )
    raw = {
        name: _told([first for turn in turns for first in turn["firsts"]])
        for name, turns in found.items()
    }
    ratios = (
        {"service_ttft95_llamacpp": raw["openai_server"]["p95"] / raw["llama_cpp"]["p95"]}
        if them.gguf
        else {}
    )
    return ratios, {"first_token": raw}


def _told(seconds):
    return {"median": percentile(seconds, 0.5), "p95": percentile(seconds, 0.95)}


def _growth(them, rivals, repeats):
    """Time requests, half of them streamed, of more and more clients."""
    half, raw = max(them.tokens // 2, 1), {}
    racing = {
        name: rivals[key]
        for name, key in (("openai_server", "openai_server"), ("llama_cpp", "llama_cpp_crowd"))
        if key in rivals
    }
    for callers in GROWTH:
        count = max(2 * callers, CALLERS)
        found = take_turns(
            {
                name: partial(rival.ask, [half] * count, callers, halves(count, count))
                for name, rival in racing.items()
            },
            repeats,
        )
        raw[str(callers)] = {
            name: {
                "whole": _told([second for turn in turns for second in turn["seconds"]]),
                "first_token": _told([first for turn in turns for first in turn["firsts"]]),
            }
            for name, turns in found.items()
        }
    return {}, {"growth": raw}


def _soak(greeter):
    """Send very many short requests, and compare what the server holds then with what it held after the first part."""
    (server,) = [child for child in psutil.Process().children() if SERVICE in child.cmdline()]
    part = SOAK // SETTLED
    for number in range(SETTLED):
        greeter.ask([1] * part, CALLERS, halves(part, 2))
        if number == 0:
            settled = _held(server)
    end = _held(server)
    left = sum(end[name] - settled[name] for name in ("threads", "descriptors"))
    return (
        {"soak_memory": end["memory_bytes"] / settled["memory_bytes"]},
        {"soak": {"requests": part * SETTLED, "settled": settled, "end": end, "left_behind": left}},
    )


def _held(server):
    time.sleep(1)  # connections and threads of the last requests end
    return {
        "memory_bytes": server.memory_info().rss,
        "threads": server.num_threads(),
        "descriptors": server.num_fds(),
    }
