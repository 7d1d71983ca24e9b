"""Decides what becomes of a shell's variables: which the course leaves out, and which it sets.

`docs/variables.md` says so to the reader. Importing this changes nothing: `clean_process` does, in
the course's commands and at the top of a page.
"""

import fnmatch
import os
import sys
import warnings
from collections.abc import Mapping

# These would send what a page does elsewhere, or break it, without a word. A star stands for any
# letters.
LEFT_OUT = (
    # `mlflow run` sets them for the run that it keeps itself; a page opens its own, in the
    # experiment of its name.
    "MLFLOW_RUN_ID",
    "MLFLOW_EXPERIMENT_ID",
    # A page registers its model in the store that it logs to.
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_REGISTRY_URI",
    # A page's figures belong to the model that it logged.
    "MLFLOW_ACTIVE_MODEL_ID",
    "_MLFLOW_ACTIVE_MODEL_ID",
    "MLFLOW_ENABLE_ASYNC_LOGGING",  # a page reads at once what it has logged
    # They are for a server's database; the course's is one file.
    "MLFLOW_SQLALCHEMYSTORE_*",
    "MLFLOW_ENABLE_WORKSPACES",
    "MLFLOW_WORKSPACE_STORE_URI",
    "MLFLOW_ARTIFACT_LOCATION_MAX_LENGTH",
    # The page says where its model runs, how it is stored and what it requires; for more, MLflow
    # asks an index.
    "MLFLOW_DEFAULT_PREDICTION_DEVICE",
    "MLFLOW_*HUGGINGFACE_*",
    "MLFLOW_LOG_MODEL_COMPRESSION",
    "MLFLOW_LOCK_MODEL_DEPENDENCIES",
    # `python -m helpers ui` says what it shows, and where.
    "MLFLOW_ARTIFACTS_ONLY",
    "MLFLOW_STATIC_PREFIX",
    "MLFLOW_SERVE_ARTIFACTS",
    "MLFLOW_*_OPTS",
    "MLFLOW_READ_REPLICA_BACKEND_STORE_URI",
    # The pages need this machine's Python, and its JupyterLab.
    "JUPYTER_GATEWAY_*",
    "JUPYTERLAB_DIR",
    # MLflow fails without docstrings, and where a warning raises.
    "PYTHONOPTIMIZE",
    "PYTHONWARNINGS",
)
SET = {
    # Every file the course loads is on this machine once it is set up, and a look-up costs 23 s
    # where there is no network. What has to ask the Hub runs in a process of its own, which
    # `helpers.models.steps.ask` starts.
    "HF_HUB_OFFLINE": "1",
}
SET_UNLESS_THERE = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    # MLflow's evaluate imports LiteLLM where it is installed, and that asks GitHub for prices.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # MLflow's and transformers' own notes and progress bars would come between the lines of a page.
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Fork-safety notice of the tokenizers library: the course forks only to start programs.
    "TOKENIZERS_PARALLELISM": "false",
}


# `mlflow run` always sets these two, so nobody has to be told.
LEFT_OUT_SILENTLY = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
TRUE = ("1", "true", "yes", "on")  # as huggingface_hub reads a switch


def clean(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return an environment in which the course runs, and what the user should know of the changes.

    Parameters
    ----------
    environment : mapping
        A process's variables. It stays as it is.

    Returns
    -------
    tuple
        The variables, and sentences about those that the user had set otherwise.
    """
    # Treat empty variables as unset: MLflow fails to read a number in one.
    cleaned = {
        name: value
        for name, value in environment.items()
        if value or not name.startswith(("MLFLOW_", "HF_"))
    }
    left_out = sorted(name for name in cleaned if _is_left_out(name, cleaned[name]))
    for name in left_out:
        del cleaned[name]
    notes = []
    if told := [name for name in left_out if name not in LEFT_OUT_SILENTLY]:
        notes.append(f"the course leaves out {', '.join(told)}; docs/variables.md says why.")
    for name, value in SET.items():
        if name in cleaned and (cleaned[name].lower() in TRUE) != (value in TRUE):
            notes.append(f"the course sets {name} to {value}; docs/variables.md says why.")
    cleaned = SET_UNLESS_THERE | cleaned | SET
    # MLflow starts programs such as uvicorn by their names, and .venv may not be activated.
    folder = os.path.dirname(sys.executable)  # noqa: PTH120 - PATH holds texts
    path = cleaned.get("PATH", "")
    if path.split(os.pathsep)[0] != folder:
        cleaned["PATH"] = os.pathsep.join(filter(None, [folder, path]))
    return cleaned, notes


def _is_left_out(name, value):
    if name == "PYTHONWARNINGS":
        return "error" in value
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT)


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
