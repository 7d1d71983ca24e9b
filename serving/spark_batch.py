"""Prompts in Parquet files go in, the same rows with their answers come out, by way of a Spark cluster.

The model is any MLflow model of the chat contract, ``llm/v1/chat``. Spark ships it to the workers; each of their
Python processes loads it once. This is one file that imports nothing of the course, so it travels alone:
``MLFLOW_TRACKING_URI=... python spark_batch.py IN.parquet OUT.parquet --model models:/slm-onnx@champion --master
spark://HOST:PORT``.

From top to bottom: the rows (what runs on a worker: which row is at fault, and which rows go together), the words
(what a failure means), the run (what is there, what is missing, what came of it), and the program.
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

AT_ONCE = 64  # rows of one call of the model, at most: it runs them as batches
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
ANSWER = "answer string, status string, reason string, prompt_tokens long, completion_tokens long"
ADDED = ("row", *(field.split()[0] for field in ANSWER.split(", ")))
CELLS = r"string$|array<struct<(?=.*role:string)(?=.*content:string)"  # what a column of prompts may hold
OLDEST_JAVA = 17
QUICK_START = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # for a Java that has few cores, and little to do itself
# For a master and its workers on one machine: a worker soon removes what a program that has ended left with it.
DAEMONS = (f"{QUICK_START} -Dspark.worker.cleanup.enabled=true -Dspark.worker.cleanup.interval=30 "
           "-Dspark.worker.cleanup.appDataTtl=30")
LOOK_SECONDS, LOOKS = 5, 4  # looks at the cluster: how often, and how many in a row have to find nobody

# --- the rows -------------------------------------------------------------------------------


def failed(reason: str) -> dict:
    """Return what a row gets that has no answer."""
    return {"answer": "", "status": "error", "reason": reason, "prompt_tokens": 0, "completion_tokens": 0}


def answered(completion: dict) -> dict:
    """Return what a row gets whose chat completion this is."""
    used = completion.get("usage") or {}
    return {"answer": completion["choices"][0]["message"]["content"], "status": "ok", "reason": "",
            "prompt_tokens": used.get("prompt_tokens", 0), "completion_tokens": used.get("completion_tokens", 0)}


def read_messages(cell: Any, system: str = "") -> list[dict] | None:
    """Return the messages of a cell, which is a text or a list of messages; None where there is nothing to ask."""
    before = [{"role": "system", "content": system}] if system else []
    if isinstance(cell, str) and cell.strip():
        return [*before, {"role": "user", "content": cell}]
    if isinstance(cell, list | np.ndarray) and len(cell):
        return [*before, *({"role": message["role"], "content": message["content"]} for message in cell)]
    return None


def answer_rows(conversations: list[list[dict] | None], ask: Callable[[list[list[dict]]], list[dict]],
                works: Callable[[], Any], at_once: int = AT_ONCE) -> list[dict]:
    """Answer every conversation, each with its own fate.

    Parameters
    ----------
    conversations : list
        Each a list of messages, or None for a row that has nothing to ask.
    ask : callable
        Takes conversations and returns their chat completions. It raises where it does not take one of them.
    works : callable
        Asks what the model has to be able to answer, and raises where it can't: then no row is at fault.
    at_once : int, optional
        Conversations that ``ask`` gets, at most. Those of similar length go together.

    Returns
    -------
    list of dict
        The fields of ``ANSWER``, in the order of ``conversations``.
    """
    rows = [None if conversation else failed("There is nothing to ask: the cell is empty or null.")
            for conversation in conversations]
    asked = sorted((place for place, row in enumerate(rows) if row is None),
                   key=lambda place: sum(len(message["content"] or "") for message in conversations[place]))
    groups = [asked[start:start + at_once] for start in range(0, len(asked), at_once)]
    while groups:
        group = groups.pop()
        try:
            for place, completion in zip(group, ask([conversations[place] for place in group]), strict=True):
                rows[place] = answered(completion)
        except Exception as error:
            if len(group) > 1:  # the half that has the row at fault fails again, and the other one does not
                groups += [group[:len(group) // 2], group[len(group) // 2:]]
                continue
            rows[group[0]] = failed(read_refusal(error) or _tell(error, works))
    return rows


def read_refusal(error: Exception) -> str:
    """Return the sentence with which a model refuses a request; empty where an error is no refusal."""
    refused = isinstance(error, MlflowException) and error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
    return error.message.partition("\n")[0][:500] if refused else ""


def _tell(error, works):
    works()  # what this raises is the model's failure, and Spark tries the task again
    return f"The model failed on this row: {type(error).__name__}."


class RowByRow(mlflow.pyfunc.PythonModel):
    """A chat model as Spark asks it: a column of prompts or of conversations comes in, a table of ``ANSWER`` goes out.

    The artifact ``model`` is the chat model's folder. ``model_config`` has ``fields``, those of each request beside
    its messages; ``system``, a text that goes before each, or an empty one; and ``threads``, how many one such
    model may use.
    """

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        """Load the chat model; once for each Python process of a worker."""
        folder, self._config = Path(context.artifacts["model"]), context.model_config
        flavor = mlflow.models.Model.load(folder).flavors["python_function"]
        takes_threads = "threads" in (flavor.get("config") or {})
        self._model = mlflow.pyfunc.load_model(
            folder.as_uri(), model_config={"threads": self._config["threads"]} if takes_threads else None)
        self._pipeline = (self._model.get_raw_model() if flavor["loader_module"] == "mlflow.transformers" else None)
        self._works()

    def predict(self, context: mlflow.pyfunc.PythonModelContext, model_input: pd.DataFrame,
                params: dict | None = None) -> pd.DataFrame:
        """Answer the cells of the first column. ``params`` is not used."""
        conversations = [read_messages(cell, self._config["system"]) for cell in model_input.iloc[:, 0]]
        rows = answer_rows(conversations, self._ask, self._works, 1 if self._pipeline else AT_ONCE)
        return pd.DataFrame(rows, columns=ADDED[1:])

    def _works(self):
        self._complete([HELLO])

    def _ask(self, conversations):
        return self._complete([{"messages": messages} | self._config["fields"] for messages in conversations])

    def _complete(self, requests):
        if not self._pipeline:
            return self._model.predict(requests)
        (request,) = requests
        self._check_length(request["messages"])
        return self._model.predict(request)

    def _check_length(self, messages):
        """Refuse what a pipeline's model cannot read: the pipeline itself would try, for minutes and gigabytes."""
        longest = self._pipeline.model.config.max_position_embeddings
        prompt = self._pipeline.tokenizer.apply_chat_template(messages, tokenize=False)
        if len(self._pipeline.tokenizer(prompt)["input_ids"]) >= longest:
            raise MlflowException.invalid_parameter_value(
                f"messages has to be fewer than {longest} tokens, the model's context.")


