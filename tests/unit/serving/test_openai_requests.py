"""Each request of the chat model's tests again, over HTTP: the same answer, or a refusal in OpenAI's shape.

Run: python -m helpers test tests/unit/serving/test_openai_requests.py
"""

import ast
import inspect
import itertools
import json
import math
import re
from collections import Counter

import mlflow
import pytest
import schemathesis
import transformers
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from schemathesis import GenerationMode, checks
from support import ROOT
from support.chat import (
    AS_SHOWN,
    BAD,
    HABITS,
    SECRET,
    SENT_BACK,
    chat_model_for,
    contents,
    deltas,
    parts,
    schema,
    user,
)
from support.service import events, running

from serving import openai_server
from serving.chat_model import ChatRequest, Refusal, read_request
from tests.unit.serving.test_answers import ANYTHING, REQUESTS
from tests.unit.serving.test_contract import GOOD_CONTENTS, GOOD_FIELDS, GOOD_FORMATS, NULLS
from tests.unit.serving.test_schema import REFUSED, SCHEMAS, request

WITHOUT_ANSWER = ("invalid_value", "unknown_field", "invalid_json", "model_not_found", "context_length_exceeded",
                  "request_too_large")


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """Serve the chat model on the toy model, with 16 tokens where a request says nothing."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    mlflow.pyfunc.save_model(folder, **chat_model_for(tiny, max_tokens=16))
    with running(folder, max_body=1 << 23) as served:
        yield served


def save_pipeline(prepared, folder, template=None, **model_config):
    """Save track A's model as its page logs it; ``template`` in place of its tokenizer's own."""
    pipeline = transformers.pipeline("text-generation", model=str(prepared.transformers_dir), device="cpu")
    pipeline.tokenizer.chat_template = template or pipeline.tokenizer.chat_template
    mlflow.transformers.save_model(pipeline, folder, task="llm/v1/chat", model_card=ModelCard("A toy."),
                                   pip_requirements=["mlflow"], model_config={"max_new_tokens": 4} | model_config)
    return folder


@pytest.fixture(scope="module")
def flavor(tiny, tmp_path_factory):
    """Serve track A's model, which samples unless a request asks for no temperature."""
    folder = tmp_path_factory.mktemp("flavor") / "model"
    with running(save_pipeline(tiny, folder, do_sample=True, temperature=1.5), max_body=1 << 23) as served:
        yield served


def post(server, values):
    """Return what the server says to a request, and see that it says nothing which it should not."""
    body = json.dumps(values).encode() if not isinstance(values, bytes) else values
    answer = server.client.post("/v1/chat/completions", content=body)
    assert answer.status_code < 500, answer.text[:500]
    if answer.status_code != 200:
        said = answer.json()
        assert set(said) == {"error"} and set(said["error"]) == {"message", "type", "code", "param"}
        assert said["error"]["type"] == ("not_found_error" if answer.status_code == 404 else "invalid_request_error")
        assert said["error"]["code"] in WITHOUT_ANSWER
        assert len(answer.text) < 1000
        for word in (SECRET, str(ROOT), "Traceback", 'File "', "site-packages", "sqlite"):
            assert word not in answer.text
    return answer


def refused(server, values):
    """Return the error object of a refusal, and see that the same request for a stream gets the same one."""
    answer = post(server, values)
    assert 400 <= answer.status_code < 500, answer.text[:500]
    if "stream" not in values:
        assert post(server, values | {"stream": True}).json() == answer.json()
    return answer.json()["error"]


def said(choices):
    """Return what an answer says, and why it ends."""
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in choices]


# --- bad requests ---------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "says"), BAD, ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "")
def test_what_the_chat_model_refuses_is_refused_with_its_field_and_code(server, fields, says):
    values = fields if "messages" in fields or not fields else {"messages": user(SECRET)} | fields
    with pytest.raises(Refusal) as refusal:
        read_request(values)
    if fields.get("temperature") == math.inf:  # which JSON does not have
        assert refused(server, values)["code"] == "invalid_json"
        return
    # Outside a stream, stream_options is refused whatever it holds.
    error = refused(server, values) if "stream_options" not in fields else post(server, values | {"stream": True}).json(
        )["error"]
    assert (error["param"], error["code"]) == (refusal.value.field, refusal.value.code)
    # The service's own sentence is about the same field.
    assert error["message"] == says or error["message"].startswith(f"{refusal.value.field} has to be ")


