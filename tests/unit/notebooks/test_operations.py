"""The operations page for both tracks, from end to end: what it shows, what it leaves in the registry, what it ends.

Run: python -m helpers test tests/unit/notebooks/test_operations.py
"""

import re
import sys
import tempfile
import time
from pathlib import Path

import httpx
import mlflow
import nbformat
import psutil
import pytest
from support import run_python
from support.projects import activated, project

from helpers.models.catalogue import TRACKS
from helpers.operations.programs import start_program

pytestmark = pytest.mark.slow
NAMES = {"transformers": "slm-transformers", "onnx": "slm-onnx"}
FAMILIES = ["facts", "format", "json", "odd", "multi-turn", "languages", "injection"]


@pytest.fixture(scope="module", params=TRACKS)
def track(request):
    return request.param


@pytest.fixture(scope="module")
def ran(tmp_path_factory, track, smol):
    """Run the page on the real model, solved; return its store, its outputs as text by cell, and what it printed."""
    folder = tmp_path_factory.mktemp("öperations 1")
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    result = run_python(folder, "-m", "helpers", "notebook", "Operations", "--solved", "-p", "track", track,
                        "-p", "model", "smollm2-135m", "-p", "tracking_uri", store, "--output", folder, network=False)
    assert result.returncode == 0, result.stdout + result.stderr
    cells = nbformat.read(folder / "Operations.ipynb", as_version=4).cells
    return store, [(cell.source, cell.outputs) for cell in cells if cell.cell_type == "code"], folder, result


def said(outputs):
    """Return what a cell shows as text."""
    return "\n".join(output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
                     for output in outputs)


def shown(ran, text):
    """Return what the one cell shows that shows a text."""
    (found,) = [said(outputs) for _, outputs in ran[1] if text in said(outputs)]
    return found


def test_the_page_runs_without_a_word_of_complaint(ran):
    _, cells, folder, result = ran
    for source, outputs in cells:
        for output in outputs:
            told = output.get("text", "") if output.get("name") == "stderr" else ""
            assert not re.sub(r"(Successfully r|R)egistered model .*|Created version .*|\s", "", told), (source, told)
    log = (folder / "Operations.log").read_text(encoding="utf-8")
    assert "Warning" not in result.stderr + log, log
    assert sum(said(outputs).startswith("PASS") for _, outputs in cells) == 6


def test_the_gate_refuses_the_worse_challenger_with_the_rows_that_decided(ran, track):
    gate = shown(ran, "The gate\n")
    assert re.search(r"decision +refused", gate)
    assert shown(ran, "rows decided\n").count("\n") > 3
    table = shown(ran, "Prompts met, by family\n")
    assert [row.split("  ")[0] for row in table.splitlines()[4:]] == FAMILIES
    store, name = ran[0], NAMES[track]
    client = mlflow.MlflowClient(store)
    versions = {version.tags["title"]: version for version in client.search_model_versions(f"name = '{name}'")}
    assert set(versions) == {"steady", "lively"}  # the broken one is gone
    assert client.get_registered_model(name).aliases == {
        "champion": versions["steady"].version, "challenger": versions["lively"].version}
    assert versions["lively"].tags["gate"]


def test_texts_stay_out_of_the_traces_unless_asked_for(ran):
    assert re.search(r"texts kept out +False\ntexts kept +True", shown(ran, "Does the trace know the lighthouse?"))
    assert "True" not in shown(ran, "What the collector got")


def test_the_service_serves_what_it_should_and_refuses_the_rest(ran, track):
    assert re.search(r"version +" + NAMES[track] + "/1", shown(ran, "One question\n"))
    assert "rate_limit_error" in shown(ran, "Eight at once\n")
    assert re.search(r"answered +8", shown(ran, "Eight patient clients\n"))
    parsed = {"onnx": "City(city=", "transformers": "response_format"}[track]
    assert parsed in "\n".join(said(outputs) for source, outputs in ran[1] if "class City" in source)
    assert re.search(r"slm_model_failed_version +3", shown(ran, "While the alias points to the broken version\n"))
    before_after = re.findall(r"^(versions|models|runs) +(\d+) +(\d+)$", shown(ran, "In the store\n"), re.MULTILINE)
    assert len(before_after) == 3
    assert all(before == after for _, before, after in before_after)


def test_drift_leaves_its_band_when_the_traffic_changes(ran):
    for figure in ("tokens of an answer: a band", "share of refused requests: a band"):
        assert "window 9 leaves it" in shown(ran, figure)


def test_no_program_of_the_page_outlives_it(ran):
    store = ran[0].removeprefix("sqlite:///")

    def left():
        return [process.cmdline() for process in psutil.process_iter(["cmdline"])
                if store in " ".join(process.info["cmdline"] or [])]

    for _ in range(100):  # they end when their kernel has ended
        if not left():
            break
        time.sleep(0.2)
    assert left() == []


# --- as a project ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def projects(tmp_path_factory):
    """Return a store with tiny versions that `mlflow run . -e operations` made, what it printed, and variables."""
    folder = tmp_path_factory.mktemp("projects 1")
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    variables = activated(folder)
    result = run_python(folder, *project("operations", model="tiny-phi3", track="transformers", tracking_uri=store),
                        cwd=folder, network=False, **variables)
    return store, result, variables


def test_mlflow_run_runs_the_page_on_the_other_track_with_its_exercises_open(projects):
    store, result, _ = projects
    assert result.returncode == 0, result.stdout + result.stderr
    (page,) = re.findall(r"page: (\S.*)\.html", result.stdout)
    assert "Not yet: put your own" in Path(f"{page}.ipynb").read_text(encoding="utf-8")
    aliases = mlflow.MlflowClient(store).get_registered_model("slm-transformers").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"champion": 1, "challenger": 2}


def test_mlflow_run_serves_until_a_signal_comes(projects, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)  # MLflow sets it, and another test's store may be meant
    store, _, variables = projects
    command = [sys.executable, *map(str, project("serve", model="models:/slm-transformers@champion", port=0))]
    program = start_program(command, r"Serving slm-transformers, version 1, at (http://\S+)/v1", tmp_path / "log",
                            **variables | {"COURSE_TRACKING_URI": store})
    try:
        reply = httpx.post(f"{program.address}/v1/chat/completions", trust_env=False, timeout=60, json={
            "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2})
        assert reply.json()["usage"]["completion_tokens"] == 2, reply.text
    finally:
        program.stop()
    assert not program.running


@pytest.mark.index
def test_mlflow_run_makes_a_fresh_environment_from_which_the_course_finds_its_own(projects, tmp_path):
    store, _, variables = projects
    words = project("serve", local=False, model="models:/nobody@champion", port=0)
    # MLflow puts the environment's path into a shell's line as it is, so it may have no space, as a checkout's may.
    with tempfile.TemporaryDirectory() as environments:
        result = run_python(tmp_path, *words, cwd=tmp_path, MLFLOW_ENV_ROOT=environments,
                            **variables | {"COURSE_TRACKING_URI": store})
        assert result.returncode == 1 and list(Path(environments).iterdir()), result.stderr
    assert "names no version at models:/nobody@champion" in result.stderr, result.stderr
