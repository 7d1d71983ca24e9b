"""What the variables of a shell do to the course: which are left out, set, refused or obeyed.

Run: python -m helpers test tests/unit/course/test_variables.py
"""

import fnmatch
import json
import re
from itertools import chain
from pathlib import Path

import pytest
from support import ROOT, refuses
from support.hostile import HOSTILE

from helpers.environment import ALWAYS_SET, REMOVED, SET_IF_UNSET, clean
from helpers.parameters import DEFAULTS, NUMBER_VARIABLES, check_variables

# MLflow's variables that reach the libraries as the user set them, and why that is right.
OBEYED = {
    "a page sets it itself": ["MLFLOW_TRACKING_URI"],
    "it is of the file store, which the course has not": [
        "MLFLOW_TRACKING_DIR",
        "MLFLOW_REGISTRY_DIR",
        "MLFLOW_ALLOW_FILE_STORE",
    ],
    "how a server is reached, and with what name": [
        "MLFLOW_TRACKING_[!UD]*",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_HTTP_*",
        "_MLFLOW_HTTP_*",
        "MLFLOW_ALLOW_HTTP_REDIRECTS",
        "MLFLOW_WORKSPACE",
        "MLFLOW_AUTH_*",
        "MLFLOW_KERBEROS_*",
    ],
    "where a server keeps artifacts": [
        "MLFLOW_S3_*",
        "MLFLOW_GCS_*",
        "MLFLOW_BOTO_*",
        "MLFLOW_PYARROW_*",
        "*MLFLOW*MULTIPART*",
        "_MLFLOW_MPD_*",
        "MLFLOW_DOWNLOAD_CHUNK_TIMEOUT",
        "MLFLOW_ARTIFACT_UPLOAD_*",
        "MLFLOW_ARTIFACTS_DESTINATION",
        "MLFLOW_PRESIGNED_*",
    ],
    "how long something may take": [
        "MLFLOW_REQUIREMENTS_INFERENCE_TIMEOUT",
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT",
        "MLFLOW_INPUT_EXAMPLE_INFERENCE_TIMEOUT",
    ],
    "what is said": [
        "MLFLOW_CONFIGURE_LOGGING",
        "MLFLOW_PRINT_*",
        "MLFLOW_SUPPRESS_PRINTING_*",
        "MLFLOW_DISABLE_SCHEMA_DETAILS",
        "MLFLOW_DISABLE_AGENT_HINT",
        "MLFLOW_DISABLE_ENV_MANAGER_*",
        "MLFLOW_REQUIREMENTS_INFERENCE_RAISE_ERRORS",
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK",
        "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING",
    ],
    "what is trusted": ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"],
    "tags and figures beside a page's own": ["MLFLOW_RUN_CONTEXT", "MLFLOW_*SYSTEM_METRICS*"],
    "no page traces": [
        "MLFLOW_*TRACE*",
        "MLFLOW_*TRACING*",
        "_MLFLOW_ENABLE_UC_TRACE_*",
        "MLFLOW_*OTLP*",
        "MLFLOW_*OTEL*",
        "MLFLOW_USE_*SPAN*",
        "MLFLOW_USE_DEFAULT_TRACER_PROVIDER",
    ],
    "no page has it": [
        "*GENAI*",
        "*JUDGE*",
        "*PROMPT*",
        "MLFLOW_ONLINE_SCORING_*",
        "*_EVALUATE_*",
        "MLFLOW_*ASSISTANT*",
        "MLFLOW_*SANDBOX*",
        "MLFLOW_*GATEWAY*",
        "_MLFLOW_INTERNAL_GATEWAY_*",
        "MLFLOW_*DEPLOYMENT*",
        "*OPENAI*",
        "*LANGCHAIN*",
        "*MCP*",
        "MLFLOW_MODEL_CATALOG_*",
        "MLFLOW_MODEL_ENV_*",
        "*SPARK*",
        "MLFLOW_DFS_TMP",
        "*SGC*",
        "*DATABRICKS*",
        "*DBFS*",
        "*SERVERLESS*",
        "*_SGI_*",
        "*_UC_*",
        "*SQL_WAREHOUSE*",
        "MLFLOW_ENABLE_DB_SDK",
        "*SAGEMAKER*",
        "*DOCKER*",
        "*CONDA*",
        "MLFLOW_ENV_ROOT",
        "MLFLOW_DISABLE_ENV_CREATION",
        "*WHEELED*",
        "MLFLOW_ASYNC_LOGGING_*",
        "MLFLOW_TRUNCATE_LONG_VALUES",
        "MLFLOW_CREATE_MODEL_VERSION_*",
        "MLFLOW_*UV_*",
    ],
    "it is a server's": [
        "MLFLOW_SERVER_*",
        "MLFLOW_FLASK_*",
        "MLFLOW_MYSQL_*",
        "MLFLOW_WEBHOOK_*",
        "MLFLOW_ICON_*",
        "MLFLOW_JOB_*",
        "*_RBAC_*",
        "MLFLOW_BASIC_AUTH_*",
        "_MLFLOW_AUTH_*",
        "_MLFLOW_SERVER_*",
        "MLFLOW_ALLOWED_HOST_*",
        "MLFLOW_WORKSPACE_ARTIFACT_*",
        "MLFLOW_ENABLE_AI_*",
    ],
    "it is of MLflow's own tests and processes": [
        "*TESTING*",
        "MLFLOW_RUN_SLOW_TESTS",
        "_MLFLOW_IS_IN_*",
        "_MLFLOW_IN_*",
        "MLFLOW_IN_*",
        "_MLFLOW_TELEMETRY_*",
        "_MLFLOW_*LOGGED_MODEL_PARAMS_BATCH_SIZE",
    ],
    "the command line of `make ui` has it, or it changes nothing there": [
        "MLFLOW_HOST",
        "MLFLOW_PORT",
        "MLFLOW_BACKEND_STORE_URI",
        "MLFLOW_REGISTRY_STORE_URI",
        "MLFLOW_WORKERS",
        "MLFLOW_DEFAULT_ARTIFACT_ROOT",
        "MLFLOW_EXPOSE_PROMETHEUS",
    ],
}


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def mlflow_variables():
    """Return those of MLflow's list, and those that the command line of its server has beside it."""
    from mlflow import environment_variables as known

    names = {
        one.name for one in vars(known).values() if isinstance(one, known._EnvironmentVariable)
    }
    folder = Path(known.__file__).parent  # importing the command line takes seconds
    text = "".join(
        (folder / name).read_text(encoding="utf-8")
        for name in ("cli/__init__.py", "utils/cli_args.py")
    )
    return names | (
        set(re.findall(r'envvar="(\w+)"', text)) - {"MLFLOW_TMP_DIR", "MLFLOW_MODELS_WORKERS"}
    )


