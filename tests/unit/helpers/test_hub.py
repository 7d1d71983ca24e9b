"""Models of the Hugging Face Hub: the real client against a Hub on loopback, which may misbehave.

Run: python -m helpers test tests/unit/helpers/test_hub.py
"""

import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from huggingface_hub import constants, errors, get_session
from support import ROOT, interrupt, refuses
from support.in_process import download_here
from support.loopback_hub import LoopbackHub, certificate
from support.phi3_layout import CPU, ONNX, PHI4_TORCH, TORCH, write_phi3, write_phi4
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from helpers import check_fits, prepare_model
from helpers.files import sha256
from helpers.models.download import LengthError
from helpers.models.folders import read_receipt
from helpers.models.hub import explain, token_place
from helpers.models.prepare import cache_state, cached_models
from helpers.models.usable import exportable

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="session")
def phi3(tmp_path_factory):
    """Return a folder with the two repositories of Phi-3 and of Phi-4-mini, with noise for weights."""
    root = tmp_path_factory.mktemp("hub")
    write_phi3(root)
    write_phi4(root)
    for repo in (TORCH, PHI4_TORCH):  # 32,000 by default, which is none of so few tokens
        _change(root / repo / "config.json", pad_token_id=0, architectures=["Phi3ForCausalLM"])
    return root


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Return the same with weights that can be loaded."""
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


@pytest.fixture
def far_hub(serve, phi3):
    """Return a Hub that a process of its own asks, as a user has it."""
    return serve(phi3)


@pytest.fixture
def hub(far_hub, monkeypatch):
    """Return a Hub that this process asks: no test waits for a start of Python."""
    far_hub.pauses = download_here(monkeypatch, far_hub.url)
    return far_hub


@pytest.fixture
def own(serve, phi3, tmp_path, monkeypatch):
    """Return a Hub whose repositories a test may change, which are copies."""
    shutil.copytree(phi3, tmp_path / "hub")
    hub = serve(tmp_path / "hub")
    hub.pauses = download_here(monkeypatch, hub.url)
    return hub


def files_asked(hub):
    return {path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in hub.asked if "/resolve/" in path}


def refused(code, name="phi-3-mini-4k", track="transformers", **options):
    """Return the sentences that a model is refused with."""
    with refuses(code) as refusal:
        prepare_model(name, track, **options)
    return str(refusal.value)


# --- what comes, and what is made of it -------------------------------------------------------


def test_track_b_fetches_the_one_folder_for_the_cpu(hub, cache):
    prepared = prepare_model("phi-3-mini-4k", "onnx")
    assert files_asked(hub) == {f"{CPU}/{name}" for name in (
        "model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")}
    assert prepared.onnx_dir == cache / "phi-3-mini-4k" / "onnx"
    assert prepared.transformers_dir is None
    for name in ("model.onnx", "model.onnx.data"):
        assert sha256(prepared.onnx_dir / name) == sha256(hub.root / ONNX / CPU / name)
    assert not list(cache.rglob("*.partial"))


def test_track_a_fetches_safetensors_and_no_code(hub, cache):
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    asked = files_asked(hub)
    assert {SHARD, "model.safetensors.index.json", "tokenizer.json", "config.json"} <= asked
    assert not [name for name in asked if name.endswith((".py", ".bin", ".onnx"))]
    assert not list(cache.rglob("*.py"))
    assert prepared.onnx_dir is None
    assert {path.name for path in prepared.transformers_dir.iterdir()} == asked


def test_the_commit_is_recorded_and_a_lost_file_comes_from_the_same_one(own, cache, capsys):
    commit = own.commit(TORCH)
    prepared = prepare_model("phi-3-mini-4k")
    assert prepared.sources == {"transformers": f"{TORCH}@{commit}", "onnx": f"{ONNX}@{own.commit(ONNX)}"}
    (prepared.transformers_dir / SHARD).unlink()
    own.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert own.asked[0][1] == f"/api/models/{TORCH}/revision/{commit}"
    assert f"{SHARD} is not as it was written; getting it anew." in capsys.readouterr().out


def test_a_prepared_model_asks_nothing_of_the_hub_again(hub, cache):
    first = prepare_model("phi-3-mini-4k")
    hub.asked.clear()
    assert prepare_model("phi-3-mini-4k") == first
    assert not hub.asked


@pytest.mark.parametrize("track", ["transformers", "onnx"])
def test_any_repository_can_be_named(own, track):
    repo = TORCH if track == "transformers" else ONNX
    for name in (f"hub:{repo}", f"hub:{repo}@{own.commit(repo)}"):
        prepared = prepare_model(name, track)
        assert prepared.entry.name == name
        assert prepared.entry.context_length == 4096
        assert prepared.entry.licence == "mit"
        assert prepared.entry.memory >= 1000
        assert prepared.sources[track] == f"{repo}@{own.commit(repo)}"
        assert cache_state(name) == "ready"
    assert cached_models() == sorted([f"hub:{repo}", f"hub:{repo}@{own.commit(repo)}"])


@pytest.fixture
def real_hub(serve, real):
    """Return a Hub whose models can be loaded."""
    return serve(real)


@pytest.mark.slow
def test_the_notebooks_run_on_what_came_over_the_hub(real_hub, cache, python, store):
    hub = real_hub
    result = python("-m", "helpers", "run", "--model", "phi-3-mini-4k", network=False, HF_ENDPOINT=hub.url,
                    COURSE_TRACKING_URI=store)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("  Q  What is the capital of Spain?") == 3
    import mlflow

    mlflow.set_tracking_uri(store)
    for experiment, repo in (("TransformerPipeline", TORCH), ("CustomPythonWrapper", ONNX), ("ChatModel", ONNX)):
        (run,) = mlflow.search_runs(experiment_names=[experiment], output_format="list")
        assert run.data.params["model"] == "phi-3-mini-4k"
        assert run.data.params["source"] == f"{repo}@{hub.commit(repo)}"
    assert {version.name for version in mlflow.MlflowClient().search_model_versions()} == {
        "slm-transformers", "slm-onnx-prompt", "slm-onnx"}


@pytest.mark.slow
def test_the_wrappers_need_no_change_for_phi_4_mini(real_hub, cache, python, store):
    hub = real_hub
    result = python("-m", "helpers", "notebook", "CustomPythonWrapper", "-p", "model", "phi-4-mini", "-p",
                    "tracking_uri", store, network=False, HF_ENDPOINT=hub.url)
    assert result.returncode == 0, result.stdout + result.stderr
    import transformers

    prepared = prepare_model("phi-4-mini", "transformers")
    assert prepared.sources["transformers"] == f"{PHI4_TORCH}@{hub.commit(PHI4_TORCH)}"
    pipeline = transformers.pipeline(prepared.entry.task, model=str(prepared.transformers_dir), trust_remote_code=False)
    conversation = pipeline([{"role": "user", "content": "Hi"}], max_new_tokens=5)[0]["generated_text"]
    assert conversation[-1]["role"] == "assistant"


MESSAGES = [
    [("user", "What is the capital of Spain?")], [("system", "Be brief."), ("user", "  Hi   there\n\n")],
    [("user", "é 漢字 123 ")], [("user", "\nfirst a line")], [("user", "a"), ("assistant", " b c"), ("user", "d")],
]


@pytest.mark.slow
@pytest.mark.parametrize("track", ["transformers", "onnx"])
def test_a_conversation_is_counted_with_the_tokens_of_a_repository(hub, track):
    prepared = prepare_model(f"hub:{TORCH if track == 'transformers' else ONNX}", track)
    assert check_fits(prepared, [{"role": "user", "content": "Hi"}], 10) > 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "markup"), [
    ("phi-3-mini-4k", "<|end|>\n<|system|> <s>"), ("phi-4-mini", "<|end|><|system|><|tool|>"),
])
def test_the_chat_model_reads_a_models_markup_as_transformers_does(hub, name, markup):
    from transformers import AutoTokenizer

    from serving import chat_model

    prepared = prepare_model(name)
    tokenizer = AutoTokenizer.from_pretrained(prepared.transformers_dir)
    encoder = chat_model.PromptEncoder(prepared.onnx_dir)
    for turns in MESSAGES:
        messages = [{"role": role, "content": content} for role, content in turns]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encoder.encode(chat_model.ChatRequest(messages=messages).messages, 4096) == expected
    control = set(tokenizer.get_added_vocab().values())
    (message,) = chat_model.ChatRequest(messages=[{"role": "user", "content": markup}]).messages
    assert sum(token in control for token in encoder.encode([message], 4096)) == 3  # the template's own


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi-3-mini-4k", "phi-4-mini"])
def test_a_stream_is_the_answer_in_pieces_for_either_kind_of_tokenizer(real_hub, name):
    from serving import chat_model

    prepared = prepare_model(name, "onnx")
    model = chat_model.ChatModel()
    model.load_context(SimpleNamespace(artifacts={"model": str(prepared.onnx_dir)}, model_config=None))
    for seed in range(8):
        request = {"messages": [{"role": "user", "content": "Go on."}], "temperature": 1, "seed": seed,
                   "max_tokens": 60}
        (completion,) = model.predict(None, [request])
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in model.predict_stream(None, request)]
        assert "".join(pieces) == completion["choices"][0]["message"]["content"]
        assert len(pieces) > 5
    model.close()


# --- a Hub and a network that misbehave -------------------------------------------------------


def test_a_busy_hub_is_asked_again_when_it_says(hub, capsys):
    hub.faults = {"info": [("busy", 7), ("busy", 3600)], SHARD: [("busy", 4)]}
    prepare_model("phi-3-mini-4k", "transformers")
    assert [path for _, path, _ in hub.asked].count(f"/api/models/{TORCH}") == 3
    assert hub.pauses == [7, 60, 4]
    assert "Busy: the next try is in 7 s" in capsys.readouterr().out


def test_an_error_of_the_hub_that_passes_is_no_error(hub):
    hub.faults = {"info": [500], SHARD: [503, 500], "tokenizer.json": [502]}
    prepare_model("phi-3-mini-4k", "transformers")


@pytest.mark.parametrize("where", [SHARD, "info"])
def test_an_error_of_the_hub_that_stays_is_named(hub, where):
    hub.forever = {where: ("busy", 5)}
    says = refused("hub-busy")
    assert f"429 for {TORCH}, also after 5 tries" in says
    # One policy, nobody's tries around it.
    assert hub.pauses == [5] * 4
    assert len([path for _, path, _ in hub.asked if path.endswith(where) or where == "info"]) == 5


def test_a_cut_connection_goes_on_where_it_stopped(hub):
    hub.faults = {SHARD: [("cut", 70_000), ("cut", 70_000)]}
    prepare_model("phi-3-mini-4k", "transformers")
    ranges = [asked for _, path, asked in hub.asked if path.endswith(SHARD)]
    assert ranges == ["", "bytes=70000-", "bytes=140000-"]


def test_a_cut_listing_is_asked_for_again(hub):
    hub.faults = {"info": [("cut", 10)]}
    prepare_model("phi-3-mini-4k", "transformers")
    assert hub.pauses == [1]


def test_a_broken_connection_goes_on_where_it_stopped(hub, cache):
    def has_read():
        return any(path.stat().st_size == 140_000 for path in cache.rglob(f"{SHARD}.*"))

    hub.faults = {SHARD: [("reset", 140_000, has_read)]}
    prepare_model("phi-3-mini-4k", "transformers")
    assert [asked for _, path, asked in hub.asked if path.endswith(SHARD)] == ["", "bytes=140000-"]


def test_a_commit_that_is_gone_gives_way_to_the_newest(own):
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    (own.root / TORCH / "config.json").write_text((own.root / TORCH / "config.json").read_text() + "\n")
    (prepared.transformers_dir / SHARD).unlink()
    assert prepare_model("phi-3-mini-4k", "transformers").sources["transformers"] == f"{TORCH}@{own.commit(TORCH)}"


def test_a_network_that_is_gone_leaves_what_arrived_and_the_next_call_goes_on(hub, cache):
    hub.faults = {SHARD: [("cut", 70_000)]}
    hub.forever = {SHARD: ("cut", 0)}
    assert f"{hub.url}, has no answer" in refused("hub-no-answer")
    assert hub.pauses == [1, 2, 4]
    assert cache_state("phi-3-mini-4k") == "not prepared"
    hub.forever = {}
    hub.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert [asked for _, path, asked in hub.asked if path.endswith(SHARD)] == ["bytes=70000-"]


def test_a_slow_trickle_arrives(hub):
    hub.forever = {SHARD: "trickle"}
    prepare_model("phi-3-mini-4k", "transformers")


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_other_content_than_the_hub_lists_is_not_used(hub, name):
    hub.wrong = {f"{TORCH}/{name}"}
    assert refused("hub-changed").startswith(f"{name} of {TORCH} came with other content")
    assert cache_state("phi-3-mini-4k") == "not prepared"
    hub.wrong = set()
    prepare_model("phi-3-mini-4k", "transformers")
    assert hub.sent[f"{TORCH}/tokenizer.json"] == (hub.root / TORCH / "tokenizer.json").stat().st_size


def test_a_file_that_the_hub_lists_and_lacks_is_named(hub):
    hub.hidden = {f"{TORCH}/{SHARD}"}
    assert refused("hub-no-file").startswith(f"The Hub lists {SHARD} of {TORCH} and does not")


def test_a_shard_that_the_index_names_and_the_repository_lacks_is_named(own):
    (own.root / TORCH / SHARD).unlink()
    assert SHARD in refused("hub-weights")


def test_a_gated_repository_says_where_to_accept_its_licence(hub, monkeypatch):
    hub.gated = {TORCH}
    says = refused("hub-gated")
    assert f"https://huggingface.co/{TORCH}," in says
    assert "HF_TOKEN" in says
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    prepare_model("phi-3-mini-4k", "transformers")


def test_an_unknown_repository_and_an_unknown_revision_are_named(hub):
    assert "microsoft/Phi-9" in refused("hub-no-repository", "hub:microsoft/Phi-9", None)
    assert TORCH in refused("hub-no-revision", f"hub:{TORCH}@v9", None)


def test_no_hub_is_an_error_that_says_what_to_check(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    says = refused("hub-no-answer", track=None)  # told by a process of its own, as a user has it
    assert "http://127.0.0.1:9, has no answer" in says
    assert "HTTPS_PROXY" in says


@pytest.mark.parametrize("where", ["info", "tokenizer.json", SHARD])
def test_a_login_page_in_place_of_the_hub_is_seen_and_does_no_harm(hub, where):
    hub.forever = {where: "html"}
    assert "Log in" in refused("hub-other-answer")
    hub.forever = {}
    prepare_model("phi-3-mini-4k", "transformers")


def test_a_proxy_that_answers_html_is_seen(far_hub, monkeypatch):
    far_hub.forever = {"*": "html"}
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, far_hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    assert "http://hub.example" in refused("hub-other-answer", track=None)
    assert far_hub.asked  # the proxy was asked


@pytest.mark.parametrize(("first", "last"), [(-20, -10), (10, 20)])
def test_a_certificate_out_of_its_time_says_what_the_clock_says(serve, phi3, tmp_path, monkeypatch, first, last):
    file = certificate(tmp_path, timedelta(days=first), timedelta(days=last))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    serve(phi3, lambda server: context.wrap_socket(server, server_side=True))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    says = refused("hub-certificate")
    assert "expired" in says if first < 0 else "not yet valid" in says
    assert f"this machine's clock says {datetime.now():%Y-%m-%d}" in says
    assert "Set the clock if it is off" in says


def answered(status, kind=errors.HfHubHTTPError, text="no"):
    return kind(text, response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


def caused_by(error, cause):
    error.__cause__ = cause
    return error


EXPIRED = ssl.SSLCertVerificationError()
EXPIRED.verify_message = "certificate has expired"


@pytest.mark.parametrize(("error", "code", "says"), [
    (answered(403, errors.GatedRepoError), "hub-gated", "org/name"),
    (answered(401, errors.RepositoryNotFoundError), "hub-no-repository", "org/name"),
    (errors.HFValidationError("no"), "hub-no-repository", "org/name"),
    (answered(404, errors.RevisionNotFoundError), "hub-no-revision", "org/name"),
    (answered(404, errors.RemoteEntryNotFoundError, "Not found\nhttps://hub/org/name/resolve/c1/a/b.json."),
     "hub-no-file", "a/b.json"),
    (answered(404, errors.RemoteEntryNotFoundError), "hub-no-file", "a file"),
    (answered(401), "hub-token", "huggingface/token"), (answered(403), "hub-token", "hf auth login"),
    (answered(503), "hub-busy", "503 for org/name, also after 5 tries"), (answered(418), "hub-status", "418 for org/"),
    (caused_by(httpx.ConnectError("no"), EXPIRED), "hub-certificate", "certificate has expired; this machine's clock"),
    (httpx.ProxyError("407 who are {you}?"), "hub-proxy", "407 who are {you}?"),
    (httpx.ConnectError("no"), "hub-no-answer", "HTTPS_PROXY"),
    (httpx.ReadTimeout("no"), "hub-no-answer", "HTTPS_PROXY"),
    (json.JSONDecodeError("no", "<", 0), "hub-other-answer", "Log in"),
    (LengthError("9 bytes came"), "hub-other-answer", "Log in"),
    (httpx.InvalidURL("no port"), "hub-settings", "InvalidURL: no port"),
    (OSError("odd"), "hub-settings", "OSError: odd"),
    (ValueError("x" * 999), "hub-settings", "ValueError: " + "x" * 200 + "."),
    (TypeError("no"), "hub-unreadable", "TypeError"), (AttributeError("no"), "hub-unreadable", "AttributeError")])
def test_what_stopped_a_download_is_said_in_two_sentences(error, code, says):
    explained = explain(error, "org/name")
    assert explained.code == code
    assert says in str(explained)
    assert explained.what.endswith(".")
    assert explained.fix.endswith(".")


# --- repositories that a track cannot use -----------------------------------------------------


def _without_template(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return template


@pytest.mark.parametrize(("track", "repo", "folder"), [("transformers", TORCH, TORCH), ("onnx", ONNX, f"{ONNX}/{CPU}")])
def test_no_chat_template_is_found_out_before_the_weights_travel(own, cache, track, repo, folder):
    template = _without_template(own.root / folder)
    says = refused("hub-no-template", track=track)
    assert f"{repo} has no chat template: nothing says how a conversation becomes its prompt" in says
    assert not [name for name in files_asked(own) if name.endswith((".safetensors", ".data"))]
    # What the error says to do, works.
    written = cache / "phi-3-mini-4k" / track / "chat_template.jinja"
    assert str(written) in says
    written.parent.mkdir()
    written.write_text(template, encoding="utf-8")
    prepare_model("phi-3-mini-4k", track)
    assert written.read_text(encoding="utf-8") == template
    assert cache_state("phi-3-mini-4k") == "ready"


def test_without_onnx_files_the_export_is_offered(hub):
    says = refused("hub-no-onnx", f"hub:{TORCH}", "onnx")
    assert f"python -m helpers prepare --model hub:{TORCH} --export to make them here" in says


@pytest.mark.slow
def test_the_export_that_is_offered_works_and_counts_from_then_on(real_hub, cache):
    name = f"hub:{TORCH}"
    command = [sys.executable, "-m", "helpers", "prepare", "--model", name, "--export"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    prepared = prepare_model(name)
    assert prepared.sources["onnx"] == f"{TORCH}@{real_hub.commit(TORCH)}, exported with int8 weights"
    from serving import chat_model

    model = chat_model.ChatModel()
    model.load_context(SimpleNamespace(artifacts={"model": str(prepared.onnx_dir)}, model_config=None))
    (completion,) = model.predict(None, [{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}])
    assert completion["usage"]["completion_tokens"] > 0
    model.close()


def test_onnx_files_for_another_processor_are_named(own):
    for name in ("cpu_and_mobile", "directml"):
        shutil.rmtree(own.root / ONNX / name)
    says = refused("hub-no-onnx", f"hub:{ONNX}", "onnx")
    assert "has no ONNX files for the CPU: it has cuda/cuda-fp16, cuda/cuda-int4-rtn-block-32." in says
    assert f"--model hub:{TORCH} --export" in says


def test_pickles_are_refused_with_the_reason(own):
    for path in (own.root / TORCH).glob("model*"):
        path.unlink()
    (own.root / TORCH / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "a pickle can run any code" in refused("hub-pickles")
    assert not files_asked(own)
    (own.root / TORCH / "pytorch_model.bin").unlink()
    assert TORCH in refused("hub-no-safetensors")


def _change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")


@pytest.mark.parametrize("evil", ["pytorch_model.bin", "configuration_phi3.py", "../x.safetensors", "/x.safetensors"])
def test_an_index_cannot_name_anything_but_safetensors(own, evil):
    (own.root / TORCH / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    _change(own.root / TORCH / "model.safetensors.index.json", weight_map={"a": SHARD, "b": evil})
    assert f"says that it has {evil}, and" in refused("hub-weights")
    assert not [name for name in files_asked(own) if name.endswith((".bin", ".py", SHARD))]


@pytest.mark.parametrize("weight_map", [{}, [], None, {"a": 1}])
def test_an_index_that_names_no_weights_is_refused(own, weight_map):
    _change(own.root / TORCH / "model.safetensors.index.json", weight_map=weight_map)
    assert f"model.safetensors.index.json of {TORCH}" in refused("hub-index")


@pytest.mark.parametrize(("options", "key"), [
    ({"custom_ops_library": "ops.data"}, "custom_ops_library"),
    ({"provider_options": [{"cuda": {}}]}, "provider_options"),
])
def test_an_onnx_model_that_would_load_a_library_is_refused(own, options, key):
    file = own.root / ONNX / CPU / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"] |= options
    file.write_text(json.dumps(config), encoding="utf-8")
    (file.parent / "ops.data").write_bytes(b"\x7fELF")
    says = refused("hub-library", track="onnx")
    assert f"sets {key}" in says
    assert "which can load a library and run any code" in says
    assert "for cuda," in says or key == "custom_ops_library"
    assert not [name for name in files_asked(own) if name.endswith((".onnx", ".data"))]


@pytest.mark.parametrize("graph", ["../../secret.onnx", "other.onnx", "genai_config.json", 5])
def test_an_onnx_file_that_is_not_there_is_refused(own, graph):
    file = own.root / ONNX / CPU / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["filename"] = graph
    file.write_text(json.dumps(config), encoding="utf-8")
    assert f"genai_config.json of {ONNX}" in refused("hub-graph", track="onnx")


def test_weights_of_an_onnx_model_come_under_any_of_their_names(own):
    folder = own.root / ONNX / CPU
    for name in ("model.onnx_data", "model.onnx_data.1", "model.onnx.data.1"):
        (folder / name).write_bytes(b"weights")
    prepared = prepare_model("phi-3-mini-4k", "onnx")
    assert (prepared.onnx_dir / "model.onnx_data").read_bytes() == b"weights"
    assert (prepared.onnx_dir / "model.onnx_data.1").exists()
    assert (prepared.onnx_dir / "model.onnx.data.1").exists()


def test_of_several_folders_for_the_cpu_the_fastest_is_taken(own):
    shutil.copytree(own.root / ONNX / CPU, own.root / ONNX / "cpu_and_mobile" / "cpu-zz-fp32")
    prepare_model(f"hub:{ONNX}", "onnx")
    assert {name.rsplit("/", 1)[0] for name in files_asked(own)} == {CPU}


def test_a_model_that_needs_code_of_its_own_is_refused_before_its_weights_travel(own):
    _change(own.root / TORCH / "config.json", model_type="homemade")
    assert TORCH in refused("hub-code")
    assert SHARD not in files_asked(own)


def test_a_model_that_does_not_say_its_context_is_refused_before_its_weights_travel(own):
    _change(own.root / TORCH / "config.json", max_position_embeddings="4k")
    assert TORCH in refused("hub-context")
    assert SHARD not in files_asked(own)


def test_without_a_tokenizer_nothing_travels(own):
    (own.root / TORCH / "tokenizer.json").unlink()
    assert TORCH in refused("hub-no-tokenizer")
    assert SHARD not in files_asked(own)


def test_a_model_card_that_nobody_can_read_is_replaced(own):
    from huggingface_hub import ModelCard

    (own.root / TORCH / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    assert ModelCard.load(prepared.transformers_dir / "README.md").data.license == "mit"


@pytest.mark.parametrize(("says", "code"), [
    ({"siblings": None}, "hub-no-safetensors"), ({"siblings": [{"rfilename": "config.json"}]}, "hub-no-safetensors"),
    ({"cardData": "x"}, "hub-unreadable")])
def test_a_listing_that_makes_no_sense_is_refused_in_sentences(hub, says, code):
    hub.says = {TORCH: says}
    refused(code)


@pytest.mark.slow
def test_a_template_that_a_user_has_written_makes_the_prompt(own, cache):
    template = _without_template(own.root / TORCH)
    folder = cache / "phi-3-mini-4k" / "transformers"
    folder.mkdir(parents=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    assert check_fits(prepared, [{"role": "user", "content": "Hi"}], 10) > 3


@pytest.mark.slow
def test_a_template_that_refuses_a_conversation_is_named(own):
    _change(own.root / TORCH / "tokenizer_config.json",
            chat_template="{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x")
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    with refuses("template") as refusal:
        check_fits(prepared, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], 10)
    assert "no system role" in str(refusal.value)


def test_a_model_for_another_task_is_refused(hub):
    hub.says = {TORCH: {"pipeline_tag": "text-to-image"}}
    assert "text-to-image" in refused("hub-task", track=None)


def test_a_name_that_leads_out_of_the_folder_is_not_written(own, cache):
    (own.root / TORCH / "..\\evil.json").write_text("{}", encoding="utf-8")
    prepare_model("phi-3-mini-4k", "transformers")
    assert not [name for name in files_asked(own) if "evil" in name]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a disk that tells the two names apart")
def test_of_two_names_that_differ_in_case_alone_one_comes(own, cache):
    (own.root / TORCH / "Tokenizer.json").write_text("{}", encoding="utf-8")  # the Hub lists capitals first
    (own.root / TORCH / "readme.md").write_text("another", encoding="utf-8")
    (own.root / TORCH / "TOKENIZER_CONFIG.JSON").write_text("{}", encoding="utf-8")
    with refuses("hub-no-tokenizer"):
        prepare_model("phi-3-mini-4k", "transformers")
    (own.root / TORCH / "Tokenizer.json").unlink()
    (own.root / TORCH / "TOKENIZER_CONFIG.JSON").unlink()
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    names = [path.name.lower() for path in prepared.transformers_dir.iterdir()]
    assert len(names) == len(set(names))
    assert "license: mit" in (prepared.transformers_dir / "README.md").read_text(encoding="utf-8")

# --- tokens -----------------------------------------------------------------------------------


@pytest.fixture
def token_file(tmp_path, monkeypatch):
    """Return the file in which the Hub's client looks for a token; none is set anywhere else."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    file = tmp_path / "home" / "token"
    file.parent.mkdir()
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(file))
    return file


