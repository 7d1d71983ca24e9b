"""The benchmark: its targets, its ranges, and the parts that it measures with.

Run: python -m helpers test tests/services/test_bench.py
"""

import json
import sys

import pytest
from support import ROOT, refuses
from support.runs import run

from benchmarks import notebooks, timing
from benchmarks.clients import Clients
from benchmarks.contenders import run_requests
from benchmarks.fidelity import agreement
from benchmarks.figures import (
    FIGURES,
    KEPT_RUNS,
    RATIOS,
    SERVICE_RATIOS,
    find,
    find_misses,
    keep_run,
    machine_name,
    meets,
    read_runs,
    show_range,
    write_runs,
)
from benchmarks.notebooks import bench, run_measured
from benchmarks.service import choose_streams
from benchmarks.timing import interleave, median_seconds, mix, percentile, timed
from course import generate
from course.generate import batch_table, ratios_table, service_table
from helpers.servers import running


@pytest.mark.parametrize(
    ("value", "target", "is_met"),
    [
        (0.97, {"at_least": 0.97}, True),
        (0.968, {"at_least": 0.97}, False),
        (0.9699999, {"at_least": 0.97}, False),
        (2, {"at_least": 0.97}, True),
        (1.0, {"under": 1.0}, False),
        (0.9999999, {"under": 1.0}, True),
        (1.0001, {"under": 1.0}, False),
        (5, {}, True),
    ],
)
def test_a_target_is_compared_with_the_unrounded_figure(value, target, is_met):
    assert meets(value, **target) is is_met


def test_a_run_says_what_it_misses():
    assert find_misses(run()) == []
    assert find_misses(run(single_overhead=0.968, turn5_llamacpp=0.6)) == [
        "single_overhead",
        "turn5_llamacpp",
    ]
    slow = run()
    slow["raw"]["pages"]["TransformerPipeline on smollm2-135m"]["seconds"] = 300
    slow["raw"]["prepare"]["peak_memory_bytes"] = 2.5e9
    slow["raw"]["test"] = {"seconds": 899.9, "tests_seconds": 661, "disk_bytes": 1}
    assert set(find_misses(slow)) == {
        "pages: TransformerPipeline on smollm2-135m: seconds",
        "prepare: peak_memory_bytes",
        "test: tests_seconds",
    }
    assert set(run()["ratios"]) == set(RATIOS)


def test_a_run_without_a_figure_does_not_miss_it():
    old = {"ratios": {"track_ratio": 4.0}, "raw": {"pages": {}, "test": {"seconds": 719.9}}}
    assert find_misses(old) == []
    assert {find(old["raw"], figure.path) for figure in FIGURES} == {None, 719.9}


def test_the_oldest_runs_of_a_machine_are_dropped_and_those_of_another_stay(tmp_path):
    def numbered(number, **machine):
        one = run()
        one["machine"] |= machine
        return one | {"raw": number}

    runs = [numbered("other", cores=4), numbered("more memory", memory_bytes=32e9)]
    for number in range(KEPT_RUNS + 2):
        # A system does not always report the same size.
        runs = keep_run(runs, numbered(number, memory_bytes=15.7e9 + number))
    assert [one["raw"] for one in runs] == ["other", "more memory", *range(2, KEPT_RUNS + 2)]
    assert keep_run(runs, runs[3]) == runs
    assert {machine_name(one) for one in runs} == {
        "4 cores (Fast, Linux, 16 GB)",
        "2 cores (Fast, Linux, 32 GB)",
        "2 cores (Fast, Linux, 16 GB)",
    }
    write_runs(runs, tmp_path / "bench.json")
    assert read_runs(tmp_path / "bench.json") == runs
    assert read_runs(tmp_path / "none.json") == []


@pytest.mark.parametrize(
    ("values", "digits", "shown"),
    [
        ([2.5], 2, "2.50"),
        ([3.98, 8.7829, 5], 2, "3.98 to 8.78"),
        ([17.2, 17.4], 0, "17"),
        ([1234.4, 10], 0, "10 to 1,234"),
    ],
)
def test_a_range_is_the_smallest_and_the_largest(values, digits, shown):
    assert show_range(iter(values), digits) == shown


def test_the_mixed_load_has_every_length_as_often_as_the_others_and_not_in_order():
    lengths = [8, 16, 24, 32, 40, 48, 56, 64]
    mixed = mix(lengths, 32)
    assert sorted(mixed) == sorted(lengths * 4)
    assert mixed[:8] != sorted(mixed[:8])
    streamed = [
        length for length, stream in zip(mixed, choose_streams(32, 8), strict=True) if stream
    ]
    assert sorted(streamed) == sorted(lengths * 2)


