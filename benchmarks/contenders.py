"""Who is compared, and how each is asked: the chat model, the lesson's wrapper, a bare engine, llama.cpp and OpenVINO.

llama.cpp and OpenVINO GenAI read one and the same GGUF file; a model without one is compared with
neither. All have the same threads, and all are greedy.
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

from course.environment import pins
from helpers.errors import CourseError
from helpers.models.prepare import PreparedModel

if TYPE_CHECKING:
    import xllamacpp

CALLERS = 8
THREADS = psutil.cpu_count(logical=False)
CHAT, PROMPT = "models:/slm-onnx@champion", "models:/slm-onnx-prompt@champion"
CACHE_GB = 2  # what OpenVINO GenAI keeps for what it has read; llama.cpp's slots take less
# So many ships take more tokens than any answer here may have: a bound answer is as long as a free
# one.
SHIP = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "masts": {"type": "integer"}},
    "required": ["name", "masts"],
    "additionalProperties": False,
}
FLEET = {
    "type": "object",
    "properties": {"ships": {"type": "array", "items": SHIP, "minItems": 64}},
    "required": ["ships"],
    "additionalProperties": False,
}


class Contenders:
    """The ways to ask for a story; each returns when the whole answer is there.

    Every story has another number in it: a server that remembers prompts should not have met it
    lately. Numbers whose answer ends too early to compare are left out before anything is measured.
    """

    def __init__(self, prepared: PreparedModel, repeats: int, tokens: int):
        # Takes seconds to import, and only a measurement needs it.
        from transformers import AutoTokenizer

        self.prepared, self.repeats, self.tokens = prepared, repeats, tokens
        self.mixed = [max(tokens * eighth // 8, 1) for eighth in range(1, 9)]
        self.chat = mlflow.pyfunc.load_model(CHAT)
        self.lesson = mlflow.pyfunc.load_model(PROMPT)
        config = og.Config(str(prepared.onnx_dir))
        config.overlay(
            json.dumps(
                {"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}
            )
        )
        self.engine = og.Model(config)
        self.tokenizer = og.Tokenizer(self.engine)
        self.template = AutoTokenizer.from_pretrained(prepared.onnx_dir)
        self.lock = threading.Lock()
        numbers = range(1000, 1200)
        found = self.chat.predict(
            [{"messages": self.story(number=number), "max_tokens": tokens} for number in numbers]
        )
        self.numbers = itertools.cycle(
            [
                number
                for number, answer in zip(numbers, found, strict=True)
                if answer["usage"]["completion_tokens"] == tokens
            ]
        )
        self.gguf = next((prepared.onnx_dir.parent / "gguf").glob("*.gguf"), None)
        self.llama = self.gguf and start_llama(self.gguf, CALLERS, 512)
        self.openvino = self.gguf and OpenVino(self.gguf)
        self.peers = (
            {"llama_cpp": self.ask_llama, "openvino": self.ask_openvino} if self.gguf else {}
        )

    def story(self, sentences: int = 0, number: int | None = None) -> list[dict]:
        """Return a conversation, with so many sentences of 7 tokens before the question."""
        return [
            {
                "role": "user",
                "content": "The harbour is full of ships. "
                * sentences
                + f"Tell me a long story about {number or next(self.numbers)} ships. Make it as long as you can, with "
                "many chapters.",
            }
        ]

    def prompt(self, messages: list[dict]) -> str:
        """Return a conversation as the model's chat template writes it, ready for an answer."""
        return self.template.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def encode(self, messages: list[dict]) -> list[int]:
        """Return the tokens of a conversation: a GGUF file's own tokenizer need not cut it as the model's does."""
        return self.template.encode(self.prompt(messages), add_special_tokens=False)

    def ask_chat(self, messages: list[dict], max_tokens: int, **fields: Any) -> None:
        """Ask the chat model through ``predict``, with more ``fields`` of a request."""
        (answer,) = self.chat.predict({"messages": messages, "max_tokens": max_tokens} | fields)
        expect(answer["usage"]["completion_tokens"], max_tokens * fields.get("n", 1))

    def ask_json(self, messages: list[dict], max_tokens: int, **fields: Any) -> None:
        """Ask the chat model for an answer that a schema binds."""
        self.ask_chat(
            messages,
            max_tokens,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "fleet", "schema": FLEET},
            },
            **fields,
        )

    def ask_stream(self, messages: list[dict], max_tokens: int) -> tuple[float, float]:
        """Ask for a stream. Return the seconds until the first chunk, and from there to the last."""
        started, (first, last, _, usage) = time.perf_counter(), self._stream(messages, max_tokens)
        expect(usage["completion_tokens"], max_tokens)
        return first - started, last - first

    def _stream(self, messages, max_tokens):
        """Return when the first and the last chunk came, the text, and the usage."""
        first, chunks = None, []
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

    def ask_lesson(self, messages: list[dict], max_tokens: int) -> None:
        """Ask the lesson's wrapper, which takes one caller at a time."""
        with self.lock:
            self.lesson.predict(
                {"prompt": self.prompt(messages)}, params={"max_tokens": max_tokens}
            )

    def ask_bare(self, messages: list[dict], max_tokens: int) -> None:
        """Ask the engine without any of our code around it."""
        tokens = self.tokenizer.encode(self.prompt(messages))
        generator = self.generator(len(tokens) + max_tokens)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        answer = generator.get_sequence(0)[len(tokens) :]
        self.tokenizer.decode(answer)
        expect(len(answer), max_tokens)

    def generator(self, max_length: int) -> og.Generator:
        """Return a greedy generator of the bare engine, for so many tokens of prompt and answer."""
        options = og.GeneratorParams(self.engine)
        options.set_search_options(max_length=max_length, do_sample=False)
        return og.Generator(self.engine, options)

    def ask_llama(self, messages: list[dict], max_tokens: int) -> None:
        """Ask llama.cpp, which may take any of its slots."""
        *_, last = llama_events(
            self.llama, prompt=self.prompt(messages), n_predict=max_tokens, ignore_eos=True
        )
        expect(last["tokens_predicted"], max_tokens)

    def ask_openvino(self, messages: list[dict], max_tokens: int) -> None:
        """Ask OpenVINO GenAI."""
        self.load_openvino(1, [max_tokens], messages)

    def load_openvino(
        self, callers: int, lengths: list[int], messages: list[dict] | None = None
    ) -> None:
        """Let ``callers`` ask OpenVINO GenAI for answers of these lengths, each as soon as it is free.

        Its pipeline takes requests from one thread, and keeps as many in one batch as there are: no
        callers' threads stand in its way.
        """
        requests = [(self.encode(messages or self.story()), length) for length in lengths]
        for answer, length in zip(
            self.openvino.answer(requests, callers, ignore_eos=True), lengths, strict=True
        ):
            self.template.decode(answer)
            expect(len(answer), length)

    def talk_chat(self, messages: list[dict], max_tokens: int) -> tuple[float, str]:
        """Return the seconds to the chat model's first chunk, and its answer."""
        started, (first, _, text, _) = time.perf_counter(), self._stream(messages, max_tokens)
        return first - started, text

    def talk_llama(
        self, server: "xllamacpp.Server", messages: list[dict], max_tokens: int
    ) -> tuple[float, str]:
        """Return the seconds to the first text of llama.cpp, whose one slot keeps what it has read, and its answer."""
        started, first, text = time.perf_counter(), None, ""
        for event in llama_events(
            server, prompt=self.prompt(messages), n_predict=max_tokens, id_slot=0, cache_prompt=True
        ):
            first = first or (time.perf_counter() if event["content"] else None)
            text += event["content"]
        return first - started, text


