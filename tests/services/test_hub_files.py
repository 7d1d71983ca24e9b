"""Models of the Hugging Face Hub: the real client against a Hub on loopback, with one case for each error code.

What a repository's files say is decided in ``helpers.models.loadable`` (test_loadable.py).

Run: python -m helpers test tests/services/test_hub_files.py
"""

import json
import re
import shutil
import ssl
from pathlib import Path

import httpx
import pytest
from huggingface_hub import ModelCard, constants, errors
from support import refuses
from support.in_process import download_here
from support.loopback_hub import LoopbackHub
from support.phi3_layout import CPU, ONNX, TORCH, change_json

from helpers import check_fits, prepare_model
from helpers.files import sha256
from helpers.models.folders import read_receipt
from helpers.models.hub_errors import hub_error, token_place
from helpers.models.prepare import cache_state, cached_models

SHARD = "model-00001-of-00002.safetensors"
WEIGHTS = (".safetensors", ".data", ".onnx", ".bin", ".gguf")


@pytest.fixture
def serve(monkeypatch, cache):
    """Return a function that starts a Hub on a folder, which this process asks: no test waits for a start of Python."""
    hubs = []

    def start(root):
        hubs.append(LoopbackHub(root))
        hubs[-1].pauses = download_here(monkeypatch, hubs[-1].url)
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


@pytest.fixture
def hub(serve, phi3):
    """Return a Hub whose repositories stay as they are."""
    return serve(phi3)


@pytest.fixture
def own(serve, phi3, tmp_path):
    """Return a Hub whose repositories a test may change, which are copies."""
    return serve(shutil.copytree(phi3, tmp_path / "hub"))


def files_asked(hub):
    return {
        path.split("/resolve/")[1].split("/", 1)[1]
        for _, path, _ in hub.asked
        if "/resolve/" in path
    }


def no_weights_asked(hub):
    return not [name for name in files_asked(hub) if name.endswith(WEIGHTS)]


def ranges_asked(hub, name):
    """Return the Range header of each request for a file."""
    return [asked for _, path, asked in hub.asked if path.endswith(name)]


def refused(code, name="phi-3-mini-4k", track="transformers", **options):
    """Return the sentences that a model is refused with."""
    with refuses(code) as refusal:
        prepare_model(name, track, **options)
    return str(refusal.value)


# --- what comes, and what is made of it -------------------------------------------------------


def test_track_b_fetches_the_one_folder_for_the_cpu(hub, cache):
    prepared = prepare_model("phi-3-mini-4k", "onnx")
    assert files_asked(hub) == {
        f"{CPU}/{name}"
        for name in (
            "model.onnx",
            "model.onnx.data",
            "genai_config.json",
            "config.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
        )
    }
    assert prepared.onnx_dir == cache / "phi-3-mini-4k" / "onnx"
    assert prepared.transformers_dir is None
    for name in ("model.onnx", "model.onnx.data"):
        assert sha256(prepared.onnx_dir / name) == sha256(hub.root / ONNX / CPU / name)
    assert not list(cache.rglob("*.partial"))


def test_track_a_fetches_safetensors_and_no_code_and_asks_nothing_again(hub, cache):
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    asked = files_asked(hub)
    assert {SHARD, "model.safetensors.index.json", "tokenizer.json", "config.json"} <= asked
    assert not [name for name in asked if name.endswith((".py", ".bin", ".onnx"))]
    assert not list(cache.rglob("*.py"))
    assert prepared.onnx_dir is None
    assert {path.name for path in prepared.transformers_dir.iterdir()} == asked
    hub.asked.clear()
    assert prepare_model("phi-3-mini-4k", "transformers") == prepared
    assert not hub.asked


def test_the_commit_is_recorded_and_a_lost_file_comes_from_the_same_one(own, cache, capsys):
    commit = own.commit(TORCH)
    prepared = prepare_model("phi-3-mini-4k")
    assert prepared.sources == {
        "transformers": f"{TORCH}@{commit}",
        "onnx": f"{ONNX}@{own.commit(ONNX)}",
    }
    (prepared.transformers_dir / SHARD).unlink()
    own.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert own.asked[0][1] == f"/api/models/{TORCH}/revision/{commit}"
    assert f"{SHARD} is missing or damaged; getting it again." in capsys.readouterr().out


