"""The variables of a hostile shell: some that the course leaves out, and some that a page has to bear."""

import os

from helpers.environment import REMOVED

# One hostile value for each name that is left out; a star stands for nothing here.
HOSTILE = {name.replace("*", "X"): "1" for name in REMOVED} | {
    "MLFLOW_REGISTRY_URI": "sqlite:////nowhere/else.db",
    "MLFLOW_RUN_ID": "0" * 32,
    "MLFLOW_EXPERIMENT_ID": "77",
    "MLFLOW_EXPERIMENT_NAME": "Elsewhere",
    "MLFLOW_ACTIVE_MODEL_ID": "m-none",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "true",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "nonsense",
    "MLFLOW_ENABLE_WORKSPACES": "true",
    "MLFLOW_DEFAULT_PREDICTION_DEVICE": "cuda",
    "MLFLOW_HUGGINGFACE_USE_DEVICE_MAP": "true",
    "MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE": "100KB",
    "MLFLOW_DISABLE_HUGGINGFACE_ACCELERATE_FEATURES": "perhaps",
    "MLFLOW_LOG_MODEL_COMPRESSION": "nonsense",
    "MLFLOW_LOCK_MODEL_DEPENDENCIES": "true",
    "PYTHONOPTIMIZE": "2",
    "PYTHONWARNINGS": "error",
}
NOWHERE = os.devnull + "/none"  # nobody can make it, root neither
# What else a shell may hold, and a page has to bear.
BORNE = {
    "MLFLOW_TRACKING_URI": "databricks",
    "MLFLOW_TRACKING_TOKEN": "t",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_RUN_CONTEXT": '{"team": "a"}',
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_TRACE_SAMPLING_RATIO": "0.5",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "",
    "HF_HUB_OFFLINE": "0",
    "HF_HOME": NOWHERE,
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "HF_TOKEN": "nonsense",
    "TRANSFORMERS_CACHE": NOWHERE,
    "SSL_CERT_FILE": NOWHERE,
    "REQUESTS_CA_BUNDLE": NOWHERE,
    "TMPDIR": NOWHERE,
    **dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"),
        "http://127.0.0.1:9",
    ),
    "OMP_NUM_THREADS": "nonsense",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "LC_ALL": "C",
    "PYTHONSAFEPATH": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONHASHSEED": "7",
    "CUDA_VISIBLE_DEVICES": "nonsense",
}