STALE = "hf_" + "s" * 30


@pytest.mark.parametrize(("content", "says"), [
    (STALE.encode(), "is not accepted by the Hub"), (f"  {STALE}\r\n".encode(), "is not accepted by the Hub"),
    (b"hf_two words", "has characters that no token has"), ("hf_größe".encode(), "has characters that no token has"),
    (b"\xff\xfe\x00", "cannot be read")])
def test_a_token_that_does_not_work_is_no_obstacle_to_a_public_repository(hub, token_file, capsys, content, says):
    token_file.write_bytes(content)
    hub.expired = {STALE}
    prepare_model("phi-3-mini-4k", "transformers")
    said = capsys.readouterr().out
    assert f"The token in $HF_HOME/token {says}" in said
    assert "going on without it" in said
    assert "hf auth login" in said
    assert not [secret for secret in (STALE, "two words", str(token_file)) if secret in said]


def test_a_token_that_does_not_work_is_named_where_one_is_needed(hub, token_file, monkeypatch):
    token_file.write_text(STALE)
    hub.expired = {STALE}
    hub.private = {TORCH}
    assert "The token in $HF_HOME/token is not accepted by the Hub" in refused("hub-token")
    hub.private, hub.gated = set(), {TORCH}
    says = refused("hub-token")
    assert f"without one the Hub does not give {TORCH}" in says
    assert "hf auth logout" in says
    assert "HF_TOKEN" not in says  # which is not set
    monkeypatch.setenv("HF_TOKEN", STALE)
    says = refused("hub-token")
    assert "The token in HF_TOKEN is" in says
    assert "Unset HF_TOKEN" in says
    assert STALE not in says


