"""Chat models of ten lines, for the server's tests: the user's message says what they do.

``log`` writes this very file as models from code, so it imports nothing of ours.
"""

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class Plain(mlflow.pyfunc.PythonModel):
    """Answers whole, and nothing says that it may be asked by two at once."""

    def load_context(self, context):
        self.gate = threading.Semaphore(0)  # a test lets "gated" words through
        self.lock = threading.Lock()
        self.steps = 0
        self.running = 0
        self.closed = False
        self.asked = []

    def words(self, request):
        text = request["messages"][-1]["content"]
        with self.lock:
            self.asked.append(text)
            self.running += 1
        try:
            what, _, number = text.partition(" ")
            for _step in range(int(number) if number.isdigit() else 2):
                if what == "gated":
                    self.gate.acquire()
                elif what == "sleep":
                    time.sleep(int(number))
                elif what == "slow":
                    time.sleep(0.02)
                elif what == "raise":
                    raise ValueError(text)
                elif what == "exit":
                    sys.exit(text)
                with self.lock:
                    self.steps += 1
                yield "word " * (10_000 if what == "big" else 1)
                if what == "sleep":
                    break
        finally:
            with self.lock:
                self.running -= 1

    def predict(self, context, model_input, params=None):
        return {
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "".join(self.words(model_input))},
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE,
        }

    def stats(self):
        return {"running": self.running}

    def close(self):
        self.closed = True


class Streams(Plain):
    """Streams, and tells the usage at the end."""

    def predict_stream(self, context, model_input, params=None):
        head = {"id": "chatcmpl-1", "created": 1, "object": "chat.completion.chunk"}
        for word in self.words(model_input):
            yield head | {
                "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]
            }
        yield head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        yield head | {"choices": [], "usage": USAGE}


class Rows(Plain):
    """Answers the requests of a list, as a chat model does that runs them as a batch."""

    def predict(self, context, model_input, params=None):
        if "refuse" in (request["messages"][-1]["content"] for request in model_input):
            raise mlflow.MlflowException("messages has to be something else.", error_code=1000)
        return [super(Rows, self).predict(context, request) for request in model_input]


class TellsStream(Streams):
    """Answers with what the field ``stream`` was."""

    def words(self, request):
        yield str(request.get("stream"))


class Older(TellsStream):
    """Wants a stream to be one, as chat models did before."""

    def predict_stream(self, context, model_input, params=None):
        if model_input.get("stream") is False:
            raise mlflow.MlflowException("no", error_code=1000)
        yield from super().predict_stream(context, model_input, params)


class NoLoad(Plain):
    """Does not load."""

    def load_context(self, context):
        raise ValueError("This model is broken.")


class Exits(Plain):
    """Ends the program that loads it, if it can."""

    def load_context(self, context):
        sys.exit("This model has had enough.")


class NoChat(Plain):
    """Answers with a text where a chat completion is due."""

    def predict(self, context, model_input, params=None):
        return "a text"


class Thinks(Plain):
    """Does not come to its first word."""

    def predict(self, context, model_input, params=None):
        print("thinking", flush=True)
        time.sleep(600)


def save(folder: Path, kind: str) -> Path:
    """Save a model of this kind; return its folder."""
    folder.mkdir(parents=True)
    mlflow.pyfunc.save_model(
        folder / "model", python_model=_write(folder, kind), pip_requirements=["mlflow"]
    )
    return folder / "model"


def register(
    folder: Path, kind: str, name: str = "stand-in", alias: str | None = "champion"
) -> str:
    """Log a model of this kind to the store that is set, and register it; return its version."""
    folder.mkdir(parents=True, exist_ok=True)
    logged = mlflow.pyfunc.log_model(
        name=kind, python_model=_write(folder, kind), pip_requirements=["mlflow"]
    )
    version = mlflow.register_model(logged.model_uri, name).version
    if alias:
        mlflow.MlflowClient().set_registered_model_alias(name, alias, version)
    return version


def move_alias(version: str, alias: str = "champion") -> None:
    """Let an alias of the stand-in stand on another version."""
    mlflow.MlflowClient().set_registered_model_alias("stand-in", alias, version)


@contextlib.contextmanager
def registry(store: str, folder: Path) -> Iterator[Callable[..., str]]:
    """Set a store while the block runs; yield a function that registers a stand-in there, as ``register`` does."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment("stand-ins", (folder / "artifacts").as_uri())
    )
    yield functools.partial(register, folder)
    mlflow.set_tracking_uri(before)


def _write(folder, kind):
    code = folder / "model_code.py"
    code.write_text(
        Path(__file__).read_text(encoding="utf-8") + f"\n\nmlflow.models.set_model({kind}())\n",
        encoding="utf-8",
    )
    return str(code)
