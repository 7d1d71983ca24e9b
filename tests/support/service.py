"""Runs the service of ``serving/service`` in a test: in this process, on a port of its own."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import mlflow
import psutil
import transformers
from huggingface_hub import ModelCard

from serving.service.active_version import ModelAddress
from serving.service.app import Limits, Service
from serving.service.command_line import check_reach
from serving.service.http_server import Server, listen


class Running:
    """A server that runs: its address, its parts, and requests to it."""

    def __init__(self, server: Server, service: Service, token: str | None = None):
        self.server = server
        self.service = service
        self.address = server.address
        # httpx reads all certificates of the system for a client that verifies, which takes longer
        # than an answer.
        self.client = httpx.Client(
            base_url=server.address,
            timeout=60,
            trust_env=False,
            verify=False,
            headers={"authorization": f"Bearer {token}".encode()} if token else {},
        )

    @property
    def model(self):
        """Return the Python model that serves."""
        return self.service.active.current.model._python_model

    def ask(self, text: str, **fields) -> httpx.Response:
        """Ask for a chat completion."""
        return self.client.post("/v1/chat/completions", content=body(text, **fields))

    def readiness(self) -> dict:
        """Return what ``/ready`` says."""
        return self.client.get("/ready").json()

    def count(self, name: str, **labels) -> float:
        """Return a figure of ``/metrics``; 0 where there is none yet."""
        return self.service.metrics.registry.get_sample_value(name, labels) or 0

    def connect(self, sent: bytes = b"") -> socket.socket:
        """Return a connection on which this has been sent."""
        place = urlsplit(self.address)
        connection = socket.create_connection((place.hostname, place.port), timeout=60)
        connection.sendall(sent)
        return connection

    def requests(self) -> tuple[int, int]:
        """Return how many requests the model works on, and how many wait."""
        return self.service.queue.running, self.service.queue.waiting


def body(text: str, **fields) -> bytes:
    """Return the body of a request."""
    return json.dumps({"messages": [{"role": "user", "content": text}]} | fields).encode()


def raw(content: bytes, *headers: str, host: str = "127.0.0.1", length: bool = True) -> bytes:
    """Return a whole request as bytes."""
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {host}", *headers]
    lines += [f"Content-Length: {len(content)}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode() + content


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes the connection, or breaks it off."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            said += data
    return said


def events(response: httpx.Response) -> list[dict]:
    """Return the server-sent events of a stream that ended well."""
    *data, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]", response.text[-500:]
    return [json.loads(text) for text in data]


def wait_for(true: Callable[[], bool], what: str = "it", seconds: float = 60) -> None:
    """Wait until something is so. The time is only there so that a broken test ends."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"{what} did not come to be"
        time.sleep(0.005)


def wait_for_version(server: Running, version: str) -> None:
    """Wait until a version serves."""
    wait_for(lambda: server.readiness()["version"] == version, f"version {version}")


def handles() -> int:
    """Return how many descriptors this process has open."""
    process = psutil.Process()
    return process.num_fds() if psutil.POSIX else process.num_handles()


@contextlib.contextmanager
def running(
    uri: str,
    token: str | None = None,
    host: str = "127.0.0.1",
    name: str | None = None,
    traces: str | None = None,
    trace_texts: bool = False,
    caller_header: str | None = None,
    separates_addresses: bool = False,
    **limits,
) -> Iterator[Running]:
    """Serve a model while the block runs, and see that the server ends with it."""
    service = Service(
        ModelAddress(str(uri)),
        Limits(**limits),
        name,
        traces,
        trace_texts=trace_texts,
        caller_header=caller_header,
        separates_addresses=separates_addresses,
    )
    server = Server(service, listen(host, 0), token, check_reach(host, token, []))
    failures = []

    def run():
        try:
            server.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="server", daemon=True)
    thread.start()
    wait_for(lambda: service.active.current or not thread.is_alive(), "the server")
    if failures:
        raise failures[0]
    server_side = Running(server, service, token)
    try:
        yield server_side
    finally:
        server_side.client.close()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"
        assert not failures, failures


def save_pipeline(prepared, folder: Path, template: str | None = None, **model_config) -> Path:
    """Save track A's model as its page logs it; ``template`` in place of its tokenizer's own."""
    pipeline = transformers.pipeline(
        "text-generation", model=str(prepared.transformers_dir), device="cpu"
    )
    pipeline.tokenizer.chat_template = template or pipeline.tokenizer.chat_template
    mlflow.transformers.save_model(
        pipeline,
        folder,
        task="llm/v1/chat",
        model_card=ModelCard("A toy."),
        pip_requirements=["mlflow"],
        model_config=model_config,
    )
    return folder
