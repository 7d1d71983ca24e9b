"""A logged model of no weights that answers every page's requests; and a page's cells, run by themselves around it.

MLflow loads it by this module's name.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, Schema

from helpers import (
    CourseError,
    check_model,
    check_name,
    check_run,
    compare_figures,
    in_terminal,
    name_run,
    pinned,
    show_table,
    tracking_store,
    ui_addresses,
)
from helpers.exercises import check
from helpers.page import open_store
from helpers.parameters import DEFAULTS
from helpers.release import choose_alias, find_champion, model_of
from support import NAMES, ROOT, find_cell

FIGURES = {
    "load_seconds": 1.0,
    "first_token_seconds": 0.5,
    "tokens_per_second": 10.0,
    "disk_bytes": 2e6,
    "peak_memory_bytes": 1e8,
}


class Small:
    """What MLflow calls, and what the pages take out of a loaded model."""

    engine = python_model = None

    def predict(self, rows, params=None):
        answers = ["Madrid"] * len(rows)
        return (
            answers
            if "prompt" in rows
            else [{"choices": [{"message": {"content": text}}]} for text in answers]
        )

    def get_raw_model(self):
        return self

    def unwrap_python_model(self):
        return self


def _load_pyfunc(path):
    small = Small()
    small.python_model = small
    return small


@dataclass
class Stand:
    """A page in a store of its own that has logged, measured and shown its model; what it has bound is in ``names``."""

    page: str
    names: dict
    client: mlflow.MlflowClient

    @property
    def name(self) -> str:
        return NAMES[self.page]

    @property
    def run_id(self) -> str:
        return self.names["run"].info.run_id

    @property
    def artifacts(self) -> Path:
        return Path(
            mlflow.artifacts.download_artifacts(self.names["model_info"].model_uri)
        ).parents[2]

    def log(self, field: str = "", file: Path | None = None) -> object:
        """Log another small model, which takes a field of that name, to a run of its own."""
        field = field or ("prompt" if self.page == "CustomPythonWrapper" else "messages")
        with mlflow.start_run(run_name=self.names["model"]) as self.names["run"]:
            mlflow.log_param("model", self.names["model"])
            return mlflow.pyfunc.log_model(
                name=self.name,
                loader_module="support.small_model",
                data_path=str(file or self.names["file"]),
                pip_requirements=["mlflow"],
                signature=ModelSignature(inputs=Schema([ColSpec(AnyType(), field)])),
            )

    def cell(self, text: str) -> object:
        """Run the one cell that holds a text, and return what stands in its last line."""
        *body, last = ast.parse(find_cell(self.page, text)).body
        if not isinstance(last, ast.Expr):
            return exec(find_cell(self.page, text), self.names)
        exec(compile(ast.Module(body, []), text, "exec"), self.names)
        return eval(compile(ast.Expression(last.value), text, "eval"), self.names)


# What the cells of every page take from `helpers`.
PAGE_HELPERS = {
    "open_store": open_store,
    "tracking_store": tracking_store,
    "choose_alias": choose_alias,
    "find_champion": find_champion,
    "model_of": model_of,
    "check_model": check_model,
    "check_name": check_name,
    "check_run": check_run,
    "show_table": show_table,
}


def use_store(store: str) -> dict:
    """Make a store the active one; return what a page has bound when it logs."""
    mlflow.set_tracking_uri(store)
    mlflow.create_experiment("cells", artifact_location=tracking_store(store).artifact_location)
    mlflow.set_experiment("cells")
    return PAGE_HELPERS | {
        "mlflow": mlflow,
        "parameters": DEFAULTS,
        "name_run": name_run,
        "pinned": pinned,
        "client": mlflow.MlflowClient(),
        "MlflowException": mlflow.MlflowException,
        "tracking_uri": store,
    }


def mend(refusal: CourseError) -> None:
    """Run the call that a refusal names."""
    exec(refusal.fix.partition(": ")[2].removesuffix("."), {"mlflow": mlflow})


def make_stand(page: str, store: str, folder: Path, model: str = "smollm2-135m") -> Stand:
    """Run a page's set-up cell on a store, and log to it what the rest of the page needs."""
    weights = folder / "weights.bin"
    weights.write_bytes(b"w" * 10_000)
    names = PAGE_HELPERS | {
        "tracking_uri": store,
        "model": model,
        "file": weights,
        "ROOT": ROOT,
        "compare_figures": compare_figures,
        "ui_addresses": ui_addresses,
        "in_terminal": in_terminal,
        "figures": FIGURES,
        "question": "Where?",
        "answer": "Madrid",
        "messages": [{"role": "user", "content": "Where?"}],
        "prompt": "Where?",
        "pirate": [{"content": "Who?"}],
        "pirate_answer": "I",
        "pipeline": None,
    }
    names["check"] = lambda exercise: check(exercise, names)
    stand = Stand(page, names, mlflow.MlflowClient(store))
    stand.cell("set_experiment(")
    names["model_info"] = stand.log()
    names["client"] = stand.client
    names["chat"] = names["loaded"] = mlflow.pyfunc.load_model(names["model_info"].model_uri)
    return stand