def test_a_commit_that_is_gone_gives_way_to_the_newest(own):
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    (own.root / TORCH / "config.json").write_text(
        (own.root / TORCH / "config.json").read_text() + "\n"
    )
    (prepared.transformers_dir / SHARD).unlink()
    assert (
        prepare_model("phi-3-mini-4k", "transformers").sources["transformers"]
        == f"{TORCH}@{own.commit(TORCH)}"
    )


def test_any_repository_can_be_named(hub):
    names = [f"hub:{TORCH}", f"hub:{ONNX}@{hub.commit(ONNX)}"]
    for name, track, repo in zip(names, ("transformers", "onnx"), (TORCH, ONNX), strict=True):
        prepared = prepare_model(name, track)
        assert (prepared.entry.name, prepared.entry.context_length, prepared.entry.licence) == (
            name,
            4096,
            "mit",
        )
        assert prepared.entry.memory >= 1000
        assert prepared.sources[track] == f"{repo}@{hub.commit(repo)}"
        assert cache_state(name) == "ready"
    assert cached_models() == sorted(names)


# --- a Hub and a network that misbehave -------------------------------------------------------


def test_a_busy_hub_is_asked_again_when_it_says(hub, capsys):
    hub.faults = {SHARD: [("busy", 7), ("busy", 4)]}
    prepare_model("phi-3-mini-4k", "transformers")
    assert hub.pauses == [8, 5]  # huggingface_hub adds a second
    assert "huggingface_hub: Rate limited. Waiting 8.0s before retry" in capsys.readouterr().out


@pytest.mark.parametrize("where", [SHARD, "info"])
def test_an_error_of_the_hub_that_stays_is_named(hub, where):
    hub.forever = {where: 503}
    assert f"it answers 503 for {TORCH}" in refused("hub-busy")


def test_a_network_that_is_gone_leaves_what_arrived_and_the_next_call_goes_on(hub, capsys):
    hub.faults = {SHARD: [("cut", 70_000)]}
    hub.forever = {SHARD: ("cut", 0)}
    assert f"{hub.url}, does not answer" in refused("hub-no-answer")
    assert hub.pauses  # huggingface_hub has tried again
    assert cache_state("phi-3-mini-4k") == "not prepared"
    hub.forever = {}
    hub.asked.clear()
    capsys.readouterr()
    prepare_model("phi-3-mini-4k", "transformers")
    assert ranges_asked(hub, SHARD) == ["bytes=70000-"]
    progress = re.findall(r"Progress (\d+) of (\d+)", capsys.readouterr().out)
    done = [int(count) for count, _ in progress]
    assert done == sorted(done)
    assert progress[-1][0] == progress[-1][1]
    assert "tokenizer.json" not in files_asked(hub)


def test_other_content_than_the_hub_lists_is_not_used(hub):
    hub.wrong = {f"{TORCH}/{SHARD}"}
    assert refused("hub-changed").startswith(f"{SHARD} of {TORCH} arrived with another hash than")
    assert cache_state("phi-3-mini-4k") == "not prepared"
    hub.wrong = set()
    prepare_model("phi-3-mini-4k", "transformers")
    assert (
        hub.sent[f"{TORCH}/tokenizer.json"] == (hub.root / TORCH / "tokenizer.json").stat().st_size
    )


def test_a_file_that_the_hub_lists_and_lacks_is_named(hub):
    hub.hidden = {f"{TORCH}/config.json"}
    assert refused("hub-no-file").startswith(f"The Hub lists config.json of {TORCH}, but does not")


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


@pytest.mark.parametrize("where", ["info", "tokenizer.json"])
def test_a_login_page_in_place_of_the_hub_is_seen_and_does_no_harm(hub, where):
    hub.forever = {where: "html"}
    assert "Log in" in refused("hub-other-answer")
    hub.forever = {}
    prepare_model("phi-3-mini-4k", "transformers")


def answered(status, kind=errors.HfHubHTTPError, text="no"):
    return kind(text, response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))


def caused_by(error, cause):
    error.__cause__ = cause
    return error


