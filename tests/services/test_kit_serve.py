"""An offline kit that is checked and served.

Run: python -m helpers test tests/services/test_kit_serve.py
"""

import contextlib
import hashlib
import http.client
import socket
import subprocess
import sys
import threading
from functools import partial
from urllib.parse import quote, urlsplit

import pytest
from support import refuses
from support.kits import NOBODY, served
from support.user import make_checkout, user
from support.web_server import web_server

from course.kit.build import build
from course.kit.serve import KitHandler, KitServer, check, serve
from helpers.files import sha256
from helpers.models.kit import SUMS, read_kit


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, index):
    """Return a small kit for one system."""
    folder = tmp_path_factory.mktemp("small") / "kit"
    build(folder, ["tiny-phi3"], ["linux"], ["3.13"])
    return folder


@pytest.mark.parametrize("over_http", [False, True])
def test_check_names_a_file_that_is_not_as_it_was_built(small, over_http, capsys):
    name = "models/tiny-phi3/onnx/model.onnx.data"
    (small / "notes.txt").write_text("mine", encoding="utf-8")
    assert check(str(small)) == 0
    assert "are as they were built." in capsys.readouterr().out
    (small / name).write_bytes(bytes((small / name).stat().st_size))
    with web_server(small) if over_http else contextlib.nullcontext(str(small)) as address:
        assert check(address) == 1
    printed = capsys.readouterr().out
    assert f"FAIL  {name} is not as it was built." in printed
    assert printed.count("FAIL") == 1
    assert ("Tell the person who serves it" if over_http else "Build it again") in printed


def test_the_server_gives_the_files_of_the_folder_and_none_outside(small, tmp_path):
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    with served(small) as (url, _):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)

        def ask(path, method="GET"):
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()

        for path in (
            "/../secret",
            "/%2e%2e/secret",
            "/..%2fsecret",
            "/wheels/../../secret",
            "/%2e%2e%5csecret",
            f"/{quote(str(tmp_path))}/secret",
            f"//{quote(str(tmp_path))}/secret",
            "/nothing",
        ):
            status, body = ask(path)
            assert (path, status) == (path, 404)
            assert b"secret" not in body.replace(b"/secret", b"")
            assert str(tmp_path).encode() not in body
        assert ask("/") == (200, (small / "index.html").read_bytes())
        assert ask("/wheels/") == (200, (small / "wheels" / "index.html").read_bytes())
        assert ask(f"/{SUMS}") == (200, (small / SUMS).read_bytes())
        assert ask("/course.zip", "POST")[0] == 501


@pytest.mark.parametrize("own", [True, False], ids=["kit serve", "http.server"])
def test_forty_participants_read_at_once(small, own):
    name = "/models/tiny-phi3/transformers/model.safetensors"
    good = sha256(small / name[1:])
    found = []

    def read(url):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("GET", name)
        found.append(hashlib.sha256(connection.getresponse().read()).hexdigest())

    with served(small) if own else plain_server(small) as (url, _):
        threads = [threading.Thread(target=read, args=[url]) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read_kit(url).models() == ["tiny-phi3"]
    assert found == [good] * 40


@contextlib.contextmanager
def plain_server(folder):
    """Serve a folder by Python's own command."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    command += ["--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while True:
                assert process.poll() is None
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
            yield f"http://127.0.0.1:{port}", []
        finally:
            process.terminate()


def test_a_participant_who_sends_half_a_head_is_cut_off(small, monkeypatch):
    assert KitHandler.timeout <= 60  # without one, half a head holds a thread for ever
    monkeypatch.setattr(KitHandler, "timeout", 0.3)
    with KitServer(("127.0.0.1", 0), partial(KitHandler, directory=str(small))) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        for begin in (b"", b"GET /course.z", b"GET /course.zip HTTP/1.1\r\nHost: a\r\n"):
            with socket.create_connection(server.server_address, 30) as slow:
                slow.sendall(begin)
                while slow.recv(4096):
                    pass
        server.shutdown()


def test_serve_says_when_its_address_cannot_be_had_and_when_there_is_no_kit(small, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with refuses("port-taken") as refusal:
            serve(small, "127.0.0.1", port)
    assert refusal.value.what == f"Port {port} is taken."
    assert f"--port {port + 1 if port < 65535 else port - 1}" in refusal.value.fix
    with refuses("host-refused"):
        serve(small, "192.0.2.1", 0)
    with refuses("kit-absent"):
        serve(tmp_path, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("127.0.0.1", "--host 0.0.0.0"),
        ("0.0.0.0", "Participants open that address."),
    ],
)
def test_serve_tells_how_to_reach_the_room_and_what_participants_type(small, host, says):
    with served(small, "--host", host) as (_, lines):
        assert "Ctrl-C ends it" in lines[0]
        assert says in lines[-1]
        assert any(line.startswith("  http://") for line in lines)
        assert not any("http://0.0.0.0" in line for line in lines)


def test_a_kit_that_has_no_answer_is_named_before_anything_is_set_up(tmp_path):
    course = make_checkout(tmp_path / "course")
    result = user(course, "setup", COURSE_KIT=NOBODY)
    assert result.returncode == 1
    assert f"error: The kit {NOBODY} does not answer: " in result.stderr
    assert not (course / ".venv").exists()
