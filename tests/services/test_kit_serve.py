"""An offline kit that is checked and served: what is named, what is given, and what is not.

Run: python -m helpers test tests/services/test_kit_serve.py
"""

import contextlib
import hashlib
import http.client
import json
import socket
import sys
import threading
from urllib.parse import quote, urlsplit

import pytest
from support import refuses
from support.kits import NOBODY, change_manifest, served
from support.user import make_checkout, user
from support.web_server import web_server

from course.kit.build import build
from course.kit.check import check
from course.kit.serve import make_server, serve
from helpers.files import sha256
from helpers.models.kit import read_kit
from serving.service import connection as service_connection


@pytest.fixture(scope="module")
def built(tmp_path_factory, tiny, index):
    """Return a small kit for one system."""
    folder = tmp_path_factory.mktemp("small") / "kit"
    build(folder, ["tiny-phi3"], ["linux"], ["3.13"])
    return folder


# --- checking ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("changed", "has been changed: its sha256 is another."),
        ("truncated", "has 100 bytes, and "),
        ("missing", "is missing"),
    ],
)
@pytest.mark.parametrize("over_http", [False, True])
def test_check_names_a_file_that_is_not_as_it_was_built(small, damage, says, over_http, capsys):
    name = "models/tiny-phi3/onnx/model.onnx.data"
    if damage == "changed":
        (small / name).write_bytes(bytes((small / name).stat().st_size))
    elif damage == "truncated":
        (small / name).write_bytes((small / name).read_bytes()[:100])
    else:
        (small / name).unlink()
    with web_server(small) if over_http else contextlib.nullcontext(str(small)) as address:
        assert check(address) == 1
    printed = capsys.readouterr().out
    assert f"FAIL  {name} {says}" in printed
    assert printed.count("FAIL") == 1
    assert (
        "Tell whoever serves it" if over_http else "Build it again: python -m helpers kit build"
    ) in printed


def test_check_names_a_file_that_is_the_users_and_does_not_fail(small, capsys):
    (small / "notes.txt").write_text("mine", encoding="utf-8")
    assert check(str(small)) == 0
    assert "unknown: notes.txt is no part of the kit" in capsys.readouterr().out


# --- serving ----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="a symbolic link takes rights there")
def test_a_link_that_leads_out_of_a_kit_is_named_and_not_served(small, tmp_path, capsys):
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (small / "link.txt").symlink_to(tmp_path / "secret")
    change_manifest(
        small,
        lambda manifest: manifest["files"].update(
            {"link.txt": {"size": 6, "sha256": sha256(tmp_path / "secret")}}
        ),
    )
    assert check(str(small)) == 1
    assert (
        "FAIL  link.txt lies outside of the kit's folder, behind a link." in capsys.readouterr().out
    )
    with refuses("kit-damaged") as refusal:
        serve(small, "127.0.0.1", 0)
    assert "link.txt lies outside" in refusal.value.what


@pytest.mark.skipif(sys.platform == "win32", reason="a symbolic link takes rights there")
def test_what_changes_while_a_kit_is_served_is_looked_at_for_each_request(small, tmp_path):
    course = small / "course.zip"
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    with served(small) as (url, _):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)

        def ask():
            connection.request("GET", "/course.zip")
            answer = connection.getresponse()
            answer.read()
            return answer.status

        found = [ask()]
        for change in (
            course.unlink,
            lambda: course.symlink_to(tmp_path / "secret"),
            course.unlink,
            course.mkdir,
        ):
            change()
            found.append(ask())
    assert found == [200, 404, 404, 404, 404]


def test_the_server_gives_what_the_manifest_lists_and_nothing_else(small, tmp_path):
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (small / "notes.txt").write_text("secret", encoding="utf-8")
    course = (small / "course.zip").read_bytes()
    with served(small) as (url, _):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)

        def ask(path, method="GET", **headers):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read()

        for path in (
            "/../secret",
            "/%2e%2e/secret",
            "/..%2fsecret",
            "/wheels/../../secret",
            "/%2e%2e%5csecret",
            f"/{quote(str(tmp_path))}/secret",
            f"//{quote(str(tmp_path))}/secret",
            "/notes.txt",
            "/.lock",
            "/wheels",
            "/models/",
            "/nothing",
            "/wheels/index.html/",
            "/%00",
            "/%ff",
        ):
            answer, body = ask(path)
            assert (path, answer.status) == (path, 404)
            assert b"secret" not in body
            assert str(tmp_path).encode() not in body
            assert b"Traceback" not in body
        assert ask("/")[1] == (small / "index.html").read_bytes()
        assert (
            ask("/wheels/")[1]
            == ask("/wheels/index.html")[1]
            == (small / "wheels" / "index.html").read_bytes()
        )
        assert json.loads(ask("/manifest.json")[1])["complete"] is True
        assert ask("/course.zip")[1] == course
        answer, body = ask("/course.zip", Range="bytes=100-")
        assert (answer.status, body) == (206, course[100:])
        answer, body = ask("/course.zip", "HEAD")
        assert (answer.status, int(answer.headers["content-length"]), body) == (
            200,
            len(course),
            b"",
        )
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask("/course.zip", method)[0].status == 405
        assert "uvicorn" not in str(answer.headers).lower()


def test_many_participants_read_at_once(small):
    name = "/models/tiny-phi3/transformers/model.safetensors"
    good = sha256(small / name[1:])
    found = []

    def read(url):
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("GET", name)
        found.append(hashlib.sha256(connection.getresponse().read()).hexdigest())

    with served(small) as (url, _):
        threads = [threading.Thread(target=read, args=[url]) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [good] * 40


def test_a_participant_who_sends_half_a_head_is_cut_off(small, monkeypatch):
    monkeypatch.setattr(service_connection, "HEADER_SECONDS", 0.3)
    server = make_server(read_kit(str(small)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        try:
            for begin in (b"", b"GET /course.z", b"GET /course.zip HTTP/1.1\r\nHost: a\r\n"):
                with socket.create_connection(listener.getsockname(), 30) as slow:
                    slow.sendall(begin)
                    assert slow.recv(1) == b""
        finally:
            server.should_exit = True
            thread.join()


def test_serve_says_when_its_port_is_taken_and_when_a_file_is_missing(small):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with refuses("port-taken") as refusal:
            serve(small, "127.0.0.1", port)
    assert refusal.value.what == f"Port {port} is taken."
    assert f"--port {port + 1 if port < 65535 else port - 1}" in refusal.value.fix
    for host, code in (("", "host-empty"), ("192.0.2.1", "host-refused")):
        with refuses(code):
            serve(small, host, 0)
    (small / "course.zip").unlink()
    with refuses("kit-damaged") as refusal:
        serve(small, "127.0.0.1", 0)
    assert "is not whole: course.zip is missing." in refusal.value.what
    assert "Build it again: python -m helpers kit build" in refusal.value.fix


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
    assert f"error: The kit {NOBODY} has no answer: " in result.stderr
    assert not (course / ".venv").exists()
