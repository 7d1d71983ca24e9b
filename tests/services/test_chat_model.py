"""The chat model's traces in a store of MLflow, and the model in another process, which has nothing of the course.

Run: python -m helpers test tests/services/test_chat_model.py
"""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from support import ROOT
from support.chat import AS_SHOWN, LONG, SECRET, ask, change_code, chat_model_for, user
from support.conversations import TURNS, talk

# --- what it tells MLflow's tracing -------------------------------------------------------------


@pytest.fixture
def traced(store, monkeypatch):
    """Let MLflow keep traces in a store of this test's own, in no experiment of another one."""
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    yield
    mlflow.set_tracking_uri(before)


def children(span):
    """Return the spans below one, of a trace that has ended."""
    trace = mlflow.get_trace(span.trace_id, flush=True)
    return sorted(
        (one for one in trace.data.spans if one.parent_id == span.span_id),
        key=lambda one: one.start_time_ns,
    )


def own(span):
    return {
        name: value for name, value in span.attributes.items() if not name.startswith("mlflow.")
    }


@pytest.mark.parametrize("stream", [False, True])
def test_under_a_span_each_row_tells_what_it_spent_its_time_on(fresh, traced, stream):
    request = {"messages": user(SECRET * 20), "max_tokens": 6, "temperature": 1.0, "seed": 2}
    started = time.time_ns()
    with mlflow.start_span("caller") as caller:
        if stream:
            *_, last = fresh.predict_stream(
                None, request | {"stream_options": {"include_usage": True}}
            )
        else:
            (last,) = fresh.predict(None, request)
    ended = time.time_ns()
    spans = children(caller)
    assert [span.name for span in spans] == ["read", "wait", "prefill", "decode"]
    prompt, completion = last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]
    assert [own(span) for span in spans] == [
        {},
        {},
        {"prompt_tokens": prompt, "reused_prompt_tokens": 0},
        {"completion_tokens": completion, "finish_reason": "length" if completion == 6 else "stop"},
    ]
    # One begins where the other ends.
    times = [started, *(span.start_time_ns for span in spans), spans[-1].end_time_ns, ended]
    assert times == sorted(times)
    assert [span.end_time_ns for span in spans[:-1]] == [span.start_time_ns for span in spans[1:]]
    assert all(span.inputs is None and span.outputs is None for span in spans)
    text = json.dumps([span.to_dict() for span in spans])
    assert SECRET not in text
    assert request["messages"][0]["role"] not in text.replace("user_id", "")


def test_each_row_of_a_call_has_its_spans_and_a_continuation_says_what_it_reused(fresh, traced):
    held = talk(fresh, turns=TURNS[:2])
    with mlflow.start_span("caller") as caller:
        fresh.predict(None, {"messages": held[-1][0], "max_tokens": 3})
    reused = children(caller)[2].attributes["reused_prompt_tokens"]
    assert reused == children(caller)[2].attributes["prompt_tokens"] - 2
    with mlflow.start_span("caller") as caller:
        fresh.predict(
            None, [AS_SHOWN | {"n": 2, "max_tokens": 3}, {"messages": user("y"), "max_tokens": 4}]
        )
    names = [span.name for span in children(caller)]
    assert sorted(names) == sorted(["read", "wait", "prefill", "decode"] * 3)


def test_a_row_that_is_left_or_refused_has_spans_that_end(fresh, traced):
    with mlflow.start_span("caller") as caller:
        stream = fresh.predict_stream(None, {"messages": user("x")} | LONG)
        next(stream)
        stream.close()
    spans = children(caller)
    assert [span.name for span in spans] == ["read", "wait", "prefill", "decode"]
    assert own(spans[-1])["finish_reason"] is None
    fresh.close()
    with (
        mlflow.start_span("caller") as caller,
        pytest.raises(MlflowException, match="This model is closed"),
    ):
        fresh.predict(None, AS_SHOWN)
    assert sorted(span.name for span in children(caller)) == ["decode", "prefill", "read", "wait"]
    with mlflow.start_span("caller") as caller, pytest.raises(MlflowException, match="temperature"):
        fresh.predict(None, AS_SHOWN | {"temperature": 3})  # refused before there is a row
    assert children(caller) == []


def test_without_a_callers_span_none_is_made(fresh, traced, monkeypatch):
    made = []
    monkeypatch.setattr(
        mlflow, "start_span_no_context", lambda *arguments, **named: made.append(arguments)
    )
    ask(fresh, AS_SHOWN)
    list(fresh.predict_stream(None, AS_SHOWN))
    with mlflow.start_span("before"):
        pass
    ask(fresh, AS_SHOWN)
    assert made == []


# --- two versions in one process ------------------------------------------------------------


@pytest.fixture
def versions(tiny, tmp_path, monkeypatch):
    """Return the folders of two saved models with different code: the ids of their answers begin differently."""
    mlflow.pyfunc.save_model(tmp_path / "first", **chat_model_for(tiny))
    change_code(monkeypatch, tmp_path)
    mlflow.pyfunc.save_model(tmp_path / "second", **chat_model_for(tiny))
    return tmp_path / "first", tmp_path / "second"


def kind_of(model):
    return model.predict(AS_SHOWN)[0]["id"].split("-")[0]


def test_two_versions_with_different_code_answer_each_by_its_own(versions):
    first, second = map(mlflow.pyfunc.load_model, versions)
    assert [kind_of(first), kind_of(second), kind_of(first)] == ["chatcmpl", "changed", "chatcmpl"]
    assert first.unwrap_python_model().stats()["answers"] == 2
    for model in (first, second):
        model.unwrap_python_model().close()


def test_two_versions_that_are_loaded_at_the_same_moment_answer_each_by_its_own_code(
    versions, monkeypatch
):
    both, real, waits = threading.Barrier(2, timeout=60), mlflow.models.set_model, [True, True]

    def set_model(model):
        real(model)
        if waits:  # MLflow reads the global after both have set it
            waits.pop()
            both.wait()

    monkeypatch.setattr(mlflow.models, "set_model", set_model)
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(mlflow.pyfunc.load_model, versions))
    sys.modules.pop("dbutils", None)  # which MLflow leaves behind where two threads load
    # What MLflow mixes up.
    assert models[0].unwrap_python_model() is models[1].unwrap_python_model()
    assert [kind_of(model) for model in models * 2] == ["chatcmpl", "changed"] * 2


# --- in another process ---------------------------------------------------------------------


def test_it_loads_in_another_process_without_pickles_and_without_the_course(
    tiny, as_shown, python, tmp_path
):
    saved = tmp_path / "störe 1" / "slm-onnx"
    mlflow.pyfunc.save_model(saved, **chat_model_for(tiny, model="toy", max_tokens=16))
    code = (
        "import sys, json, mlflow; sys.modules |= dict.fromkeys(['helpers', 'course', 'serving']); "
        "print(json.dumps(mlflow.pyfunc.load_model(sys.argv[1]).predict(json.loads(sys.argv[2]))))"
    )
    result = python(
        "-c",
        code,
        saved,
        json.dumps(AS_SHOWN),
        cwd=tmp_path,
        network=False,
        MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])[0]["choices"] == as_shown
    assert "Warning" not in result.stderr
    assert str(ROOT) not in result.stderr