def test_a_good_request_after_all_the_bad_ones_is_answered(server, chat):
    assert said(post(server, AS_SHOWN).json()["choices"]) == said(chat.predict(None, AS_SHOWN)[0]["choices"])


def in_json(values, **options):
    """Say whether a request can be written: numpy's numbers and arrays, a set or bytes are a table's matter."""
    try:
        return bool(json.dumps(values, **options))
    except (TypeError, RecursionError):
        return False


@pytest.mark.parametrize("name", [name for name, schema in REFUSED.items() if in_json(schema)])
def test_a_schema_that_cannot_be_kept_is_refused_by_name(server, name):
    error = refused(server, request(REFUSED[name]))
    # JSON has no NaN, and what lies very deep is read by nobody.
    assert (error["param"], error["code"]) == (
        (None, "invalid_json") if name in ("NaN", "infinity", "500 levels", "500 objects")
        else ("response_format.json_schema.schema", "invalid_value"))


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"5", b"null", b'"' + SECRET.encode() + b'"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000,
    b'{"a":' * 100_000, AS_SHOWN | {"verbosity": SECRET}, AS_SHOWN | {SECRET: 1}, AS_SHOWN | {"model": SECRET},
    AS_SHOWN | dict.fromkeys(map(str, range(100_000)), 1), AS_SHOWN | {"max_tokens": 10**400},
    AS_SHOWN | {"max_tokens": 2049}, AS_SHOWN | {"stream_options": {}}, AS_SHOWN | {"stream_options": SECRET},
    {"messages": user(f"{SECRET} " * 50_000)}, {"messages": user("x" * (1 << 23))},
], ids=lambda body: repr(body)[:40])
def test_what_no_table_of_the_model_has_is_refused(server, body):
    values = body if isinstance(body, bytes) else dict(body)
    answer = post(server, values)
    assert 400 <= answer.status_code < 500


# --- good requests --------------------------------------------------------------------------

SHORT = {"max_tokens": 6}
GOOD = [
    *(fields for fields, *_ in GOOD_FIELDS), *({"response_format": value} for value, *_ in GOOD_FORMATS),
    *({"messages": [{"role": role, "content": content}, *user("b")]} for content, _ in GOOD_CONTENTS
      for role in ("system", "developer", "user", "assistant")),
    *(values for values, _ in NULLS),
    *({name: value} for name, _, harmless, _ in HABITS for value in (*harmless, None) if name != "model"),
    {"messages": [*user("a"), SENT_BACK, *user("b")]}, {"messages": [user("a")[0] | {"name": "Bob"}]},
    {"messages": user("日本語 🙂\n")}, {"messages": [{"role": "system", "content": "a"}]},
    {"temperature": 1.5, "seed": 7, "n": 3}, {"temperature": 1.5, "seed": 7.0, "n": 2.0, "top_k": 5},
    {"frequency_penalty": 1, "presence_penalty": -1.5}, {"stop": ["a", "e"], "max_tokens": 16},
    *(request(SCHEMAS[name], seed=1, **SHORT) for name in ("enum", "json_object", "names", "a map")),
    schema({"const": {"ok": True}}, strict=True) | {"max_tokens": 40},
]