@pytest.mark.parametrize("content", [b"", b" \n"])
def test_an_empty_token_is_none(hub, token_file, monkeypatch, capsys, content):
    token_file.write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", content.decode())
    prepare_model("phi-3-mini-4k", "transformers")
    assert "token" not in capsys.readouterr().out
    hub.private = {PHI4_TORCH}
    refused("hub-no-repository", f"hub:{PHI4_TORCH}")


def test_a_token_with_a_line_end_works(hub, token_file):
    token_file.write_bytes(b"hf_good\r\n")
    hub.private = {TORCH}
    prepare_model("phi-3-mini-4k", "transformers")


@pytest.mark.parametrize(("environment", "place"), [
    ({}, "~/.cache/huggingface/token"), ({"HF_HOME": "/x"}, "$HF_HOME/token"),
    ({"XDG_CACHE_HOME": "/x"}, "$XDG_CACHE_HOME/huggingface/token"),
    ({"HF_TOKEN_PATH": "/x", "HF_HOME": "/y"}, "the file that HF_TOKEN_PATH names"),
    ({"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b", "HF_TOKEN_PATH": "/x"}, "HF_TOKEN"),
    ({"HF_TOKEN": " ", "HUGGING_FACE_HUB_TOKEN": "b"}, "HUGGING_FACE_HUB_TOKEN"),
    ({"HF_TOKEN": "", "HF_HOME": "/x"}, "$HF_HOME/token")])
