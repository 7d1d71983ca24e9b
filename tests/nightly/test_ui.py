"""Opens the addresses that a page gives in the MLflow UI, in a real browser: each shows what the page says it shows.

Screenshots are left in build/browser.
Run: python -m helpers test tests/nightly/test_ui.py
"""

import os
import sys
from dataclasses import dataclass

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from support.jupyter import browser, elsewhere, expect, need_chromium, server, take

from helpers.tracking import UI, tracking_store, ui_addresses

need_chromium()

NAME, MODEL = "tiny-phi3", "slm-transformers"
PARAMETERS = {"model": NAME, "question": "What is the capital of Spain?", "max_tokens": "64"}
FIGURES = {"load_seconds": 0.4, "tokens_per_second": 30.5, "disk_bytes": 1234567.0}


@dataclass(frozen=True)
class Ui:
    """What was logged, and the addresses of `ui_addresses` in a UI that runs."""

    runs: list
    addresses: dict


@pytest.fixture(scope="module")
def ui(tmp_path_factory):
    """Log a run of each track and a registered model, and start the UI on their store as `python -m helpers ui`."""
    folder = tmp_path_factory.mktemp("ui")
    store = tracking_store(f"sqlite:///{(folder / 'mlflow.db').as_posix()}")
    client = MlflowClient(store.uri, store.uri)
    runs = []
    for page in ("TransformerPipeline", "CustomPythonWrapper"):
        experiment = client.create_experiment(page, artifact_location=store.artifact_location)
        run = client.create_run(experiment, run_name=f"{NAME} of {page}")
        client.log_batch(
            run.info.run_id,
            [Metric(name, value, 0, 0) for name, value in FIGURES.items()],
            [Param(*parameter) for parameter in PARAMETERS.items()],
        )
        client.set_terminated(run.info.run_id)
        runs.append(client.get_run(run.info.run_id))
    client.create_registered_model(MODEL)
    version = client.create_model_version(
        MODEL, f"{runs[0].info.artifact_uri}/model", runs[0].info.run_id
    )
    client.set_registered_model_alias(MODEL, "champion", version.version)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
    }
    with server(
        [sys.executable, "-m", "helpers", "ui", "--port", "0"],
        environment | {"COURSE_TRACKING_URI": store.uri},
        folder / "ui.log",
        r"http://127\.0\.0\.1:[1-9]\d*",
    ) as address:
        yield Ui(
            runs,
            {
                what: url.replace(UI, address)
                for what, url in ui_addresses(store, runs, MODEL).items()
            },
        )


@pytest.fixture(scope="module")
def chromium():
    with browser() as (context, asked):
        yield context, asked


@pytest.fixture
def page(chromium):
    with chromium[0].new_page() as page:
        yield page


def test_the_runs_page_shows_its_name_and_its_parameters(ui, page):
    page.goto(ui.addresses["this run"])
    expect(page.get_by_role("heading", name=ui.runs[0].info.run_name)).to_be_visible()
    for name, value in PARAMETERS.items():
        expect(
            page.get_by_role("row").filter(has_text=name).filter(has_text=value).first
        ).to_be_visible()
    take(page, "mlflow-run")


def test_the_comparison_shows_both_runs_and_their_figures(ui, page):
    page.goto(ui.addresses["side by side"])
    for run in ui.runs:
        expect(page.get_by_text(run.info.run_name).first).to_be_visible()
    for figure in FIGURES:
        expect(page.get_by_text(figure).first).to_be_attached()
    take(page, "mlflow-compare")


def test_the_registered_models_page_shows_its_name_and_its_alias(ui, page):
    page.goto(ui.addresses["the registered model"])
    expect(page.get_by_role("heading", name=MODEL)).to_be_visible()
    expect(page.get_by_text("champion").first).to_be_visible()
    take(page, "mlflow-model")


def test_no_request_leaves_this_machine(ui, page, chromium):
    page.goto(ui.addresses["this run"])
    expect(page.get_by_text(ui.runs[0].info.run_name).first).to_be_visible()
    assert elsewhere(chromium[1]) == []
