"""The form that asks logged models: its buttons are pressed in this process, without a browser.

Run: python -m helpers test tests/services/test_playground.py
"""

import gc
import importlib
import json
import shutil
import threading
import weakref
from html.parser import HTMLParser
from types import SimpleNamespace

import ipywidgets
import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model, infer_signature
from support import refuses
from support.chat import chat_model_for, user

from helpers.show.playground import build_request, kind_of, pieces, show_playground

MODULE = importlib.import_module("helpers.show.playground")
VIEW = "application/vnd.jupyter.widget-view+json"
QUESTION = "The sky is"
PROMPT_MODEL = """
import mlflow
import onnxruntime_genai as og


class PromptModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.model = og.Model(context.artifacts["model"])
        self.tokenizer = og.Tokenizer(self.model)

    def predict(self, context, model_input, params=None):
        tokens = self.tokenizer.encode(model_input["prompt"][0])
        settings = og.GeneratorParams(self.model)
        settings.set_search_options(max_length=len(tokens) + params["max_tokens"], do_sample=params["temperature"] > 0)
        generator = og.Generator(self.model, settings)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        return [self.tokenizer.decode(generator.get_sequence(0)[len(tokens):])]


mlflow.models.set_model(PromptModel())
"""
# The third, of MLflow's transformers flavor, is in tests/nightly/test_playground.py.
KINDS = ["stream", "prompt"]


@pytest.fixture(scope="module")
def uris(tiny, empty_database, tmp_path_factory):
    """Return a function that logs a model of one kind on the tiny one, once, and returns its URI."""
    folder = tmp_path_factory.mktemp("störe 1")
    logged = {}
    shutil.copy(empty_database, folder)
    mlflow.set_tracking_uri("sqlite:///" + (folder / "mlflow.db").as_posix())
    mlflow.create_experiment("playground", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment("playground")

    def log(kind):
        if kind == "stream":
            return mlflow.pyfunc.log_model(name=kind, **chat_model_for(tiny))
        (folder / "prompt_model.py").write_text(PROMPT_MODEL, encoding="utf-8")
        return mlflow.pyfunc.log_model(
            name=kind,
            python_model=str(folder / "prompt_model.py"),
            signature=infer_signature(
                {"prompt": "a"}, "b", params={"max_tokens": 16, "temperature": 0.0}
            ),
            artifacts={"model": str(tiny.onnx_dir)},
            pip_requirements=["onnxruntime-genai"],
        )

    def uri(kind):
        if kind not in logged:
            logged[kind] = log(kind).model_uri
        return logged[kind]

    return uri


@pytest.fixture
def make(monkeypatch):
    """Return a function that makes a form, as JupyterLab would get it."""
    monkeypatch.setattr(
        MODULE, "get_ipython", lambda: SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=True))
    )
    # A form that drops a model collects garbage, and the libraries of all tests are no part of
    # that.
    gc.freeze()

    def form(models, question=QUESTION, max_tokens=16):
        return show_playground(
            models,
            question=question,
            system_prompt="Be brief.",
            max_tokens=max_tokens,
            temperature=0.0,
        )

    yield form
    MODULE._drop()
    gc.unfreeze()


def press(form):
    """Press Generate, wait for the answer, and return the form's line about it."""
    form.generate.click()
    form.thread.join()
    assert (form.generate.disabled, form.stop.disabled) == (False, True)
    return read(form.status.value)[1]


def read(markup):
    """Return the tags of some HTML and its text."""
    tags = []
    texts = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.handle_data = texts.append
    parser.feed(markup)
    parser.close()
    return tags, "".join(texts)


class Talker(mlflow.pyfunc.PythonModel):
    """Streams numbers; ``events`` notes what happens to it."""

    def __init__(self, events=None):
        self.events = [] if events is None else events

    def predict(self, context, model_input, params=None):
        raise AssertionError("nobody asks for a whole answer")

    def predict_stream(self, context, model_input, params=None):
        try:
            if model_input["messages"][-1]["content"] == "fail":
                raise MlflowException(
                    "It broke at <b>$5 $6</b>.\nTraceback (most recent call last)"
                )
            if model_input["messages"][-1]["content"] == "fail otherwise":
                raise KeyError("<b>")
            for number in range(50):
                yield {"choices": [{"delta": {"content": f"{number} "}}]}
            yield {"choices": [], "usage": {"completion_tokens": 50}}
        finally:
            self.events.append("ended")

    def close(self):
        self.events.append("closed")


def talker(events=None, inputs=None):
    """Return a model as MLflow would load it, with a talker inside."""
    python_model = Talker(events)
    meta = Model(signature=infer_signature(inputs or {"messages": user("a")}))
    meta.add_flavor("python_function", loader_module="none")
    return mlflow.pyfunc.PyFuncModel(
        meta,
        SimpleNamespace(
            python_model=python_model,
            predict=None,
            predict_stream=lambda values, params=None: python_model.predict_stream(None, values),
        ),
        predict_stream_fn="predict_stream",
    )


