"""A form that asks logged models: names and model URIs come in, a widget goes out, or a note where none can be used."""

import contextlib
import gc
import html
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ipywidgets
import mlflow
from IPython import get_ipython
from mlflow.pyfunc import PythonModel

from helpers.errors import CourseError
from helpers.show.tables import NO_MATHEMATICS, Table, show_table
from helpers.states import check_model

_SHOW_SECONDS = 0.1  # between two updates of the page: a browser cannot draw one for each token
_NOTE = show_table(
    "Ask the models yourself",
    {
        "in JupyterLab": "A form stands here: you ask a logged model a question of your own and watch it answer.",
        "how to get there": "Open this page with make lab, or python -m helpers lab, and run its cells.",
    },
)


def show_playground(
    models: dict[str, object],
    *,
    question: str,
    system_prompt: str,
    max_tokens: int,
    temperature: float,
) -> ipywidgets.VBox | Table:
    """Return a form for the last line of a cell, or a note where nobody could press a button.

    ``models`` has the names that the form shows, each with a model URI or with a function that
    returns a loaded ``mlflow.pyfunc.PyFuncModel``, the one that the page has at that time. A URI is
    loaded when it is first asked, and dropped before another one is loaded or a form is made anew.
    """
    # JupyterLab and VS Code tell the kernel that somebody could be asked for input; papermill,
    # nbmake and nbconvert tell it that nobody could, and a program outside IPython has no kernel.
    if not getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False):
        return _NOTE
    _drop()
    return _Form(models, question, system_prompt, max_tokens, temperature)


def kind_of(model: object) -> str:
    """Return how a loaded model is asked: a ``stream`` or one piece for its ``messages``, or one for its ``prompt``."""
    schema, base = model.metadata.get_input_schema(), PythonModel.predict_stream
    inputs = schema.input_names() if schema else []
    if "messages" in inputs:
        return (
            "messages"
            if getattr(type(_unwrap(model)), "predict_stream", base) is base
            else "stream"
        )
    if "prompt" in inputs:
        return "prompt"
    raise CourseError(
        "playground-signature",
        "The model's signature has neither messages nor prompt.",
        "Choose a model that one of the course's pages has logged.",
    )


