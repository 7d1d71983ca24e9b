"""A model of the Hub is fetched by processes of their own, as a user has it: interrupted, ended, without a network.

They are stopped before the libraries that read a model are imported, which takes seconds.

Run: python -m helpers test tests/services/test_hub.py
"""

import shutil
import subprocess
import sys
import time

import psutil
import pytest
from huggingface_hub import constants
from support import ROOT, interrupt, refuses
from support.in_process import download_here
from support.loopback_hub import LoopbackHub
from support.phi3_layout import CPU, ONNX

from helpers import prepare_model
from helpers.models.prepare import cache_state

COMMAND = [
    sys.executable,
    "-m",
    "helpers",
    "prepare",
    "--model",
    "phi-3-mini-4k",
    "--track",
    "onnx",
]
TOKENIZER = "tokenizer.json"


@pytest.fixture
def hub(phi3, cache, monkeypatch):
    """Return a Hub that the children of this process ask."""
    hub = LoopbackHub(phi3)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.close()


def test_no_hub_is_an_error_that_says_what_to_check(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with refuses("hub-no-answer") as refusal:
        prepare_model("phi-3-mini-4k")
    assert "http://127.0.0.1:9, does not answer" in refusal.value.what
    assert "HTTPS_PROXY" in refusal.value.fix


def test_a_proxy_that_answers_html_is_seen(hub, monkeypatch):
    hub.forever = {"*": "html"}
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with refuses("hub-other-answer") as refusal:
        prepare_model("phi-3-mini-4k")
    assert "http://hub.example" in refusal.value.what
    assert hub.asked  # the proxy was asked


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_in_the_middle_of_a_download_keeps_what_arrived(phi3, tmp_path, cache, monkeypatch):
    hub = LoopbackHub(shutil.copytree(phi3, tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    block = constants.DOWNLOAD_CHUNK_SIZE  # huggingface_hub writes blocks of this size
    (hub.root / ONNX / CPU / "words.json").write_bytes(b"{" + b" " * 3 * block + b"}")
    hub.faults = {"words.json": [("hold", 2 * block + 1)]}
    interrupt(
        COMMAND,
        lambda: any(path.stat().st_size == 2 * block for path in cache.rglob("words.json.*")),
    )
    assert cache_state("phi-3-mini-4k") == "not prepared"
    hub.asked.clear()
    download_here(monkeypatch, hub.url)
    hub.says = {ONNX: {"sizes": {f"{CPU}/model.onnx.data": 10**13}}}
    with refuses("memory-short"):  # when the small files are here
        prepare_model("phi-3-mini-4k", "onnx")
    ranges = [asked for _, path, asked in hub.asked if path.endswith("words.json")]
    assert ranges == [f"bytes={2 * block}-"]
    hub.close()


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_download_ends_with_the_process_that_wants_it(hub):
    hub.faults = {TOKENIZER: [("hold", 10_000)]}
    process = subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not hub.sent[f"{ONNX}/{CPU}/{TOKENIZER}"]:
        assert process.poll() is None
        time.sleep(0.02)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    # Raises an error where it goes on: without an answer, the client gives up after ten seconds.
    child.wait(timeout=6)
