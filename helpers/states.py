"""Says what was deleted in MLflow of what a page has logged: a run, an address or a name in, a refusal out."""

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from helpers.errors import CourseError
from helpers.stores.database import database_path
from helpers.tracking import tracking_store


def check_run(run: object) -> None:
    """Raise CourseError unless an ``mlflow.entities.Run`` is still in the store, and can take more."""
    client, name = _client(), f"The run {run.info.run_name}"
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
    """Raise CourseError unless the model at an address, ``models:/NAME@ALIAS`` or a logged one's, can be loaded.

    With the ``mlflow.models.model.ModelInfo`` of another model, it has to take the same fields,
    too.
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
            f"Of the {model.model_size_bytes:,} bytes that were logged for {uri}, "
            f"the store has {size:,}: files of it were deleted.",
            fix,
        )
    if model_info and model.get_input_schema() != model_info.signature.inputs:
        raise CourseError(
            "model-other-contract",
            f"The model at {uri} takes other fields than this page's: "
            "somebody has moved the alias.",
            fix,
        )


def check_name(name: str) -> None:
    """Raise CourseError where a prompt has the name of a registered model: MLflow would make the model its version."""
    client = _client()
    if client.get_prompt(name):
        raise CourseError(
            "name-taken",
            f"In the registry of {client.tracking_uri}, {name} is the name of a prompt.",
            f'Delete it: mlflow.MlflowClient({client.tracking_uri!r}).delete_prompt("{name}").',
        )


def _client():
    """Return a client of the active store, if that can still be used."""
    uri = mlflow.get_tracking_uri()
    database = database_path(uri)
    if database and not database.exists():
        raise CourseError(
            "store-gone",
            f"The tracking store {database} is not there any more.",
            "Restart the kernel, and run this page from the top.",
        )
    tracking_store(uri)
    return mlflow.MlflowClient()


def _bytes(repository, folder=None):
    return sum(
        _bytes(repository, file.path) if file.is_dir else file.file_size or 0
        for file in repository.list_artifacts(folder)
    )
