"""Shows a form in which the reader asks a logged model; without a live notebook, a note in its place."""

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

_UPDATE_SECONDS = 0.1  # between two updates of the answer: a browser cannot draw one for each token
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
    """Return a form for the last line of a cell; a note if nobody could press its buttons.

    ``models`` has the names that the form shows, each with a model URI or with a function that
    returns the page's loaded ``mlflow.pyfunc.PyFuncModel``. The model of a URI is loaded at its first
    question, and dropped before another model is loaded or another form is made.
    """
    # JupyterLab and VS Code tell the kernel that it may ask for input; papermill, nbmake and nbconvert
    # tell it that it may not, and a program outside IPython has no kernel.
    if not getattr(getattr(get_ipython(), "kernel", None), "_allow_stdin", False):
        return _NOTE
    _drop()
    return _Form(models, question, system_prompt, max_tokens, temperature)


def kind_of(model: object) -> str:
    """Return how a loaded model is asked: ``"stream"``, ``"messages"`` (without a stream) or ``"prompt"``."""
    schema = model.metadata.get_input_schema()
    base = PythonModel.predict_stream
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
    """Return the request for a kind of model (see kind_of). The tokenizer's chat template makes a ``prompt``."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": question})
    settings = {"max_tokens": max_tokens, "temperature": temperature}
    if kind == "prompt":
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return {"prompt": prompt, "params": settings}
    usage = {"stream_options": {"include_usage": True}} if kind == "stream" else {}
    return {"messages": messages} | settings | usage


def pieces(model: object, request: dict) -> Iterator[tuple[str, dict | list]]:
    """Yield the pieces of an answer: the text, and the response or chunk that contains it.

    Iterate in one thread. Closing the iterator stops a model that streams.
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
    from transformers import (
        AutoTokenizer,
    )  # imported here because it takes seconds, and only a prompt needs it

    file = next(Path(mlflow.artifacts.download_artifacts(uri)).rglob("tokenizer_config.json"), None)
    if file is None:
        raise CourseError(
            "playground-tokenizer",
            "The logged model has no tokenizer, which has to make the prompt.",
            "Choose a model that one of the course's pages has logged.",
        )
    return AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False)


# The model that is loaded, by its URI. Memory may be too small for a second one.
_loaded = {}


def _load(uri):
    if uri not in _loaded:
        check_model(uri)
        _drop()
        _loaded[uri] = mlflow.pyfunc.load_model(uri)
    return _loaded[uri]


def _drop():
    while _loaded:
        python_model = _unwrap(_loaded.popitem()[1])
        if hasattr(python_model, "close"):
            python_model.close()
        del python_model
        # MLflow keeps a reference to the last model that was loaded from code.
        mlflow.models.set_model(PythonModel)
    gc.collect()


class _Form(ipywidgets.VBox):
    """The form's widgets. Answers are computed in ``thread``, because the kernel's main thread has to handle Stop."""

    def __init__(self, models, question, system_prompt, max_tokens, temperature):
        looks = {
            "style": {"description_width": "8em"},
            "layout": {"width": "100%", "max_width": "60em"},
        }
        self.models = models
        self.thread = None
        self._stopped = threading.Event()
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
        self.status = ipywidgets.HTML()
        self.raw = ipywidgets.HTML()
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
        # A page without a kernel shows the note instead of the widget.
        note = {"text/html": _NOTE._repr_html_(), "text/plain": repr(_NOTE)}
        return super()._repr_mimebundle_(**options) | note

    def _start(self, _):
        values = [field.value for field in self.fields]
        if self.generate.disabled:  # the second click of a double click
            return
        if not values[0].strip():
            self._show_status("Write a question first.")
            return
        self.generate.disabled = True
        self.stop.disabled = False
        self._stopped.clear()
        self.thread = threading.Thread(
            target=self._run, args=(self.model.value, values), daemon=True
        )
        self.thread.start()

    def _stop(self, _):
        self._stopped.set()
        self.stop.disabled = True
        self._show_status("Stopping at the next piece of the answer.")

    def _run(self, name, values):
        try:
            self._show_status(self._answer(name, values))
        # Whatever it is, the reader sees a sentence, and can press the button again.
        except Exception as error:
            message = getattr(error, "message", "") or str(error)
            if not isinstance(error, mlflow.MlflowException | CourseError):
                message = f"The model gave no answer: {type(error).__name__}: {message}"
            self._show_status(message.strip().splitlines()[0])
        finally:
            self.generate.disabled = False
            self.stop.disabled = True

    def _answer(self, name, values):
        """Show an answer while it arrives, and return a sentence about its length and speed."""
        self.answer.value = self.raw.value = ""
        self._show_status(f"Loading {name}.")
        given = self.models[name]
        model = _load(given) if isinstance(given, str) else given()
        kind = kind_of(model)
        tokenizer = None
        if kind == "prompt":
            tokenizer = _tokenizer(
                given if isinstance(given, str) else f"models:/{model.metadata.model_id}"
            )
        request = build_request(kind, *values, tokenizer)
        self.raw.value = _details("Raw request", request)
        self._show_status(f"{name} is answering.")
        text = ""
        raw = []
        shown = -math.inf  # when the answer was last updated
        started = time.perf_counter()
        with contextlib.closing(pieces(model, request)) as answer:
            while not self._stopped.is_set() and (piece := next(answer, None)):
                text += piece[0]
                now = time.perf_counter()
                raw.append(piece[1])
                # A stream begins with a piece without text.
                if piece[0] and now - shown >= _UPDATE_SECONDS:
                    self.answer.value = text
                    shown = now
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

    def _show_status(self, sentence):
        self.status.value = f'<p role="status" {NO_MATHEMATICS}>{html.escape(sentence)}</p>'


def _usage(raw):
    """Return the number of an answer's tokens from the usage in its last object; None without a usage."""
    last = raw[-1] if raw else {}
    usage = (last[0] if isinstance(last, list) else last).get("usage")
    return usage and usage["completion_tokens"]


def _details(title, *objects):
    """Return objects as JSON, folded under a title: one object over many lines, or several with a line each."""
    lines = [
        json.dumps(one, ensure_ascii=False, default=str, indent=2 if len(objects) == 1 else None)
        for one in objects
    ]
    return (
        f'<details><summary>{title}</summary><pre {NO_MATHEMATICS} style="white-space: pre-wrap">'
        f"{html.escape(chr(10).join(lines))}</pre></details>"
    )
