"""Answers the prompts in Parquet files on a Spark cluster, and writes the rows with their answers.

The model is any MLflow model of the chat contract, ``llm/v1/chat``. Spark ships it to the workers,
and each of their Python processes loads it once:
``python -m serving.batch IN.parquet OUT.parquet --master spark://HOST:PORT``.

From top to bottom: rows (what runs on a worker), errors (what a failure of Spark's means), the
cluster, input and output (which rows are missing), and the program.
"""

import argparse
import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from .errors import ProgramError, ServiceError, to_service_error
from .package import SHARED_FILES, copy_package
from .served_model import ServedModel

ROWS_AT_ONCE = 64  # the most rows in one call of a model that runs them together
TEST_REQUEST = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
# The output's columns with an answer, and their Spark types.
ANSWER_COLUMNS = {
    "answer": "string",
    "status": "string",
    "reason": "string",
    "finish_reason": "string",
    "prompt_tokens": "long",
    "completion_tokens": "long",
}
# Names that the input must not use: columns of the output, and temporary columns.
ROW_ID_COLUMNS = ["row", "row_hash"]
ADDED_COLUMNS = (*ROW_ID_COLUMNS, *ANSWER_COLUMNS)
TEMPORARY_COLUMNS = ("_metadata", "_file", "_answer")
SHIPPED_FILES = (*SHARED_FILES, "package.py", "batch.py")
OLDEST_JAVA = 17
# For a Java with few cores and little work.
FAST_START_JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
# SPARK_DAEMON_JAVA_OPTS for a master and its workers on one machine. A worker removes a program's
# folder 30 seconds after the program has ended.
DAEMON_JAVA_OPTIONS = (
    f"{FAST_START_JAVA_OPTIONS} -Dspark.worker.cleanup.enabled=true -Dspark.worker.cleanup.interval=30 "
    "-Dspark.worker.cleanup.appDataTtl=30"
)
BEAT_SECONDS = 5.0  # between two checks of the cluster, each with a sign of life in the lock
LOST_CHECKS = 4  # after so many in a row that find no master and no executor, a cluster is lost
SILENT_BEATS = 4  # after so many without a change, the lock's driver counts as dead
NO_EXECUTOR_CHECKS = 12  # after so many without an executor, warn once

# --- rows -----------------------------------------------------------------------------------


def error_row(reason: str) -> dict:
    """Return the fields of ``ANSWER_COLUMNS`` for a row without an answer."""
    empty = {name: "" if kind == "string" else 0 for name, kind in ANSWER_COLUMNS.items()}
    return empty | {"status": "error", "reason": reason}


def answer_row(completion: dict) -> dict:
    """Return the fields of ``ANSWER_COLUMNS`` for a chat completion."""
    choice = completion["choices"][0]
    usage = completion.get("usage") or {}
    return {
        "answer": choice["message"]["content"] or "",
        "status": "ok",
        "reason": "",
        "finish_reason": choice.get("finish_reason") or "",
        "prompt_tokens": usage.get("prompt_tokens") or 0,
        "completion_tokens": usage.get("completion_tokens") or 0,
    }


def read_messages(cell: Any, system: str = "") -> list[dict] | None:
    """Return a cell's messages, after the system prompt if there is one.

    The cell holds a text or a list of messages. Returns None if it is blank, null or of another
    type.

    Raises
    ------
    ServiceError
        A message of the list is null.
    """
    before = [{"role": "system", "content": system}] if system else []
    if isinstance(cell, str) and cell.strip():
        return [*before, {"role": "user", "content": cell}]
    if isinstance(cell, list | np.ndarray) and len(cell):
        if any(message is None for message in cell):
            raise ServiceError(400, "A message is null.", "invalid_value", "messages")
        messages = [{"role": message["role"], "content": message["content"]} for message in cell]
        return [*before, *messages]
    return None


