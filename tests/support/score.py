"""Lets init() of ``serving/score.py`` load a model in this process, as Azure does."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from serving import score


@contextlib.contextmanager
def undo_init() -> Iterator[pytest.MonkeyPatch]:
    """Take back the variable that init() sets, for which other tests' errors would lack their details."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_SCHEMA_DETAILS", "")
        patch.delenv("MLFLOW_DISABLE_SCHEMA_DETAILS")
        yield patch


@contextlib.contextmanager
def load_score(folder: Path) -> Iterator[mlflow.pyfunc.PyFuncModel]:
    """Let init() load the model that was registered in a folder; yield it."""
    with undo_init() as patch:
        patch.setenv("AZUREML_MODEL_DIR", str(folder))
        score.init()
        yield score._model._model
        score._model.close()
