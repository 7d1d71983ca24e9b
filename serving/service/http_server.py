"""Runs the application in uvicorn, with limits, and errors in JSON where uvicorn answers in text."""

import asyncio
import contextlib
import errno
import math
import socket

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ProgramError, ServiceError
from .answer import to_response
from .app import Service, build_app
from .connection import make_protocol
from .threads import in_thread

HEADER_BYTES = 1 << 16


def make_json_protocol(answer_seconds: float) -> type[H11Protocol]:
    """Return `make_protocol`'s connection, with refusals in JSON. Half a body is refused at shutdown."""

    class Protocol(make_protocol(answer_seconds)):
        def shutdown(self):
            super().shutdown()
            if self.cycle:
                self.cycle.message_event.set()  # wakes `read_body`, which then sees the closing

        def send_400_response(self, msg):
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.abort()  # the answer has begun
                return
            response = to_response(ServiceError(400, msg, "invalid_request"))
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers),
                h11.Data(data=response.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
            self.transport.close()

    return Protocol


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises
    ------
    ProgramError
        The port is taken, or the host is no address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ProgramError(
                f"Port {port} is taken.", f"Choose another one: --port {port + 1}."
            ) from None
        raise ProgramError(
            f"Nothing can listen at {host}, port {port}: {error}.",
            "Choose another --host or --port.",
        ) from None


class Server(uvicorn.Server):
    """A uvicorn server that listens, loads its model, and prints one line when it is ready.

    Parameters
    ----------
    service : Service
        What it serves.
    listener : socket.socket
        What `listen` returned.
    token, hosts
        See `app.CallerCheck`.

    Attributes
    ----------
    address : str
        Its URL, without a path.
    """

    def __init__(
        self, service: Service, listener: socket.socket, token: str | None, hosts: set[str]
    ):
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                build_app(service, token, hosts),
                # The answer's own limit comes first, with an error that the caller can read.
                http=make_json_protocol(limits.timeout + 5),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=limits.keep_alive,
                timeout_graceful_shutdown=math.ceil(limits.drain),
            )
        )
        self._service = service
        self._listener = listener
        self._failure = None
        host, port, *_ = listener.getsockname()
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> None:
        """Serve until a signal comes.

        Raises
        ------
        ProgramError
            The model did not load, or ended by an error.
        """
        super().run([self._listener])
        if self._failure:
            raise self._failure

    async def main_loop(self):
        """Load the model, and run until a signal comes."""
        model_task = asyncio.create_task(self._run_model())
        try:
            await super().main_loop()
        finally:
            model_task.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests end that the model has, for a bounded time, and close the model."""
        self._service.is_closing = True
        await super().shutdown(sockets)
        if version := self._service.active.current:
            with contextlib.suppress(TimeoutError):  # the program ends, even if the model does not
                await asyncio.wait_for(in_thread(version.close), 5)

    async def _run_model(self):
        active = self._service.active
        try:
            await self._service.start()
            ready = f"Serving {active.name}, version {active.current.number}, at {self.address}/v1"
            print(ready, flush=True)
            await active.watch(self._service.limits.poll)
        except Exception as error:
            self._failure = error
            self.should_exit = True