EXPIRED = ssl.SSLCertVerificationError()
EXPIRED.verify_message = "certificate has expired"


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (answered(403, errors.GatedRepoError), "hub-gated", "org/name"),
        (answered(401, errors.RepositoryNotFoundError), "hub-no-repository", "org/name"),
        (errors.HFValidationError("no"), "hub-no-repository", "org/name"),
        (answered(404, errors.RevisionNotFoundError), "hub-no-revision", "org/name"),
        (
            answered(
                404,
                errors.RemoteEntryNotFoundError,
                "Not found\nhttps://hub/org/name/resolve/c1/a/b.json.",
            ),
            "hub-no-file",
            "a/b.json",
        ),
        (answered(404, errors.RemoteEntryNotFoundError), "hub-no-file", "a file"),
        (answered(401), "hub-status", "a proxy before it, does not give org/name: it answers 401"),
        (answered(403), "hub-status", "set HF_TOKEN"),
        (answered(503), "hub-busy", "503 for org/name"),
        (answered(418), "hub-status", "418 for org/"),
        (
            caused_by(httpx.ConnectError("no"), EXPIRED),
            "hub-certificate",
            "certificate has expired; this machine's clock",
        ),
        (httpx.ProxyError("407 who are {you}?"), "hub-proxy", "407 who are {you}?"),
        (httpx.ConnectError("no"), "hub-no-answer", "HTTPS_PROXY"),
        (httpx.ReadTimeout("no"), "hub-no-answer", "HTTPS_PROXY"),
        (json.JSONDecodeError("no", "<", 0), "hub-other-answer", "Log in"),
        (
            OSError("Consistency check failed: file should be of size 9"),
            "hub-other-answer",
            "Log in",
        ),
        (httpx.InvalidURL("no port"), "hub-settings", "InvalidURL: no port"),
        (OSError("odd"), "hub-settings", "OSError: odd"),
        (ValueError("x" * 999), "hub-settings", "ValueError: " + "x" * 200 + "."),
        (TypeError("no"), "hub-unreadable", "TypeError"),
    ],
)
def test_what_stopped_a_download_is_said_in_two_sentences(error, code, says, token_file):
    explained = hub_error(error, "org/name")
    assert explained.code == code
    assert says in str(explained)
    assert explained.what.endswith(".")
    assert explained.fix.endswith(".")


def test_a_token_that_is_refused_is_named(token_file):
    token_file.write_text(STALE)
    explained = hub_error(answered(403), "org/name")
    assert explained.code == "hub-token"
    assert "the token in $HF_HOME/token" in explained.what
    assert "hf auth login" in explained.fix


# --- repositories that a track cannot use: each is refused before its weights travel ------------


@pytest.mark.parametrize(
    ("track", "repo", "folder"), [("transformers", TORCH, TORCH), ("onnx", ONNX, f"{ONNX}/{CPU}")]
)
def test_without_a_chat_template_the_user_may_write_one(own, cache, track, repo, folder):
    file = own.root / folder / "tokenizer_config.json"
    template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    change_json(file, chat_template=None)
    says = refused("hub-no-template", track=track)
    assert (
        f"{repo} has no chat template: nothing says how a conversation becomes its prompt" in says
    )
    assert no_weights_asked(own)
    # What the error says to do, works.
    written = cache / "phi-3-mini-4k" / track / "chat_template.jinja"
    assert str(written) in says
    written.parent.mkdir()
    written.write_text(template, encoding="utf-8")
    prepared = prepare_model("phi-3-mini-4k", track)
    assert written.read_text(encoding="utf-8") == template
    assert cache_state("phi-3-mini-4k") == "ready"
    assert check_fits(prepared, [{"role": "user", "content": "Hi"}], 10) > 3