# --- the words ------------------------------------------------------------------------------


class BatchError(Exception):
    """A failure that the user can mend: what happened, and what to do."""

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what}\n{fix}")
        self.what, self.fix = what, fix

    def _render_traceback_(self):  # a notebook shows these in place of a page of stack frames
        return [f"BatchError: {self.what}", self.fix]


AGAIN = "Run the same command again: it goes on with the rows that are missing."
MORE_MEMORY = (
    "Give its executors more, with --conf: spark.executor.memory is for Java, spark.executor.memoryOverhead for the "
    f"Python processes and their models, and spark.executor.pyspark.memory bounds these. {AGAIN}")
# What Spark's long messages have in them, and what each means. The first that fits is taken.
MEANINGS = (
    (r"No space left on device|Disk quota exceeded", "A disk is full.",
     f"Make room where the rows are written, and where the workers keep their files. {AGAIN}"),
    (r"MemoryError|bad_alloc|Cannot allocate memory|DefaultCPUAllocator|exit code 137|exit code: 137|OutOfMemoryError|"
     r"[Ff]ailed to allocate memory|failed to map segment",
     "A worker ran out of memory.", MORE_MEMORY),
    # What Spark says of a Python that the system has ended.
    (r"Python worker exited unexpectedly", "A worker's Python was ended, most likely for want of memory.", MORE_MEMORY),
    (r"cancelled as part of cancellation of all jobs|All masters are unresponsive|Could not connect to .*master|"
     r"Master removed our application|SparkContext was shut down|Cannot call methods on a stopped SparkContext|"
     r"Connection refused|Answer from Java side is empty|Py4JNetworkError",
     "The cluster's master is lost.", f"Start the master and its workers. {AGAIN}"),
    (r"ModuleNotFoundError|No module named", "A worker's Python lacks a package that the model needs.",
     "Install what the model requires on every worker, or name another Python: --conf spark.pyspark.python=PATH."),
    (r"PYTHON_VERSION_MISMATCH|Python in worker has different version",
     "The workers' Python is of another version than this one.",
     "Name a Python of the same version there: --conf spark.pyspark.python=PATH."),
)


