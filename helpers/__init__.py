"""What a page imports: model set-up, parameter checks, signature tables, measurements.

The names are loaded on first use, so that ``python -m helpers`` starts on a bare Python
that has none of the course's packages yet.
"""

import os
import sys

# Every file the course loads is on this machine once it is set up. These keep the
# libraries from asking the network about it (a hub look-up costs 23 s when there is none).
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
# MLflow's and transformers' own notes and progress bars would come between the lines of a page.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# Fork-safety notice of the tokenizers library: the course forks only to start programs.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# MLflow starts programs such as uvicorn and python by their names; the environment may not be activated.
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
    "show_playground": "helpers.playground",
    "torch_device": "helpers.devices",
    "onnx_provider": "helpers.devices",
    "show_signature": "helpers.signatures",
    "compare_signatures": "helpers.signatures",
    "measure": "helpers.measurement",
    "show_table": "helpers.tables",
    "show_tokens": "helpers.views",
    "show_folder": "helpers.views",
    "compare_figures": "helpers.views",
    "tracking_store": "helpers.tracking",
    "ui_addresses": "helpers.tracking",
    "running": "helpers.servers",
    "in_terminal": "helpers.servers",
    "pinned": "helpers.requirements",
}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError("module 'helpers' has no attribute " + repr(name))
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