class OpenVino:
    """OpenVINO GenAI's ContinuousBatchingPipeline on a GGUF file; it keeps what it has read, as the others do."""

    def __init__(self, gguf: Path):
        try:
            import openvino
            import openvino_genai
        except ImportError:
            pin = pins(("bench",))["openvino-genai"]
            raise CourseError(
                "bench-openvino",
                "OpenVINO GenAI, which the benchmark compares with, is not installed.",
                f"Install it: python -m pip install openvino-genai=={pin}.",
            ) from None
        self._genai, self._tensor, self._ids = openvino_genai, openvino.Tensor, itertools.count()
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = CACHE_GB, True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(gguf), scheduler, "CPU", {"INFERENCE_NUM_THREADS": THREADS}
        )

    def answer(
        self, requests: list[tuple[list[int], int]], callers: int, ignore_eos: bool
    ) -> list[list[int]]:
        """Return the answers to prompts, of at most so many tokens each, with so many at work at a time."""

        def start(request):
            tokens, max_tokens = request
            config = self._genai.GenerationConfig(
                max_new_tokens=max_tokens, do_sample=False, ignore_eos=ignore_eos
            )
            return self._pipeline.add_request(
                next(self._ids), self._tensor(np.array([tokens], np.int64)), config
            )

        def take(handle):
            running = handle.get_status() == self._genai.GenerationStatus.RUNNING
            return None if running else handle.read_all()[0].generated_ids

        return keep_busy(start, self._pipeline.step, take, requests, callers)


def keep_busy(
    start: Callable[[Any], Any],
    step: Callable[[], None],
    take: Callable[[Any], Any],
    requests: list,
    callers: int,
) -> list:
    """Let ``callers`` ask, each for the next request as soon as it has an answer. Return the answers in order.

    ``start`` begins a request, ``step`` brings all that have begun further, and ``take`` returns
    the answer to one that has begun, None where it is not whole.
    """
    left, running, answers = iter(enumerate(requests)), {}, {}
    while len(answers) < len(requests):
        running |= {
            place: start(request)
            for place, request in itertools.islice(left, callers - len(running))
        }
        step()
        answers |= {
            place: found for place, begun in running.items() if (found := take(begun)) is not None
        }
        running = {place: begun for place, begun in running.items() if place not in answers}
    return [answers[place] for place in range(len(requests))]


def start_llama(gguf: Path, slots: int, context_length: int) -> "xllamacpp.Server":
    """Start llama.cpp's server on a GGUF file, with slots of so many tokens.

    A slot keeps what it read last. What slots read before is not kept beside them, or a story that
    comes again after a while would be known, to its end.
    """
    import xllamacpp  # of the extra bench, which only the benchmark and the nightly tests install

    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.port, settings.verbosity = 0, -1
    settings.n_parallel, settings.n_ctx = slots, slots * context_length
    settings.cache_ram_mib = 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = THREADS
    return xllamacpp.Server(settings)


def llama_events(server: "xllamacpp.Server", **fields: Any) -> Iterator[dict]:
    """Yield what llama.cpp's server sends of a greedy answer, as it comes."""
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc, timeout=600)
    body = json.dumps({"temperature": 0, "stream": True} | fields)
    connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
    yield from (
        json.loads(line[6:]) for line in connection.getresponse() if line.startswith(b"data: ")
    )
    connection.close()


def expect(count: int, tokens: int) -> None:
    """Refuse an answer of another length than was asked for."""
    if count != tokens:
        raise CourseError(
            "bench-length",
            f"An answer has {count} tokens, and {tokens} were asked for.",
            "The benchmark compares answers of equal length: choose another story.",
        )