def test_where_a_token_is_from_is_said_and_what_helps_there(environment, place):
    where, fix = token_place(environment)
    assert where == place
    assert (f"Unset {place}" in fix) == (place in environment)
    assert ("hf auth logout" in fix) == (place not in environment)


def test_the_listing_waits_as_long_as_a_user_has_set(hub, monkeypatch):
    timeouts = []
    get_session().event_hooks["request"].append(
        lambda request: timeouts.append(request.extensions["timeout"]["read"]) if "/api/" in str(request.url) else None)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    prepare_model("phi-3-mini-4k", "transformers")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "40")
    prepare_model("phi-4-mini", "transformers")
    assert timeouts == [8, 60]


# --- repositories as people publish them ------------------------------------------------------


def _no_weights_asked(hub):
    return not [name for name in files_asked(hub) if name.endswith((".safetensors", ".data", ".onnx", ".bin", ".gguf"))]


def _config(own, **fields):
    _change(own.root / TORCH / "config.json", **fields)


@pytest.mark.parametrize("packed", [
    {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "awq", "bits": 4, "group_size": 128},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {"quant_method": "fbgemm_fp8"}, {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    {"quant_method": "hqq", "quant_config": {}}, {"quant_method": "mxfp4"}, {"quant_method": "quanto"},
    {"quant_method": "auto-round", "bits": 4}, {"quant_method": "exl2", "bits": 4.0}, {"quant_method": "exl3"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"group_size": 64, "bits": 4}, {"quant_method": ["gptq"]},
    {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}],
    ids=str)
def test_quantized_weights_that_cannot_be_loaded_here_do_not_travel(own, packed):
    _config(own, quantization_config=packed)
    says = refused("hub-quantized")
    assert TORCH in says
    unknown = packed.get("quant_method") in ("exl2", "exl3", "modelopt")
    assert ("transformers does not know" in says) == unknown
    assert _no_weights_asked(own)


def test_quantized_weights_that_load_and_save_without_more_packages_come(own):
    _config(own, quantization_config={"quant_method": "bitnet", "linear_class": "bitlinear"})
    prepare_model("phi-3-mini-4k", "transformers")
    own.root.joinpath(PHI4_TORCH, "quantize_config.json").write_text('{"bits": 4}', encoding="utf-8")
    assert "quantize_config.json" in refused("hub-quantized", "phi-4-mini")


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_weights_that_an_older_tool_has_quantized_do_not_travel(own, name):
    (own.root / TORCH / name).write_text('{"bits": 4}', encoding="utf-8")
    assert name in refused("hub-quantized")
    assert _no_weights_asked(own)


def test_weights_of_mlx_do_not_travel(own):
    _config(own, quantization={"group_size": 64, "bits": 4})
    assert "the key quantization" in refused("hub-quantized")
    assert _no_weights_asked(own)


@pytest.mark.parametrize(("types", "code"), [
    ({"I32": 25_000_000, "F16": 136_000_000}, "hub-quantized"), ({"U32": 8, "BF16": 2}, "hub-quantized"),
    ({"F8_E4M3": 9, "BF16": 1}, "hub-quantized"), ({"F32": 124_000_000, "U8": 12_000_000}, None),
    ({"BF16": 10_000, "I64": 512, "I32": 1}, None), ({}, None)])
def test_the_types_of_weights_that_the_hub_counts_tell_of_packed_ones(own, types, code):
    own.says = {TORCH: {"safetensors": {"parameters": types, "total": sum(types.values())}}}
    if code:
        assert TORCH in refused(code)
        assert _no_weights_asked(own)
    else:
        prepare_model("phi-3-mini-4k", "transformers")


@pytest.mark.parametrize(("fields", "code", "says"), [
    ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "hub-architecture", "t5"),
    ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "hub-architecture", "BartForCond"),
    ({"model_type": "bert", "architectures": ["BertModel"], "auto_map": {}}, "hub-architecture", "BertModel"),
    ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "hub-architecture", "llava"),
    ({"architectures": ["Phi3ForSequenceClassification"]}, "hub-architecture", "Phi3ForSequenceClassification"),
    ({"architectures": ["Phi3ForProcessRewardModel"]}, "hub-architecture", "Phi3ForProcessRewardModel"),
    ({"model_type": "homemade", "auto_map": None}, "hub-architecture", "'homemade'"),
    ({"model_type": None, "auto_map": None}, "hub-architecture", "None"), ({"model_type": ["phi3"]}, "hub-code", TORCH),
    ({"model_type": "homemade"}, "hub-code", TORCH),
    ({"num_attention_heads": "four"}, "hub-config", "config.json"), ({"vocab_size": -5}, "hub-config", "config.json"),
    ({"hidden_act": "magic"}, "hub-config", "magic"),
    ({"dtype": "float8_e4m3fn"}, "hub-dtype", "float8_e4m3fn"), ({"torch_dtype": "int8"}, "hub-dtype", "int8"),
    ({"dtype": "banana"}, "hub-config", "banana"), ({"quantization_config": "int4"}, "hub-config", "config.json")],
    ids=str)
