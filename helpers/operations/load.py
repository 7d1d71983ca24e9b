"""Sends chat requests from several clients at once, and records the result of each.

The clients run in another thread, so that a page can watch the server meanwhile.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx

CONNECTION_ERRORS = (
    "no connection",
    "broken off",
)  # outcomes without a whole answer


@dataclass(frozen=True)
class RequestResult:
    """The result of one request, as its client saw it.

    Attributes
    ----------
    began : float
        Seconds from the start of the load to the start of the request.
    seconds : float
        Seconds from the start of the request to the end of the answer.
    first_token_seconds : float or None
        Seconds to the first text of a stream.
    tokens : int
        The answer's tokens, from its usage.
    status : int
        The HTTP status; 0 if no answer began.
    outcome : str
        ``ok``, an error's code, ``no connection`` or ``broken off``.
    """

    began: float
    seconds: float
    first_token_seconds: float | None
    tokens: int
    status: int
    outcome: str


class Reply:
    """Reads an answer while it arrives. Until its end, its outcome is ``broken off``."""

    def __init__(self):
        self.first_token_seconds = None
        self.tokens = 0
        self.outcome = "broken off"

    def read_line(self, line: str, seconds: float) -> None:
        """Read a line of a stream that arrived ``seconds`` after the request."""
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            # An error came before it.
            self.outcome = "ok" if self.outcome == "broken off" else self.outcome
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            self.outcome = chunk["error"]["code"]
            return
        self.tokens = (chunk.get("usage") or {}).get("completion_tokens", self.tokens)
        if self.first_token_seconds is None and any(
            choice["delta"].get("content") for choice in chunk["choices"]
        ):
            self.first_token_seconds = seconds

    def read_whole(self, body: dict) -> None:
        """Read an answer that is not a stream, or an error."""
        self.outcome = body["error"]["code"] if "error" in body else "ok"
        self.tokens = (body.get("usage") or {}).get("completion_tokens", 0)


def start_load(
    address: str, requests: Iterable[dict], clients: int = 1, seconds: float = 60
) -> Future:
    """Start clients that each send the next request as soon as they have an answer. Return at once.

    Parameters
    ----------
    address : str
        The server's address, without ``/v1``.
    requests : iterable of dict
        Bodies of chat requests, shared by the clients. With ``"stream": True``, the answer is a
        stream.
    clients : int
    seconds : float
        After this time, no client starts another request.

    Returns
    -------
    concurrent.futures.Future
        Its ``result()`` waits for a list of RequestResult, in the order in which they ended.
    """
    pool = ThreadPoolExecutor(1)
    load = pool.submit(lambda: asyncio.run(_send(address, iter(requests), clients, seconds)))
    pool.shutdown(wait=False)  # the thread ends with the load
    return load


async def _send(
    address: str, requests: Iterator[dict], clients: int, seconds: float
) -> list[RequestResult]:
    rows = []
    # trust_env=False: a proxy would not find this machine's servers.
    async with httpx.AsyncClient(
        base_url=address, timeout=120, trust_env=False, limits=httpx.Limits(max_connections=clients)
    ) as http:
        start = time.perf_counter()

        async def work():
            while (
                time.perf_counter() - start < seconds and (body := next(requests, None)) is not None
            ):
                rows.append(await _ask(http, body, start))
                if rows[-1].outcome in CONNECTION_ERRORS or rows[-1].status == 503:
                    # The server may come back; asking at once would only fill the table.
                    await asyncio.sleep(0.2)

        await asyncio.gather(*(work() for _ in range(clients)))
    return rows


async def _ask(http, body, start):
    reply = Reply()
    status = 0
    began = time.perf_counter()
    if body.get("stream"):
        body = body | {"stream_options": {"include_usage": True}}
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            status = response.status_code
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                async for line in response.aiter_lines():
                    reply.read_line(line, time.perf_counter() - began)
            else:
                reply.read_whole(json.loads(await response.aread()))
    except httpx.ConnectError:
        reply.outcome = "no connection"
    except httpx.TransportError:
        reply.outcome = "broken off"
    return RequestResult(
        began - start,
        time.perf_counter() - began,
        reply.first_token_seconds,
        reply.tokens,
        status,
        reply.outcome,
    )


def count_outcomes(rows: list[RequestResult]) -> list[tuple]:
    """Return a row for each outcome: its name, its number of requests, their tokens, their median seconds."""
    found = {}
    for row in rows:
        found.setdefault(row.outcome, []).append(row)
    return [
        (
            outcome,
            len(same),
            sum(row.tokens for row in same),
            f"{statistics.median(row.seconds for row in same):.2f}",
        )
        for outcome, same in sorted(found.items())
    ]
