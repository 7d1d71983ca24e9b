"""Decides which of a shell's variables the course removes, and which it sets. docs/variables.md lists them.

Importing this module changes nothing. The course's commands and a page's first cell call
`clean_process`.
"""

import fnmatch
import os
import sys
import warnings
from collections.abc import Mapping

# With these, a page would log elsewhere or fail, without an error that names them. A star stands for
# any letters.
REMOVED = (
    # `mlflow run` sets them for its own run; a page starts another one, in the experiment of its name.
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    # A page registers its model in the store to which it logs.
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    # A page links its figures to the model that it logged.
    "MLFLOW_ACTIVE_MODEL_ID",
    "_MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_ENABLE_ASYNC_LOGGING",  # a page reads back at once what it has logged
    # They are for the database of a server; the course's database is one file.
    "MLFLOW_SQLALCHEMYSTORE_*",
    "MLFLOW_ENABLE_WORKSPACES",
    "MLFLOW_WORKSPACE_STORE_URI",
    "MLFLOW_ARTIFACT_LOCATION_MAX_LENGTH",
    # The page decides where its model runs, how it is stored and what it requires. To lock
    # dependencies, MLflow would ask a package index.
    "MLFLOW_DEFAULT_PREDICTION_DEVICE",
    "MLFLOW_*HUGGINGFACE_*",
    "MLFLOW_LOG_MODEL_COMPRESSION",
    "MLFLOW_LOCK_MODEL_DEPENDENCIES",
    # `python -m helpers ui` decides what it shows, and where.
    "MLFLOW_ARTIFACTS_ONLY",
    "MLFLOW_STATIC_PREFIX",
    "MLFLOW_SERVE_ARTIFACTS",
    "MLFLOW_*_OPTS",
    "MLFLOW_READ_REPLICA_BACKEND_STORE_URI",
    # The pages need this machine's Python, and its JupyterLab.
    "JUPYTER_GATEWAY_*",
    "JUPYTERLAB_DIR",
    # MLflow fails without docstrings, and where warnings raise errors.
    "PYTHONOPTIMIZE",
    "PYTHONWARNINGS",
)
ALWAYS_SET = {
    # After set-up, the course loads only files of this machine, and without a network each look-up
    # would take 23 s. `helpers.models.steps.call_in_subprocess` starts a process for what has to ask the Hub.
    "HF_HUB_OFFLINE": "1",
}
SET_IF_UNSET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    # MLflow's evaluate imports LiteLLM if it is installed, and that downloads prices from GitHub.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # Notes and progress bars of MLflow and transformers would appear among a page's outputs.
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # The tokenizers library warns about forks; the course forks only to start programs.
    "TOKENIZERS_PARALLELISM": "false",
}


# `mlflow run` always sets these two: no note tells the user about them.
REMOVED_SILENTLY = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
TRUE = ("1", "true", "yes", "on")  # as huggingface_hub reads a switch


def clean(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return an environment in which the course runs, and notes about the changes.

    Parameters
    ----------
    environment : mapping
        A process's variables. It is not changed.

    Returns
    -------
    tuple
        The variables, and a sentence for each change that the user has to know.
    """
    # Treat empty variables as unset: MLflow fails to read a number in one.
    cleaned = {
        name: value
        for name, value in environment.items()
        if value or not name.startswith(("MLFLOW_", "HF_"))
    }
    removed = sorted(name for name in cleaned if _is_removed(name, cleaned[name]))
    for name in removed:
        del cleaned[name]
    notes = []
    if told := [name for name in removed if name not in REMOVED_SILENTLY]:
        notes.append(f"the course removes {', '.join(told)}; docs/variables.md says why.")
    for name, value in ALWAYS_SET.items():
        if name in cleaned and (cleaned[name].lower() in TRUE) != (value in TRUE):
            notes.append(f"the course sets {name} to {value}; docs/variables.md says why.")
    cleaned = SET_IF_UNSET | cleaned | ALWAYS_SET
    # MLflow starts programs such as uvicorn by their names, and .venv may not be activated.
    folder = os.path.dirname(sys.executable)  # noqa: PTH120 - PATH holds texts
    path = cleaned.get("PATH", "")
    if path.split(os.pathsep)[0] != folder:
        cleaned["PATH"] = os.pathsep.join(filter(None, [folder, path]))
    return cleaned, notes


def _is_removed(name, value):
    if name == "PYTHONWARNINGS":
        return "error" in value
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in REMOVED)


def clean_process() -> None:
    """Give this process, and what it starts, a `clean` environment. Print the notes to stderr."""
    cleaned, notes = clean(os.environ)
    if "PYTHONWARNINGS" in os.environ and "PYTHONWARNINGS" not in cleaned:  # Python has read it
        warnings.filters[:] = [row for row in warnings.filters if row[0] != "error"]
    # PySpark warns about this pandas whenever MLflow imports it. serving/batch.py is tested with it.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    library = sys.modules.get("huggingface_hub")
    if library and not library.constants.HF_HUB_OFFLINE:
        notes.append(
            "huggingface_hub was imported before the course, and may ask the network. In a "
            "notebook, restart the kernel and run all cells."
        )
    for name in [name for name in os.environ if name not in cleaned]:
        del os.environ[name]
    os.environ.update(cleaned)
    for note in notes:
        sys.stderr.write(f"note: {note}\n")