def test_works_are_interleaved_and_the_warm_up_is_left_out(monkeypatch):
    clock, order = [0.0], []
    costs = {"a": iter([100, 1, 2, 30]), "b": iter([100, 5, 5, 5])}
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def work(name):
        order.append(name)
        clock[0] += next(costs[name])

    works = {name: timed(lambda name=name: work(name)) for name in costs}
    assert interleave(works, 3) == {"a": [1, 2, 30], "b": [5, 5, 5]}
    assert order == ["a", "b"] * 4
    costs.update(a=iter([100, 1, 2, 30]), b=iter([100, 5, 5, 5]))
    works = {name: lambda name=name: work(name) for name in costs}
    assert median_seconds(works, 3) == {"a": 2, "b": 5}


@pytest.mark.parametrize(
    ("values", "share", "value"),
    [
        ([7], 0.95, 7),
        ([3, 1, 2], 0.5, 2),
        ([4, 3, 2, 1], 0.5, 2),
        (range(1, 101), 0.95, 95),
        (range(1, 22), 0.95, 20),
        (range(1, 21), 0.95, 19),
        ([1, 2], 1.0, 2),
        ([1, 9], 0.95, 9),
    ],
)
def test_a_percentile_is_one_of_the_values(values, share, value):
    assert percentile(values, share) == value


async def _stand_in(scope, receive, send):
    """Answer like a server that counts tokens: what was asked for, an error for 13, and one in the stream for 14."""
    asked = json.loads((await receive())["body"])
    length = asked["max_tokens"]
    status = 500 if length == 13 else 200
    usage = {"usage": {"completion_tokens": length}}
    if asked.get("stream"):
        events = [{"choices": [{"delta": {"content": text}}]} for text in ("", "a", "b")]
        end = (
            [{"error": {"code": "failed"}}] if length == 14 else [{"choices": []} | usage, "[DONE]"]
        )
        body = "".join(
            f"data: {event if event == '[DONE]' else json.dumps(event)}\n\n"
            for event in events + end
        )
    else:
        body = json.dumps({"predictions": ["text"]} if "inputs" in asked else usage)
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body.encode()})


def test_clients_return_the_times_of_each_request_in_order():
    bodies = [{"max_tokens": 3}, {"max_tokens": 4, "stream": True}, {"max_tokens": 5, "inputs": {}}]
    with running(_stand_in) as address, Clients() as clients:
        for _ in range(2):
            seconds, replies = clients.ask(address, bodies * 4, 3)
            assert [reply["tokens"] for reply in replies] == [3, 4, 0] * 4
            assert [reply.get("texts") for reply in replies] == [None, None, ["text"]] * 4
            assert [reply["first_token_seconds"] is not None for reply in replies] == [
                False,
                True,
                False,
            ] * 4
            assert all(
                0
                < (reply["first_token_seconds"] or reply["seconds"])
                <= reply["seconds"]
                <= seconds
                for reply in replies
            )
        for wrong, says in (
            ({"max_tokens": 13}, "500"),
            ({"max_tokens": 14, "stream": True}, "failed"),
        ):
            with refuses("bench-request") as refusal:
                clients.ask(address, [bodies[0], wrong], 2)
            assert f"1 of 2 requests to {address} failed. The first: '{says}" in refusal.value.what
    with Clients() as clients, refuses("bench-request") as refusal:
        clients.ask(address, bodies, 3)  # nobody listens there any more
    assert "3 of 3 requests" in refusal.value.what


@pytest.mark.parametrize(
    ("answers", "references", "share"),
    [
        ([[1, 2], [3]], [[1, 2], [3]], 1.0),
        ([[1, 2, 9], [3]], [[1, 2, 4], [3]], 0.75),  # a share of all tokens, not of the answers
        ([[9, 2], []], [[1, 2], []], 0.5),
        ([[None]], [[1]], 0.0),
    ],
)
def test_agreement_is_the_share_of_equal_tokens_over_all_answers(answers, references, share):
    assert agreement(answers, references) == share


@pytest.mark.parametrize("callers", [1, 2, 3, 9])
def test_each_caller_asks_again_as_soon_as_it_has_an_answer(callers):
    steps, log = [0], []

    def start(length):
        return {"length": length, "until": steps[0] + length}

    def step():
        steps[0] += 1

    def read(begun):
        log.append(steps[0])
        return str(begun["length"]) if begun["until"] <= steps[0] else None

    lengths = [3, 1, 4, 1, 5]
    assert run_requests(start, step, read, lengths, callers) == ["3", "1", "4", "1", "5"]
    assert steps[0] == {1: 14, 2: 9, 3: 7, 9: 5}[callers]
    assert max(map(log.count, log)) == min(callers, len(lengths))