def mlflow_unknown(names):
    ours = [*REMOVED, *ALWAYS_SET, *SET_IF_UNSET]
    return {name for name in names if not matches(name, [*ours, *chain(*OBEYED.values())])}


def test_each_variable_of_mlflow_is_left_out_set_or_obeyed_for_a_reason():
    names = mlflow_variables()
    assert mlflow_unknown(names) == set()
    assert mlflow_unknown({"MLFLOW_DEFAULT_STORE", "MLFLOW_MODEL_REDIRECT"}) == {
        "MLFLOW_DEFAULT_STORE",
        "MLFLOW_MODEL_REDIRECT",
    }
    idle = [
        pattern
        for pattern in [*chain(*OBEYED.values()), *REMOVED]
        if "MLFLOW" in pattern and not any(fnmatch.fnmatchcase(name, pattern) for name in names)
    ]
    assert idle == []


def test_the_document_lists_what_the_course_leaves_out_and_sets():
    text = (ROOT / "docs" / "variables.md").read_text(encoding="utf-8")
    left_out, rest = text.split("## Left out")[1].split("## Set")

    def listed(part):
        cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        return {name for cell in cells for name in re.findall("`([A-Z_*]+)`", cell)}

    assert listed(left_out) == set(REMOVED)
    assert listed(rest) == {*ALWAYS_SET, *SET_IF_UNSET}


# --- what a process of the course sees --------------------------------------------------------

