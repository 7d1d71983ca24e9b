"""Repositories of the Hub as people publish them: real weights, a page on them, and a table of kinds of quantization.

Run: python -m helpers test tests/nightly/test_hub.py
"""

import os
import ssl
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import mlflow
import pytest
import transformers
from support import ROOT, refuses
from support.chat import load_chat
from support.loopback_hub import LoopbackHub, certificate
from support.phi3_layout import PHI4_ONNX, PHI4_TORCH, TORCH, write_phi3, write_phi4

from helpers import prepare_model
from helpers.models.prepare import cache_state
from serving.chat import ChatRequest, PromptEncoder

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Return a folder with the repositories of Phi-3 and Phi-4-mini, with weights that can be loaded."""
    root = tmp_path_factory.mktemp("real hub")
    write_phi3(root, real=True)
    write_phi4(root, real=True)
    return root


@pytest.fixture
def serve(monkeypatch, cache):
    """Return a function that starts a Hub on a folder, for this process and its children."""
    hubs = []

    def start(root, wrap=None):
        hubs.append(LoopbackHub(root, wrap))
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].url)
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


def test_the_wrapper_s_page_needs_no_change_for_phi_4_mini(serve, real, python, store):
    hub = serve(real)
    result = python(
        "-m",
        "helpers",
        "notebook",
        "CustomPythonWrapper",
        "-p",
        "model",
        "phi-4-mini",
        "-p",
        "tracking_uri",
        store,
        network=False,
        HF_ENDPOINT=hub.url,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    mlflow.set_tracking_uri(store)
    (run,) = mlflow.search_runs(experiment_names=["CustomPythonWrapper"], output_format="list")
    assert (run.data.params["model"], run.data.params["source"]) == (
        "phi-4-mini",
        f"{PHI4_ONNX}@{hub.commit(PHI4_ONNX)}",
    )
    assert {version.name for version in mlflow.MlflowClient().search_model_versions()} == {
        "slm-onnx-prompt"
    }
    prepared = prepare_model("phi-4-mini", "transformers")
    assert prepared.sources["transformers"] == f"{PHI4_TORCH}@{hub.commit(PHI4_TORCH)}"
    pipeline = transformers.pipeline(
        prepared.entry.task, model=str(prepared.transformers_dir), trust_remote_code=False
    )
    conversation = pipeline([{"role": "user", "content": "Hi"}], max_new_tokens=5)[0][
        "generated_text"
    ]
    assert conversation[-1]["role"] == "assistant"


MESSAGES = [
    [("user", "What is the capital of Spain?")],
    [("system", "Be brief."), ("user", "  Hi   there\n\n")],
    [("user", "é 漢字 123 ")],
    [("user", "\nfirst a line")],
    [("user", "a"), ("assistant", " b c"), ("user", "d")],
]


@pytest.mark.parametrize(
    ("name", "markup"),
    [
        ("phi-3-mini-4k", "<|end|>\n<|system|> <s>"),
        ("phi-4-mini", "<|end|><|system|><|tool|>"),
    ],
)
def test_the_chat_model_reads_markup_as_transformers_does_and_its_stream_is_its_answer(
    serve, real, name, markup
):
    serve(real)
    prepared = prepare_model(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared.transformers_dir)
    encoder = PromptEncoder(prepared.onnx_dir)
    for turns in MESSAGES:
        messages = [{"role": role, "content": content} for role, content in turns]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encoder.encode(ChatRequest(messages=messages).messages, 4096) == expected
    control = set(tokenizer.get_added_vocab().values())
    (message,) = ChatRequest(messages=[{"role": "user", "content": markup}]).messages
    # The template's own.
    assert sum(token in control for token in encoder.encode([message], 4096)) == 3
    model = load_chat(prepared.onnx_dir)
    for seed in range(8):
        request = {
            "messages": [{"role": "user", "content": "Go on."}],
            "temperature": 1,
            "seed": seed,
            "max_tokens": 60,
        }
        (completion,) = model.predict(None, [request])
        pieces = [
            chunk["choices"][0]["delta"].get("content", "")
            for chunk in model.predict_stream(None, request)
        ]
        assert "".join(pieces) == completion["choices"][0]["message"]["content"]
        assert len(pieces) > 5
    model.close()


def test_the_export_that_is_offered_works_and_counts_from_then_on(serve, real, cache):
    hub, name = serve(real), f"hub:{TORCH}"
    command = [sys.executable, "-m", "helpers", "prepare", "--model", name, "--export"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    prepared = prepare_model(name)
    assert prepared.sources["onnx"] == f"{TORCH}@{hub.commit(TORCH)}, exported with int8 weights"
    model = load_chat(prepared.onnx_dir)
    (completion,) = model.predict(
        None, [{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}]
    )
    assert completion["usage"]["completion_tokens"] > 0
    model.close()


def test_two_at_once_download_once(serve, phi3):
    hub = serve(phi3)
    hub.faults = {SHARD: [("hold", 10_000)]}
    command = [
        sys.executable,
        "-m",
        "helpers",
        "prepare",
        "--model",
        "phi-3-mini-4k",
        "--track",
        "transformers",
    ]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    first = subprocess.Popen(command, **options)
    while not hub.sent[f"{TORCH}/{SHARD}"]:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    second = subprocess.Popen(command, **options)
    assert (
        "Another process prepares Phi-3-mini-4k-instruct; waiting for it."
        in second.stdout.readline()
    )
    hub.release.set()
    assert [process.wait() for process in (first, second)] == [0, 0]
    for process in (first, second):
        process.communicate()
    assert hub.sent[f"{TORCH}/{SHARD}"] == (hub.root / TORCH / SHARD).stat().st_size


def test_a_folder_on_another_disk_works_through_a_link(serve, phi3, cache, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    serve(phi3)
    folder = other / f"course-{os.getpid()}"
    folder.mkdir()
    try:
        (cache / "phi-3-mini-4k").mkdir(parents=True)
        (cache / "phi-3-mini-4k" / "onnx").symlink_to(folder)
        prepare_model("phi-3-mini-4k", "onnx")
        (folder / "model.onnx.data").unlink()
        prepare_model("phi-3-mini-4k", "onnx")
        assert (folder / "model.onnx.data").is_file()
        assert cache_state("phi-3-mini-4k") != "damaged"
    finally:
        for path in folder.rglob("*"):
            path.unlink()
        folder.rmdir()


@pytest.mark.parametrize(("first", "last"), [(-20, -10), (10, 20)])
def test_a_certificate_out_of_its_time_says_what_the_clock_says(
    serve, phi3, tmp_path, monkeypatch, first, last
):
    file = certificate(tmp_path, timedelta(days=first), timedelta(days=last))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    serve(phi3, lambda server: context.wrap_socket(server, server_side=True))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with refuses("hub-certificate") as refusal:
        prepare_model("phi-3-mini-4k", "transformers")
    says = str(refusal.value)
    assert "expired" in says if first < 0 else "not yet valid" in says
    assert f"this machine's clock says {datetime.now():%Y-%m-%d}" in says
    assert "Set the clock if it is wrong" in says
