"""What is made from other files: environment.yml, the documents' tables, the chart.

Run: python -m helpers test tests/unit/course/test_generate.py
"""

import re

import pytest
import yaml
from support import ROOT
from support.runs import run

from benchmarks.figures import FIGURES, RATIOS, find_misses, machine_name, read_runs
from course.environment import pins
from course.generate import (
    CHART,
    PAGES_WITH_TABLES,
    TABLE,
    bench_digest,
    environment_yml,
    figures_table,
    models_table,
    ratios_table,
    summary_table,
    with_tables,
)
from helpers import read_catalogue


def test_environment_yml_is_what_pyproject_makes():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert text == environment_yml()
    pip = yaml.safe_load(text)["dependencies"][-1]["pip"]
    assert {f"{name}=={version}" for name, version in pins(("dev",)).items()} <= {
        line.partition(";")[0] for line in pip
    }


def test_each_table_stands_on_one_page():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    found = [
        (match[2], page)
        for page in documents
        for match in TABLE.finditer(page.read_text(encoding="utf-8"))
    ]
    assert sorted(table for table, _ in found) == [
        "batch",
        "entries",
        "exercises",
        "figures",
        "models",
        "pages",
        "ratios",
        "service",
        "summary",
    ]
    assert {page for _, page in found} == set(PAGES_WITH_TABLES)


@pytest.mark.parametrize("page", PAGES_WITH_TABLES, ids=lambda page: page.name)
def test_a_page_shows_what_is_kept_now(page):
    text = page.read_text(encoding="utf-8")
    assert text == with_tables(text)


def test_the_chart_shows_the_measurements_that_are_kept_and_the_table_the_catalogue():
    assert f"sha256 {bench_digest()}" in CHART.read_text(encoding="utf-8")
    assert all(f"`{name}`" in models_table() for name in read_catalogue())


def cells(table, start):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_table_shows_the_range_over_the_runs_and_what_missed_its_target():
    runs = [
        run(rows16=2.5, single_overhead=0.998),
        run("2026-01-03", 4, rows16=3.25, single_overhead=1.0),
    ]
    runs[0]["missed"] = {"single_overhead": "Another program ran."}
    runs[1]["missed"] = {"rows16": "A reason, although the figure meets its target."}
    table = ratios_table(runs)
    assert cells(table, "tokens per second, 16 rows in one `predict` | 16 calls")[2:] == [
        "2.500 to 3.250",
        "at least 1.8",
    ]
    single = "tokens per second, one caller of `predict`"
    assert cells(table, single)[2:] == ["0.998 to 1.000", "at least 1; missed on 2026-01-02"]
    sentence = f"Missed on 2026-01-02, {single}, compared with a bare `og.Generator` loop: Another"
    assert sentence in table
    assert "one caller 100; 16 rows 100;" in table
    twice = ratios_table([runs[0], runs[0]])  # two runs of a day, and one reason
    assert cells(twice, single)[3] == cells(table, single)[3]
    assert twice.count("Another program ran.") == 1
    assert "issed" not in ratios_table(runs[1:]) + figures_table(runs)
    runs[1]["raw"]["prepare"]["peak_memory_bytes"] = 2.6e9
    runs[1]["missed"] = {"prepare: peak_memory_bytes": "The disk was slow."}
    table = figures_table(runs)
    memory = "peak memory while preparing the model"
    assert cells(table, memory)[1:] == ["1.0 to 2.6 GB", "under 2.5 GB; missed on 2026-01-03"]
    assert f"Missed on 2026-01-03, {memory}: The disk was slow.\n" in table


def test_a_figure_that_a_run_lacks_is_left_out_of_its_range_and_its_row():
    old = run()
    new = run("2026-01-03", 4)
    new["raw"]["test"] = {"seconds": 660, "tests_seconds": 480, "disk_bytes": 5.49e9}
    new["raw"]["pages"]["TransformerPipeline on smollm2-135m"]["seconds"] = 20.6
    table = figures_table([old, new])
    assert cells(table, "`make test` from a bare checkout")[1:] == ["11.0 min", "under 15 min"]
    assert cells(table, "`make test` after set-up")[1:] == ["8.0 min", "under 11 min"]
    assert cells(table, "`TransformerPipeline`: time of Run All")[1:] == [
        "10 to 21 s",
        "under 180 s",
    ]
    assert "`make test`" not in figures_table([old]).split("Measured by")[0]
    assert table.endswith(
        "in 2 runs on 2 cores (Fast, Linux, 16 GB), Python 3.11.7: 2026-01-02; "
        "4 cores (Fast, Linux, 16 GB), Python 3.11.7: 2026-01-03.\n"
    )
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert {len(line.strip("|").split("|")) for line in rows} == {3}
    # The first runs compared nothing but the tracks.
    old["ratios"] = {"track_ratio": 4.5}
    del old["raw"]["chat"]
    table = ratios_table([old, new])
    assert cells(table, "tokens per second, track B")[2] == "4.000 to 4.500"
    assert cells(table, "tokens per second, 16 rows in one `predict` | 16 calls")[2] == "1.800"
    assert "one caller 100;" in table


def test_the_summary_has_a_column_for_each_page_and_at_most_ten_rows():
    old = run()
    new = run("2026-01-03", callers8_llamacpp=2.5)
    new["raw"]["pages"]["ChatModel on smollm2-135m"]["seconds"] = 30
    new["raw"]["chat"]["callers8"] = {
        "tokens_per_second": {"chat_model": 205, "lesson_behind_a_lock": 77}
    }
    table = summary_table([old, new])
    assert cells(table, "time of Run All")[1:] == ["10 s", "10 s", "10 to 30 s"]
    assert cells(table, "tokens per second, 8 callers")[1:] == ["", "77 to 100", "100 to 205"]
    assert cells(table, "8 callers: times llama.cpp")[1:] == ["", "", "1.25 to 2.50"]
    assert table.endswith(
        "Set-up: time to prepare the model: 1 s; peak memory while preparing the model: 1.0 GB.\n"
    )
    rows = [line for line in summary_table(read_runs()).splitlines() if line.startswith("|")][2:]
    assert len(rows) <= 10
    assert all(any(cell.strip() for cell in row.strip("|").split("|")[1:]) for row in rows)


def test_every_kept_run_meets_its_targets_or_says_why_not():
    for one in read_runs():
        # A run may give reasons for figures that are no longer measured.
        reasons = one.get("missed", {})
        assert set(find_misses(one)) <= set(reasons), f"{one['date']}, {machine_name(one)}"
        assert all(len(reason) > 20 and reason.endswith(".") for reason in reasons.values())


def test_the_newest_run_measured_everything():
    runs = read_runs()
    assert len(runs) > 1
    assert set(RATIOS) <= set(runs[-1]["ratios"])
    table = figures_table(runs[-1:])
    assert all(f"| {figure.what} |" in table for figure in FIGURES)


def test_the_kept_ratios_are_not_rounded():
    ratios = [ratio for one in read_runs() for ratio in one["ratios"].values()]
    assert sum(len(re.sub(r"^\d+\.", "", repr(ratio))) > 4 for ratio in ratios) > len(ratios) * 0.9