SHOW = (
    "from helpers.environment import clean_process; clean_process()\n"
    "import json, os, warnings; warnings.warn('!'); print(json.dumps(dict(os.environ)))"
)


def test_what_would_lead_elsewhere_is_left_out_and_told(python):
    result = python("-c", SHOW, **HOSTILE)
    assert result.returncode == 0, result.stderr  # the warning was none that raises
    assert {name for name in json.loads(result.stdout) if matches(name, REMOVED)} == set()
    (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert set(re.findall("[A-Z_]{8,}", note)) == set(HOSTILE) - {
        "MLFLOW_RUN_ID",
        "MLFLOW_EXPERIMENT_ID",
    }


def test_what_is_obeyed_stays_and_nothing_is_said(python):
    kept = {
        "MLFLOW_TRACKING_TOKEN": "t",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "9",
        "HTTPS_PROXY": "http://p",
        "TMPDIR": "/t",
        "HF_TOKEN": "t",
        "HF_ENDPOINT": "http://h",
        "MLFLOW_LOGGING_LEVEL": "debug",
        "PYTHONWARNINGS": "ignore",
        "MLFLOW_RUN_CONTEXT": "{}",
        "MLFLOW_WORKSPACE": "mine",
    }
    result = python("-c", SHOW, **kept)
    assert json.loads(result.stdout).items() >= kept.items()
    assert result.stderr == ""


def test_an_empty_variable_is_none(python):
    seen = json.loads(
        python(
            "-c",
            SHOW,
            MLFLOW_HTTP_REQUEST_TIMEOUT="",
            MLFLOW_DISABLE_TELEMETRY="",
            HF_HOME="",
            COURSE_MODEL="",
        ).stdout
    )
    assert {"MLFLOW_HTTP_REQUEST_TIMEOUT", "HF_HOME"} & set(seen) == set()
    assert seen["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize(
    ("users", "told"), [("0", True), ("no", True), ("", False), ("1", False), ("TRUE", False)]
)
def test_nobody_is_asked_for_what_is_here_and_a_user_who_wants_it_is_told(users, told):
    cleaned, notes = clean({"HF_HUB_OFFLINE": users})
    assert cleaned["HF_HUB_OFFLINE"] == "1"
    assert notes == ["the course sets HF_HUB_OFFLINE to 1; docs/variables.md says why."] * told


def test_importing_the_course_changes_nothing(python):
    code = "import os; before = dict(os.environ)\nfrom helpers import errors, environment, page\n"
    result = python("-c", code + "print(before == dict(os.environ))", **HOSTILE)
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_what_is_clean_stays_as_it_is():
    cleaned, _ = clean({"HOME": "/h", "MLFLOW_RUN_ID": "1", "MLFLOW_REGISTRY_URI": "x"})
    assert clean(cleaned) == (cleaned, [])


def test_a_library_that_was_imported_too_early_is_told(python):
    code = "import huggingface_hub, huggingface_hub.constants\nfrom helpers.page import open_page\n"
    parameters = {name: value for name, value in DEFAULTS.items() if name != "device"}
    result = python("-c", f"{code}open_page(device='cpu', **{parameters!r})", HF_HUB_OFFLINE="")
    assert "restart the kernel" in result.stderr


# --- what cannot be read ----------------------------------------------------------------------

NONSENSE = [
    ("MLFLOW_RUN_CONTEXT", "{tags"),
    ("MLFLOW_RUN_CONTEXT", "[1]"),
    ("MLFLOW_LOGGING_LEVEL", "loud"),
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon"),
    ("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "perhaps"),
    ("MLFLOW_DISABLE_TELEMETRY", "yes"),
    *((name, "many") for name in NUMBER_VARIABLES),
    (NUMBER_VARIABLES[0], "1.5"),
]


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_what_mlflow_cannot_read_is_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with refuses("variable-unreadable") as refusal:
        check_variables()
    assert name in refusal.value.what
    monkeypatch.setenv(
        name,
        {"MLFLOW_RUN_CONTEXT": '{"team": "a"}', "MLFLOW_LOGGING_LEVEL": "debug"}.get(name, "1"),
    )
    check_variables()
