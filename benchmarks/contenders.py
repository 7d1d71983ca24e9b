"""Asks each contender: the chat model, track B's wrapper, a bare og.Generator, llama.cpp, OpenVINO GenAI.

llama.cpp and OpenVINO GenAI read the same GGUF file; a model without one is compared with neither.
All contenders have the same number of threads and decode greedily.
"""

import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import mlflow
import numpy as np
import onnxruntime_genai as og
import psutil

from helpers.errors import CourseError
from helpers.models.prepare import PreparedModel

if TYPE_CHECKING:
    import xllamacpp

CALLERS = 8
THREADS = psutil.cpu_count(logical=False)
CHAT = "models:/slm-onnx@champion"
PROMPT = "models:/slm-onnx-prompt@champion"
CACHE_GB = 2  # OpenVINO GenAI's KV cache; llama.cpp's slots take less


class Contenders:
    """The contenders, each with a method that asks for a story and returns after the whole answer.

    Each story's prompt has a different number, so that no prompt cache has it. Numbers whose answer
    has fewer than ``tokens`` tokens are left out before anything is measured.

    Parameters
    ----------
    prepared : PreparedModel
        The model that the pages have logged.
    repeats : int
        How often each comparison is repeated.
    tokens : int
        The length of each answer.
    """

    def __init__(self, prepared: PreparedModel, repeats: int, tokens: int):
        # Takes seconds to import, and only a measurement needs it.
        from transformers import AutoTokenizer

        self.prepared = prepared
        self.repeats = repeats
        self.tokens = tokens
        self.mixed_lengths = [max(tokens * eighth // 8, 1) for eighth in range(1, 9)]
        self.chat = mlflow.pyfunc.load_model(CHAT)
        self.track_b = mlflow.pyfunc.load_model(PROMPT)
        config = og.Config(str(prepared.onnx_dir))
        config.overlay(
            json.dumps(
                {"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}
            )
        )
        self.engine = og.Model(config)
        self.tokenizer = og.Tokenizer(self.engine)
        self.template = AutoTokenizer.from_pretrained(prepared.onnx_dir)
        self.track_b_lock = threading.Lock()
        numbers = range(1000, 1200)
        answers = self.chat.predict(
            [{"messages": self.story(number=number), "max_tokens": tokens} for number in numbers]
        )
        long_enough = [
            number
            for number, answer in zip(numbers, answers, strict=True)
            if answer["usage"]["completion_tokens"] == tokens
        ]
        self.numbers = itertools.cycle(long_enough)
        self.gguf = next((prepared.onnx_dir.parent / "gguf").glob("*.gguf"), None)
        self.llama = self.gguf and start_llama(self.gguf, CALLERS, 512)
        self.openvino = self.gguf and OpenVino(self.gguf)

    def story(self, sentences: int = 0, number: int | None = None) -> list[dict]:
        """Return messages that ask for a story, after ``sentences`` sentences of 7 tokens each."""
        before = "The harbour is full of ships. " * sentences
        question = (
            f"Tell me a long story about {number or next(self.numbers)} ships. Make it as long as "
            "you can, with many chapters."
        )
        return [{"role": "user", "content": before + question}]

    def prompt(self, messages: list[dict]) -> str:
        """Return the messages in the model's chat template, with the start of an answer."""
        return self.template.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def encode(self, messages: list[dict]) -> list[int]:
        """Return the messages as tokens of the model's own tokenizer, which a GGUF file's may differ from."""
        return self.template.encode(self.prompt(messages), add_special_tokens=False)

    def ask_chat(self, messages: list[dict], max_tokens: int) -> None:
        """Ask the chat model through ``predict``."""
        (answer,) = self.chat.predict({"messages": messages, "max_tokens": max_tokens})
        check_length(answer["usage"]["completion_tokens"], max_tokens)

    def ask_stream(self, messages: list[dict], max_tokens: int) -> tuple[float, float]:
        """Stream an answer. Return the seconds to the first chunk, and from there to the last."""
        started = time.perf_counter()
        first, last, _, usage = self._stream(messages, max_tokens)
        check_length(usage["completion_tokens"], max_tokens)
        return first - started, last - first

    def _stream(self, messages, max_tokens):
        """Return the times of the first and the last chunk, the text, and the usage."""
        first = None
        chunks = []
        request = {
            "messages": messages,
            "max_tokens": max_tokens,
            "stream_options": {"include_usage": True},
        }
        for chunk in self.chat.predict_stream(request):
            first = first or time.perf_counter()
            chunks.append(chunk)
        text = "".join(
            choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]
        )
        return first, time.perf_counter(), text, chunks[-1]["usage"]

    def ask_track_b(self, messages: list[dict], max_tokens: int) -> None:
        """Ask track B's wrapper, which takes one caller at a time."""
        with self.track_b_lock:
            self.track_b.predict(
                {"prompt": self.prompt(messages)}, params={"max_tokens": max_tokens}
            )

    def ask_bare(self, messages: list[dict], max_tokens: int) -> None:
        """Ask onnxruntime-genai's generator directly."""
        tokens = self.tokenizer.encode(self.prompt(messages))
        generator = self.generator(len(tokens) + max_tokens)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        answer = generator.get_sequence(0)[len(tokens) :]
        self.tokenizer.decode(answer)
        check_length(len(answer), max_tokens)

    def generator(self, max_length: int) -> og.Generator:
        """Return a greedy generator for ``max_length`` tokens of prompt and answer."""
        options = og.GeneratorParams(self.engine)
        options.set_search_options(max_length=max_length, do_sample=False)
        return og.Generator(self.engine, options)

    def ask_llama(self, messages: list[dict], max_tokens: int) -> None:
        """Ask llama.cpp's server with 8 slots."""
        *_, last = llama_events(
            self.llama, prompt=self.prompt(messages), n_predict=max_tokens, ignore_eos=True
        )
        check_length(last["tokens_predicted"], max_tokens)

    def ask_openvino(self, messages: list[dict], max_tokens: int) -> None:
        """Ask OpenVINO GenAI."""
        self.load_openvino(1, [max_tokens], messages)

    def load_openvino(
        self, callers: int, lengths: list[int], messages: list[dict] | None = None
    ) -> None:
        """Ask OpenVINO GenAI for answers of these lengths, with ``callers`` requests at once.

        All requests come from one thread, because its pipeline batches them itself.
        """
        requests = [(self.encode(messages or self.story()), length) for length in lengths]
        answers = self.openvino.answer(requests, callers, ignore_eos=True)
        for answer, length in zip(answers, lengths, strict=True):
            self.template.decode(answer)
            check_length(len(answer), length)

    def talk_chat(self, messages: list[dict], max_tokens: int) -> tuple[float, str]:
        """Return the seconds to the chat model's first chunk, and its answer."""
        started = time.perf_counter()
        first, _, text, _ = self._stream(messages, max_tokens)
        return first - started, text

    def talk_llama(
        self, server: "xllamacpp.Server", messages: list[dict], max_tokens: int
    ) -> tuple[float, str]:
        """Return the seconds to the first text of a llama.cpp server with one slot, and its answer."""
        started = time.perf_counter()
        first = None
        text = ""
        for event in llama_events(
            server, prompt=self.prompt(messages), n_predict=max_tokens, id_slot=0, cache_prompt=True
        ):
            first = first or (time.perf_counter() if event["content"] else None)
            text += event["content"]
        return first - started, text


class OpenVino:
    """OpenVINO GenAI's ContinuousBatchingPipeline on a GGUF file, with prefix caching as the others have."""

    def __init__(self, gguf: Path):
        # Of the extra bench, which only the benchmark and the nightly tests install.
        import openvino
        import openvino_genai

        self._genai = openvino_genai
        self._tensor = openvino.Tensor
        self._ids = itertools.count()
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(gguf), scheduler, "CPU", {"INFERENCE_NUM_THREADS": THREADS}
        )

    def answer(
        self, requests: list[tuple[list[int], int]], callers: int, ignore_eos: bool
    ) -> list[list[int]]:
        """Return the answers to pairs of prompt and max_tokens, with ``callers`` requests at once."""

        def start(request):
            prompt, max_tokens = request
            config = self._genai.GenerationConfig(
                max_new_tokens=max_tokens, do_sample=False, ignore_eos=ignore_eos
            )
            return self._pipeline.add_request(
                next(self._ids), self._tensor(np.array([prompt], np.int64)), config
            )

        def read(handle):
            if handle.get_status() == self._genai.GenerationStatus.RUNNING:
                return None
            return handle.read_all()[0].generated_ids

        return run_requests(start, self._pipeline.step, read, requests, callers)


def run_requests(
    start: Callable[[Any], Any],
    step: Callable[[], None],
    read: Callable[[Any], Any],
    requests: list,
    callers: int,
) -> list:
    """Run requests on an engine that is stepped, at most ``callers`` at once. Return the answers in order.

    Parameters
    ----------
    start : callable
        Starts a request, and returns a handle.
    step : callable
        Runs one step of all started requests.
    read : callable
        Returns the answer of a handle, None before it is complete.
    requests : list
        What ``start`` takes.
    callers : int
    """
    waiting = iter(enumerate(requests))
    running = {}
    answers = {}
    while len(answers) < len(requests):
        for place, request in itertools.islice(waiting, callers - len(running)):
            running[place] = start(request)
        step()
        for place, handle in list(running.items()):
            answer = read(handle)
            if answer is not None:
                answers[place] = answer
                del running[place]
    return [answers[place] for place in range(len(requests))]


def start_llama(gguf: Path, slots: int, context_length: int) -> "xllamacpp.Server":
    """Start llama.cpp's server on a GGUF file, with slots of ``context_length`` tokens each.

    Each slot keeps its last prompt. The server's store of earlier prompts is off: prompts repeat
    here, and it would have them.
    """
    # Of the extra bench, which only the benchmark and the nightly tests install.
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.port = 0
    settings.verbosity = -1
    settings.n_parallel = slots
    settings.n_ctx = slots * context_length
    settings.cache_ram_mib = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
    return xllamacpp.Server(settings)


def llama_events(server: "xllamacpp.Server", **fields: Any) -> Iterator[dict]:
    """Yield the events of a greedy answer from llama.cpp's server."""
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc, timeout=600)
    body = json.dumps({"temperature": 0, "stream": True} | fields)
    connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
    yield from (
        json.loads(line[6:]) for line in connection.getresponse() if line.startswith(b"data: ")
    )
    connection.close()


def check_length(count: int, tokens: int) -> None:
    """Raise a CourseError if an answer's length is not the requested one."""
    if count != tokens:
        raise CourseError(
            "bench-length",
            f"An answer has {count} tokens, but {tokens} were requested.",
            "The benchmark compares answers of equal length: choose another story.",
        )