def answer_rows(
    cells: Sequence[Any],
    system: str,
    complete: Callable[[list[list[dict]]], list[dict]],
    check_model: Callable[[], Any],
    at_once: int = ROWS_AT_ONCE,
) -> list[dict]:
    """Answer the conversation in each cell. A row that fails changes no other.

    Parameters
    ----------
    cells : sequence
        What `read_messages` takes.
    system : str
        A system prompt for each row, or an empty text.
    complete : callable
        Returns the chat completions of several conversations. It raises if one of them is wrong.
    check_model : callable
        Asks the model something that it can answer. It raises if the model does not work.
    at_once : int
        The most conversations that ``complete`` gets. Those of similar length go together.

    Returns
    -------
    list of dict
        The fields of ``ANSWER_COLUMNS``, in the order of ``cells``.

    Raises
    ------
    Exception
        What ``check_model`` raises: then no row is at fault.
    """
    rows = []
    conversations = []
    for cell in cells:
        row = None
        messages = None
        try:
            messages = read_messages(cell, system)
            if messages is None:
                row = error_row("There is nothing to ask: the cell is empty or null.")
        except ServiceError as error:
            row = error_row(error.message)
        rows.append(row)
        conversations.append(messages)
    asked = [index for index, row in enumerate(rows) if row is None]
    asked.sort(key=lambda index: sum(len(one["content"] or "") for one in conversations[index]))
    groups = [asked[start : start + at_once] for start in range(0, len(asked), at_once)]
    while groups:
        group = groups.pop()
        try:
            completions = complete([conversations[index] for index in group])
            for index, completion in zip(group, completions, strict=True):
                rows[index] = answer_row(completion)
        except Exception as error:
            if len(group) > 1:  # halve the group, until the row at fault is alone
                middle = len(group) // 2
                groups += [group[:middle], group[middle:]]
            else:
                rows[group[0]] = error_row(_explain_or_raise(error, check_model))
    return rows


def _explain_or_raise(error, check_model):
    """Return the reason to store for a row that failed.

    If the error is not the row's fault, test the model first, and raise what the test raises.
    """
    if to_service_error(error).status == 400:
        is_mlflow_error = isinstance(error, MlflowException)
        message = error.message if is_mlflow_error else to_service_error(error).message
        return message.partition("\n")[0][:500]
    check_model()  # Spark tries the task again if this raises
    return f"The model failed on this row: {type(error).__name__}."


class BatchModel(mlflow.pyfunc.PythonModel):
    """A chat model as Spark calls it: a column of cells becomes a table with ``ANSWER_COLUMNS``'s fields.

    The artifact ``model`` is the chat model's folder. ``model_config`` has ``fields``, which each
    request gets beside its messages; ``system``, a system prompt or an empty text; and
    ``threads``, the number of threads that one process may use.
    """

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        """Load the chat model, once for each Python process of a worker."""
        folder = Path(context.artifacts["model"])
        self._config = context.model_config
        flavor = mlflow.models.Model.load(folder).flavors["python_function"]
        has_threads = "threads" in (flavor.get("config") or {})
        config = {"threads": self._config["threads"]} if has_threads else None
        self._model = ServedModel(mlflow.pyfunc.load_model(folder.as_uri(), model_config=config))
        self._check_model()

    def predict(
        self,
        context: mlflow.pyfunc.PythonModelContext,
        model_input: pd.DataFrame,
        params: dict | None = None,
    ) -> pd.DataFrame:
        """Answer the cells of the first column. ``params`` is not used."""
        rows = answer_rows(
            list(model_input.iloc[:, 0]),
            self._config["system"],
            self._complete,
            self._check_model,
            1 if self._model.is_pipeline else ROWS_AT_ONCE,
        )
        return pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))

    def _check_model(self):
        self._model.complete_all([TEST_REQUEST])

    def _complete(self, conversations):
        fields = self._config["fields"]
        return self._model.complete_all([{"messages": one} | fields for one in conversations])


# --- errors ---------------------------------------------------------------------------------


class BatchError(ProgramError):
    """A failure that the user of the batch program can fix."""