@pytest.mark.parametrize("fields", [fields for fields in GOOD if in_json(fields)], ids=lambda fields: repr(fields)[:60])
def test_what_the_chat_model_takes_gets_the_same_answer_over_http(server, chat, fields):
    values = AS_SHOWN | ({} if {"max_tokens", "max_completion_tokens"} & fields.keys() else SHORT) | fields
    # What a random seed would decide is not the same twice.
    values |= {"seed": 1} if values.get("temperature") and values.get("seed") is None else {}
    (direct,) = chat.predict(None, {name: value for name, value in values.items()
                                    if name not in ("stream", "stream_options")})
    options = {"stream_options": {"include_usage": True} | (values.pop("stream_options", None) or {})}
    streamed = events(post(server, values | options | {"stream": True}))
    values.pop("stream", None)
    whole = post(server, values).json()
    assert said(whole["choices"]) == said(direct["choices"])
    assert whole["usage"] == direct["usage"]
    pieces = deltas(streamed, len(direct["choices"]))
    assert ["".join(text for text, index in pieces if index == choice) for choice in range(len(direct["choices"]))] == \
        contents(direct)
    if options["stream_options"]["include_usage"]:
        assert streamed[-1]["usage"] == direct["usage"]


def ask_directly(chat, values):
    """Return the chat model's own answer, or None where it refuses the request."""
    try:
        if values.get("stream") is True:
            return list(chat.predict_stream(None, dict(values)))
        return chat.predict(None, dict(values))[0]
    except MlflowException:
        return None


def as_json(values):
    """Return a request as it is after its way in JSON, None where it is none."""
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError):
        return None