def test_the_service_has_its_own_ratios_and_the_times_of_the_last_run_that_measured_it():
    def grown(date, scale, **ratios):
        seconds = {
            "whole": {"median": 1.004 * scale, "p95": 2.0 * scale},
            "first_token": {"median": 0.25 * scale, "p95": 0.5 * scale},
        }
        one = run(date, **ratios)
        one["raw"]["chat"]["service"] = {
            "growth": {
                "1": {"openai_server": seconds, "llama_cpp": seconds},
                "64": {"openai_server": seconds},
            }
        }
        return one

    unmeasured = run("2026-01-04")
    for name in SERVICE_RATIOS:
        del unmeasured["ratios"][name]
    assert service_table([unmeasured]) == "No run has measured it.\n"
    runs = [
        grown("2026-01-02", 1, service8_llamacpp=0.9),
        grown("2026-01-03", 10, service8_llamacpp=1.25),
        unmeasured,
    ]
    table, chat_models = service_table(runs), ratios_table(runs)
    assert "| 0.900 to 1.250 | at least 1.15; missed on 2026-01-02 |" in table
    assert (
        "Missed on 2026-01-02, tokens per second, 8 clients, half of them streaming, compared with "
        "llama.cpp's server: no reason" in table
    )
    assert (
        "| 1 | this service | 10.04 s | 20.00 s | 2.50 s | 5.00 s |\n| 1 | llama.cpp's server | 10.04 s |"
        in table
    )
    assert table.endswith("| 64 | this service | 10.04 s | 20.00 s | 2.50 s | 5.00 s |\n")
    assert "clients" not in chat_models and "16 rows" in chat_models
    assert "issed" not in chat_models and "16 rows" not in table


def test_the_batch_has_its_own_ratios_and_rows_per_second():
    one = run("2026-01-02", spark_two_workers=1.5)
    assert batch_table([one]) == "No run has measured it.\n"
    one["raw"]["chat"]["spark"] = {
        "rows_per_second": {"1": 1.0, "2": 1.5, "predict": 2.04},
        "few_rows_seconds": 20.4,
    }
    table = batch_table([one, run("2026-01-03", spark_two_workers=1.7)])
    assert "| rows per second, two workers | one worker | 1.500 to 1.700 |" in table
    assert "one worker 1.0; two workers 1.5; one `predict` 2.0" in table and "takes 20 s" in table
    assert "workers" not in ratios_table([one])


def test_the_services_chart_has_a_line_for_each_server_that_was_measured(tmp_path, monkeypatch):
    seconds = {part: {"median": 1.0, "p95": 2.0} for part in ("whole", "first_token")}
    monkeypatch.setattr(generate, "SERVICE_CHART", tmp_path / "service.svg")
    for servers in (["openai_server"], ["openai_server", "llama_cpp"]):
        generate.draw_service_chart(
            {clients: dict.fromkeys(servers, seconds) for clients in ("1", "2", "64")}
        )
        drawn = (tmp_path / "service.svg").read_text(encoding="utf-8")
        assert generate.bench_digest() in drawn and "clients at once" in drawn and ">64<" in drawn
        assert ("llama.cpp's" in drawn) is ("llama_cpp" in servers)


def test_peak_memory_is_that_of_a_program_and_its_children(tmp_path):
    child = "import time; held = bytearray(200_000_000); time.sleep(0.5)"
    code = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print('done')"
    )
    seconds, peak = run_measured([sys.executable, "-c", code], ROOT, tmp_path / "log.txt")
    assert 200e6 < peak < 400e6
    assert seconds >= 0.5
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "done\n"
    with refuses("bench-failed") as refusal:
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], ROOT, tmp_path / "log.txt")
    assert "ended with 3" in refusal.value.what


def test_a_measurement_is_written_unrounded_and_kept_beside_the_others_when_asked(
    tmp_path, monkeypatch, capsys
):
    folder, kept = tmp_path / "bench", tmp_path / "bench.json"
    rates = {"TransformerPipeline": 17.5, "CustomPythonWrapper": 153.7, "ChatModel": 150.0}
    measured, other = run(), run(cores=4)
    measured["ratios"].pop("track_ratio")
    page = measured["raw"]["pages"]["TransformerPipeline on smollm2-135m"]
    monkeypatch.setattr(
        notebooks, "_bench_test", lambda folder: {"seconds": 5399.9, "tests_seconds": 4800.0}
    )
    monkeypatch.setattr(notebooks, "bench_prepare", lambda folder: measured["raw"]["prepare"])
    monkeypatch.setattr(
        notebooks,
        "bench_page",
        lambda page_name, model, store, folder: (page, {"tokens_per_second": rates[page_name]}),
    )
    monkeypatch.setattr(
        notebooks, "bench_chat", lambda store: (measured["ratios"], measured["raw"]["chat"])
    )
    with refuses("bench-missing"):
        bench(keep=True, folder=folder, kept=kept)
    write_runs([other], kept)
    assert bench(keep=False, folder=folder, kept=kept) == 0
    (one,) = read_runs(folder / "bench.json")
    assert one["ratios"] == measured["ratios"] | {"track_ratio": 153.7 / 17.5}
    assert set(one["raw"]["pages"]) == set(measured["raw"]["pages"])
    assert one["machine"]["memory_bytes"] > 1e9 and one["machine"]["processor"]
    assert "misses its target: test: tests_seconds" in capsys.readouterr().out
    assert read_runs(kept) == [other]
    assert bench(keep=True, folder=folder, kept=kept) == 0
    assert read_runs(kept) == [other, one]