def test_templates_come_from_where_transformers_reads_them(own):
    folder = own.root / TORCH
    template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))[
        "chat_template"
    ]
    change_json(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": template}), encoding="utf-8"
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text(template, encoding="utf-8")
    # The first is a processor's, which no tokenizer reads; the second is not the default.
    refused("hub-no-template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    assert (prepared.transformers_dir / "additional_chat_templates" / "rag.jinja").is_file()


def test_without_onnx_files_the_export_is_offered(own):
    says = refused("hub-no-onnx", f"hub:{TORCH}", "onnx")
    assert f"python -m helpers prepare --model hub:{TORCH} --export to make them here" in says
    for name in ("cpu_and_mobile", "directml"):
        shutil.rmtree(own.root / ONNX / name)
    says = refused("hub-no-onnx", f"hub:{ONNX}", "onnx")
    assert (
        "has no ONNX files for the CPU: it has cuda/cuda-fp16, cuda/cuda-int4-rtn-block-32." in says
    )
    assert f"--model hub:{TORCH} --export" in says


def test_pickles_are_refused_and_the_model_that_another_was_made_from_is_named(own):
    folder = own.root / TORCH
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "a pickle can run any code" in refused("hub-pickles")
    (folder / "a.gguf").write_bytes(b"{}")
    for base, named in (("org/base", True), (["org/a", "org/b"], False)):
        own.says = {TORCH: {"cardData": {"license": "mit", "base_model": base}}}
        assert ("hub:" in refused("hub-gguf")) == named
    assert not files_asked(own)


def test_an_index_cannot_name_anything_but_safetensors(own):
    (own.root / TORCH / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    change_json(
        own.root / TORCH / "model.safetensors.index.json",
        weight_map={"a": SHARD, "b": "pytorch_model.bin"},
    )
    assert "names pytorch_model.bin, which" in refused("hub-weights")
    assert no_weights_asked(own)
    change_json(own.root / TORCH / "model.safetensors.index.json", weight_map={})
    assert f"model.safetensors.index.json of {TORCH}" in refused("hub-index")


def test_an_onnx_model_that_would_load_a_library_or_that_the_engine_does_not_know_is_refused(own):
    file = own.root / ONNX / CPU / "genai_config.json"
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    decoder = {**model["decoder"], "session_options": {"custom_ops_library": "ops.data"}}
    (file.parent / "ops.data").write_bytes(b"\x7fELF")
    change_json(file, model=model | {"decoder": decoder})
    says = refused("hub-library", track="onnx")
    assert "sets custom_ops_library, which can load a library and run any code" in says
    change_json(file, model=model | {"type": "homemade"})
    says = refused("hub-engine", track="onnx")
    assert "homemade" in says and ".partial" not in says
    assert no_weights_asked(own)


@pytest.mark.parametrize("graph", ["../../secret.onnx", "deep/model.onnx", "genai_config.json", 5])
def test_an_onnx_file_that_is_not_there_is_refused(own, graph):
    file = own.root / ONNX / CPU / "genai_config.json"
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    (file.parent / "deep").mkdir()
    shutil.copy(file.parent / "model.onnx", file.parent / "deep")
    change_json(file, model=model | {"decoder": model["decoder"] | {"filename": graph}})
    assert f"genai_config.json of {ONNX}" in refused("hub-graph", track="onnx")


def test_weights_of_an_onnx_model_come_under_any_of_their_names(own):
    folder = own.root / ONNX / CPU
    names = {"model.onnx_data", "model.onnx_data.1", "model.onnx.data.1", "model.onnx_data_1"}
    for name in names:
        (folder / name).write_bytes(b"weights")
    assert names <= {
        path.name for path in prepare_model("phi-3-mini-4k", "onnx").onnx_dir.iterdir()
    }


def test_of_several_folders_for_the_cpu_the_fastest_is_taken_and_that_is_said(own, capsys):
    shutil.copytree(own.root / ONNX / CPU, own.root / ONNX / "cpu_and_mobile" / "cpu-zz-fp32")
    prepare_model(f"hub:{ONNX}", "onnx")
    assert {name.rsplit("/", 1)[0] for name in files_asked(own)} == {CPU}
    said = capsys.readouterr().out
    assert (
        f"cpu_and_mobile/cpu-int4-rtn-block-32, {CPU}, cpu_and_mobile/cpu-zz-fp32. {CPU} is taken"
        in said
    )
    assert "data/models.toml" in said
    prepare_model("phi-3-mini-4k", "onnx")  # whose entry names the folder
    assert "is taken" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model_type": "homemade"}, "hub-code"),
        ({"max_position_embeddings": "4k"}, "hub-context"),
        ({"architectures": ["BertModel"]}, "hub-architecture"),
        ({"dtype": "int8"}, "hub-config"),
    ],
)
def test_a_configuration_that_the_course_cannot_run_is_refused(own, fields, code):
    change_json(own.root / TORCH / "config.json", **fields)
    assert TORCH in refused(code)
    assert no_weights_asked(own)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_configuration_that_is_missing_or_no_json_is_named(own, content):
    file = own.root / TORCH / "config.json"
    file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    assert "config.json" in refused("hub-config")
    assert no_weights_asked(own)


@pytest.mark.parametrize(
    ("track", "folder", "content"),
    [
        ("transformers", TORCH, None),
        ("transformers", TORCH, "{"),
        ("onnx", f"{ONNX}/{CPU}", None),
        ("onnx", f"{ONNX}/{CPU}", "{}"),
    ],
)
def test_without_a_tokenizer_that_can_be_made_no_weights_travel(own, track, folder, content):
    file = own.root / folder / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    refused("hub-no-tokenizer", track=track)
    assert no_weights_asked(own)


@pytest.mark.parametrize("model", [None, "phi3"])
def test_an_engine_configuration_without_a_model_is_refused(own, model):
    change_json(own.root / ONNX / CPU / "genai_config.json", model=model)
    assert "genai_config.json" in refused("hub-config", track="onnx")


def test_an_unfinished_file_of_another_commit_is_not_continued(own):
    own.faults = {SHARD: [("cut", 70_000)]}
    own.forever = {SHARD: ("cut", 0)}
    refused("hub-no-answer")
    (own.root / TORCH / SHARD).write_bytes(bytes((own.root / TORCH / SHARD).stat().st_size))
    own.forever = {}
    own.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert ranges_asked(own, SHARD) == [""]


def test_quantized_weights_do_not_travel(own):
    change_json(own.root / TORCH / "config.json", quantization_config={"quant_method": "gptq"})
    assert "(gptq)" in refused("hub-quantized")
    assert no_weights_asked(own)


def test_a_model_for_another_task_is_refused(hub):
    hub.says = {TORCH: {"pipeline_tag": "text-to-image"}}
    assert "text-to-image" in refused("hub-task", track=None)


@pytest.mark.parametrize(
    ("says", "code"),
    [
        ({"siblings": None}, "hub-no-safetensors"),
        ({"siblings": [{"rfilename": "config.json"}]}, "hub-no-safetensors"),
        ({"cardData": "x"}, "hub-unreadable"),
    ],
)
def test_a_listing_that_makes_no_sense_is_refused_in_sentences(hub, says, code):
    hub.says = {TORCH: says}
    refused(code)


# --- which files come ---------------------------------------------------------------------------


def test_what_transformers_does_not_load_stays_there_and_that_is_said(own, capsys):
    folder = own.root / TORCH
    # Which transformers takes before an index.
    shutil.copy(folder / SHARD, folder / "model.safetensors")
    shutil.copy(folder / SHARD, folder / "consolidated.safetensors")
    (folder / "original").mkdir()
    (folder / "original" / "tokenizer.json").write_bytes(b"{}")
    # Leads out of the folder on Windows.
    (folder / "..\\evil.json").write_text("{}", encoding="utf-8")
    # Which nobody can read.
    (folder / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    asked = files_asked(own)
    assert {name for name in asked if name.endswith(".safetensors")} == {"model.safetensors"}
    assert not [name for name in asked if "/" in name or "evil" in name]
    # The course's own.
    assert ModelCard.load(prepared.transformers_dir / "README.md").data.license == "mit"
    said = capsys.readouterr().out
    assert "model.safetensors are downloaded" in said
    assert f"but not consolidated.safetensors, {SHARD}" in said


def test_shards_in_a_folder_come_where_the_index_names_them(own):
    folder = own.root / TORCH
    (folder / "shards").mkdir()
    shards = [SHARD, SHARD.replace("1", "2", 1)]
    for shard in shards:
        (folder / shard).rename(folder / "shards" / shard)
    change_json(
        folder / "model.safetensors.index.json",
        weight_map={shard: f"shards/{shard}" for shard in shards},
    )
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    assert (prepared.transformers_dir / "shards" / SHARD).is_file()
    assert cache_state("phi-3-mini-4k") == "ready"


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


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f"  {STALE}\r\n".encode(), "is not accepted by the Hub"),
        ("hf_größe".encode(), "has characters that no token has"),
        (b"\xff\xfe\x00", "has characters that no token has"),
    ],
)
def test_a_token_that_does_not_work_is_no_obstacle_to_a_public_repository(
    hub, token_file, capsys, content, says
):
    token_file.write_bytes(content)
    hub.expired = {STALE}
    prepare_model("phi-3-mini-4k", "transformers")
    said = capsys.readouterr().out
    assert f"The token in $HF_HOME/token {says}" in said
    assert "Going on without a token" in said
    assert "hf auth login" in said
    assert not [secret for secret in (STALE, "größe", str(token_file)) if secret in said]


