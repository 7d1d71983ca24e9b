"""Bounds what uvicorn leaves without a limit: slow callers, and bodies in very many pieces.

uvicorn waits for ever for a caller that sends a byte now and then or does not read its answer, and
takes a body in any number of pieces.
"""

import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # for a request's headers, from its first byte or from the connection
# Each piece of a body costs about 13 microseconds, even if it has one byte.
MAX_PIECES = 20_000


def make_protocol(answer_seconds: float) -> type[H11Protocol]:
    """Return uvicorn's connection with limits, as its option ``http`` takes it.

    A connection is cut when a request's headers take longer than ``HEADER_SECONDS``, or when its
    body and its answer take longer than ``answer_seconds``.
    """

    class Protocol(H11Protocol):
        timer = None  # cuts the connection, unless it is idle
        is_draining = False  # the answer is complete, and the caller still reads it

        def connection_made(self, transport):
            super().connection_made(transport)
            # asyncio sets this option only where the listening socket names its protocol. Without
            # it, the end of each answer waits 40 ms for the caller to confirm the beginning.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._set_timer(HEADER_SECONDS)
            self._pieces = 0
            next_event = self.conn.next_event

            def count_pieces():
                event = next_event()
                if isinstance(event, h11.Request):
                    self._pieces = 0
                elif isinstance(event, h11.Data):
                    self._pieces += 1
                if self._pieces > MAX_PIECES:
                    raise h11.RemoteProtocolError("too many pieces")  # uvicorn answers 400
                return event

            self.conn.next_event = count_pieces

        def data_received(self, data):
            if self.timer is None or self.is_draining:
                self._set_timer(HEADER_SECONDS)
            super().data_received(data)

        def handle_events(self):
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self._set_timer(answer_seconds)

        def on_response_complete(self):
            self._set_timer(None)
            if self.transport.get_write_buffer_size():  # the caller has not read the end yet
                self.is_draining = True
                self.timer = self.loop.call_later(answer_seconds, self._cut_reader)
            super().on_response_complete()

        def connection_lost(self, exc):
            self._set_timer(None)
            super().connection_lost(exc)

        def _cut_reader(self):
            self._set_timer(None)
            if self.transport.get_write_buffer_size():
                self.transport.abort()

        def _set_timer(self, limit):
            self.is_draining = False
            if self.timer:
                self.timer.cancel()
            self.timer = self.loop.call_later(limit, self.transport.abort) if limit else None

    return Protocol