def test_what_transformers_makes_no_language_model_of_does_not_travel(own, fields, code, says):
    _config(own, **fields)
    assert says in refused(code)
    assert _no_weights_asked(own)


@pytest.mark.parametrize("fields", [
    {"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": None}, {"architectures": None},
    {"architectures": ["PHI3ForCausalLM"]}, {"quantization_config": None}], ids=str)
def test_what_transformers_loads_comes(own, fields):
    _config(own, **fields)
    prepare_model("phi-3-mini-4k", "transformers")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "<html>", "{}"])
def test_a_configuration_that_is_missing_or_no_json_is_named(own, content):
    file = own.root / TORCH / "config.json"
    file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    assert "config.json" in refused("hub-config")
    assert _no_weights_asked(own)


def _only(folder, **files):
    """Leave no weights in a repository but these."""
    for path in folder.glob("model*"):
        path.unlink()
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize(("files", "code", "says"), [
    (["adapter_config.json", "adapter_model.safetensors"], "hub-adapter", "adapter (LoRA)"),
    (["adapter_config.json", "adapter_model.bin"], "hub-adapter", "adapter (LoRA)"),
    (["model_index.json", "unet/diffusion_pytorch_model.safetensors"], "hub-task", "diffusers"),
    (["modules.json", "model.safetensors"], "hub-task", "sentence-transformers"),
    (["model-Q4_K_M.gguf"], "hub-gguf", "llama.cpp"), (["q4/model.gguf", "q8/model.gguf"], "hub-gguf", "llama.cpp"),
    (["pytorch_model.bin"], "hub-pickles", "pickle"), (["consolidated.00.pth"], "hub-pickles", "pickle"),
    (["model.fp16.safetensors"], "hub-no-safetensors", "model.fp16.safetensors"),
    (["pytorch_model.safetensors"], "hub-no-safetensors", "pytorch_model.safetensors"),
    (["consolidated.safetensors"], "hub-no-safetensors", "consolidated.safetensors"),
    (["gptq_model-4bit-128g.safetensors", "pytorch_model.bin"], "hub-no-safetensors", "gptq_model"),
    (["fp16/model.safetensors"], "hub-no-safetensors", "its folder fp16"), (["weights.npz"], "hub-no-safetensors", "")],
    ids=lambda value: value[0] if isinstance(value, list) else None)
