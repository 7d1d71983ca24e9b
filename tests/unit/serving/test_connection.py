"""A connection's limits on a server of its own: who is cut off, and who is not.

Run: python -m helpers test tests/unit/serving/test_connection.py
"""

import contextlib
import http.client
import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from serving.service.connection import make_protocol

BODY = b"x" * 20_000_000  # more than the system's buffers hold


@pytest.fixture
def address():
    """Serve a long answer, which a caller has a second to read; return the server's address."""
    app = Starlette(routes=[Route("/", lambda request: Response(BODY))])
    server = uvicorn.Server(
        uvicorn.Config(app, http=make_protocol(1), log_level="error", lifespan="off")
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()


def test_who_reads_slowly_may_ask_again_later(address):
    with contextlib.closing(http.client.HTTPConnection(*address)) as connection:
        for _ in range(2):
            connection.request("GET", "/")
            response = connection.getresponse()
            time.sleep(0.3)  # the answer is complete, and waits in the server to be read
            assert response.read() == BODY
            time.sleep(1.2)


def test_who_does_not_read_at_all_is_cut_off(address):
    with contextlib.closing(http.client.HTTPConnection(*address)) as connection:
        connection.request("GET", "/")
        response = connection.getresponse()
        time.sleep(2)
        with pytest.raises((http.client.IncompleteRead, ConnectionError)):
            response.read()
