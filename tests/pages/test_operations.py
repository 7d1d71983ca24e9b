"""Operations, executed with its exercises solved: what it shows, what it leaves in the registry, what it ends.

Run: python -m helpers test tests/pages/test_operations.py
"""

import re
import time

import mlflow
import psutil
import pytest
from support.executed import Executed, assert_clean, checks, execute_once

FAMILIES = ["facts", "format", "json", "odd", "multi-turn", "languages", "injection"]
NAMES = {"transformers": "slm-transformers", "onnx": "slm-onnx"}


@pytest.fixture(scope="module")
def track() -> str:
    return "onnx"


@pytest.fixture(scope="module")
def executed() -> Executed:
    return execute_once("operations")


def test_the_page_runs_clean_and_each_solution_passes(executed):
    assert_clean(executed)
    assert [said.partition("\n")[0] for said in checks(executed)] == ["PASS"] * 6


def test_the_gate_refuses_the_worse_challenger_with_the_rows_that_decided(executed, track):
    gate = executed.shown("The gate\n")
    assert re.search(r"decision +refused", gate)
    assert executed.shown("rows decided\n").count("\n") > 3
    table = executed.shown("Prompts met, by family\n")
    assert [row.split("  ")[0] for row in table.splitlines()[4:]] == FAMILIES
    name = NAMES[track]
    client = mlflow.MlflowClient(executed.store)
    versions = {
        version.tags["title"]: version
        for version in client.search_model_versions(f"name = '{name}'")
    }
    assert set(versions) == {"steady", "lively"}  # the broken one is gone
    assert client.get_registered_model(name).aliases == {
        "champion": versions["steady"].version,
        "challenger": versions["lively"].version,
    }
    assert versions["lively"].tags["gate"]


def test_texts_stay_out_of_the_traces_unless_asked_for(executed):
    told = executed.shown("Does the trace know the lighthouse?")
    assert re.search(r"texts kept out +False\ntexts kept +True", told)
    assert "True" not in executed.shown("What the collector got")


def test_the_service_serves_what_it_should_and_refuses_the_rest(executed, track):
    assert re.search(r"version +" + NAMES[track] + "/1", executed.shown("One question\n"))
    assert "rate_limit_error" in executed.shown("Eight at once\n")
    assert re.search(r"answered +8", executed.shown("Eight patient clients\n"))
    parsed = {"onnx": "City(city=", "transformers": "response_format"}[track]
    assert parsed in "\n".join(executed.output("class City"))
    assert re.search(
        r"slm_model_failed_version +3",
        executed.shown("While the alias points to the broken version\n"),
    )
    table = executed.shown("In the store\n")
    before_after = re.findall(r"^(versions|models|runs) +(\d+) +(\d+)$", table, re.MULTILINE)
    assert len(before_after) == 3
    assert all(before == after for _, before, after in before_after)


def test_drift_leaves_its_band_when_the_traffic_changes(executed):
    for figure in ("tokens of an answer: a band", "share of refused requests: a band"):
        assert "window 9 leaves it" in executed.shown(figure)


def test_no_program_of_the_page_outlives_it(executed):
    def left():
        return [
            process.cmdline()
            for process in psutil.process_iter(["cmdline"])
            if executed.database in " ".join(process.info["cmdline"] or [])
        ]

    for _ in range(100):  # they end when their kernel has ended
        if not left():
            break
        time.sleep(0.2)
    assert left() == []
