"""The benchmark measures what it says, end to end.

Run: python -m helpers nightly tests/nightly/test_bench.py
"""

import json

import mlflow
from support.chat import chat_model_for

from benchmarks import chat, service, spark, timing
from benchmarks.contenders import llama_events, start_llama
from benchmarks.figures import BATCH_RATIOS, RATIOS
from benchmarks.notebooks import bench_page, bench_prepare
from helpers.models.prepare import prepare_model


def test_llama_cpp_has_dropped_a_prompt_that_comes_again():
    (gguf,) = (prepare_model("smollm2-135m").onnx_dir.parent / "gguf").glob("*.gguf")
    server = start_llama(gguf, 1, 512)

    def read(text):
        *_, last = llama_events(server, prompt=text, n_predict=2)
        return last["timings"]["prompt_n"]

    ships, trees = (
        f"Tell me a long story about the {name} of the north. " * 5 for name in ("ships", "trees")
    )
    first = read(ships)
    assert first > 50 and read(ships) < 5  # the slot still has it
    assert read(trees) < first  # it has what both begin with
    assert read(ships) > first / 2


def test_a_model_is_prepared_in_an_empty_cache(tmp_path):
    figures = bench_prepare(tmp_path, "tiny-phi3")
    assert figures["seconds"] > 0
    assert figures["peak_memory_bytes"] > 1e8
    assert "is ready" in (tmp_path / "prepare.log").read_text(encoding="utf-8")


def test_everything_is_measured_on_what_a_page_has_registered(tiny, tmp_path, monkeypatch):
    # A page itself, in a process of its own; then each comparison once, with answers of four
    # tokens.
    store = "sqlite:///" + (tmp_path / "mlflow.db").as_posix()
    figures, metrics = bench_page("CustomPythonWrapper", "tiny-phi3", store, tmp_path)
    assert (
        figures["seconds"] > 1 and figures["peak_memory_bytes"] > metrics["peak_memory_bytes"] > 1e8
    )
    # Absent where the tiny model is done too soon to tell.
    assert metrics.get("tokens_per_second", 1) > 0
    assert metrics["disk_bytes"] > 1e5
    # What the third page would register.
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment("CustomPythonWrapper")
    info = mlflow.pyfunc.log_model(name="slm-onnx", **chat_model_for(tiny))
    version = mlflow.register_model(info.model_uri, "slm-onnx")
    mlflow.MlflowClient().set_registered_model_alias("slm-onnx", "champion", version.version)
    for module in (chat, timing):
        monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(service, "LOGS", tmp_path)
    monkeypatch.setattr(service, "GROWTH", (1, 2))
    monkeypatch.setattr(
        spark, "interleave", lambda works, repeats: {name: [work()] for name, work in works.items()}
    )
    ratios, raw = chat.bench_chat(store, "tiny-phi3", repeats=1, tokens=4)
    # The tiny model has no GGUF file.
    against_gguf = {name for name in RATIOS if name.endswith(("_llamacpp", "_openvino"))}
    assert len(against_gguf) == 8
    assert set(ratios) == set(RATIOS) - {"track_ratio"} - against_gguf
    # The tiny model's rows take less time than Spark's start varies by.
    assert all(ratio > 0 for name, ratio in ratios.items() if name not in BATCH_RATIOS)
    assert json.loads(json.dumps(raw)) == raw
    assert set(raw) == {
        "single",
        "rows16",
        "callers8",
        "conversation",
        "growth",
        "fidelity",
        "service",
        "spark",
        "memory",
    }
    sizes = [turn["prompt_tokens"] for turn in raw["conversation"]["chat_model"].values()]
    assert len(sizes) == 5 and sizes == sorted(set(sizes))
    assert set(raw["fidelity"]) == {"prompts", "chat_model"}
    assert 0.5 < raw["fidelity"]["chat_model"]["next_token_agreement"] <= 1
    assert list(raw["growth"]["tokens_per_second_by_callers"]) == ["1", "2", "4", "8", "16"]
    # The longest prompts do not fit into its context.
    assert 3 < len(raw["growth"]["by_prompt_tokens"]) < 7
    assert raw["memory"]["callers8_bytes"] >= raw["memory"]["load_bytes"] > 1e8
    served = raw["service"]
    assert set(served) == {"overhead", "crowds", "growth"}
    assert {name: found["requests"] for name, found in served["crowds"].items()} == {
        "8": 32,
        "32": 128,
    }
    assert set(served["crowds"]["8"]["tokens_per_second"]) == {"openai_server", "mlflow"}
    assert list(served["growth"]) == ["1", "2"]
    whole = served["growth"]["2"]["openai_server"]["whole"]
    assert 0 < whole["median"] <= whole["p95"]
    assert mlflow.get_tracking_uri() == store
