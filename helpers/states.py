"""Checks that a run, a model or a registered name still exists in MLflow; raises CourseError if not."""

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from helpers.errors import CourseError
from helpers.stores.database import database_path
from helpers.tracking import tracking_store


def check_run(run: object) -> None:
    """Raise CourseError unless an ``mlflow.entities.Run`` still exists, and can be logged to."""
    client = _client()
    name = f"The run {run.info.run_name}"
    try:
        info = client.get_run(run.info.run_id).info
        experiment = client.get_experiment(info.experiment_id)
    except MlflowException:
        raise CourseError(
            "run-gone",
            f"{name} is not in the store {client.tracking_uri} any more.",
            "Log it again: run this page's cells from Log it on.",
        ) from None
    for code, deleted, what, restore in (
        (
            "experiment-deleted",
            experiment,
            f"The experiment {experiment.name}",
            f'restore_experiment("{experiment.experiment_id}")',
        ),
        ("run-deleted", info, name, f'restore_run("{info.run_id}")'),
    ):
        if deleted.lifecycle_stage == "deleted":
            raise CourseError(
                code,
                f"{what} was deleted from the store {client.tracking_uri}.",
                f"Restore it: mlflow.MlflowClient({client.tracking_uri!r}).{restore}.",
            )


def check_model(uri: str, model_info: object = None) -> None:
    """Raise CourseError unless the model at a URI, such as ``models:/NAME@ALIAS``, can be loaded.

    With ``model_info``, an ``mlflow.models.model.ModelInfo``, its inputs have to be the same as
    that model's.
    """
    client = _client()
    fix = (
        "Register it again: run this page's cells from Register it on."
        if "@" in uri
        else "Log it again: run this page's cells from Log it on."
    )
    try:
        model = mlflow.models.Model.load(uri)
        size = _bytes(get_artifact_repository(uri))
    except (MlflowException, OSError) as error:
        raise CourseError(
            "model-gone",
            f"The store {client.tracking_uri} has nothing to load at {uri}: "
            f"{str(error).strip().splitlines()[0].rstrip('.:')}.",
            fix,
        ) from None
    if size < (model.model_size_bytes or 0):
        raise CourseError(
            "model-not-whole",
            f"{model.model_size_bytes:,} bytes were logged for {uri}, and the store has {size:,}: files "
            "were deleted.",
            fix,
        )
    if model_info and model.get_input_schema() != model_info.signature.inputs:
        raise CourseError(
            "model-other-contract",
            f"The model at {uri} takes other fields than this page's model: somebody moved the alias.",
            fix,
        )


def check_name(name: str) -> None:
    """Raise CourseError if a prompt has this name: MLflow would register the model as a version of the prompt."""
    client = _client()
    if client.get_prompt(name):
        raise CourseError(
            "name-taken",
            f"The registry of {client.tracking_uri} has a prompt called {name}.",
            f'Delete it: mlflow.MlflowClient({client.tracking_uri!r}).delete_prompt("{name}").',
        )


def _client():
    """Return a client of the active store; raise CourseError if that cannot be used any more."""
    uri = mlflow.get_tracking_uri()
    database = database_path(uri)
    if database and not database.exists():
        raise CourseError(
            "store-gone",
            f"The tracking store {database} does not exist any more.",
            "Restart the kernel, and run this page from the top.",
        )
    tracking_store(uri)
    return mlflow.MlflowClient()


def _bytes(repository, folder=None):
    return sum(
        _bytes(repository, file.path) if file.is_dir else file.file_size or 0
        for file in repository.list_artifacts(folder)
    )
