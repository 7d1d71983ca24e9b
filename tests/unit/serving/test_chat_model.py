"""The chat model behind MLflow: logged from its file, asked through its signature, as a caller in MLflow meets it.

Run: python -m helpers test tests/unit/serving/test_chat_model.py
"""

import gc
import json
import logging
import math

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from support.chat import (
    A_TOOL,
    AS_SHOWN,
    ASKED,
    HABITS,
    LONG,
    MESSAGE_FIELDS,
    MESSAGES,
    SECRET,
    SENT_BACK,
    chat_model_for,
    contents,
    deltas,
    mixed_requests,
    parts,
    schema,
    user,
)
from support.conversations import engine_threads

from serving.chat.contract import SIGNATURE, ChatRequest


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Return the folder of the model as MLflow keeps it, whose name is not plain."""
    folder = tmp_path_factory.mktemp("störe 1") / "slm-onnx"
    mlflow.pyfunc.save_model(
        folder,
        **chat_model_for(tiny, model="toy", max_tokens=16),
        input_example={"messages": user("Hi")},
    )
    return str(folder)


@pytest.fixture(scope="module")
def model(saved):
    return mlflow.pyfunc.load_model(saved)


@pytest.fixture(scope="module")
def before(model):
    return model.predict(AS_SHOWN)[0]["choices"]


@pytest.fixture
def mlflow_log(caplog):
    """Return the text of what MLflow logs, which it keeps from other handlers."""
    logger = logging.getLogger("mlflow")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# --- the answer -----------------------------------------------------------------------------


def test_the_answer_is_an_openai_completion(model):
    first, second = (model.predict({"messages": user("The sky is")})[0] for _ in range(2))
    assert set(first) == {"id", "object", "created", "model", "choices", "usage"}
    assert first["id"].startswith("chatcmpl-")
    assert first["id"] != second["id"]
    assert first["object"] == "chat.completion"
    assert isinstance(first["created"], int)
    assert first["model"] == "toy"
    (choice,) = first["choices"]
    assert set(choice) == {"index", "message", "finish_reason"}
    assert choice["message"]["role"] == "assistant"
    assert (
        first["usage"]["total_tokens"]
        == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    )
    assert json.loads(json.dumps(first)) == first
    assert {column.name for column in SIGNATURE.outputs} == set(first)


def test_the_signature_is_the_files_own_and_no_type_hint_changes_it(model):
    assert model.metadata.signature == SIGNATURE
    assert model.unwrap_python_model().__class__.__module__.startswith("chat_")  # a copy of its own


def test_rows_may_come_as_a_dict_a_list_or_a_table(model):
    requests = [{"messages": user(text)} for text in ASKED]
    expected = [model.predict(one)[0]["choices"] for one in requests]
    table = pd.DataFrame({"messages": [user(text) for text in ASKED]}, index=[5, 5, 3, 2, 1, 0])
    assert [row["choices"] for row in model.predict(requests)] == expected
    assert [row["choices"] for row in model.predict(table)] == expected
    # As Spark gives them.
    arrays = pd.DataFrame({"messages": [np.array(user(text), dtype=object) for text in ASKED]})
    assert [row["choices"] for row in model.predict(arrays)] == expected
    assert model.predict(table[:0]) == []


def test_every_field_passes_the_signature_and_acts_as_it_does_without(model):
    raw = model.unwrap_python_model()
    requests = [
        *mixed_requests(),
        AS_SHOWN | {"temperature": 2, "seed": 1},
        AS_SHOWN | {"stop": ["a", "e"], "top_k": 5.0},
    ]
    through = [completion["choices"] for completion in model.predict(requests)]
    assert through == [completion["choices"] for completion in raw.predict(None, requests)]
    for request in requests[:3]:
        streamed = deltas(model.predict_stream(request), request.get("n", 1))
        assert (
            "".join(text for text, place in streamed if place == 0)
            == contents(model.predict(request)[0])[0]
        )
    *_, last = model.predict_stream(
        AS_SHOWN | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert last["usage"] == model.predict(AS_SHOWN | {"stream": False})[0]["usage"]


def test_a_row_has_its_own_parameters_and_a_gap_is_the_default(model, before):
    table = pd.DataFrame(
        [AS_SHOWN | {"max_tokens": 3}, AS_SHOWN | {"stop": ["a"], "n": 2}, AS_SHOWN]
    )
    answers = model.predict(table)
    assert answers[0]["usage"]["completion_tokens"] == 3
    assert [len(row["choices"]) for row in answers] == [1, 2, 1]
    assert answers[2]["choices"] == before


def test_settings_change_at_load(saved, model, before):
    short = mlflow.pyfunc.load_model(saved, model_config={"max_tokens": 4, "model": "other"})
    (completion,) = short.predict(AS_SHOWN)
    assert (completion["model"], completion["usage"]["completion_tokens"]) == ("other", 4)
    short.unwrap_python_model().close()
    with pytest.raises(
        MlflowException, match="model_config's temperature has to be a number from 0 to 2"
    ) as refusal:
        mlflow.pyfunc.load_model(saved, model_config={"temperature": 5})
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
    assert model.predict(AS_SHOWN)[0]["choices"] == before  # another model in the same process


# --- bad input ------------------------------------------------------------------------------


def check_refusal(refusal, says):
    assert refusal.value.message == says
    assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"


# One request for each code of a Refusal that a request may cause; `test_contract.py` has the table.
CODES = {
    "invalid_value": ({"temperature": SECRET}, "temperature has to be a number from 0 to 2."),
    "unknown_field": (
        {"messages": [user("a")[0] | {SECRET: 1}]},
        (f"messages[0] holds a field that is not served. The fields are: {MESSAGE_FIELDS}."),
    ),
    "context_length_exceeded": (
        {"messages": user(f"{SECRET} " * 3000)},
        ("messages has to be fewer than 4096 tokens, the model's context."),
    ),
    "a table without columns": ({}, MESSAGES),
}


@pytest.mark.parametrize(("fields", "says"), CODES.values(), ids=CODES)
def test_bad_input_is_refused_by_name_and_the_next_request_is_answered(model, before, fields, says):
    request = {"messages": user(SECRET)} | fields if fields else {}
    with pytest.raises(MlflowException) as refusal:
        model.predict(request)
    check_refusal(refusal, says)
    if fields:  # of an empty object, MLflow makes no conversation to stream
        with pytest.raises(MlflowException) as refusal:
            list(model.predict_stream(request))
        check_refusal(refusal, says)
        with pytest.raises(MlflowException) as refusal:
            model.predict([AS_SHOWN, AS_SHOWN | request])
        check_refusal(refusal, f"Row 1: {says}")
    assert model.predict(AS_SHOWN)[0]["choices"] == before


def test_what_mlflow_itself_refuses_is_not_quoted_where_a_server_says_so(
    model, before, monkeypatch
):
    monkeypatch.setenv("MLFLOW_DISABLE_SCHEMA_DETAILS", "true")
    for request in (
        {"messages": user(SECRET), "stream_options": 5},
        [{"messages": user(SECRET)}, None],
        {"messages": user(SECRET), "stream_options": {SECRET: 1}},
    ):
        for ask in (model.predict, lambda request: list(model.predict_stream(request))):
            with pytest.raises(MlflowException) as refusal:
                ask(request)
            assert SECRET not in refusal.value.message
    assert model.predict(AS_SHOWN)[0]["choices"] == before


def test_an_unknown_field_is_left_out_with_a_warning(model, before, mlflow_log):
    # The file itself refuses it. Behind a signature, MLflow drops it first, and says so.
    assert model.predict(AS_SHOWN | {"verbosity": [SECRET]})[0]["choices"] == before
    (record,) = mlflow_log.records
    assert record.levelname == "WARNING"
    assert (
        "not defined in the model signature: `['verbosity']`. These inputs will be ignored."
        in record.getMessage()
    )
    assert SECRET not in record.getMessage()


def test_what_clients_send_by_habit_passes_the_signature_and_changes_nothing(
    model, before, mlflow_log
):
    habits = {name: harmless[0] for name, _, harmless, _ in HABITS}
    assert model.predict(AS_SHOWN | habits)[0]["choices"] == before
    assert model.predict(AS_SHOWN | dict.fromkeys(habits))[0]["choices"] == before
    # In a table, a row that has none is a gap.
    assert [
        row["choices"] for row in model.predict(pd.DataFrame([AS_SHOWN, AS_SHOWN | habits]))
    ] == [before] * 2
    assert not [record for record in mlflow_log.records if "will be ignored" in record.getMessage()]


def test_a_refusal_keeps_its_parts_through_mlflow(model):
    with pytest.raises(MlflowException) as refusal:
        model.predict(AS_SHOWN | {"tools": [A_TOOL]})
    body = json.loads(refusal.value.serialize_as_json())
    assert body["message"] == "tools has to be empty or left out."
    assert (body["field"], body["code"], body["allowed"]) == (
        "tools",
        "invalid_value",
        "empty or left out",
    )
    with pytest.raises(MlflowException) as refusal:
        model.predict({"messages": user("x" * 100_000_000)})
    assert (refusal.value.field, refusal.value.code) == ("messages", "context_length_exceeded")


def test_what_openais_clients_send_passes_the_signature(model):
    plain = [
        {"role": "system", "content": "Be brief.\nBe kind."},
        *user("Capital?"),
        {"role": "assistant", "content": "Paris."},
        *user("And of Italy?"),
    ]
    sent = [
        {"role": "developer", "content": parts("Be brief.", "Be kind.")},
        plain[1] | {"name": "Bob"},
        SENT_BACK,
        *user(parts("And of Italy?")),
    ]
    expected = model.predict({"messages": plain, "max_tokens": 9})[0]["choices"]
    for fields in (
        {"max_completion_tokens": 9},
        {"max_completion_tokens": 9, "max_tokens": 9, "response_format": {"type": "text"}},
        {"max_tokens": 9, "response_format": None, "model": "gpt-4.1", "user": "Bob"},
    ):
        request = {"messages": sent} | fields
        assert model.predict(request)[0]["choices"] == expected
        table = pd.DataFrame([request, {"messages": plain, "max_tokens": 9}])
        assert [row["choices"] for row in model.predict(table)] == [expected] * 2
        streamed = deltas(model.predict_stream(request))
        assert "".join(text for text, _ in streamed) == expected[0]["message"]["content"]


def test_an_answer_in_json_passes_the_signature(model):
    shape = schema(
        {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}},
            "required": ["ok"],
            "additionalProperties": False,
        }
    )
    (completion,) = model.predict(AS_SHOWN | shape | {"max_tokens": 60})
    assert json.loads(contents(completion)[0]) in ({"ok": True}, {"ok": False})
    assert completion["choices"][0]["finish_reason"] == "stop"


def test_a_gap_is_a_number_that_is_not_given_and_none_is_refused(model, before):
    for ask in (
        lambda request: model.unwrap_python_model().predict(None, request),
        lambda request: list(model.predict_stream(request)),
    ):
        with pytest.raises(
            MlflowException, match=r"^temperature has to be a number from 0 to 2\.$"
        ):
            ask(AS_SHOWN | {"temperature": math.nan})
    # A table's last batch may be one row with a gap: it is answered as it would be beside others.
    assert (
        model.predict(pd.DataFrame([AS_SHOWN | {"temperature": math.nan}]))[0]["choices"] == before
    )


def test_null_rows_among_good_ones_are_named_and_nothing_runs(model, before):
    rows = [AS_SHOWN, {"messages": None, "max_tokens": 4}, AS_SHOWN]
    for table in (rows, pd.DataFrame(rows), pd.DataFrame([AS_SHOWN, {"max_tokens": 4}])):
        with pytest.raises(MlflowException, match=r"^Row 1: messages has to be a list") as refusal:
            model.predict(table)
        assert refusal.value.error_code == "INVALID_PARAMETER_VALUE"
    assert model.predict(AS_SHOWN)[0]["choices"] == before


def test_a_null_field_is_a_field_not_given(model, before):
    nulls = dict.fromkeys(ChatRequest.model_fields) | {"verbosity": None}
    message = AS_SHOWN["messages"][0] | {"refusal": None, "tool_calls": None}
    assert model.predict(nulls | {"messages": [message]})[0]["choices"] == before


# --- life -----------------------------------------------------------------------------------


def test_closing_and_forgetting_a_model_frees_its_thread(saved, before):
    running = set(engine_threads())
    closed, forgotten = (mlflow.pyfunc.load_model(saved) for _ in range(2))
    for one in (closed, forgotten):  # two at once, beside the one that all tests share
        assert one.predict(AS_SHOWN)[0]["choices"] == before
    assert len(set(engine_threads()) - running) == 2
    stream = closed.predict_stream({"messages": user("x")} | LONG)
    next(stream)
    closed.unwrap_python_model().close()
    with pytest.raises(MlflowException, match="closed before it had answered"):
        list(stream)
    with pytest.raises(MlflowException, match=r"This model is closed\. Load it again\."):
        closed.predict(AS_SHOWN)
    # Not even a failed answer holds on to its model, nor does MLflow. Each model's code is its own.
    forgotten.unwrap_python_model()._loaded.engine._decoder.read = None
    with pytest.raises(MlflowException, match="The engine failed"):
        forgotten.predict(AS_SHOWN)
    del forgotten, one
    gc.collect()
    for thread in set(engine_threads()) - running:
        thread.join(60)
    assert set(engine_threads()) <= running