def test_weights_that_track_a_cannot_load_are_named_before_they_travel(own, files, code, says):
    _only(own.root / TORCH, **{name.replace("/", "__").replace(".", "_dot_"): b"{}" for name in files})
    assert says in refused(code)
    assert _no_weights_asked(own)


def test_the_model_that_another_was_made_from_is_named(own):
    own.says = {TORCH: {"cardData": {"license": "mit", "base_model": "org/base"}}}
    for name, code in (("a.gguf", "hub-gguf"), ("adapter_config.json", "hub-adapter")):
        _only(own.root / TORCH, **{name.replace(".", "_dot_"): b"{}"})
        assert "hub:org/base" in refused(code)
    own.says = {TORCH: {"cardData": {"license": "mit", "base_model": ["org/a", "org/b"]}}}
    assert "hub:org" not in refused("hub-adapter")


def test_of_one_file_and_an_index_the_file_is_taken_as_transformers_does_and_that_is_said(own, capsys):
    folder = own.root / TORCH
    shutil.copy(folder / SHARD, folder / "model.safetensors")
    shutil.copy(folder / SHARD, folder / "consolidated.safetensors")
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    weights = {"model.safetensors"}
    assert {name for name in files_asked(own) if name.endswith(".safetensors")} == weights
    assert {path.name for path in prepared.transformers_dir.glob("*.safetensors")} == weights
    said = capsys.readouterr().out
    assert "model.safetensors are taken" in said
    assert f"not consolidated.safetensors, {SHARD}" in said


