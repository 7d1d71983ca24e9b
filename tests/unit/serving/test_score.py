"""The scoring script of Azure Machine Learning: its answers, its refusals and its batches.

Run: python -m helpers test tests/unit/serving/test_score.py
"""

import io
import json

import mlflow
import pandas as pd
import pytest
from support import ROOT, stand_ins
from support.chat import AS_SHOWN, SECRET, chat_model_for, contents, deltas, user
from support.score import load_score, undo_init
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request

from serving import score


@pytest.fixture(autouse=True, scope="module")
def init_sets_nothing_for_others():
    with undo_init():
        yield


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """Save the chat model on the toy model as the chat page logs it; return the folder that stands around it."""
    folder = tmp_path_factory.mktemp("registered")
    mlflow.pyfunc.save_model(
        folder / "model", **chat_model_for(tiny), input_example=AS_SHOWN | {"max_tokens": 16}
    )
    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    """Let init() load the chat model, as Azure does."""
    with load_score(saved) as model:
        yield model


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Return a function that lets init() load a stand-in."""

    def load(kind):
        monkeypatch.setenv("AZUREML_MODEL_DIR", str(stand_ins.save(tmp_path / kind, kind)))
        monkeypatch.setattr(score, "_model", None)
        score.init()
        return score._model._python_model

    return load


def post(content):
    """Ask run() as the inference server does: with a request of Flask's kind."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return score.run(
        Request(
            EnvironBuilder(
                method="POST", input_stream=io.BytesIO(body), content_length=len(body)
            ).get_environ()
        )
    )


def read(response):
    return json.loads(response.get_data())


# --- answers --------------------------------------------------------------------------------


def test_the_sample_request_gets_what_the_model_itself_answers(loaded, saved, chat):
    sample = json.loads(
        (saved / "model" / "serving_input_example.json").read_text(encoding="utf-8")
    )
    response = post(sample)
    assert (response.status_code, response.content_type) == (200, "application/json")
    assert contents(read(response)) == contents(chat.predict(None, AS_SHOWN)[0])


