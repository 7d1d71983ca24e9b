"""What a page imports: model set-up, parameter checks, signature tables, measurements.

The names are loaded on first use, so that ``python -m helpers`` starts on a bare Python
that has none of the course's packages yet.

Every way into the course passes here before a library of its own is imported: the variables that a
shell holds are put in order here. docs/variables.md says to the reader what becomes of them.
"""

import fnmatch
import os
import sys
import warnings

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
    "HF_HUB_OFFLINE": "0" if os.environ.get("COURSE_ONLINE") else "1",
}
SET_UNLESS_THERE = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    # MLflow's evaluate imports it where it is there, and it asks for prices.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # MLflow's and transformers' own notes and progress bars would come between the lines of a page.
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Fork-safety notice of the tokenizers library: the course forks only to start programs.
    "TOKENIZERS_PARALLELISM": "false",
}
# An empty variable is none to whoever wrote it; MLflow fails to read a number in it.
for _name in [
    name for name in os.environ if name.startswith(("MLFLOW_", "HF_")) and not os.environ[name]
]:
    del os.environ[_name]
left_out = sorted(
    name
    for name in os.environ
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_OUT)
    and (name != "PYTHONWARNINGS" or "error" in os.environ[name])
)
for _name in left_out:
    del os.environ[_name]
if "PYTHONWARNINGS" in left_out:  # this process has read it
    warnings.filters[:] = [row for row in warnings.filters if row[0] != "error"]
# Where Spark is installed, MLflow meets it, and it says so each time; serving/batch.py is tried on
# this pandas.
warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
_told = [name for name in left_out if name not in LEFT_OUT[:2]]
if _told:
    sys.stderr.write(
        "note: the course leaves out " + ", ".join(_told) + "; docs/variables.md says why.\n"
    )
os.environ.update(SET)
for _name in SET_UNLESS_THERE:
    os.environ.setdefault(_name, SET_UNLESS_THERE[_name])
# MLflow starts programs such as uvicorn and python by their names; the environment may not be
# activated.
_programs = os.path.dirname(sys.executable)  # noqa: PTH120 - an old Python has no pathlib
if os.environ.get("PATH", "").split(os.pathsep)[0] != _programs:
    os.environ["PATH"] = os.pathsep.join([_programs, os.environ.get("PATH", "")])

_HOME = {
    "CourseError": "helpers.errors",
    "CatalogueEntry": "helpers.models.catalogue",
    "read_catalogue": "helpers.models.catalogue",
    "PreparedModel": "helpers.models.prepare",
    "prepare_model": "helpers.models.prepare",
    "check_parameters": "helpers.parameters",
    "check_fits": "helpers.parameters",
    "name_run": "helpers.parameters",
    "check": "helpers.exercises",
    "show_playground": "helpers.show.playground",
    "torch_device": "helpers.devices",
    "onnx_provider": "helpers.devices",
    "show_signature": "helpers.show.signatures",
    "compare_signatures": "helpers.show.signatures",
    "measure": "helpers.measurement",
    "show_table": "helpers.show.tables",
    "show_tokens": "helpers.show.views",
    "show_folder": "helpers.show.views",
    "compare_figures": "helpers.show.views",
    "show_timeline": "helpers.show.views",
    "tracking_store": "helpers.tracking",
    "ui_addresses": "helpers.tracking",
    "check_run": "helpers.states",
    "check_model": "helpers.states",
    "check_name": "helpers.states",
    "running": "helpers.servers",
    "in_terminal": "helpers.servers",
    "pinned": "helpers.requirements",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError("module 'helpers' has no attribute " + repr(name))
    import importlib

    from helpers.strangers import refuse_strangers

    refuse_strangers()
    return getattr(importlib.import_module(_HOME[name]), name)