@given(REQUESTS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_request_within_the_contract_is_answered_as_by_the_model(server, chat, values):
    values.pop("model", None)  # its name is a server's matter
    values |= {"max_tokens": 4} if values.get("max_completion_tokens") is None else {}
    values |= {"seed": 3} if values.get("seed") is None else {}
    assert said(post(server, values).json()["choices"]) == said(chat.predict(None, dict(values))[0]["choices"])


@given(REQUESTS, st.dictionaries(st.sampled_from([*ChatRequest.model_fields, "verbosity"]), ANYTHING, min_size=1,
                                 max_size=2))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_service_refuses_what_the_model_refuses_and_nothing_else(server, chat, values, anything):
    values = as_json(values | anything)
    if values is None:
        return
    values.pop("model", None)
    values = {"max_tokens": 2} | values
    assert (post(server, values).status_code == 200) == (ask_directly(chat, values) is not None)


def test_a_seed_gives_the_same_answer_and_another_one_another(server):
    answers = [post(server, AS_SHOWN | {"temperature": 1.5, "seed": seed, "n": 2}).json()["choices"]
               for seed in (1, 1, 2)]
    assert said(answers[0]) == said(answers[1]) != said(answers[2])
    assert len(set(said(answers[0]))) == 2


# --- track A --------------------------------------------------------------------------------

TAKEN = [
    {}, {"max_tokens": 1}, {"max_tokens": 3.0}, {"max_completion_tokens": 2}, {"stop": "a"}, {"stop": ["a", "日本"]},
    {"stop": []}, {"temperature": 0}, {"temperature": 0.0}, {"temperature": 1}, {"temperature": 2}, {"n": 1},
    {"temperature": 0.7}, {"temperature": 1e-300}, {"top_p": 1}, {"response_format": {"type": "text"}}, {"tools": []},
    {"messages": user(parts("a", "b"))}, {"messages": [{"role": "developer", "content": "a"}, *user("b")]},
    {"messages": [*user("a"), SENT_BACK, *user("b")]}, {"messages": [user("a")[0] | {"name": "Bob"}]},
    {"messages": user("")}, {"messages": [*user("a"), *user("b")]}, {"messages": user("日本語 🙂\n")},
    {"user": "Bob", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True, "seed": None},
]
NOT_TAKEN = [
    ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"), ({"max_tokens": True}, "max_tokens"), ({"messages": []}, "messages"),
    ({"messages": user(None)}, "messages[0].content"), ({"messages": user([])}, "messages[0].content"),
    ({"messages": user([*parts(SECRET), {"type": "image_url", "image_url": {"url": SECRET}}])}, "messages[0].content"),
    ({"messages": user([*parts(SECRET), {"type": "text", "text": 5}])}, "messages[0].content"),
    ({"messages": user([*parts(SECRET), {"type": "text"}])}, "messages[0].content"), ({"n": 2}, "n"), ({"n": 9}, "n"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"), ({"seed": 1}, "seed"), ({"top_p": 0.5}, "top_p"),
    ({"stop": [""]}, "stop"), ({"stop": [5]}, "stop"), ({"stop": {SECRET: 1}}, "stop"),
    ({"messages": [{"role": SECRET, "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": SECRET}]}, "messages[0].role"),
    ({"messages": user(SECRET + "\ud83d")}, "messages[0].content"),
    ({"messages": user(SECRET + "\0")}, "messages[0].content"),
    ({"messages": user(parts(SECRET + "\ud83d"))}, "messages[0].content"),
    ({"messages": [user("a")[0] | {"name": SECRET + "\ud83d"}]}, "messages[0].name"),
    ({"messages": [user("a")[0] | {"name": 5}]}, "messages[0].name"),
    ({"messages": [user("a")[0] | {"tool_calls": [{SECRET: 1}]}]}, "messages[0]"),
    ({"messages": [user("a")[0] | {SECRET: SECRET}]}, "messages[0]"),
    ({"verbosity": SECRET}, None), ({SECRET: 1}, None), ({"temperature": "hot"}, "temperature"),
    ({"temperature": 2.1}, "temperature"), ({"temperature": [0.5]}, "temperature"),
    ({"response_format": {"type": "json_object"}}, "response_format"), (schema({}), "response_format"),
    ({"tools": [{SECRET: 1}]}, "tools"), ({"logprobs": True}, "logprobs"),
    ({"max_completion_tokens": 4, "max_tokens": 5}, "max_completion_tokens"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize("fields", TAKEN, ids=lambda fields: repr(fields)[:60])
def test_track_a_answers_what_its_pipeline_can(flavor, fields):
    values = AS_SHOWN | fields
    answer = post(flavor, values)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert type(choice["message"]["content"]) is str and choice["finish_reason"] in ("stop", "length")
    assert 1 <= answer.json()["usage"]["completion_tokens"] <= (fields.get("max_tokens") or 4)


def test_track_a_reads_parts_as_lines_and_a_developer_as_the_system(flavor):
    plain, sent = ({"messages": [{"role": role, "content": "Be brief."}, *user(content)], "temperature": 0}
                   for role, content in (("system", "a\nb"), ("developer", parts("a", "b"))))
    answers = [post(flavor, values).json() for values in (plain, sent, plain | {"messages": user("a\nb")})]
    assert [answer["usage"]["prompt_tokens"] for answer in answers[:2]] == [answers[0]["usage"]["prompt_tokens"]] * 2
    assert said(answers[0]["choices"]) == said(answers[1]["choices"])
    assert answers[2]["usage"]["prompt_tokens"] < answers[0]["usage"]["prompt_tokens"]


def test_a_stream_of_track_a_is_one_chunk(flavor):
    values = AS_SHOWN | {"temperature": 0}
    streamed = events(post(flavor, values | {"stream": True, "stream_options": {"include_usage": True}}))
    ((text, _),) = deltas(streamed)
    whole = post(flavor, values).json()
    assert text == contents(whole)[0]
    assert streamed[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize(("fields", "param"), NOT_TAKEN, ids=lambda value: repr(value)[:60])
def test_track_a_refuses_the_rest_by_name(flavor, fields, param):
    error = refused(flavor, AS_SHOWN | fields) if "stream_options" not in fields else post(
        flavor, AS_SHOWN | fields).json()["error"]
    assert error["param"] == param


@pytest.mark.parametrize(("fields", "says"), BAD, ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "")
def test_what_the_chat_model_refuses_breaks_no_other_model(flavor, fields, says):
    values = fields if "messages" in fields or not fields else {"messages": user(SECRET)} | fields
    post(flavor, {"max_tokens": 1} | values)  # sees that it is no fault of the service's, and quotes nothing


def test_track_a_refuses_more_than_its_context_as_the_chat_model_does(server, flavor):
    values = {"messages": user(f"{SECRET} " * 3_000), "max_tokens": 1}
    error = refused(flavor, values)
    assert error == refused(server, values)
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_a_template_that_takes_no_such_conversation_is_the_callers_matter(tiny, tmp_path):
    folder = save_pipeline(tiny, tmp_path / "model", "{% if messages[0]['role'] == 'system' %}{{ raise_exception('" +
                           SECRET + "') }}{% endif %}x")
    with running(folder) as served:
        assert post(served, AS_SHOWN).status_code == 200
        error = refused(served, {"messages": [{"role": "system", "content": SECRET}, *user("a")]})
        assert (error["param"], error["code"]) == ("messages", "invalid_value")


# --- the application's own description ------------------------------------------------------


@pytest.mark.parametrize(("mode", "rules"), [
    (GenerationMode.POSITIVE, []), (GenerationMode.NEGATIVE, [checks.negative_data_rejection])],
    ids=["as described", "otherwise"])
def test_requests_made_from_the_description_get_an_answer_or_a_refusal(server, mode, rules):
    description = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    rules = [checks.not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance,
             checks.content_type_conformance, *rules]
    statuses, answers = Counter(), server.count("slm_requests_total", outcome="ok")

    def ask(case):
        statuses[case.operation.path, case.call_and_validate(checks=rules).status_code] += 1

    operations = [found.ok() for found in description.get_all_operations()]
    assert {operation.path for operation in operations} == {"/v1/chat/completions", "/v1/models", "/health", "/ready",
                                                            "/metrics"}
    for operation in operations:
        if mode is GenerationMode.POSITIVE or operation.method == "post":  # the others take nothing that may be wrong
            examples = settings(max_examples=40 if operation.method == "post" else 1,
                                suppress_health_check=list(HealthCheck))
            examples(given(operation.as_strategy(generation_mode=mode))(ask))()
    answered = statuses["/v1/chat/completions", 200]
    assert server.count("slm_requests_total", outcome="ok") - answers == answered
    assert statuses["/v1/chat/completions", 400] > 5
    assert (answered > 2) == (mode is GenerationMode.POSITIVE)


def test_a_chat_models_own_name_is_taken_and_others_are_not(server):
    assert post(server, AS_SHOWN | {"model": "model"}).status_code == 200
    assert post(server, AS_SHOWN | {"model": "gpt-4.1"}).status_code == 404




# --- the document ---------------------------------------------------------------------------

DOCUMENT = ROOT / "docs" / "serving.md"


def rows(heading):
    """Return the cells of the rows of the first table below a heading of the document."""
    lines = iter(DOCUMENT.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].splitlines())
    table = itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(
        lambda line: not line.startswith("|"), lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table][2:]


def test_the_document_has_the_options_and_what_they_are_unless_given():
    told = {}
    for names, defaults, _ in rows("Options"):
        told |= zip(re.findall("`--([a-z-]+)`", names), re.findall("`(.+?)`(?:,|$)", defaults) or [""] * 2,
                    strict=False)
    options = vars(openai_server.read_options([]))
    assert {name.replace("-", "_") for name in told} == options.keys()
    defaults = {name: str(value) for name, value in options.items() if value not in (None, [], False)}
    assert {name: told[name.replace("_", "-")] for name in defaults} == defaults


def test_the_document_has_the_figures():
    figures = {f"{family.name}{'_total' if family.type == 'counter' else ''}"
               for family in openai_server.Figures().registry.collect() if not family.name.startswith("process_")}
    assert {name.strip("`").partition("{")[0] for name, _ in rows("Figures")} == figures


def test_the_document_has_every_error_of_the_service_and_the_model():
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(openai_server))) if isinstance(node, ast.Call)
             and getattr(node.func, "id", None) == "ServiceError"]
    raised = {(call.args[0].value, call.args[2].value) for call in calls
              if all(isinstance(argument, ast.Constant) for argument in (call.args[0], call.args[2]))}
    raised |= {(openai_server.STATUS.get(code, 400), code) for code in (
        "invalid_value", "unknown_field", "context_length_exceeded", "busy", "closed", "failed", "unusable_model")}
    told = {(int(status), code) for statuses, codes, _ in rows("Errors")
            for status in statuses.split(", ") for code in re.findall("`(.+?)`", codes)}
    assert raised - told == set()
    assert {code for _, code in told} == {code for _, code in raised}