def explain(error: str) -> BatchError:
    """Return what a failure of Spark's means, from its long text."""
    for pattern, what, fix in MEANINGS:
        if re.search(pattern, error):
            return BatchError(what, fix)
    first = next((line.strip() for line in error.splitlines() if line.strip()), "it says nothing")
    return BatchError(f"The job failed: {first[:300].rstrip('.')}.", f"The logs of the executors have more. {AGAIN}")


def read_java(said: str) -> int:
    """Return the number of a Java from what ``java -version`` says: 17, and 8 for 1.8; 0 where it says none."""
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else 0


def check_spark() -> None:
    """Refuse a Python without Spark, and a machine without a Java that it runs on."""
    if importlib.util.find_spec("pyspark") is None:
        raise BatchError("This Python has no Spark.",
                         "Install pyspark; in the course's folder: python -m pip install --editable \".[spark]\".")
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    advice = (f"Install Java {OLDEST_JAVA} or newer, such as Debian's openjdk-17-jre-headless or Temurin's, and let "
              "JAVA_HOME be its folder.")
    try:
        said = subprocess.run([java or "java", "-version"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        raise BatchError("Spark needs Java, and there is none" + (" where JAVA_HOME points." if home else "."),
                         advice) from None
    if (number := read_java(said)) < OLDEST_JAVA:
        raise BatchError(f"Spark needs Java {OLDEST_JAVA} or newer, and this one is {number or 'of no known version'}.",
                         advice)


def check_master(master: str) -> None:
    """Refuse what is no cluster, and a standalone master that nobody can be reached at."""
    if not re.match(r"spark://|k8s://|yarn$", master):
        raise BatchError(f"{master} is no cluster that Spark would ship a model to.",
                         "Say --master spark://HOST:PORT, yarn or k8s://HOST:PORT.")
    if master.startswith("spark://") and not _answers(master):
        raise BatchError(f"No Spark master answers at {master}.", "Start it, or correct --master.")


def _answers(master):
    for one in master.removeprefix("spark://").split(","):  # several stand by for each other
        place = urlsplit(f"//{one}")
        try:
            with socket.create_connection((place.hostname, place.port), timeout=10):
                return True
        except (OSError, TypeError, ValueError):
            continue
    return False


def is_lost(looks: Sequence[tuple[bool, int]]) -> bool:
    """Tell whether a cluster is lost, from looks at it: whether a master answers, and how many executors there are.

    A master that is lost alone is no harm: the executors go on, and another master may come.
    """
    last = looks[-LOOKS:]
    return len(last) == LOOKS and not any(answers or executors for answers, executors in last)


@contextlib.contextmanager
def watching(spark: Any, master: str) -> Iterator[None]:
    """Cancel the jobs of a block whose standalone cluster is lost: Spark would wait for it for ever."""
    ended, looks = threading.Event(), []

    def watch():
        context = spark.sparkContext
        while not ended.wait(LOOK_SECONDS):
            executors = context._jsc.sc().getExecutorMemoryStatus().size() - 1  # one of these is the driver
            looks.append((_answers(master), executors))
            if is_lost(looks):
                context.cancelAllJobs()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if master.startswith("spark://"):
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if watcher.is_alive():
            watcher.join()


# --- the run --------------------------------------------------------------------------------


class Files:
    """The cluster's file system, local or not: what Hadoop's Java classes do for a path."""

    def __init__(self, spark: Any, path: str):
        self._java = spark._jvm.org.apache.hadoop.fs.Path
        self._system = self._java(path).getFileSystem(spark._jsc.hadoopConfiguration())

    def exists(self, path: str) -> bool:
        """Tell whether there is a file or a folder."""
        return self._system.exists(self._java(path))

    def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        self._system.delete(self._java(path), True)

    def move(self, path: str, to: str) -> None:
        """Rename a folder. On a file system such as HDFS or a disk nobody ever sees half of it."""
        if not self._system.rename(self._java(path), self._java(to)):
            raise BatchError(f"{path} cannot be renamed to {to}.", "Look who owns the folder that they are in.")

    def write(self, path: str, text: str) -> None:
        """Write a small file, whole or not at all."""
        stream = self._system.create(self._java(f"{path}.new"), True)
        try:
            stream.write(bytearray(text.encode()))
        finally:
            stream.close()
        self._system.delete(self._java(path), False)
        self.move(f"{path}.new", path)

    def read(self, path: str) -> str:
        """Return a small file's text."""
        stream = self._system.open(self._java(path))
        try:
            return bytes(stream.readAllBytes()).decode()
        finally:
            stream.close()


class Report(NamedTuple):
    """What came of a run: rows of the input, how many were there already, errors by reason, tasks tried again."""

    rows: int
    kept: int
    errors: dict[str, int]
    retried: int


def find_version(uri: str) -> str:
    """Return a model's address with its version in place of an alias, so that a run goes on with the same one."""
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if not uri.startswith("models:/") or not at:
        return uri
    try:
        return f"models:/{name}/{mlflow.MlflowClient().get_model_version_by_alias(name, alias).version}"
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise BatchError(f"The registry at MLFLOW_TRACKING_URI does not answer: {error.error_code}.",
                             "Start it, or correct the variable.") from None
        raise BatchError(f"There is no model {name} whose alias {alias} points to a version.",
                         "Register one and set its alias, or correct --model and MLFLOW_TRACKING_URI.") from None


def wrap_model(uri: str, folder: Path, config: dict) -> Path:
    """Save ``RowByRow`` around a model, in a folder that is whole by itself."""
    try:
        signature = mlflow.models.get_model_info(uri).signature
        if signature and "messages" not in signature.inputs.input_names():
            raise BatchError(f"{uri} does not take the chat contract: it has no messages.",
                             "Take a model that has: slm-onnx or slm-transformers, by their addresses.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # no type hints and no input example: Spark is the only caller
            mlflow.pyfunc.save_model(folder, python_model=__file__, artifacts={"model": uri}, model_config=config,
                                     pip_requirements=["mlflow"])
    except (MlflowException, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise explain(str(error)) from None
        first = str(error).partition("\n")[0].rstrip(".")
        raise BatchError(f"The model {uri} cannot be had: {first}.",
                         "Correct --model and MLFLOW_TRACKING_URI.") from None
    return folder


def number_rows(spark: Any, path: str, column: str) -> Any:
    """Return the input as a Spark DataFrame whose column ``row`` counts its rows, from 0, in the order of its files."""
    from pyspark.sql import functions

    try:
        table = spark.read.parquet(path)
    except Exception as error:  # Java's own where the file is something else
        missing = "PATH_NOT_FOUND" in str(error)
        raise BatchError(f"{path} is not there." if missing else f"{path} holds no Parquet that Spark can read.",
                         "Correct the first path.") from None
    if column not in table.columns:
        raise BatchError(f"{path} has no column {column}: it has {', '.join(table.columns)}.",
                         "Name the column of prompts: --column NAME.")
    if not re.match(CELLS, kind := table.schema[column].dataType.simpleString()):
        raise BatchError(f"The column {column} holds neither texts nor messages: its type is {kind}.",
                         "Name another one: --column NAME.")
    if taken := [name for name in ADDED if name in table.columns]:
        raise BatchError(f"{path} has columns that the answers would have: {', '.join(taken)}.", "Rename them.")
    place = functions.col("_metadata")
    table = table.select("*", place.file_path.alias("_file"), place.row_index.alias("row"))
    before, total = {}, 0
    for file, count in sorted(tuple(found) for found in table.groupBy("_file").count().collect()):
        before[file], total = total, total + count
    if not before:
        return table.drop("_file"), 0
    offset = functions.create_map(*(functions.lit(word) for pair in before.items() for word in pair))
    return table.withColumn("row", functions.col("row") + offset[functions.col("_file")]).drop("_file"), total


def run(spark: Any, options: argparse.Namespace, folder: Path) -> Report:
    """Answer the rows that have no answer yet; then, and not before, the output is there."""
    from pyspark.sql import functions

    files, out, unfinished = Files(spark, options.output), options.output, f"{options.output}.unfinished"
    if files.exists(out) and not options.overwrite:
        raise BatchError(f"{out} is there already.", "Take another path, or replace it: --overwrite.")
    version = find_version(options.model)
    table, total = number_rows(spark, options.input, options.column)
    plan = {"input": options.input, "rows": total, "column": options.column, "model": version,
            "system": options.system, "max_tokens": options.max_tokens, "temperature": options.temperature}
    fields = {name: plan[name] for name in ("max_tokens", "temperature") if plan[name] is not None}
    wrapped = wrap_model(version, folder / "model", {
        "fields": fields, "system": options.system, "threads": int(spark.conf.get("spark.task.cpus", "1"))})
    table, kept = _go_on(files, unfinished, plan, options.overwrite, table, spark)  # writes, once the model is there
    parts = -(-(total - kept) // options.rows_per_task)
    if parts or not kept:
        answer = mlflow.pyfunc.spark_udf(spark, wrapped.as_uri(), result_type=f"struct<{_as_struct(ANSWER)}>",
                                         env_manager="local")
        # Rows of similar length come one after the other, so that a batch has few that wait for a long one.
        lengths = table.repartition(max(parts, 1), "row").sortWithinPartitions(
            functions.length(functions.col(options.column).cast("string")), "row")
        answers = lengths.withColumn("_answer", answer(functions.col(options.column)))
        answers.select(*table.columns, "_answer.*").write.mode("append").parquet(f"{unfinished}/rows")
    report = _count(spark, f"{unfinished}/rows", total, kept)
    replaced = f"{out}.replaced"
    if files.exists(out):
        files.move(out, replaced)
    files.move(f"{unfinished}/rows", out)
    files.remove(unfinished)
    files.remove(replaced)
    return report


def _as_struct(fields):
    return fields.replace(" ", ":").replace(",:", ",")


def _go_on(files, unfinished, plan, anew, table, spark):
    """Return the rows that are missing, of a run with the same plan or of a new one, and how many are not."""
    told = f"{unfinished}/plan.json"
    if anew or not files.exists(told):
        files.remove(unfinished)
        files.write(told, json.dumps(plan))
        return table, 0
    other = [name for name, value in json.loads(files.read(told)).items() if value != plan[name]]
    if other:
        raise BatchError(f"{unfinished} is of a run with another {' and another '.join(other)}.",
                         "Run that one again to end it, or begin anew: --overwrite.")
    if not files.exists(f"{unfinished}/rows"):
        return table, 0
    try:
        done = spark.read.parquet(f"{unfinished}/rows").select("row")
    except Exception:  # no task had ended, so no file is in it
        return table, 0
    missing = table.join(done, "row", "left_anti")
    return missing, plan["rows"] - missing.count()


def _count(spark, path, total, kept):
    """Return what the rows came to. They have to be all, and each once."""
    from pyspark.sql import functions

    rows = spark.read.parquet(path)
    found, different = rows.agg(functions.count("*"), functions.countDistinct("row")).first()
    if (found, different) != (total, total):
        raise BatchError(f"Of {total} rows, {different} are answered, and {found - different} twice.",
                         "Begin anew: --overwrite.")
    errors = rows.where("status = 'error'").groupBy("reason").count().orderBy("count", ascending=False).limit(20)
    tracker = spark.sparkContext.statusTracker()
    stages = [tracker.getStageInfo(stage) for job in tracker.getJobIdsForGroup() for stage in
              tracker.getJobInfo(job).stageIds]
    return Report(total, kept, {row["reason"]: row["count"] for row in errors.collect()},
                  sum(stage.numFailedTasks for stage in stages if stage))


# --- the program ----------------------------------------------------------------------------


def read_options(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="batch", allow_abbrev=False,
                                     description="Answer the prompts of a Parquet file on a Spark cluster.")
    parser.add_argument("input", help="a Parquet file, or a folder of them, where each worker can read it")
    parser.add_argument("output", help="a folder that is not there yet, where each worker can write it")
    parser.add_argument("--model", default="models:/slm-onnx@champion",
                        help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("--master", required=True, help="spark://HOST:PORT, yarn or k8s://HOST:PORT")
    parser.add_argument("--column", default="prompt", help="the column of prompts, or of lists of messages")
    parser.add_argument("--system", default="", help="a system prompt for each row")
    parser.add_argument("--max-tokens", type=_whole, help="tokens of an answer, at most; left out: the model's own")
    parser.add_argument("--temperature", type=float, help="left out: the model's own")
    parser.add_argument("--rows-per-task", type=_whole, default=200, help="so many are lost where a worker is lost")
    parser.add_argument("--overwrite", action="store_true", help="replace the output, and forget what was begun")
    parser.add_argument("--conf", action="append", default=[], metavar="NAME=VALUE", help="a setting for Spark")
    return parser.parse_args(words)


def _whole(text):
    if not 0 < (value := int(text)) < 2**31:
        raise ValueError
    return value


def read_settings(master: str, settings: Sequence[str]) -> dict[str, str]:
    """Return Spark's settings for a cluster, and ``settings``, each a ``NAME=VALUE``, in their place."""
    chosen = {
        "spark.log.level": "ERROR", "spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": "256",  # as many as the chat model takes in one call
        # The files of a task are there when the task ends, not when all have, so that a run can go on.
        "spark.hadoop.mapreduce.fileoutputcommitter.algorithm.version": "2",
        "spark.executorEnv.TMPDIR": "."}  # MLflow unpacks the model there, and leaves it: in the executor's own folder
    if re.match(r"spark://(127\.|localhost)", master):
        chosen |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1",
                   "spark.driver.extraJavaOptions": QUICK_START, "spark.executor.extraJavaOptions": QUICK_START}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise BatchError(f"--conf {setting} is no NAME=VALUE.", "Such as --conf spark.executor.memory=2g.")
        chosen[name] = value
    return chosen


def start_spark(master: str, settings: Sequence[str] = ()) -> Any:
    """Return a Spark session on a cluster.

    From here on this process makes zip files without compressing what goes in: Spark ships a model as the zip file that
    MLflow makes of it. Weights do not compress, and a core would try for half a minute with a small model.
    """
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).appName("spark_batch")
    for name, value in read_settings(master, settings).items():
        builder = builder.config(name, value)
    # It says so of each function, and all that this file uses is tried by its tests.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    shutil.register_archive_format("zip", _store, description="ZIP file, not compressed")
    with _java_is_quiet():
        return builder.getOrCreate()


def _store(base_name, base_dir, **_):
    """Make a zip file, as ``shutil.make_archive`` asks for one."""
    with zipfile.ZipFile(f"{base_name}.zip", "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(Path(base_dir).rglob("*")):
            archive.write(path)
    return f"{base_name}.zip"


@contextlib.contextmanager
def _java_is_quiet():
    """Send what a Java says to nobody if it starts now. Java greets with warnings that no setting turns off."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nobody:
        os.dup2(nobody.fileno(), 2)
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
        check_spark()
        check_master(options.master)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        with tempfile.TemporaryDirectory(prefix="spark-batch-", ignore_cleanup_errors=True) as folder:
            tempfile.tempdir = folder  # MLflow leaves the zip file there that Spark ships
            try:
                spark = start_spark(options.master, options.conf)
                try:
                    with watching(spark, options.master):
                        report = run(spark, options, Path(folder))
                finally:
                    spark.stop()
            except BatchError:
                raise
            except Exception as error:
                raise explain(str(error)) from None
    except BatchError as error:
        print(f"error: {error.what}\n       {error.fix}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(AGAIN, file=sys.stderr)
        return 130
    bad = sum(report.errors.values())
    print(f"{report.rows} rows in {options.output}: {report.rows - bad} answered, {bad} errors "
          f"(kept from a run before: {report.kept}; tasks tried again: {report.retried})")
    for reason, count in report.errors.items():
        print(f"{count:>8}  {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
else:
    mlflow.models.set_model(RowByRow())
