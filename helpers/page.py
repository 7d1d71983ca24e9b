"""Opens a page: cleans its environment, checks its parameters, opens its tracking store and experiment.

Libraries are imported inside the functions, because they read the environment at their import.
"""

from __future__ import annotations

import typing

from helpers.environment import clean_process
from helpers.shadowing import refuse_shadowing_files

if typing.TYPE_CHECKING:
    from helpers.tracking import TrackingStore


def open_page(track: str | None = None, **parameters: str | float) -> dict:
    """Clean the kernel's environment and check a page's parameters. Return them, without ``track``.

    See `helpers.check_parameters` for the parameters and its errors, and `docs/variables.md` for
    the environment.
    """
    refuse_shadowing_files()
    clean_process()
    from helpers.parameters import check_parameters

    check_parameters(**parameters, track=track)
    return parameters


def open_store(tracking_uri: str, experiment: str) -> TrackingStore:
    """Return a page's tracking store. Create the experiment if it is missing.

    A new experiment keeps its artifacts beside the database, not in the folder that the notebook
    happens to run in. Raises what `helpers.tracking_store` raises.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from helpers.tracking import tracking_store

    store = tracking_store(tracking_uri, experiment)
    try:
        client = MlflowClient(store.uri)
        client.create_experiment(experiment, artifact_location=store.artifact_location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return store