def test_a_token_that_does_not_work_is_named_where_one_is_needed(hub, token_file, monkeypatch):
    token_file.write_text(STALE)
    hub.expired = {STALE}
    hub.private = {TORCH}
    assert "The token in $HF_HOME/token is not accepted by the Hub" in refused("hub-token")
    says = refused("hub-token")
    assert f"without one the Hub does not give {TORCH}" in says
    assert "hf auth logout" in says
    assert "HF_TOKEN" not in says  # which is not set
    monkeypatch.setenv("HF_TOKEN", STALE)
    says = refused("hub-token")
    assert "The token in HF_TOKEN is" in says
    assert "Unset HF_TOKEN" in says
    assert STALE not in says


def test_an_empty_token_is_none(hub, token_file, monkeypatch, capsys):
    token_file.write_bytes(b" \n")
    monkeypatch.setenv("HF_TOKEN", " \n")
    hub.private = {TORCH}
    refused("hub-no-repository")
    assert "token" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, "~/.cache/huggingface/token"),
        ({"HF_HOME": "/x"}, "$HF_HOME/token"),
        ({"XDG_CACHE_HOME": "/x"}, "$XDG_CACHE_HOME/huggingface/token"),
        ({"HF_TOKEN_PATH": "/x", "HF_HOME": "/y"}, "the file that HF_TOKEN_PATH names"),
        ({"HF_TOKEN": "a", "HUGGING_FACE_HUB_TOKEN": "b", "HF_TOKEN_PATH": "/x"}, "HF_TOKEN"),
        ({"HF_TOKEN": " ", "HUGGING_FACE_HUB_TOKEN": "b"}, "HUGGING_FACE_HUB_TOKEN"),
        ({"HF_TOKEN": "", "HF_HOME": "/x"}, "$HF_HOME/token"),
    ],
)
def test_where_a_token_is_from_is_said_and_what_helps_there(environment, place):
    where, fix = token_place(environment)
    assert where == place
    assert (f"Unset {place}" in fix) == (place in environment)
    assert ("hf auth logout" in fix) == (place not in environment)


