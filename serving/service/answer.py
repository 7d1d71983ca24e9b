"""Answers one request: it waits to be admitted, a thread asks the model, and the chunks go out.

The status of a stream is sent with its first chunk, so that a refusal still gets a status of its
own. A caller that leaves ends the model's work, where the model streams.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator

from fastapi import Request
from fastapi.responses import Response
from mlflow.tracing.constant import SpanAttributeKey

from ..errors import ServiceError, to_service_error
from ..events import LAST_EVENT, STREAM_HEADERS, to_event, to_events, to_json
from ..served_model import join_chunks


class ClientLeftError(Exception):
    """The caller has closed the connection."""


@contextlib.asynccontextmanager
async def ends_with_client(request: Request) -> AsyncIterator[None]:
    """Raise ClientLeftError inside the block as soon as the caller closes the connection."""
    task = asyncio.current_task()

    async def cancel_when_client_leaves():
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(cancel_when_client_leaves())
    try:
        yield
    except asyncio.CancelledError:
        if watcher.done() and not watcher.cancelled():
            task.uncancel()
            raise ClientLeftError from None
        raise
    finally:
        watcher.cancel()


class Answer(Response):
    """The response to one request.

    Parameters
    ----------
    service : Service
        What all requests share.
    request : Request
        The HTTP request, whose body has been read.
    values : dict
        The body's fields, checked.
    deadline : float
        When the answer has to be complete, on the event loop's clock.
    """

    background = None  # FastAPI reads this attribute of a Response

    def __init__(self, service, request: Request, values: dict, deadline: float):
        self._service = service
        self._request = request
        self._values = values
        self._deadline = deadline
        self._is_stream = bool(values.get("stream"))
        self._arrived = time.perf_counter()
        self._ended = threading.Event()
        self._status_sent = False
        self._counted = False
        self._first_token_seconds = None
        self._usage = None
        self._finish_reason = None
        self._texts = []

    async def __call__(self, scope, receive, send):
        """Answer, as an ASGI application does."""
        try:
            async with ends_with_client(self._request), asyncio.timeout_at(self._deadline):
                try:
                    await self._answer(scope, receive, send)
                finally:
                    self._ended.set()
        except ClientLeftError:
            self._count("cancelled")
        except BaseException as error:
            error = self._to_service_error(error)
            self._count(error.code)
            await self._send_error(error, scope, receive, send)

    def _to_service_error(self, error):
        if isinstance(error, TimeoutError):
            seconds = self._service.limits.timeout
            return ServiceError(
                504,
                f"The answer took longer than {seconds:g} seconds. Ask for less: max_tokens.",
                "timeout",
            )
        if isinstance(error, asyncio.CancelledError):  # uvicorn's, when the time to drain is over
            return ServiceError(503, "The service is closing. Try again later.", "closed")
        return to_service_error(error)

    async def _answer(self, scope, receive, send):
        queue, active = self._service.queue, self._service.active
        await queue.acquire()
        began = time.perf_counter()
        version = active.acquire()  # only now: it may have changed while this request waited
        loop = asyncio.get_running_loop()
        parts = asyncio.Queue()

        def put(part):
            if not isinstance(part, bytes):  # the thread has ended, and the model is free again
                queue.release(time.perf_counter() - began)
                active.release(version)
            parts.put_nowait(part)

        def put_from_thread(part):
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(put, part)

        try:
            # One thread makes MLflow's iterator and reads it to its end: it can't change threads.
            arguments = (version, put_from_thread)
            threading.Thread(target=self._ask, args=arguments, daemon=True).start()
        except RuntimeError as error:  # the system gives no more threads
            put(to_service_error(error))
        whole = b""
        while isinstance(part := await parts.get(), bytes):
            if self._is_stream:
                await self._send_events(send, part)
            else:
                whole = part
        if part:
            raise part
        self._count("ok")
        if self._is_stream:
            await self._send_events(send, LAST_EVENT, is_last=True)
        else:
            self._status_sent = True
            await Response(whole, media_type="application/json")(scope, receive, send)

    async def _send_events(self, send, events, is_last=False):
        if not self._status_sent:
            self._status_sent = True
            headers = [(name.encode(), value.encode()) for name, value in STREAM_HEADERS.items()]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": events, "more_body": not is_last})

    async def _send_error(self, error, scope, receive, send):
        if not self._status_sent:
            await to_response(error)(scope, receive, send)
        elif self._is_stream:
            await self._send_events(send, to_event(error.body()), is_last=True)

    def _ask(self, version, put):
        """Ask the model, on a thread: put each part of the answer, then a ServiceError or None."""
        try:
            with self._service.start_span(version, self._values) as span:
                # No exception leaves this block: MLflow would write its text into the trace, and
                # the text may quote the request.
                error = self._put_parts(version, put)
                if span:
                    self._describe(span, error)
        except Exception as failure:  # tracing's own
            error = to_service_error(failure)
        put(error)

    def _put_parts(self, version, put):
        """Put each part of the answer. Return the ServiceError that ended it, if any."""
        name = self._service.active.name
        names = {"model": name, "system_fingerprint": f"{name}/{version.number}"}
        try:
            request = version.model.adapt(self._values)
            with contextlib.closing(version.model.chunks(request, self._is_stream)) as chunks:
                chunks = (chunk | names for chunk in self._note(chunks))
                if not self._is_stream:
                    put(to_json(join_chunks(chunks)))
                    return None
                for event in to_events(chunks, self._values):
                    put(event)
        except BaseException as error:  # whatever it is, the caller waits for it
            return to_service_error(error)
        return None

    def _note(self, chunks):
        """Yield the model's chunks until the answer has ended, and note what the metrics need."""
        for chunk in chunks:
            if self._ended.is_set():
                return
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    if self._first_token_seconds is None:
                        self._first_token_seconds = time.perf_counter() - self._arrived
                    if self._service.trace_texts:
                        self._texts.append(text)
                self._finish_reason = choice["finish_reason"] or self._finish_reason
            self._usage = chunk.get("usage") or self._usage
            yield chunk

    def _describe(self, span, error):
        """Add sizes and times to a trace, and texts only where the operator asked for them."""
        outcome = "cancelled" if self._ended.is_set() else "ok"
        span.set_attribute("outcome", error.code if error else outcome)
        if error:
            span.set_status("ERROR")
        if self._first_token_seconds is not None:
            span.set_attribute("first_token_seconds", self._first_token_seconds)
            span.set_attribute("finish_reason", self._finish_reason)
        if self._usage:
            tokens = {
                "input_tokens": self._usage["prompt_tokens"],
                "output_tokens": self._usage["completion_tokens"],
                "total_tokens": self._usage["total_tokens"],
            }
            span.set_attribute(SpanAttributeKey.CHAT_USAGE, tokens)
        if self._service.trace_texts:
            span.set_inputs(self._values)
            span.set_outputs("".join(self._texts))

    def _count(self, outcome):
        """Count the request, once, before its last byte: a caller finds it in the metrics."""
        if self._counted:
            return
        self._counted = True
        metrics = self._service.metrics
        metrics.requests.labels(outcome).inc()
        if outcome == "ok":
            metrics.duration.observe(time.perf_counter() - self._arrived)
        if self._first_token_seconds is not None:
            metrics.first_token.observe(self._first_token_seconds)
        if self._usage:
            metrics.prompt_tokens.inc(self._usage["prompt_tokens"])
            metrics.completion_tokens.inc(self._usage["completion_tokens"])
            metrics.answer_tokens.observe(self._usage["completion_tokens"])


def to_response(error: ServiceError) -> Response:
    """Return an error as an HTTP response."""
    return Response(
        to_json(error.body()), error.status, error.headers(), media_type="application/json"
    )