def test_a_stream_has_the_same_text_as_a_whole_answer_and_its_usage(loaded):
    whole = read(post(AS_SHOWN | {"max_tokens": 16}))
    response = post(
        AS_SHOWN | {"max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert response.content_type == "text/event-stream; charset=utf-8" and response.is_streamed
    *events, done = [
        line.removeprefix("data: ")
        for line in response.get_data(as_text=True).split("\n\n")
        if line
    ]
    assert done == "[DONE]"
    *chunks, last = [json.loads(event) for event in events]
    assert "".join(text for text, _ in deltas([*chunks, last])) == contents(whole)[0]
    assert last["usage"] == whole["usage"]


@pytest.mark.parametrize("read_events", [0, 1])
def test_a_caller_that_leaves_a_stream_ends_the_models_work(read_events, stand_in):
    model = stand_in("Streams")
    model.gate.release(1)
    response = post({"messages": user("gated 5"), "stream": True})
    assert model.running == 1
    for _ in range(read_events):
        assert next(response.response).startswith(b"data: ")
    response.close()
    assert (model.running, model.steps) == (0, 1)


def test_a_stream_that_is_left_is_closed_also_where_somebody_still_holds_it(stand_in, monkeypatch):
    model = stand_in("Streams")
    model.gate.release(1)
    ask = score._model._model.predict_stream
    held = []
    monkeypatch.setattr(
        score._model._model, "predict_stream", lambda values: held.append(ask(values)) or held[0]
    )
    response = post({"messages": user("gated 5"), "stream": True})
    next(response.response)
    response.close()
    assert (model.running, model.steps) == (0, 1)


def test_a_stream_that_fails_on_its_way_ends_with_an_error_and_no_word_of_the_request(
    stand_in, monkeypatch
):
    stand_in("Streams")
    chunks = iter([{"choices": [{"index": 0, "delta": {}, "finish_reason": None}]}])

    def fail():
        yield from chunks
        raise ValueError(SECRET)

    monkeypatch.setattr(score._model._model, "predict_stream", lambda values: fail())
    said = post({"messages": user(SECRET), "stream": True}).get_data(as_text=True)
    assert json.loads(said.split("\n\n")[1].removeprefix("data: "))["error"]["code"] == "failed"
    assert SECRET not in said and "[DONE]" not in said


def test_a_model_without_a_stream_says_so(stand_in):
    stand_in("Plain")
    response = post({"messages": user("words 1"), "stream": True})
    assert response.status_code == 400 and read(response)["error"]["param"] == "stream"
    assert read(post({"messages": user("words 1")}))["choices"][0]["message"]["content"] == "word "


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (f'"{SECRET}"'.encode(), 400, "invalid_json"),
        (f'["{SECRET}"]'.encode(), 400, "invalid_json"),
        (SECRET.encode("utf-16"), 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", 400, "invalid_json"),
        (b" " * (score.MAX_BODY + 1), 413, "request_too_large"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body, status, code, loaded):
    response = post(body)
    error = read(response)["error"]
    assert (response.status_code, error["code"], error["type"]) == (
        status,
        code,
        "invalid_request_error",
    )
    assert SECRET not in error["message"]


@pytest.mark.parametrize(
    ("fields", "says", "code"),
    [
        (
            {"messages": []},
            "messages has to be a list of 1 to 1000 messages, role and content each.",
            "invalid_value",
        ),
        ({"messages": user("word " * 5000)}, "context", "context_length_exceeded"),
        ({"temperature": SECRET}, "temperature has to be a number from 0 to 2.", "invalid_value"),
        ({"n": 9}, "n has to be a whole number from 1 to 8.", "invalid_value"),
        ({"stream": True, "n": 9}, "n has to be a whole number from 1 to 8.", "invalid_value"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_the_model_refuses_is_a_400_in_its_own_words(fields, says, code, loaded, caplog):
    response = post(AS_SHOWN | fields)
    error = read(response)["error"]
    assert (response.status_code, error["code"]) == (400, code) and says in error["message"]
    assert set(error) == {"message", "type", "code", "param"}
    assert SECRET not in response.get_data(as_text=True) and SECRET not in caplog.text


def test_most_refusals_name_their_field(loaded):
    assert read(post({"messages": user("a"), "max_tokens": 0}))["error"] == {
        "message": "max_tokens has to be a whole number from 1.",
        "type": "invalid_request_error",
        "code": "invalid_value",
        "param": "max_tokens",
    }


def test_what_a_model_raises_is_told_in_one_sentence_and_logged_without_the_request(
    stand_in, caplog
):
    stand_in("Plain")
    response = post({"messages": user(f"raise {SECRET}")})
    assert (response.status_code, read(response)["error"]["code"]) == (500, "failed")
    said = response.get_data(as_text=True)
    assert SECRET not in said and "Traceback" not in said and str(ROOT) not in said
    assert "ValueError" in caplog.text and SECRET not in caplog.text


def test_an_answer_that_is_no_chat_completion_is_an_error(stand_in):
    stand_in("NoChat")
    assert read(post({"messages": user("a")}))["error"]["code"] == "unusable_model"


def test_a_folder_without_a_model_says_what_to_register(tmp_path, monkeypatch):
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="register the whole folder"):
        score.init()


# --- batches --------------------------------------------------------------------------------


def test_each_line_of_a_batch_gets_a_row_and_a_bad_one_changes_no_other(loaded, tmp_path):
    good = [{"messages": user(text), "max_tokens": 6} for text in ("one", "two", "three")]
    lines = [
        json.dumps(good[0]),
        "",
        "{",
        json.dumps(good[1] | {"n": 0}),
        json.dumps(good[1]),
        "  ",
        f'"{SECRET}"',
    ]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_text("\n".join(lines), encoding="utf-8")
    second.write_bytes(json.dumps(good[2]).encode() + b"\r\n\xff\r\n")
    table = score.run([str(first), str(second)])
    assert isinstance(table, pd.DataFrame)
    assert [tuple(row) for row in table[["file", "line", "status"]].to_numpy()] == [
        ("first.jsonl", 1, "ok"),
        ("first.jsonl", 3, "error"),
        ("first.jsonl", 4, "error"),
        ("first.jsonl", 5, "ok"),
        ("first.jsonl", 7, "error"),
        ("second.jsonl", 1, "ok"),
        ("second.jsonl", 2, "error"),
    ]
    answers = [contents(json.loads(text)) for text in table["answer"][table["status"] == "ok"]]
    assert answers == [contents(score.answer(request)) for request in good]
    assert table["answer"][2] == "n has to be a whole number from 1 to 8."
    assert SECRET not in " ".join(table["answer"])


def test_an_empty_batch_is_an_empty_table(loaded, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert list(score.run([str(tmp_path / "empty.jsonl")])) == ["file", "line", "status", "answer"]
