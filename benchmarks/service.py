"""Compares the service with llama.cpp's own HTTP server and with ``mlflow models serve``.

The same client program asks all servers. MLflow serves track B's wrapper.
"""

import contextlib
import statistics
import sys
from collections.abc import Iterator
from functools import partial

import mlflow

from benchmarks.clients import Clients
from benchmarks.contenders import CALLERS, CHAT, PROMPT, Contenders, check_length, start_llama
from benchmarks.timing import interleave, mix, percentile, timed
from helpers.operations.programs import Program, free_port, start_program
from helpers.paths import BUILD

LOGS = BUILD / "bench"
CLIENT_COUNTS = (CALLERS, 32)
REQUESTS_PER_CLIENT = 4
GROWTH = (1, 2, 4, 8, 16, 32, 64)
MANY_SLOTS = 32  # of a second llama.cpp server, so that no client waits for a slot


def measure_service(contenders: Contenders) -> tuple[dict, dict]:
    """Run all comparisons. Return the ratios by name, and the figures behind them."""
    ratios = {}
    raw = {}
    repeats = contenders.repeats // 2 + 1
    with Clients() as clients, _start_service() as service, _start_mlflow() as mlflow_server:
        servers = {
            "openai_server": Server(contenders, clients, f"{service.address}/chat/completions"),
            "mlflow": MlflowServer(contenders, clients, f"{mlflow_server.address}/invocations"),
        }
        if contenders.gguf:
            # Held until the end: the server stops when its object goes.
            llama = start_llama(contenders.gguf, MANY_SLOTS, 512)
            servers["llama_cpp"] = LlamaServer(contenders, clients, _chat_url(contenders.llama))
            servers["llama_cpp_crowd"] = LlamaServer(contenders, clients, _chat_url(llama))
        for measure in (_measure_overhead, _measure_throughput, _measure_growth):
            new_ratios, figures = measure(contenders, servers, repeats)
            ratios |= new_ratios
            raw |= figures
    return ratios, {"service": raw}


@contextlib.contextmanager
def _running(command: list, ready: str, log: str) -> Iterator[Program]:
    program = start_program(
        command, ready, LOGS / log, MLFLOW_TRACKING_URI=mlflow.get_tracking_uri()
    )
    try:
        yield program
    finally:
        program.stop()


def _start_service():
    command = [sys.executable, "-m", "serving.service", "--model", CHAT, "--port", "0"]
    return _running(command, r" at (http://\S+)$", "serve.log")


def _start_mlflow():
    port = str(free_port())
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", PROMPT]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", port]
    return _running(command, f"http://127.0.0.1:{port}/ping", "mlflow-serve.log")


def _chat_url(llama):
    return f"{llama.listening_address}/v1/chat/completions"


class Server:
    """A server with OpenAI's routes, and how the clients ask it for stories."""

    def __init__(self, contenders: Contenders, clients: Clients, url: str):
        self._contenders = contenders
        self._clients = clients
        self._url = url

    def ask(self, lengths: list[int], callers: int, streamed: list[bool]) -> dict:
        """Ask for stories of these lengths, with ``callers`` clients at once.

        Returns
        -------
        dict
            ``rate``, in tokens per second; ``seconds`` of each request; ``first_token_seconds`` of
            each stream.
        """
        pairs = list(zip(lengths, streamed, strict=True))
        bodies = [self.body(length, stream) for length, stream in pairs]
        seconds, replies = self._clients.ask(self._url, bodies, callers)
        for reply, length in zip(replies, lengths, strict=True):
            self.check(reply, length)
        return {
            "rate": sum(lengths) / seconds,
            "seconds": [reply["seconds"] for reply in replies],
            "first_token_seconds": [
                reply["first_token_seconds"]
                for reply, stream in zip(replies, streamed, strict=True)
                if stream
            ],
        }

    def body(self, length: int, stream: bool) -> dict:
        """Return a request for a story."""
        body = {"messages": self._contenders.story(), "max_tokens": length, "temperature": 0}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def check(self, reply: dict, length: int) -> None:
        """Raise a CourseError if an answer's length is not the requested one."""
        check_length(reply["tokens"], length)


class LlamaServer(Server):
    """llama.cpp's server. Its weights are rounded differently, so its stories may end elsewhere."""

    def body(self, length: int, stream: bool) -> dict:
        """Return a request for a story that does not end early."""
        return super().body(length, stream) | {"ignore_eos": True}


