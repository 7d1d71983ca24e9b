"""The routes, and what is checked before a request is answered: host, token, size, form, model."""

import asyncio
import contextlib
import hashlib
import hmac
from dataclasses import dataclass

import mlflow
from fastapi import FastAPI, Request
from fastapi.responses import Response
from mlflow.entities import SpanType
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import ProgramError, ServiceError, first_line, to_service_error
from ..events import to_json
from ..request import ChatCompletionRequest, check_request, is_text, read_json
from .active_version import ActiveModel, LoadedVersion, ModelAddress
from .admission import AdmissionQueue
from .answer import Answer, to_response
from .metrics import Metrics
from .threads import in_thread

DISCARD_SECONDS = 1.0  # in which the body of a refused request is read and discarded
PATH_ERRORS = {
    404: ("not_found", "There is nothing at this path. GET /openapi.json lists what there is."),
    405: ("method_not_allowed", "This path takes another method. GET /openapi.json tells which."),
}
MOST_CONCURRENT = 64  # requests in a model that streams, unless the operator says otherwise


@dataclass(frozen=True)
class Limits:
    """The service's limits and times. Each is an option of the same name."""

    concurrent: int | None = None  # requests in the model at once
    waiting: int = 256  # requests that may wait to be admitted
    max_body: int = 1 << 20  # bytes of a request
    max_tokens: int = 2048  # tokens that a request may ask for
    timeout: float = 120.0  # seconds from a request's head to its answer's end
    drain: float = 30.0  # seconds that answers get to end after SIGTERM
    poll: float = 5.0  # seconds between two polls of the alias
    keep_alive: int = 75  # seconds until an idle connection is closed


class Service:
    """What all requests share.

    Parameters
    ----------
    address : ModelAddress
        Where the model is.
    limits : Limits
        How much callers may ask.
    name : str, optional
        The name that requests use for the model.
    traces : str, optional
        An MLflow experiment that gets a trace of each request.
    trace_texts : bool
        Whether traces hold the texts of requests and answers.
    caller_header : str, optional
        The request's header that names the caller. Callers of different names share no prompts in
        the model's cache.
    separates_addresses : bool
        Whether callers of different addresses share none if no ``caller_header`` is set. If one is
        set, requests without it are always kept apart by address.
    """

    def __init__(
        self,
        address: ModelAddress,
        limits: Limits,
        name: str | None = None,
        traces: str | None = None,
        trace_texts: bool = False,
        caller_header: str | None = None,
        separates_addresses: bool = False,
    ):
        self.limits = limits
        self.traces = traces
        self.trace_texts = trace_texts
        self.metrics = Metrics()
        self.active = ActiveModel(address, self.metrics, limits.timeout, name)
        self.queue = AdmissionQueue(self._most_concurrent, limits.waiting)
        self.is_closing = False
        self._caller_header = caller_header
        self._separates_addresses = separates_addresses
        self.metrics.running.set_function(lambda: self.queue.running)
        self.metrics.waiting.set_function(lambda: self.queue.waiting)

    def _most_concurrent(self):
        # A model without predict_stream may not be thread-safe, so it gets one request at a time.
        return self.limits.concurrent or (
            MOST_CONCURRENT if self.active.current.model.streams else 1
        )

    async def start(self) -> None:
        """Select the experiment for traces, and load the model.

        Raises
        ------
        ProgramError
            The model does not load, or no traces can be written.
        """
        if self.traces:
            try:
                await in_thread(mlflow.set_experiment, self.traces)
            except Exception as error:  # MLflow's, or its database's
                raise ProgramError(
                    f"No traces can be written to {self.traces}: {first_line(error)}.",
                    "Start the tracking server, or name another experiment: --traces.",
                ) from None
        await self.active.start()

    def start_span(self, version: LoadedVersion, values: dict) -> contextlib.AbstractContextManager:
        """Start a request's trace, if the service makes traces. The chat model adds its spans."""
        if not self.traces:
            return contextlib.nullcontext()
        attributes = {
            "model": self.active.name,
            "version": version.number,
            "messages": len(values["messages"]),
        }
        return mlflow.start_span("chat_completion", SpanType.CHAT_MODEL, attributes=attributes)

    def separate_callers(self, request: Request, values: dict) -> None:
        """Replace ``prompt_cache_key`` by a hash of the caller and that key.

        So callers never share cached prompts. Otherwise a caller could guess another's prompt, word
        by word, by how soon the answer comes.
        """
        if not (self._caller_header or self._separates_addresses):
            return
        own_key = values.get("prompt_cache_key", "")
        if not is_text(own_key):
            return  # the model refuses it
        caller = request.headers.get(self._caller_header) if self._caller_header else None
        caller = caller or (request.client.host if request.client else "unknown")
        key = hashlib.sha256(f"{caller}\n{own_key}".encode()).hexdigest()
        values["prompt_cache_key"] = key