ADVICE_RUN_AGAIN = "Run the same command again: it goes on with the rows that are missing."
ADVICE_MORE_MEMORY = (
    "Give its executors more, with --conf: spark.executor.memory is for Java, "
    "spark.executor.memoryOverhead for the Python processes and their models, and "
    f"spark.executor.pyspark.memory bounds these. {ADVICE_RUN_AGAIN}"
)
ADVICE_START_CLUSTER = f"Start the master and its workers. {ADVICE_RUN_AGAIN}"
# Patterns in Spark's long messages, and what each means. The first that matches counts. The text
# that a group captures replaces {} in the sentence.
MEANINGS = (
    (
        r"No space left on device|Disk quota exceeded",
        "A disk is full.",
        f"Make room where the rows are written, and where the workers keep their files. {ADVICE_RUN_AGAIN}",
    ),
    (
        r"MemoryError|bad_alloc|Cannot allocate memory|DefaultCPUAllocator|"
        r"exit(?:ed with)? (?:code|status):? 137|killed by YARN for exceeding|"
        r"OutOfMemoryError|[Ff]ailed to allocate memory|failed to map segment",
        "A worker ran out of memory.",
        ADVICE_MORE_MEMORY,
    ),
    (
        r"Python worker exited unexpectedly",
        "A worker's Python was ended, most likely for want of memory.",
        ADVICE_MORE_MEMORY,
    ),
    (
        r"cancelled as part of cancellation of all jobs|All masters are unresponsive|"
        r"Could not connect to .*master|Master removed our application|"
        r"SparkContext was shut down|Cannot call methods on a stopped SparkContext",
        "The cluster's master is lost.",
        ADVICE_START_CLUSTER,
    ),
    (
        r"Answer from Java side is empty|Py4JNetworkError|ConnectionRefusedError",
        "Spark's Java program on this machine has ended, most likely for want of memory.",
        f"Give it more: --conf spark.driver.memory=2g. {ADVICE_RUN_AGAIN}",
    ),
    (
        r"JAVA_GATEWAY_EXITED",
        "Spark's Java program did not start.",
        "Correct the settings of --conf, and JAVA_HOME.",
    ),
    (
        r"ModuleNotFoundError|No module named",
        "A worker's Python lacks a package that the model needs.",
        "Install what the model requires on every worker, or name another Python there: set the "
        "variable PYSPARK_PYTHON to its path.",
    ),
    (
        r"PYTHON_VERSION_MISMATCH|Python in worker has different version",
        "The workers' Python is of another version than this one.",
        "Set the variable PYSPARK_PYTHON to the path, on the workers, of a Python of the same version.",
    ),
    (
        r"reading Parquet column \[?([^\s,\]]+)",
        "The column {} has another type in one of the input's files.",
        "Write all files with one type for it.",
    ),
    (
        r"reading file ([^\n]+?)\.(?:\s|$)|RuntimeException: ([^\n]+?) is not a Parquet file",
        "Spark can't read the file {}.",
        "Write it anew as Parquet, or take it out of the input's folder.",
    ),
    (
        r"(?:Illegal Parquet type|Parquet type not yet supported|Unrecognized Parquet type): "
        r"([^\n]+?)\.?(?:\s*SQLSTATE|\n|$)",
        "The input has a column of a type that Spark can't read: {}.",
        "Write the column in another type, such as times in microseconds.",
    ),
)


def to_batch_error(error: BaseException) -> BatchError:
    """Translate an exception, mostly one of Spark's, into two sentences, by its text."""
    text = f"{type(error).__name__}: {error}"
    for pattern, what, fix in MEANINGS:
        if match := re.search(pattern, text):
            return BatchError(what.format(*filter(None, match.groups())), fix)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    others = [line for line in lines if not line.startswith("An error occurred while calling")]
    reason = [*causes[-1:], *others, "Spark gives no reason"][0]
    return BatchError(
        f"The job failed: {reason[:300].rstrip('.')}.",
        f"If it failed on a worker, the logs of the executors have more. {ADVICE_RUN_AGAIN}",
    )


# --- the cluster ----------------------------------------------------------------------------


def read_java_version(text: str) -> int:
    """Return Java's version from the output of ``java -version`` (8 for 1.8), or 0."""
    match = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(match[1]) if match else 0


