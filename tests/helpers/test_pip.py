"""What pip says when it fails is read in one place.

Run: python -m helpers test tests/helpers/test_pip.py
"""

import errno
import ssl
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from support import refuses
from support.kits import only_wheels
from support.loopback_hub import LoopbackHub, certificate

from helpers.models.pip import PipError, PipFailure, download_wheel, explain, read_failure, run_pip


@pytest.mark.parametrize(("output", "kind", "package"), [
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk-full", ""),
    ("WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError'\n"
     "ERROR: No matching distribution found for torch==2.13.0", "unreachable", "torch==2.13.0"),
    ("WARNING: Connection timed out while downloading.", "unreachable", ""),
    ("socket.gaierror: [Errno -2] Name or service not known", "unreachable", ""),
    ("[Errno -3] Temporary failure in name resolution", "unreachable", ""), ("Read timed out.", "unreachable", ""),
    ("SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]\nWARNING: Retrying", "certificate", ""),
    ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n    six from http://kit/six.whl:\n"
     "        Expected sha256 000", "changed", "six"),
    ("ERROR: Wheel 'six' located at /tmp/six.whl is invalid.", "changed", ""),
    ("ERROR: Could not find a version that satisfies the requirement six==9 (from versions: none)\n"
     "ERROR: No matching distribution found for six==9", "missing", "six==9"),
    ("The user requested (constraint) six==9\nERROR: ResolutionImpossible: for help", "conflict", "six==9"),
    ("ERROR: ResolutionImpossible: for help visit", "conflict", ""),
    ("error: metadata-generation-failed", "other", ""), ("", "other", "")])
def test_why_pip_failed(output, kind, package):
    failure = read_failure(output)
    assert (failure.kind, failure.package) == (kind, package)
    assert failure.line == (output.splitlines()[-1].strip() if output else "no output")


@pytest.mark.parametrize(("kind", "code"), [
    ("certificate", "pip-certificate"), ("changed", "pip-changed"), ("missing", "pip-unreachable"),
    ("unreachable", "pip-unreachable"), ("conflict", "pip-failed"), ("other", "pip-failed")])
def test_a_failure_is_told_in_two_sentences(kind, code):
    with refuses(code) as refusal:
        raise explain(PipFailure(kind, "six", "pip's last line"), "Downloading six")
    assert refusal.value.what.startswith("Downloading six failed: ")
    assert ("pip's last line" in refusal.value.what) == (code == "pip-failed")


def test_a_full_disk_stays_an_error_of_the_disk():
    error = explain(PipFailure("disk-full", "", ""), "Downloading six")
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC


def test_pip_returns_what_it_printed_or_raises():
    printed = []
    assert run_pip("--version", on_output=printed.append).startswith("pip ")
    assert "".join(printed).startswith("pip ")
    with pytest.raises(PipError) as error:
        run_pip("install", "--no-such-option")
    assert error.value.failure.kind == "other"


@pytest.fixture
def index(monkeypatch, tmp_path):
    """Let pip find packages in a folder and nowhere else, and return it."""
    for name, value in only_wheels(tmp_path / "index").items():
        if name.startswith("PIP_"):
            monkeypatch.setenv(name, value)
    return tmp_path / "index"


def get_words(folder):
    download_wheel("Downloading llm-words==1.0", "llm-words==1.0", folder)


def test_a_wheel_arrives_behind_a_bar(index, tmp_path, capsys):
    only_wheels(index, "llm_words-1.0-py3-none-any.whl")
    get_words(tmp_path / "got")
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["llm_words-1.0-py3-none-any.whl"]
    assert "Downloading llm-words==1.0: 100%" in capsys.readouterr().out


def test_no_index_is_an_error_that_says_what_to_check(index, tmp_path):
    with refuses("pip-unreachable") as refusal:
        get_words(tmp_path)
    assert "the package index has no answer" in refusal.value.what
    assert "HTTPS_PROXY" in refusal.value.fix


@pytest.mark.parametrize("page", ["<!DOCTYPE html><title>Welcome to Hotel WiFi</title>", ""])
def test_a_login_page_in_place_of_the_index_says_what_to_check(index, tmp_path, monkeypatch, page):
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Portal) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        with refuses("pip-unreachable") as refusal:
            get_words(tmp_path)
        server.shutdown()
    assert "something else answers in its place" in refusal.value.what


def test_an_index_with_an_expired_certificate_says_what_the_clock_says(index, tmp_path, monkeypatch):
    file = certificate(tmp_path, timedelta(days=-20), timedelta(days=-10))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    hub = LoopbackHub(tmp_path, lambda server: context.wrap_socket(server, server_side=True))
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in (("INDEX_URL", f"{hub.url}/simple"), ("CERT", file), ("RETRIES", "0")):
        monkeypatch.setenv(f"PIP_{name}", str(value))
    with refuses("pip-certificate") as refusal:
        get_words(tmp_path)
    hub.close()
    assert "this machine's clock says 2" in refusal.value.what
    assert "Set the clock if it is off" in refusal.value.fix
