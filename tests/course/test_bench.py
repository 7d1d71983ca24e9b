"""The benchmark: its gate, its ranges, and that it still measures.

Run: python -m helpers test tests/course/test_bench.py
"""

import json
import sys

import mlflow
import pytest
from support import ROOT, refuses
from support.runs import run

from course.bench import chat
from course.bench.figures import BUDGETS, KEPT, REACH, keep_run, misses, reaches, read_runs, show_range, write_runs
from course.bench.notebooks import run_measured


@pytest.mark.parametrize(("value", "reach", "reached"), [
    (0.97, {"at_least": 0.97}, True), (0.968, {"at_least": 0.97}, False), (0.9699999, {"at_least": 0.97}, False),
    (2, {"at_least": 0.97}, True),
    (1.0, {"under": 1.0}, False), (0.9999999, {"under": 1.0}, True), (1.0001, {"under": 1.0}, False),
])
def test_a_gate_compares_the_figure_as_it_was_measured(value, reach, reached):
    assert reaches(value, reach) is reached


def test_a_run_says_what_it_misses():
    assert misses(run()) == []
    assert misses(run(single_overhead=0.968, memory=1.6)) == ["single_overhead", "memory"]
    slow = run()
    slow["raw"]["notebooks"][1]["seconds"] = BUDGETS["smollm2-135m"]["seconds"]
    slow["raw"]["prepare"]["warm_seconds"] = 0.5
    slow["raw"]["test"] = {"seconds": 719.9, "tests_seconds": 541, "disk_bytes": 1}
    assert misses(slow) == ["TransformerPipeline on smollm2-135m: seconds", "prepare: warm_seconds",
                            "test: tests_seconds"]
    assert set(run()["ratios"]) == set(REACH)


def test_the_oldest_runs_make_way(tmp_path):
    runs = []
    for number in range(KEPT + 2):
        runs = keep_run(runs, {"number": number})
    assert [one["number"] for one in runs] == list(range(2, KEPT + 2))
    write_runs(runs, tmp_path / "bench.json")
    assert read_runs(tmp_path / "bench.json") == runs
    assert read_runs(tmp_path / "none.json") == []


@pytest.mark.parametrize(("values", "digits", "shown"), [
    ([2.5], 2, "2.50"), ([3.98, 8.7829, 5], 2, "3.98 to 8.78"), ([17.2, 17.4], 0, "17"),
    ([1234.4, 10], 0, "10 to 1,234"),
])
def test_a_range_is_the_smallest_and_the_largest(values, digits, shown):
    assert show_range(iter(values), digits) == shown


def test_the_mixed_load_has_every_length_as_often_as_the_others_and_not_in_order():
    lengths = [8, 16, 24, 32, 40, 48, 56, 64]
    mixed = chat.mix(lengths, 32)
    assert sorted(mixed) == sorted(lengths * 4)
    assert mixed[:8] != sorted(mixed[:8])


def test_works_take_turns_and_the_median_leaves_out_the_warm_up(monkeypatch):
    clock, order = [0.0], []
    costs = {"a": iter([100, 1, 2, 30]), "b": iter([100, 5, 5, 5])}
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(chat.time, "perf_counter", lambda: clock[0])

    def work(name):
        order.append(name)
        clock[0] += next(costs[name])

    assert chat._turns([lambda: work("a"), lambda: work("b")], 3) == [2, 5]
    assert order == ["a", "b"] * 4


def test_peak_memory_is_that_of_a_program_and_its_children(tmp_path):
    child = "import time; held = bytearray(200_000_000); time.sleep(1.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    seconds, peak = run_measured([sys.executable, "-c", code], ROOT, tmp_path / "log.txt")
    assert 200e6 < peak < 400e6
    assert seconds >= 1.5
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "done\n"
    with refuses("bench-failed") as refusal:
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], ROOT, tmp_path / "log.txt")
    assert "ended with 3" in refusal.value.what


@pytest.mark.slow
def test_everything_is_measured_on_what_a_page_has_registered(tiny, tmp_path, monkeypatch):
    # The page itself, at its smallest; then each comparison once, with answers of four tokens.
    from course.execute import execute

    store = "sqlite:///" + (tmp_path / "mlflow.db").as_posix()
    execute("CustomPythonWrapper", {"model": "tiny-phi3", "tracking_uri": store, "max_tokens": 4}, tmp_path / "page")
    monkeypatch.setattr(chat, "PAUSE", 0)
    ratios, raw = chat.bench_chat(store, "tiny-phi3", repeats=1, tokens=4)
    assert set(ratios) == set(REACH) - {"track_ratio", "single_llamacpp", "callers8_llamacpp"}  # it has no GGUF
    assert all(ratio > 0 for ratio in ratios.values())
    assert json.loads(json.dumps(raw)) == raw
    assert set(raw) == {"single", "rows16", "callers8", "stream_ttft", "growth", "memory", "log_disk"}
    assert list(raw["growth"]["tokens_per_second_by_callers"]) == ["1", "2", "4", "8", "16"]
    assert 3 < len(raw["growth"]["by_prompt_tokens"]) < 7  # the longest prompts are longer than its context
    assert raw["memory"]["callers8_bytes"] >= raw["memory"]["load_bytes"] > 1e8
    assert raw["log_disk"]["logged_bytes"] > raw["memory"]["model_bytes"]
    assert mlflow.get_tracking_uri() == store