NUMBERS = "".join(f"{number} " for number in range(50))


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_what_predict_gives_whatever_the_kind_of_model(uris, make, kind):
    form = make({"other": talker(), "mine": uris(kind)})
    form.model.value = "mine"
    status = press(form)
    model = mlflow.pyfunc.load_model(uris(kind))
    assert kind_of(model) == kind
    request = json.loads(read(form.raw.value)[1].split("Raw request")[1].split("Raw response")[0])
    if kind == "prompt":
        assert request["prompt"].endswith("<|assistant|>\n") and QUESTION in request["prompt"]
        expected = model.predict({"prompt": request["prompt"]}, params=request["params"])[0]
    else:
        assert [message["content"] for message in request["messages"]] == ["Be brief.", QUESTION]
        (completion,) = model.predict(
            {"messages": request["messages"], "max_tokens": 16, "temperature": 0.0}
        )
        expected = completion["choices"][0]["message"]["content"]
        assert status.startswith(f"{completion['usage']['completion_tokens']} tokens in ")
    assert expected
    assert form.answer.value == expected
    assert "".join(text for text, _ in pieces(model, request)) == expected
    assert status.endswith(" tokens per second.")


def test_a_prompt_model_without_a_tokenizer_is_refused(tmp_path):
    with refuses("playground-tokenizer"):
        MODULE._tokenizer(str(tmp_path))


def test_a_prompt_of_a_model_that_is_loaded_already_is_made_by_its_own_chat_template(uris, make):
    by_uri = make({"m": uris("prompt")})
    loaded = make({"m": lambda: mlflow.pyfunc.load_model(uris("prompt"))})
    assert press(by_uri).endswith("per second.") and press(loaded).endswith("per second.")
    assert loaded.answer.value == by_uri.answer.value


def test_stop_ends_an_answer_at_the_next_piece_and_the_next_one_is_whole(make, monkeypatch):
    model, kept = talker(), []
    form = make({"m": lambda: model})

    def keep(make_iterator):
        def made(*values):
            # An iterator that nobody refers to ends without being closed.
            kept.append(make_iterator(*values))
            return kept[-1]

        return made

    monkeypatch.setattr(MODULE, "pieces", keep(pieces))
    monkeypatch.setattr(model, "predict_stream", keep(model.predict_stream))
    # As soon as something is to be seen.
    form.answer.observe(lambda change: form.stop.click(), "value")
    assert press(form).startswith("Stopped after ")
    assert form.answer.value == "0 "
    assert model.unwrap_python_model().events == ["ended"]
    form.answer.unobserve_all("value")
    assert press(form).startswith("50 tokens in ")
    assert form.answer.value == NUMBERS


@pytest.mark.parametrize("kind", ["stream", "prompt"])
def test_stop_before_the_first_piece_asks_nothing(uris, make, monkeypatch, kind):
    form = make({"m": uris(kind)})
    # The request stands there, the answer does not.
    form.raw.observe(lambda change: form.stop.click(), "value")
    assert press(form).startswith("Stopped after ")
    (model,) = MODULE._loaded.values()
    for name in ("predict", "predict_stream"):
        monkeypatch.setattr(model, name, lambda *values, **params: pytest.fail("it was asked"))
    assert press(form).startswith("Stopped after ")
    assert form.answer.value == ""


def test_the_engine_answers_after_a_stop(uris, make):
    form = make({"m": uris("stream")}, max_tokens=60)
    form.answer.observe(lambda change: form.stop.click(), "value")
    assert press(form).startswith("Stopped after ")
    stopped = form.answer.value
    form.answer.unobserve_all("value")
    assert press(form).endswith("per second.")
    assert form.answer.value.startswith(stopped) and len(stopped) < len(form.answer.value)


def test_a_second_click_that_was_on_its_way_starts_nothing(make):
    form, same = make({"m": talker}), []

    def click(change):
        form.answer.unobserve_all("value")
        form.generate.click()
        same.append(form.thread is threading.current_thread())

    form.answer.observe(click, "value")
    press(form)
    assert same == [True]


def test_a_refused_request_leaves_a_sentence_and_a_working_button(uris, make):
    form = make({"m": uris("stream")}, "word " * 1_200, max_tokens=2048)
    status = press(form)
    assert status.startswith("max_tokens has to be a whole number from 1 to ")
    assert status.endswith(" after these messages.")
    form.fields[0].value, form.fields[2].value = QUESTION, 16
    assert press(form).endswith("per second.")


@pytest.mark.parametrize("question", ["", " \n"])
def test_without_a_question_nothing_is_asked(make, question):
    form = make({"m": talker}, question)
    form.generate.click()
    assert form.thread is None
    assert read(form.status.value)[1] == "Write a question first."
    assert not form.generate.disabled


