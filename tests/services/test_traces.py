"""What the operations page sends of a call to its store and to a collector: sizes and times, and no text.

Run: python -m helpers test tests/services/test_traces.py
"""

import os
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import mlflow
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from support import find_cell
from support.chat import SECRET

REQUEST = {"messages": [{"role": "user", "content": f"Tell me about {SECRET}."}], "max_tokens": 4}


@pytest.fixture
def collector(monkeypatch):
    """Return the bodies that a collector on this machine was sent, as they came."""
    bodies = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever).start()
        for name, value in {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://127.0.0.1:{server.server_port}/v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT": "true",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        mlflow.tracing.reset()
        yield bodies
        server.shutdown()
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    mlflow.tracing.reset()


class Echo:
    """A model whose error quotes what it was asked."""

    def predict(self, request):
        raise ValueError(f"no answer to {request}")


def ask_on_the_page(model, store, **options):
    """Ask as the page does, on a store of its own; return the answer and the trace."""
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("traces")  # one of another test's store may be set
    names = {"mlflow": mlflow, "chat": model, "name": "slm-onnx", "version": "3"}
    exec(find_cell("Operations", "def ask(request, keep_texts"), names)
    completion, trace_id = names["ask"](REQUEST, **options)
    return completion, mlflow.get_trace(trace_id, flush=True)


def spans_in(bodies):
    """Return the names of all spans that came, once there are any."""
    for _ in range(200):
        if bodies:
            break
        threading.Event().wait(0.05)
    sent = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    return [
        span.name
        for request in sent
        for of in request.resource_spans
        for by in of.scope_spans
        for span in by.spans
    ]


def everything(store, bodies):
    """Return all that the store holds and all that the collector was sent, as text."""
    with sqlite3.connect(store.removeprefix("sqlite:///")) as connection:
        kept = "\n".join(connection.iterdump())
    return kept + "".join(body.decode("utf-8", "replace") for body in bodies)


def test_a_call_leaves_sizes_and_times_and_no_text(chat, store, collector):
    model = SimpleNamespace(predict=lambda request: chat.predict(None, request))
    completion, trace = ask_on_the_page(model, store)
    assert {"chat", "prefill", "decode"} <= set(spans_in(collector))
    assert trace.info.token_usage["output_tokens"] == completion["usage"]["completion_tokens"]
    assert trace.data.spans[0].attributes["model"] == "slm-onnx/3"
    told = everything(store, collector)
    assert trace.info.trace_id in told  # it is the right place to look
    assert SECRET not in told
    assert completion["choices"][0]["message"]["content"] not in told


def test_an_error_leaves_its_kind_and_not_its_sentence(store, collector):
    completion, trace = ask_on_the_page(Echo(), store)
    assert spans_in(collector) == ["chat"]
    assert completion is None
    assert (trace.info.state.value, trace.data.spans[0].attributes["error"]) == (
        "ERROR",
        "ValueError",
    )
    assert SECRET not in everything(store, collector)


def test_texts_are_there_where_they_were_asked_for(chat, store, collector):
    model = SimpleNamespace(predict=lambda request: chat.predict(None, request))
    ask_on_the_page(model, store, keep_texts=True)
    assert spans_in(collector)
    assert SECRET in everything(store, collector[:0])
    assert SECRET in everything(store, collector).replace(everything(store, []), "")