# --- machines that are too small, and bad luck ------------------------------------------------


def test_a_model_that_memory_cannot_hold_is_refused_before_it_travels(hub):
    hub.says = {TORCH: {"sizes": {SHARD: 10**13}}}
    says = refused("memory-short")
    assert says.startswith(f"{TORCH} takes 20,001,001 MB of memory, and ")
    assert "MB are free. Close programs, or choose a smaller model, such as " in says
    assert SHARD not in files_asked(hub)


def test_a_model_that_the_disk_cannot_hold_is_refused_before_it_travels(hub, monkeypatch):
    # MB: the small files fit.
    monkeypatch.setattr("helpers.models.space.free_disk", lambda folder: 0.3)
    assert f"The disk is too full: {TORCH} takes 1 MB in " in refused("disk-full")
    assert files_asked(hub) and no_weights_asked(hub)


def test_a_disk_that_fills_up_while_a_file_comes_is_an_error_of_the_disk(hub, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("helpers.models.hub.http_get", full)
    assert "The disk is too full: Phi-3-mini-4k-instruct takes 10,400 MB in " in refused(
        "disk-full"
    )


def test_a_truncated_file_alone_is_fetched_again_and_the_users_own_stays(hub, capsys):
    prepared = prepare_model("phi-3-mini-4k", "transformers")
    (prepared.transformers_dir / "notes.txt").write_text("mine", encoding="utf-8")
    (prepared.transformers_dir / SHARD).write_bytes(b"short")
    assert cache_state("phi-3-mini-4k") == "damaged"
    hub.asked.clear()
    hub.forever = {"*": 500}
    refused("hub-busy")  # a repair without a network leaves the folder as it was
    assert (prepared.transformers_dir / SHARD).read_bytes() == b"short"
    hub.forever = {}
    hub.asked.clear()
    prepare_model("phi-3-mini-4k", "transformers")
    assert files_asked(hub) == {SHARD}
    assert f"{SHARD} is missing or damaged" in capsys.readouterr().out
    assert cache_state("phi-3-mini-4k") == "ready"
    assert (prepared.transformers_dir / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_files_that_were_moved_before_an_interruption_are_not_fetched_again(
    hub, cache, monkeypatch
):
    folder, move = cache / "phi-3-mini-4k" / "transformers", Path.replace

    def replace(self, target):
        if target == folder / SHARD:
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