class MlflowServer(Server):
    """MLflow's server with track B's wrapper, which takes a prompt and returns a text."""

    def body(self, length: int, stream: bool) -> dict:
        """Return a request for a story. It is never a stream."""
        prompt = self._contenders.prompt(self._contenders.story())
        return {"inputs": {"prompt": prompt}, "params": {"max_tokens": length}}

    def check(self, reply: dict, length: int) -> None:
        """Raise a CourseError if an answer has no text: this server counts no tokens."""
        if not reply["texts"][0]:
            check_length(0, length)


def choose_streams(count: int, period: int) -> list[bool]:
    """Choose every second of ``count`` requests to be a stream, and the other ones in each second period.

    The requests' lengths repeat after ``period``: each length is streamed as often as not.
    """
    return [(place // period + place) % 2 == 0 for place in range(count)]


def _measure_overhead(contenders, servers, repeats):
    """Time one caller's answers, from the model in this process and through the service."""
    tokens = min(8, contenders.tokens)
    count = 4

    def ask_directly():
        ask = timed(lambda: contenders.ask_chat(contenders.story(), tokens))
        seconds = [ask() for _ in range(count)]
        streams = [contenders.ask_stream(contenders.story(), tokens) for _ in range(count)]
        return {"seconds": seconds, "first_token_seconds": [first for first, _ in streams]}

    def ask_service():
        streamed = [False] * count + [True] * count
        found = servers["openai_server"].ask([tokens] * 2 * count, 1, streamed)
        return found | {"seconds": found["seconds"][:count]}

    rounds = interleave({"direct": ask_directly, "served": ask_service}, 4 * repeats)
    medians = {
        name: {
            key: statistics.median(value for result in results for value in result[key])
            for key in ("seconds", "first_token_seconds")
        }
        for name, results in rounds.items()
    }
    added = medians["served"]["seconds"] - medians["direct"]["seconds"]
    return {}, {"overhead": medians | {"tokens": tokens, "added_seconds": added}}


def _measure_throughput(contenders, servers, repeats):
    """Compare tokens per second with 8 and with 32 clients, mixed lengths, half of them streams."""
    ratios = {}
    raw = {}
    for clients in CLIENT_COUNTS:
        lengths = mix(contenders.mixed_lengths, REQUESTS_PER_CLIENT * clients)
        streamed = choose_streams(len(lengths), len(contenders.mixed_lengths))
        works = {
            name: partial(server.ask, lengths, clients, streamed)
            for name, server in servers.items()
            if name != "llama_cpp_crowd" or clients > CALLERS
        }
        rates = {
            name: statistics.median(result["rate"] for result in results)
            for name, results in interleave(works, repeats).items()
        }
        ours = rates["openai_server"]
        ratios[f"service{clients}_mlflow"] = ours / rates["mlflow"]
        if contenders.gguf:
            best = max(rate for name, rate in rates.items() if name.startswith("llama_cpp"))
            ratios[f"service{clients}_llamacpp"] = ours / best
        raw[str(clients)] = {
            "requests": len(lengths),
            "tokens": sum(lengths),
            "tokens_per_second": rates,
        }
    return ratios, {"crowds": raw}


def _measure_growth(contenders, servers, repeats):
    """Time requests with more and more clients, half of them streams."""
    half = max(contenders.tokens // 2, 1)
    compared = {"openai_server": servers["openai_server"]}
    if contenders.gguf:
        compared["llama_cpp"] = servers["llama_cpp_crowd"]
    raw = {}
    for clients in GROWTH:
        count = max(2 * clients, CALLERS)
        streamed = choose_streams(count, count)
        works = {
            name: partial(server.ask, [half] * count, clients, streamed)
            for name, server in compared.items()
        }
        raw[str(clients)] = {
            name: {
                "whole": _summarise(results, "seconds"),
                "first_token": _summarise(results, "first_token_seconds"),
            }
            for name, results in interleave(works, repeats).items()
        }
    return {}, {"growth": raw}


def _summarise(results, key):
    """Return the median and the 95th percentile of the seconds in all results."""
    seconds = [value for result in results for value in result[key]]
    return {"median": percentile(seconds, 0.5), "p95": percentile(seconds, 0.95)}