class ErrorDetail(BaseModel):
    """OpenAI's fields for an error."""

    message: str
    type: str
    code: str
    param: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class CallerCheck:
    """Middleware that refuses a request by its head, before its body is read.

    Parameters
    ----------
    app
        The ASGI application behind it.
    token : str or None
        What callers have to send as their bearer token.
    hosts : set of str
        The host names under which the service may be called.
    """

    OPEN_PATHS = ("/health", "/ready")  # which probes ask without a token, under any host name

    def __init__(self, app, token: str | None, hosts: set[str]):
        self._app = app
        self._token = token
        self._hosts = hosts

    async def __call__(self, scope, receive, send):
        """Answer with an error, or hand the request on."""
        error = self._find_error(Request(scope)) if scope["type"] == "http" else None
        if error:
            await ClosingErrorResponse(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _find_error(self, request):
        if {"content-length", "transfer-encoding"} <= set(request.headers.keys()):
            # A proxy may believe the one and we the other, about where the next request begins.
            message = "Send either Content-Length or Transfer-Encoding, not both."
            return ServiceError(400, message, "invalid_request")
        if request.scope["path"] in self.OPEN_PATHS:
            return None
        # Not Starlette's TrustedHostMiddleware: it answers in plain text, with status 400.
        if host_name(request.headers.get("host", "")) not in self._hosts:
            message = (
                "This service does not answer for this host. Use the address that it printed when "
                "it started, or have its operator allow the host: --allowed-host."
            )
            return ServiceError(421, message, "unknown_host")
        if self._token is None:
            return None
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        is_same = hmac.compare_digest(token.encode("latin-1"), self._token.encode())
        if is_same and scheme.lower() == "bearer":
            return None
        return ServiceError(
            401, "This service wants a token: Authorization: Bearer TOKEN.", "invalid_api_key"
        )


def host_name(header: str) -> str:
    """Return the name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().rstrip(".")


class ClosingErrorResponse(Response):
    """An error that closes the connection, because the request's body has not been read.

    Before that, what the caller still sends is read for a moment. Otherwise the operating system
    would reset the connection, and the caller might lose the answer.
    """

    def __init__(self, error: ServiceError):
        headers = error.headers() | {"connection": "close"}
        super().__init__(to_json(error.body()), error.status, headers, "application/json")

    async def __call__(self, scope, receive, send):
        """Send the error, as an ASGI application does."""
        start = {"type": "http.response.start", "status": self.status_code}
        await send(start | {"headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def build_app(service: Service, token: str | None, hosts: set[str]) -> FastAPI:
    """Return the ASGI application. For the parameters see `Service` and `CallerCheck`."""
    app = FastAPI(
        title="A chat model", version="1", docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.add_middleware(CallerCheck, token=token, hosts=hosts)
    errors = {"default": {"model": ErrorBody, "description": "What went wrong"}}
    schema = ChatCompletionRequest.model_json_schema()
    schema["properties"]["messages"]["items"] = schema.pop("$defs")["ChatMessage"]
    request_body = {"required": True, "content": {"application/json": {"schema": schema}}}

    def with_text(media_type):
        return errors | {200: {"content": {media_type: {"schema": {"type": "string"}}}}}

    @app.post(
        "/v1/chat/completions",
        responses=with_text("text/event-stream"),
        openapi_extra={"requestBody": request_body},
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events."""
        deadline = asyncio.get_running_loop().time() + service.limits.timeout
        values = read_json(await read_body(service, request, deadline))
        check_request(values, service.limits.max_tokens)
        version = service.active.require_current()
        if values.get("model", service.active.name) not in service.active.names:
            raise _unknown_model("model")
        if "prompt_cache_key" in (version.model.fields or ()):
            service.separate_callers(request, values)
        return Answer(service, request, values, deadline)

    @app.get("/v1/models", responses=errors)
    async def models() -> dict:
        """List the one model that is served."""
        return {"object": "list", "data": [_describe_model(service)]}

    @app.get("/v1/models/{name:path}", responses=errors)
    async def model(name: str) -> dict:
        """Describe the model that is served."""
        if name not in service.active.names:
            raise _unknown_model(None)
        return _describe_model(service)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=errors)
    async def health() -> dict:
        """Return ok, or an error if the model has stopped working. A model that still loads is ok."""
        if service.active.current:
            service.active.require_current()
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=errors)
    async def ready() -> dict:
        """Say which version answers, and which one does not load."""
        version = service.active.require_current()
        return {
            "status": "ready",
            "model": service.active.name,
            "version": version.number,
            "failed_version": service.active.failed_version,
            "retry_seconds": service.active.retry_seconds,
        }

    @app.get("/metrics", responses=with_text("text/plain"), response_class=Response)
    async def metrics() -> Response:
        """Return the metrics, as Prometheus reads them."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(ServiceError)
    async def refuse(request: Request, error: ServiceError) -> Response:
        if request.url.path == "/v1/chat/completions":
            service.metrics.requests.labels(error.code).inc()
        # With these, the rest of the body has not come.
        is_unread = error.status in (408, 413)
        return ClosingErrorResponse(error) if is_unread else to_response(error)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        code, message = PATH_ERRORS.get(error.status_code, ("invalid_request", f"{error.detail}."))
        response = ClosingErrorResponse(ServiceError(error.status_code, message, code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return to_response(to_service_error(error))

    return app


def _unknown_model(field):
    message = "This service has no model of that name: /v1/models has the list."
    return ServiceError(404, message, "model_not_found", field)


def _describe_model(service):
    return {"id": service.active.name, "object": "model", "created": 0, "owned_by": "mlflow"}


async def read_body(service: Service, request: Request, deadline: float) -> bytes:
    """Return a request's body.

    Raises
    ------
    ServiceError
        The body is too long or comes too slowly, its caller has left, or the service closes.
    """
    limit = service.limits.max_body
    too_large = ServiceError(
        413, f"The body may have at most {limit} bytes. Send less.", "request_too_large"
    )
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body, is_complete = bytearray(), False
    try:
        async with asyncio.timeout_at(deadline):
            while not is_complete:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ServiceError(
                        400, "The body did not come to its end. Send it again.", "cancelled"
                    )
                body += message["body"]
                is_complete = not message["more_body"]
                if len(body) > limit:
                    raise too_large
                if service.is_closing and not is_complete:
                    raise ServiceError(503, "The service is closing. Try again later.", "closed")
    except TimeoutError:
        raise ServiceError(
            408, "The body took too long to come. Send it at once.", "timeout"
        ) from None
    return bytes(body)
