"""The server as a program: what a client meets while the model loads, and what signals do.

Run: python -m helpers test tests/services/test_service_program.py
"""

import contextlib
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
from support.served_program import ask, get
from support.service import raw, read_all, wait_for


def test_sigterm_finishes_what_began_and_takes_nothing_new(program, registry, tmp_path):
    registry("Streams")
    server = program("--port", 0, "--drain", 60, "--concurrent", 8)
    address = server.wait()
    with ThreadPoolExecutor(16) as pool:
        callers = [
            pool.submit(ask, address, "slow 100", stream=number % 2 == 0) for number in range(16)
        ]
        wait_for(lambda: "slm_requests_waiting 8.0" in get(f"{address}/metrics").text)
        server.process.send_signal(signal.SIGTERM)

        def refused():
            with contextlib.suppress(httpx.ConnectError):
                ask(address, "words 1")
                return False
            return True

        wait_for(refused, "the refusal of new requests")
        server.process.send_signal(signal.SIGTERM)  # whoever is impatient changes nothing
        for number, caller in enumerate(callers):
            answer = caller.result()
            assert answer.status_code == 200 and answer.text.count("word ") == 100
            assert number % 2 or answer.text.endswith("data: [DONE]\n\n")
    assert server.process.wait(60) == 0
    assert server.said().splitlines()[-1].startswith("Serving stand-in") and not list(
        tmp_path.glob("openai-server-*")
    )


def test_a_loading_server_tells_its_clients_to_come_again_and_ends_at_ctrl_c(program, registry):
    registry("Thinks")
    server = program("--port", 0)
    process = psutil.Process(server.process.pid)
    wait_for(
        lambda: any(place.status == "LISTEN" for place in process.net_connections()),
        "the listener",
        120,
    )
    port = next(place.laddr.port for place in process.net_connections() if place.status == "LISTEN")
    answer = ask(f"http://127.0.0.1:{port}", "words 1")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "loading"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(raw(b"{}", "Connection: close"))
        assert b" 400 " in read_all(connection)[:20]
    assert get(f"http://127.0.0.1:{port}/health").status_code == 200
    assert get(f"http://127.0.0.1:{port}/ready").status_code == 503
    wait_for(lambda: "thinking" in server.said(), "the model's first thought", 120)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 130
    assert "Traceback" not in server.said()