def build_request(
    kind: str,
    question: str,
    system_prompt: str,
    max_tokens: int,
    temperature: float,
    tokenizer: object = None,
) -> dict:
    """Return the request for a kind of model. A ``prompt`` is made by the tokenizer's chat template."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": question})
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    if kind == "prompt":
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return {"prompt": prompt, "params": settings}
    usage = {"stream_options": {"include_usage": True}} if kind == "stream" else {}
    return {"messages": messages} | settings | usage


def pieces(model: object, request: dict) -> Iterator[tuple[str, dict | list]]:
    """Yield the pieces of an answer, each as its text and the response or chunk that it came in.

    Iterate in one thread. Closing the iterator ends the work of a model that streams.
    """
    if "prompt" in request:
        response = model.predict({"prompt": request["prompt"]}, params=request["params"])
        yield response[0], response
    elif "stream_options" in request:
        with contextlib.closing(model.predict_stream(request)) as chunks:
            for chunk in chunks:
                yield (
                    "".join(choice["delta"].get("content") or "" for choice in chunk["choices"]),
                    chunk,
                )
    else:
        response = model.predict(request)
        yield response[0]["choices"][0]["message"]["content"], response


def _unwrap(model):
    try:
        return model.unwrap_python_model()
    except mlflow.MlflowException:  # models of other flavors have none
        return None


def _tokenizer(uri):
    from transformers import AutoTokenizer  # takes seconds to import, and only a prompt needs it

    file = next(Path(mlflow.artifacts.download_artifacts(uri)).rglob("tokenizer_config.json"), None)
    if file is None:
        raise CourseError(
            "playground-tokenizer",
            "The logged model has no tokenizer to make a prompt with.",
            "Choose a model that one of the course's pages has logged.",
        )
    return AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False)


# A URI and its model, or nothing: a second model may not fit into the memory beside the first.
_held = {}


def _load(uri):
    if uri not in _held:
        check_model(uri)
        _drop()
        _held[uri] = mlflow.pyfunc.load_model(uri)
    return _held[uri]


def _drop():
    while _held:
        python_model = _unwrap(_held.popitem()[1])
        if hasattr(python_model, "close"):
            python_model.close()
        del python_model
        # MLflow holds on to the last one that a file of code has set.
        mlflow.models.set_model(PythonModel)
    gc.collect()


class _Form(ipywidgets.VBox):
    """The widgets. ``thread`` gets the latest answer: a callback on the kernel's main thread would block Stop."""

    def __init__(self, models, question, system_prompt, max_tokens, temperature):
        looks = {
            "style": {"description_width": "8em"},
            "layout": {"width": "100%", "max_width": "60em"},
        }
        self.models, self.thread, self._stopped = models, None, threading.Event()
        self.model = ipywidgets.Dropdown(options=list(models), description="Logged model", **looks)
        self.fields = [
            ipywidgets.Textarea(question, description="Question", **looks),
            ipywidgets.Text(system_prompt, description="System prompt", **looks),
            ipywidgets.BoundedIntText(
                max_tokens, min=1, max=2048, description="Max tokens", **looks
            ),
            ipywidgets.BoundedFloatText(
                temperature, min=0, max=2, step=0.1, description="Temperature", **looks
            ),
        ]
        self.generate = ipywidgets.Button(description="Generate", button_style="primary")
        self.stop = ipywidgets.Button(description="Stop", disabled=True)
        self.answer = ipywidgets.Textarea(description="Answer", rows=8, **looks)
        self.status, self.raw = ipywidgets.HTML(), ipywidgets.HTML()
        self.generate.on_click(self._start)
        self.stop.on_click(self._stop)
        super().__init__(
            [
                self.model,
                *self.fields,
                ipywidgets.HBox([self.generate, self.stop]),
                self.answer,
                self.status,
                self.raw,
            ]
        )

    def _repr_mimebundle_(self, **options):
        # A page that is read without a kernel shows what stands beside the widget.
        note = {"text/html": _NOTE._repr_html_(), "text/plain": repr(_NOTE)}
        return super()._repr_mimebundle_(**options) | note

    def _start(self, _):
        values = [field.value for field in self.fields]
        if self.generate.disabled:  # a second click was on its way
            return
        if not values[0].strip():
            self._say("Write a question first.")
            return
        self.generate.disabled, self.stop.disabled = True, False
        self._stopped.clear()
        self.thread = threading.Thread(
            target=self._run, args=(self.model.value, values), daemon=True
        )
        self.thread.start()

    def _stop(self, _):
        self._stopped.set()
        self.stop.disabled = True
        self._say("Stopping at the next piece of the answer.")

    def _run(self, name, values):
        try:
            self._say(self._answer(name, values))
        # Whatever it is, the reader gets a sentence, and the button back.
        except Exception as error:
            message = getattr(error, "message", "") or str(error)
            if not isinstance(error, mlflow.MlflowException | CourseError):
                message = f"The model gave no answer: {type(error).__name__}: {message}"
            self._say(message.strip().splitlines()[0])
        finally:
            self.generate.disabled, self.stop.disabled = False, True

    def _answer(self, name, values):
        """Show an answer as it comes, and return what there is to say of it."""
        self.answer.value = self.raw.value = ""
        self._say(f"Loading {name}.")
        given = self.models[name]
        model = _load(given) if isinstance(given, str) else given()
        kind, tokenizer = kind_of(model), None
        if kind == "prompt":
            tokenizer = _tokenizer(
                given if isinstance(given, str) else f"models:/{model.metadata.model_id}"
            )
        request = build_request(kind, *values, tokenizer)
        self.raw.value = _details("Raw request", request)
        self._say(f"{name} is answering.")
        text, raw, shown, started = "", [], -math.inf, time.perf_counter()
        with contextlib.closing(pieces(model, request)) as answer:
            while not self._stopped.is_set() and (piece := next(answer, None)):
                text, now = text + piece[0], time.perf_counter()
                raw.append(piece[1])
                # A stream begins with a piece without text.
                if piece[0] and now - shown >= _SHOW_SECONDS:
                    self.answer.value, shown = text, now
        seconds = time.perf_counter() - started
        self.answer.value = text
        self.raw.value += _details("Raw response", *raw)
        tokens = (
            len(tokenizer.encode(text, add_special_tokens=False))
            if tokenizer and raw
            else _usage(raw)
        )
        if tokens is None:
            return f"Stopped after {seconds:.2f} seconds."
        return (
            f"{tokens} tokens in {seconds:.2f} seconds: {tokens / seconds:.1f} tokens per second."
        )

    def _say(self, sentence):
        self.status.value = f'<p role="status" {NO_MATHEMATICS}>{html.escape(sentence)}</p>'


def _usage(raw):
    """Return the tokens of an answer as its last object counts them, or None where no object has come or counts."""
    last = raw[-1] if raw else {}
    usage = (last[0] if isinstance(last, list) else last).get("usage")
    return usage and usage["completion_tokens"]


def _details(title, *objects):
    """Return objects as JSON behind a title that opens them: one over many lines, or many on a line each."""
    lines = [
        json.dumps(one, ensure_ascii=False, default=str, indent=2 if len(objects) == 1 else None)
        for one in objects
    ]
    return (
        f'<details><summary>{title}</summary><pre {NO_MATHEMATICS} style="white-space: pre-wrap">'
        f"{html.escape(chr(10).join(lines))}</pre></details>"
    )