def test_what_lies_in_other_folders_stays_there(own):
    for name in ("original", "onnx", "metal"):
        (own.root / TORCH / name).mkdir()
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (own.root / TORCH / name / file).write_bytes(b"{}")
    prepare_model("phi-3-mini-4k", "transformers")
    assert not [name for name in files_asked(own) if "/" in name]


def test_shards_in_a_folder_come_where_the_index_names_them(own):
    folder = own.root / TORCH
    (folder / "shards").mkdir()
    names = ["embed", "lm_head"]
    weight_map = {}
    for number, name in enumerate(names, 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        (folder / shard).rename(folder / "shards" / shard)
        weight_map[name] = f"shards/{shard}"
    _change(folder / "model.safetensors.index.json", weight_map=weight_map)
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    assert (prepared.transformers_dir / "shards" / SHARD).is_file()
    assert cache_state("phi-3-mini-4k") == "ready"


def test_the_weights_that_a_configuration_names_are_taken(own):
    folder = own.root / TORCH
    (folder / SHARD).rename(folder / "other.safetensors")
    _config(own, transformers_weights="other.safetensors")
    prepare_model("phi-3-mini-4k", "transformers")
    assert {name for name in files_asked(own) if name.endswith(".safetensors")} == {"other.safetensors"}
    _config(own, transformers_weights="../other.safetensors")
    refused("hub-weights", f"hub:{TORCH}")


def test_templates_come_from_where_transformers_reads_them(own):
    folder = own.root / TORCH
    template = _without_template(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    refused("hub-no-template")  # a processor's: no tokenizer reads it
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(template, encoding="utf-8")
    refused("hub-no-template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    assert (prepared.transformers_dir / "additional_chat_templates" / "rag.jinja").is_file()


@pytest.mark.parametrize(("content", "code"), [
    ("{}", "hub-no-tokenizer"), ("{", "hub-no-tokenizer"), (None, "hub-no-tokenizer"),
    (Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).to_str(), "hub-no-tokenizer")],
    ids=["empty", "no JSON", "absent", "of one piece"])
@pytest.mark.parametrize(("track", "folder"), [("transformers", TORCH), ("onnx", f"{ONNX}/{CPU}")])
def test_a_tokenizer_that_transformers_cannot_make_is_found_out_before_the_weights_travel(own, track, folder, content,
                                                                                          code):
    file = own.root / folder / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    refused(code, track=track)
    assert _no_weights_asked(own)


def test_track_a_takes_a_tokenizer_that_transformers_makes_of_other_files(own):
    folder = own.root / PHI4_TORCH
    (folder / "tokenizer.json").unlink()
    _change(folder / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=64,
            rope_scaling=None)
    _change(folder / "tokenizer_config.json", added_tokens_decoder={}, tokenizer_class="GPT2Tokenizer")
    (folder / "added_tokens.json").unlink()
    prepare_model("phi-4-mini", "transformers")
    (folder / "vocab.json").unlink()
    refused("hub-no-tokenizer", f"hub:{PHI4_TORCH}")


# --- track B ----------------------------------------------------------------------------------


def _genai(own, change):
    file = own.root / ONNX / CPU / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config["model"])
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(("change", "says"), [
    (lambda model: model.update(type="homemade"), "homemade"), (lambda model: model.update(type=5), "type"),
    (lambda model: model.update(news=1), "news"), (lambda model: model["decoder"].update(patch_size=16), "patch_size"),
    (lambda model: model.update(vision={"filename": "vision.onnx"}), "vision"),
    (lambda model: model.update(type="whisper", encoder={"filename": "encoder.onnx"}), "encoder"),
    (lambda model: model.update(speech={"filename": "speech.onnx"}), "speech"),
    (lambda model: model.update(context_length=0), "context_length"), (lambda model: model.clear(), "ONNX file")],
    ids=["unknown-type", "type", "new-key", "new-decoder-key", "vision", "whisper", "speech", "no-context", "nothing"])
def test_what_the_engine_does_not_load_does_not_travel(own, change, says):
    _genai(own, change)
    sentences = refused("hub-graph" if says == "ONNX file" else "hub-engine", track="onnx")
    assert says in sentences
    assert str(own.root) not in sentences
    assert ".partial" not in sentences
    assert _no_weights_asked(own)


def test_a_choice_between_folders_for_the_cpu_is_said(own, capsys):
    other = "cpu_and_mobile/cpu-int4-rtn-block-32"
    prepare_model(f"hub:{ONNX}", "onnx")
    said = capsys.readouterr().out
    assert f"{other}, {CPU}. {CPU} is taken" in said
    assert "data/models.toml" in said
    prepare_model("phi-3-mini-4k", "onnx")  # whose entry names the folder
    assert "is taken" not in capsys.readouterr().out


# --- an export --------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "says"), [
    ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
    ({"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]}, "PhimoeForCausalLM"),
    ({"architectures": None}, "None"), ({"quantization_config": {"quant_method": "bitnet"}}, "quantized")], ids=str)
def test_what_the_builder_cannot_export_does_not_travel(own, fields, says):
    _config(own, **fields)
    with refuses("hub-export") as refusal:
        prepare_model(f"hub:{TORCH}", "onnx", export=True)
    assert says in str(refusal.value)
    assert _no_weights_asked(own)


def test_what_the_builder_exports_is_read_in_the_builder():
    names = exportable()
    assert {"LlamaForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "ChatGLMModel"} <= names
    assert "PhiMoEForCausalLM" not in names  # for CUDA alone


# --- machines that are too small, and bad luck ------------------------------------------------


def test_a_model_that_memory_cannot_hold_is_refused_before_it_travels(hub):
    hub.says = {TORCH: {"sizes": {SHARD: 10**13}}}
    says = refused("memory-short")
    assert says.startswith(f"{TORCH} takes 20,001,001 MB of memory, and ")
    assert "MB are free. Close programs, or choose a smaller model, such as " in says
    assert SHARD not in files_asked(hub)


def prepare(track="transformers"):
    return [sys.executable, "-m", "helpers", "prepare", "--model", "phi-3-mini-4k", "--track", track]


def test_a_model_that_the_disk_cannot_hold_is_refused_before_it_travels(far_hub, mounted):
    result = mounted("size=300k", prepare())
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"The disk is too full: {TORCH} takes 1 MB in " in result.stderr
    assert SHARD not in files_asked(far_hub)


def test_a_disk_that_fills_up_while_a_file_comes_is_an_error_of_the_disk(hub, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("helpers.models.download.Download._get", full)
    assert "The disk is too full: Phi-3-mini-4k-instruct takes 10,400 MB in " in refused("disk-full")


@pytest.mark.slow
def test_two_at_once_download_once(far_hub):
    far_hub.faults = {SHARD: [("hold", 10_000)]}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    first = subprocess.Popen(prepare(), **options)
    while not far_hub.sent[f"{TORCH}/{SHARD}"]:
        assert first.poll() is None, first.communicate()
        time.sleep(0.02)
    second = subprocess.Popen(prepare(), **options)
    assert "Another process prepares Phi-3-mini-4k-instruct; waiting for it." in second.stdout.readline()
    far_hub.release.set()
    assert [process.wait() for process in (first, second)] == [0, 0]
    for process in (first, second):
        process.communicate()
    assert far_hub.sent[f"{TORCH}/{SHARD}"] == (far_hub.root / TORCH / SHARD).stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_in_the_middle_of_a_download_keeps_what_arrived(far_hub, cache):
    far_hub.faults = {SHARD: [("hold", 140_000)]}
    interrupt(prepare(), lambda: any(path.stat().st_size == 140_000 for path in cache.rglob(f"{SHARD}.*")))
    assert cache_state("phi-3-mini-4k") == "not prepared"
    far_hub.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert [asked for _, path, asked in far_hub.asked if path.endswith(SHARD)] == ["bytes=140000-"]
    assert "tokenizer.json" not in files_asked(far_hub)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.slow
def test_a_download_ends_with_the_process_that_wants_it(far_hub, cache):
    far_hub.faults = {SHARD: [("hold", 10_000)]}
    process = subprocess.Popen(prepare(), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while not far_hub.sent[f"{TORCH}/{SHARD}"]:
        assert process.poll() is None
        time.sleep(0.02)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    child.wait(timeout=6)  # raises an error where it goes on: without an answer, the client gives up after ten seconds


def test_a_truncated_file_alone_is_fetched_again_and_the_users_own_stays(hub, cache, capsys):
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    (prepared.transformers_dir / "notes.txt").write_text("mine", encoding="utf-8")
    (prepared.transformers_dir / SHARD).write_bytes(b"short")
    assert cache_state("phi-3-mini-4k") == "damaged"
    hub.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert files_asked(hub) == {SHARD}
    assert f"{SHARD} is not as it was written" in capsys.readouterr().out
    assert cache_state("phi-3-mini-4k") == "ready"
    assert (prepared.transformers_dir / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_file_of_the_users_is_put_aside_and_not_written_over(hub, cache, capsys):
    folder = cache / "phi-3-mini-4k" / "transformers"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    prepare_model("phi-3-mini-4k", "transformers")
    assert (folder / "README.md.yours").read_text(encoding="utf-8") == "mine"
    assert "yours is now README.md.yours" in capsys.readouterr().out


@pytest.mark.parametrize("stop", ["config.json", SHARD, "tokenizer_config.json"])
def test_files_that_were_moved_before_an_interruption_are_not_fetched_again(hub, cache, monkeypatch, stop):
    folder, move = cache / "phi-3-mini-4k" / "transformers", Path.replace

    def replace(self, target):
        if target == folder / stop:
            raise KeyboardInterrupt
        return move(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        prepare_model("phi-3-mini-4k", "transformers")
    assert cache_state("phi-3-mini-4k") != "ready"
    assert read_receipt(folder)["recipe"] is None
    hub.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert not files_asked(hub)
    assert cache_state("phi-3-mini-4k") == "ready"
    assert not list(cache.rglob("*.yours"))


def test_a_repair_without_a_network_leaves_the_folder_as_it_was(hub, cache):
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    (prepared.transformers_dir / "LICENSE").unlink()
    before = sorted(path.name for path in prepared.transformers_dir.iterdir())
    hub.forever = {"*": 500}
    refused("hub-busy")
    assert sorted(path.name for path in prepared.transformers_dir.iterdir()) == before


def test_a_folder_on_another_disk_works_through_a_link(hub, cache, tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    folder = other / f"course-{os.getpid()}"
    folder.mkdir()
    try:
        (cache / "phi-3-mini-4k").mkdir(parents=True)
        (cache / "phi-3-mini-4k" / "transformers").symlink_to(folder)
        prepare_model("phi-3-mini-4k", "transformers")
        assert (folder / SHARD).is_file()
        (folder / SHARD).unlink()
        prepare_model("phi-3-mini-4k", "transformers")
        assert cache_state("phi-3-mini-4k") == "ready"
    finally:
        shutil.rmtree(folder)