def check_installation() -> None:
    """Raise a BatchError unless this machine has pyspark and a Java that Spark runs on."""
    if importlib.util.find_spec("pyspark") is None:
        raise BatchError(
            "This Python has no Spark.",
            "Install pyspark; in the course's folder: "
            'python -m pip install --editable ".[spark]".',
        )
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    fix = (
        f"Install Java {OLDEST_JAVA} or newer, such as Debian's openjdk-17-jre-headless or "
        "Temurin's, and set JAVA_HOME to its folder."
    )
    try:
        result = subprocess.run(
            [java or "java", "-version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        place = " where JAVA_HOME points" if home else ""
        raise BatchError(f"Spark needs Java, and there is none{place}.", fix) from None
    version = read_java_version(result.stderr)
    if version < OLDEST_JAVA:
        found = version or "of no known version"
        raise BatchError(f"Spark needs Java {OLDEST_JAVA} or newer, and this one is {found}.", fix)


def check_master(master: str) -> None:
    """Raise a BatchError if ``master`` names no cluster, or a standalone master does not answer."""
    if not re.match(r"spark://|k8s://|yarn$", master):
        raise BatchError(
            f"{master} is not the address of a cluster.",
            "Give --master spark://HOST:PORT, yarn or k8s://HOST:PORT.",
        )
    if master.startswith("spark://") and not _master_is_reachable(master):
        raise BatchError(f"No Spark master answers at {master}.", "Start it, or correct --master.")


def _master_is_reachable(master):
    for address in master.removeprefix("spark://").split(","):  # there may be standby masters
        place = urlsplit(f"//{address}")
        try:
            with socket.create_connection((place.hostname, place.port), timeout=3):
                return True
        except (OSError, TypeError, ValueError):
            continue
    return False


def is_lost(checks: Sequence[tuple[bool, int]]) -> bool:
    """Tell whether a cluster is lost.

    Each check has whether a master answers, and the number of executors. Executors keep working
    without a master, and a standby may take over, so both have to be missing.
    """
    last = checks[-LOST_CHECKS:]
    return len(last) == LOST_CHECKS and not any(has_master or count for has_master, count in last)


class DriverLock:
    """Keeps a second driver from writing to the same output.

    The lock is a file beside the output. While its driver works, it writes a growing number into
    the file. Where a lock is there already, the next driver waits to see whether it changes.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        Its Hadoop reads and writes the file, wherever the output is.
    output : str
        The output's path.
    """

    def __init__(self, spark: Any, output: str):
        path, self._file_system = hadoop_path(spark, output)
        self._path = path.suffix(".lock")
        self._owner = f"process {os.getpid()} on {socket.gethostname()} ({uuid.uuid4().hex[:8]})"
        self._beats = 0

    def acquire(self) -> None:
        """Take the lock. Raises a BatchError if another driver works on the output."""
        try:
            self._write(overwrite=False)
            return
        except Exception:  # from Java: the file is there, or its folder can't be written
            text = self._read()
            if text is None:
                raise
        seconds = SILENT_BEATS * BEAT_SECONDS
        owner = text.partition(",")[0]
        print(
            f"The lock of this output is held by {owner}. Waiting {seconds:g} seconds to see "
            "whether that still runs.",
            file=sys.stderr,
        )
        time.sleep(seconds)
        if self._read() not in (text, None):
            raise self._refusal(text)
        self._write()
        time.sleep(BEAT_SECONDS)
        if not self.beat():  # another driver waited, too, and took it at the same moment
            raise self._refusal(self._read())

    def _refusal(self, text):
        return BatchError(
            f"Another run writes to this output: {str(text).partition(',')[0]}.",
            "Wait until it has ended, or end it, and run the same command again.",
        )

    def beat(self) -> bool:
        """Give a sign of life. Return whether the lock is still this driver's."""
        text = self._read()
        if text and not text.startswith(self._owner):
            return False
        self._write()  # also where a full disk has left the file empty
        return True

    def release(self) -> None:
        """Remove the lock, if it is still this driver's."""
        if (self._read() or "").startswith(self._owner):
            self._file_system.delete(self._path, False)

    def _write(self, overwrite=True):
        self._beats += 1
        write_file(self._file_system, self._path, f"{self._owner}, beat {self._beats}", overwrite)

    def _read(self):
        return read_file(self._file_system, self._path)


@contextlib.contextmanager
def watch_cluster(spark: Any, master: str, lock: DriverLock) -> Iterator[Callable[[], None]]:
    """Hold the lock while the block runs, and cancel its jobs if the lock or the cluster is lost.

    Spark would wait for ever for a standalone cluster that is lost; YARN and Kubernetes tell it.
    Yields a function that raises a BatchError if one of them is lost.
    """
    ended = threading.Event()
    loss = []

    def check():
        if loss:
            raise loss[0]

    def watch():
        checks = []
        while not ended.wait(BEAT_SECONDS):
            try:
                loss.extend(_check_once(spark, master, lock, checks))
            except Exception as error:  # from Java: one failed check is tolerated
                checks.append((False, 0))
                if is_lost(checks):
                    loss.append(to_batch_error(error))
            if loss:
                with contextlib.suppress(Exception):  # from Java, if it has ended
                    spark.sparkContext.cancelAllJobs()

    lock.acquire()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield check
    except Exception:
        check()  # the reason for a job that was cancelled
        raise
    finally:
        ended.set()
        watcher.join()
        with contextlib.suppress(Exception):  # from Java, if it has ended
            lock.release()


def _check_once(spark, master, lock, checks):
    """Renew the lock, and add a check of the cluster to ``checks``.

    Returns
    -------
    list of BatchError
        Why the lock or the cluster is lost, empty if both are there.
    """
    if not lock.beat():
        return [
            BatchError(
                "Another run has taken over this output, because this one gave no sign of life.",
                "Wait until that one has ended, and run the same command again.",
            )
        ]
    if not master.startswith("spark://"):
        checks.append((True, 0))
        return []
    count = spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() - 1  # the driver is one
    checks.append((_master_is_reachable(master), count))
    if len(checks) == NO_EXECUTOR_CHECKS and not any(count for _, count in checks):
        print(
            "The cluster has given no executor yet. Free a worker, or ask for less memory: "
            "--conf spark.executor.memory=1g. Still waiting.",
            file=sys.stderr,
        )
    return (
        [BatchError("The cluster's master is lost.", ADVICE_START_CLUSTER)]
        if is_lost(checks)
        else []
    )


def hadoop_path(spark: Any, path: str) -> tuple[Any, Any]:
    """Return Hadoop's Path and the FileSystem that it is in."""
    path = spark._jvm.org.apache.hadoop.fs.Path(path)
    return path, path.getFileSystem(spark._jsc.hadoopConfiguration())


def read_file(file_system: Any, path: Any) -> str | None:
    """Return a small file's text, None where there is no file."""
    if not file_system.exists(path):
        return None
    stream = file_system.open(path)
    try:
        return bytes(stream.readAllBytes()).decode()
    finally:
        stream.close()


def write_file(file_system: Any, path: Any, text: str, overwrite: bool = True) -> None:
    """Write a small file."""
    stream = file_system.create(path, overwrite)
    try:
        stream.write(bytearray(text.encode()))
    finally:
        stream.close()


# --- input and output -----------------------------------------------------------------------


class Report(NamedTuple):
    """What came of a run.

    ``rows`` are those of the input, ``kept`` those that an earlier run had left, errors included.
    ``failed`` counts the rows with an error, and ``errors`` how often each of the 20 most frequent
    reasons occurred. ``cut`` counts the answers that max_tokens ended, ``retried`` the tasks that
    failed and that Spark tried again.
    """

    rows: int
    kept: int
    failed: int
    errors: dict[str, int]
    cut: int
    retried: int


def resolve_alias(uri: str) -> str:
    """Replace the alias in a model's URI by the version that it points to now.

    So a later run of the same command knows whether it has the same model.
    """
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if not uri.startswith("models:/") or not at:
        _, _, number = name.partition("/")
        if uri.startswith("models:/") and number and not number.isdigit():
            raise BatchError(
                f"{uri} has neither a version's number nor an alias.",
                "Use models:/NAME/3 or models:/NAME@ALIAS: --model.",
            )
        return uri
    try:
        version = mlflow.MlflowClient().get_model_version_by_alias(name, alias).version
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise BatchError(
                f"The registry at MLFLOW_TRACKING_URI does not answer: {error.error_code}.",
                "Start it, or correct the variable.",
            ) from None
        raise BatchError(
            f"There is no model {name} whose alias {alias} points to a version.",
            "Register one and set its alias, or correct --model and MLFLOW_TRACKING_URI.",
        ) from None
    return f"models:/{name}/{version}"


def wrap_model(uri: str, folder: Path, config: dict) -> Path:
    """Save a `BatchModel` around a model, with the code that it needs on a worker.

    The code has a package name of its own, as the model may have brought a package ``serving``.
    """
    sources = [Path(__file__).with_name(name) for name in SHIPPED_FILES]
    code = copy_package(sources, folder.with_name("code"), "batch", "batch", "BatchModel")
    try:
        signature = mlflow.models.get_model_info(uri).signature
        if signature and "messages" not in signature.inputs.input_names():
            raise BatchError(
                f"{uri} does not take the chat contract: it has no messages.",
                "Take a model that does, for example --model models:/slm-onnx@champion.",
            )
        with warnings.catch_warnings():
            # The model has no type hints and no input example, because only Spark calls it.
            warnings.simplefilter("ignore", UserWarning)
            mlflow.pyfunc.save_model(
                folder,
                python_model=code.python_model,
                code_paths=code.code_paths,
                artifacts={"model": uri},
                model_config=config,
                pip_requirements=["mlflow"],
            )
    except (MlflowException, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise to_batch_error(error) from None
        first = str(error).partition("\n")[0].rstrip(".")
        raise BatchError(
            f"Could not load the model {uri}: {first}.", "Correct --model and MLFLOW_TRACKING_URI."
        ) from None
    return folder


def column(name: str) -> Any:
    """Return the Spark column of this name, whatever characters it has."""
    from pyspark.sql import functions

    quoted = name.replace("`", "``")
    return functions.col(f"`{quoted}`")


def read_input(spark: Any, path: str, prompt_column: str) -> tuple[Any, int]:
    """Read the input.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session.
    path : str
        A Parquet file, or a folder of them.
    prompt_column : str
        The name of the column with prompts.

    Returns
    -------
    tuple
        The table as a Spark DataFrame, with a column ``row`` that counts from 0 through the files,
        sorted by path; then the number of rows.

    Raises
    ------
    BatchError
        The path or one of its columns can't be used.
    """
    from pyspark.sql import functions

    try:
        table = spark.read.parquet(path)
    except Exception as error:  # from Java
        if "PATH_NOT_FOUND" in str(error):
            raise BatchError(
                f"{path} is not there.", "Correct the first argument, the input."
            ) from None
        reason = to_batch_error(error)
        if reason.what.startswith("The job failed"):
            reason = BatchError(
                f"{path} holds no Parquet that Spark can read.", "Correct the path."
            )
        raise reason from None
    names = table.columns
    if prompt_column not in names:
        raise BatchError(
            f"{path} has no column {prompt_column}: it has {', '.join(names)}.",
            "Name the column of prompts: --column NAME.",
        )
    kind = table.schema[prompt_column].dataType
    if not _can_hold_prompts(kind):
        raise BatchError(
            f"The column {prompt_column} holds neither texts nor messages: its type is "
            f"{kind.simpleString()}.",
            "Name another one: --column NAME.",
        )
    # Most programs that read Parquet do not tell "Answer" from "answer".
    taken = [name for name in names if name.lower() in (*ADDED_COLUMNS, *TEMPORARY_COLUMNS)]
    if taken:
        raise BatchError(
            f"{path} has columns that the answers would have: {', '.join(taken)}.", "Rename them."
        )
    metadata = functions.col("_metadata")
    table = table.select("*", metadata.file_path.alias("_file"), metadata.row_index.alias("row"))
    starts = {}
    total = 0
    for file, count in sorted(tuple(row) for row in table.groupBy("_file").count().collect()):
        starts[file] = total
        total += count
    if not starts:
        return table.drop("_file"), 0
    pairs = [functions.lit(value) for pair in starts.items() for value in pair]
    start = functions.create_map(*pairs)[functions.col("_file")]
    return table.withColumn("row", functions.col("row") + start).drop("_file"), total


def _can_hold_prompts(kind):
    """Tell whether a column of this type can hold texts, or lists of messages."""
    if kind.typeName() == "string":
        return True
    if kind.typeName() != "array" or kind.elementType.typeName() != "struct":
        return False
    fields = {field.name: field.dataType.typeName() for field in kind.elementType.fields}
    return fields.get("role") == fields.get("content") == "string"


# How `to_json` writes a row for its hash: nothing is left out, in any time zone of the driver.
JSON_OPTIONS = {
    "ignoreNullFields": "false",
    "timeZone": "UTC",
    "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX",
    "timestampNTZFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSS",
}


def add_hash(table: Any, settings: dict) -> Any:
    """Add ``row_hash``, a hash of the row's content and of the settings its answer depends on."""
    from pyspark.sql import functions

    names = [name for name in table.columns if name != "row"]
    content = functions.to_json(functions.struct(*map(column, names)), JSON_OPTIONS)
    settings_text = functions.lit(repr(sorted(settings.items())))
    return table.withColumn(
        "row_hash", functions.sha2(functions.concat(settings_text, content), 256)
    )


def run(
    spark: Any,
    options: argparse.Namespace,
    folder: Path,
    raise_if_lost: Callable[[], None] = lambda: None,
) -> Report:
    """Process the rows of the input that are not in the output yet.

    A row that ended in an error is in the output, and is not tried again.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session.
    options : argparse.Namespace
        What `read_options` returned.
    folder : Path
        A temporary folder.
    raise_if_lost : callable
        Raises if the lock or the cluster has been lost.

    Raises
    ------
    BatchError
        The model, the input or the output can't be used, or the lock or the cluster is lost.
    """
    from pyspark.sql import functions

    model_uri = resolve_alias(options.model)
    table, total = read_input(spark, options.input, options.column)
    settings = {
        "model": model_uri,
        "column": options.column,
        "system": options.system,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
    }
    table = add_hash(table, settings)
    output = Output(spark, options.output)
    output.check(options.overwrite)
    names = ("max_tokens", "temperature")
    config = {
        "fields": {name: settings[name] for name in names if settings[name] is not None},
        "system": options.system,
        "threads": int(spark.conf.get("spark.task.cpus", "1")),
    }
    wrapped = wrap_model(model_uri, folder / "model", config)
    raise_if_lost()
    missing, kept = output.begin(table, total, settings, options.overwrite)
    kinds = ", ".join(f"{name}: {kind}" for name, kind in ANSWER_COLUMNS.items())
    answer = mlflow.pyfunc.spark_udf(
        spark, wrapped.as_uri(), result_type=f"struct<{kinds}>", env_manager="local"
    )
    # Rows of similar length follow each other, so that few rows of a call wait for a long one.
    parts = max(-(-(total - kept) // options.rows_per_task), 1)
    length = functions.length(column(options.column).cast("string"))
    ordered = missing.repartition(parts, "row").sortWithinPartitions(length, "row")
    answered = ordered.withColumn("_answer", answer(column(options.column)))
    answered.select(*map(column, missing.columns), "_answer.*").write.mode("append").parquet(
        options.output
    )
    raise_if_lost()
    report = _report(spark, options.output, total, kept)
    output.mark_complete()
    return report


class Output:
    """The folder of the answers.

    Finished tasks leave their rows in it. ``_settings.json`` has what the answers depend on, and
    ``_SUCCESS`` says that all rows are there. Spark reads no file whose name begins with ``_``.
    """

    def __init__(self, spark: Any, path: str):
        self._spark = spark
        self._name = path
        self._path, self._file_system = hadoop_path(spark, path)
        self._settings = self._path.suffix("/_settings.json")
        self._success = self._path.suffix("/_SUCCESS")

    def check(self, overwrite: bool) -> None:
        """Raise a BatchError if the folder is not an output of this program, or may not be replaced.

        A complete output may be replaced if ``overwrite`` is set.
        """
        if not self._file_system.exists(self._path):
            return
        if not self._file_system.exists(self._settings) and self._file_system.listStatus(
            self._path
        ):
            raise BatchError(
                f"{self._name} is there already, and is no output of this program.",
                "Take another path.",
            )
        if self._file_system.exists(self._success) and not overwrite:
            raise BatchError(
                f"{self._name} is there already.", "Take another path, or replace it: --overwrite."
            )

    def begin(self, table: Any, total: int, settings: dict, overwrite: bool) -> tuple[Any, int]:
        """Return the rows that are still to be answered, and how many are done.

        Deletes a folder that is complete or belongs to another run: call `check` first.
        """
        before = json.loads(read_file(self._file_system, self._settings) or "null")
        is_complete = self._file_system.exists(self._success)
        if before is None or is_complete:
            return self._begin_anew(table, settings)
        change = _find_change(before, settings)
        done = None if change else self._read_rows()
        if done is not None and done.join(table, ROW_ID_COLUMNS, "left_anti").count():
            change = "another input"
        if change and not overwrite:
            raise BatchError(
                f"{self._name} is of a run with {change}.",
                "Finish that run with its own input and options, or begin anew: --overwrite.",
            )
        if change or done is None:
            return self._begin_anew(table, settings)
        missing = table.join(done, ROW_ID_COLUMNS, "left_anti")
        return missing, total - missing.count()

    def _begin_anew(self, table, settings):
        self._file_system.delete(self._path, True)
        write_file(self._file_system, self._settings, json.dumps(settings))
        return table, 0

    def _read_rows(self):
        """Return the finished rows' numbers and hashes, None where no task has ended."""
        try:
            return self._spark.read.parquet(self._name).select(*ROW_ID_COLUMNS)
        except Exception as error:  # from Java
            if "UNABLE_TO_INFER_SCHEMA" in str(error):
                return None
            raise

    def mark_complete(self) -> None:
        """Write ``_SUCCESS``."""
        write_file(self._file_system, self._success, "")


def _find_change(before, settings):
    """Return what is different from an earlier run's settings, or an empty text."""
    return " and ".join(
        f"another {name} ({before.get(name)})"
        for name in settings
        if before.get(name) != settings[name]
    )


def _report(spark, output, total, kept):
    """Check that each input row is in the output exactly once, and count the results."""
    from pyspark.sql import functions

    rows = spark.read.parquet(output)
    is_error, is_cut = (
        functions.expr("status = 'error'"),
        functions.expr("finish_reason = 'length'"),
    )
    count, different, failed, cut = rows.agg(
        functions.count("*"),
        functions.countDistinct("row"),
        functions.count_if(is_error),
        functions.count_if(is_cut),
    ).first()
    if (count, different) != (total, total):
        raise BatchError(
            f"{output} should have {total} rows, each once. It has {different} different ones, and "
            f"{count - different} repeats.",
            f"Remove {output}, and run the same command again.",
        )
    errors = rows.where(is_error).groupBy("reason").count()
    errors = errors.orderBy("count", ascending=False).limit(20).collect()
    tracker = spark.sparkContext.statusTracker()
    stages = [
        tracker.getStageInfo(stage)
        for job in tracker.getJobIdsForGroup()
        for stage in getattr(tracker.getJobInfo(job), "stageIds", ())
    ]
    return Report(
        total,
        kept,
        failed,
        {row["reason"]: row["count"] for row in errors},
        cut,
        sum(stage.numFailedTasks for stage in stages if stage),
    )


# --- the program ----------------------------------------------------------------------------


def read_options(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="batch",
        allow_abbrev=False,
        description="Answer the prompts of a Parquet file on a Spark cluster.",
    )
    add = parser.add_argument
    add("input", help="a Parquet file, or a folder of them, where each worker can read it")
    add("output", help="a folder for the answers, where each worker can write it")
    add(
        "--model",
        default="models:/slm-onnx@champion",
        help="models:/NAME@ALIAS or models:/NAME/VERSION",
    )
    add("--master", required=True, help="spark://HOST:PORT, yarn or k8s://HOST:PORT")
    add("--column", default="prompt", help="the column of prompts, or of lists of messages")
    add("--system", default="", help="a system prompt for each row")
    add("--max-tokens", type=_positive, help="the most tokens of an answer; default: the model's")
    add("--temperature", type=float, help="default: the model's")
    add(
        "--rows-per-task",
        type=_positive,
        default=200,
        help="rows in one task of Spark; a lost worker's tasks start again",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace an output that is complete or of another run",
    )
    add("--conf", action="append", default=[], metavar="NAME=VALUE", help="a setting of Spark")
    return parser.parse_args(words)


def _positive(text):
    number = int(text)
    if not 0 < number < 2**31:
        raise ValueError
    return number


def spark_config(master: str, conf: Sequence[str]) -> dict[str, str]:
    """Return Spark's configuration for a cluster. ``conf``, each NAME=VALUE, takes precedence."""
    chosen = {
        "spark.log.level": "ERROR",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.caseSensitive": "true",  # as Parquet is
        # Rows that Spark hands to Python at a time.
        "spark.sql.execution.arrow.maxRecordsPerBatch": "256",
        # Each task's files appear when that task ends, so that a later run can go on.
        "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
        # The program itself writes _SUCCESS, once it has counted the rows.
        "spark.hadoop.mapreduce.fileoutputcommitter.marksuccessfuljobs": "false",
        # MLflow unpacks the model in the executor's own folder, and leaves it there.
        "spark.executorEnv.TMPDIR": ".",
    }
    if re.match(r"spark://(127\.|localhost)", master):
        chosen |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.extraJavaOptions": FAST_START_JAVA_OPTIONS,
            "spark.executor.extraJavaOptions": FAST_START_JAVA_OPTIONS,
        }
    for setting in conf:
        name, equals, value = setting.partition("=")
        if not equals:
            raise BatchError(
                f"--conf {setting} is no NAME=VALUE.", "Such as --conf spark.executor.memory=2g."
            )
        chosen[name] = value
    return chosen


def start_spark(master: str, settings: Sequence[str] = ()) -> Any:
    """Return a Spark session on a cluster.

    From then on, zip files of this process are not compressed: MLflow zips the model for Spark, and
    weights hardly get smaller.
    """
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).appName("batch")
    for name, value in spark_config(master, settings).items():
        builder = builder.config(name, value)
    # PySpark warns about this pandas at every function. The functions used here are tested.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    shutil.register_archive_format("zip", _make_zip, description="ZIP file, not compressed")
    with _quiet_java():
        return builder.getOrCreate()


def _make_zip(base_name, base_dir, **_):
    """Write a zip file, as ``shutil.make_archive`` asks for one."""
    with zipfile.ZipFile(f"{base_name}.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(Path(base_dir).rglob("*")):
            archive.write(path)
    return f"{base_name}.zip"


@contextlib.contextmanager
def _quiet_java():
    """Discard what Java writes to stderr, for as long as it runs: no setting turns its start off."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main(words: list[str]) -> int:
    """Answer the rows of a file. Return the exit code."""
    options = read_options(words)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    try:
        report = _run_on_cluster(options)
    except ProgramError as error:
        print(f"error: {error.what}\n       {error.fix}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(ADVICE_RUN_AGAIN, file=sys.stderr)
        return 130
    print(
        f"{report.rows} rows in {options.output}: {report.rows - report.failed} answered, "
        f"{report.failed} errors "
        f"(kept from a run before: {report.kept}; cut by max_tokens: {report.cut}; "
        f"tasks tried again: {report.retried})"
    )
    for reason, count in report.errors.items():
        print(f"{count:>8}  {reason}")
    return 0


def _run_on_cluster(options):
    check_installation()
    check_master(options.master)
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    folder = tempfile.TemporaryDirectory(prefix="spark-batch-", ignore_cleanup_errors=True)
    with folder as tempfile.tempdir:  # MLflow writes the zip file for Spark there
        try:
            spark = start_spark(options.master, options.conf)
            try:
                lock = DriverLock(spark, options.output)
                with watch_cluster(spark, options.master, lock) as raise_if_lost:
                    return run(spark, options, Path(tempfile.tempdir), raise_if_lost)
            finally:
                with contextlib.suppress(Exception):  # from Java, if it has ended
                    spark.stop()
        except ProgramError:
            raise
        except Exception as error:
            raise to_batch_error(error) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