def test_markup_and_dollars_are_text_in_a_request_an_answer_and_an_error(make):
    form = make({"m": talker}, "<b>$5 $6</b>")
    press(form)
    tags, text = read(form.raw.value)
    assert "<b>$5 $6</b>" in text
    form.fields[0].value = "fail"
    assert press(form) == "It broke at <b>$5 $6</b>."
    form.fields[0].value = "fail otherwise"
    assert press(form) == "The model gave no answer: KeyError: '<b>'"
    assert set(tags + read(form.status.value)[0]) == {"details", "summary", "pre", "p"}
    for markup in (form.raw.value.replace("<pre ", "<p "), form.status.value):
        assert markup.count("<p ") == markup.count('class="mathjax_ignore tex2jax_ignore"') > 0


def test_a_model_of_a_uri_is_loaded_once_and_the_former_one_is_gone_before(make, monkeypatch):
    events, alive = [], []

    def load(uri):
        assert [model for model in alive if model() is not None] == []
        events.append(uri)
        if uri == "gone":
            raise MlflowException("There is no such model.")
        model = talker(events)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(mlflow.pyfunc, "load_model", load)
    # These addresses are no store's.
    monkeypatch.setattr("helpers.show.playground.check_model", lambda uri: None)
    form = make({"a": "a", "b": "b", "gone": "gone", "loaded": talker})
    for name in ("a", "a", "loaded", "a", "b", "gone", "b"):
        form.model.value = name
        assert press(form).startswith("There is no" if name == "gone" else "50 tokens in")
    asked = ["ended"]
    assert events == ["a", *asked * 3, "closed", "b", *asked, "closed", "gone", "b", *asked]
    make({"a": "a"})
    assert events[-1] == "closed"
    assert alive[-1]() is None


def test_mlflow_itself_holds_no_model_that_was_dropped(uris, make):
    form = make({"m": uris("prompt")})
    press(form)
    (model,) = MODULE._loaded.values()
    inside = weakref.ref(model.unwrap_python_model())
    del model
    MODULE._drop()
    assert inside() is None


def test_the_page_is_updated_ten_times_a_second_at_most(make, monkeypatch):
    hundredths = iter(range(10_000))
    monkeypatch.setattr(MODULE, "time", SimpleNamespace(perf_counter=lambda: next(hundredths) / 32))
    form, seen = make({"m": talker}), []
    form.answer.observe(lambda change: seen.append(change["new"]), "value")
    press(form)
    assert [len(text.split()) for text in seen] == [*range(1, 50, 4), 50]  # a piece each 1/32 s


@pytest.mark.parametrize(
    "shell",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(kernel=None),
        SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=False)),
    ],
)
def test_where_nobody_can_press_a_button_a_note_stands_and_nothing_is_loaded(monkeypatch, shell):
    monkeypatch.setattr(MODULE, "get_ipython", lambda: shell)
    note = show_playground(
        {"m": "models:/none@champion"}, question="", system_prompt="", max_tokens=1, temperature=0.0
    )
    assert not isinstance(note, ipywidgets.Widget) and not hasattr(note, "_repr_mimebundle_")
    for text in (repr(note), read(note._repr_html_())[1]):
        assert "JupyterLab" in text and "make lab" in text and "python -m helpers lab" in text


def test_a_form_takes_the_note_along_for_a_page_that_is_read_without_a_kernel(make):
    bundle = make({"m": talker})._repr_mimebundle_()
    assert set(bundle) == {VIEW, "text/html", "text/plain"}
    assert "make lab" in bundle["text/html"] and "make lab" in bundle["text/plain"]


def test_every_control_has_a_name(make):
    form = make({"m": talker})
    controls = [form.model, *form.fields, form.answer, form.generate, form.stop]
    assert len({control.description for control in controls} - {""}) == len(controls) == 8


SETTINGS = {"max_tokens": 5, "temperature": 0.5}
TEMPLATE = SimpleNamespace(apply_chat_template=lambda messages, **options: f"{messages} {options}")


@pytest.mark.parametrize(
    ("kind", "system_prompt", "request_"),
    [
        ("messages", "", {"messages": user("Hi"), **SETTINGS}),
        (
            "messages",
            "S",
            {"messages": [{"role": "system", "content": "S"}, *user("Hi")], **SETTINGS},
        ),
        (
            "stream",
            "",
            {"messages": user("Hi"), **SETTINGS, "stream_options": {"include_usage": True}},
        ),
        (
            "prompt",
            "",
            {
                "params": SETTINGS,
                "prompt": f"{user('Hi')} {{'tokenize': False, 'add_generation_prompt': True}}",
            },
        ),
    ],
)
def test_each_kind_has_its_request(kind, system_prompt, request_):
    assert build_request(kind, "Hi", system_prompt, 5, 0.5, TEMPLATE) == request_


def test_a_model_that_takes_something_else_is_refused():
    with refuses("playground-signature"):
        kind_of(talker(inputs={"input": "a"}))
    assert kind_of(talker()) == "stream"
    assert kind_of(talker(inputs={"prompt": "a"})) == "prompt"
