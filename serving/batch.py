"""Answers the prompts in Parquet files on a Spark cluster, and writes the rows with their answers.

The model is any MLflow model of the chat contract, ``llm/v1/chat``. Spark ships it to the workers,
and each of their Python processes loads it once:
``python -m serving.batch IN.parquet OUT.parquet --master spark://HOST:PORT``.

This file has the program, the input, and the output: `Output` decides which rows are missing. What
runs on a worker is in `batch_model`. What can happen to a cluster is in `batch_cluster`.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
from mlflow.exceptions import MlflowException

from .batch_cluster import (
    ADVICE_RUN_AGAIN,
    BatchError,
    DriverLock,
    check_installation,
    check_master,
    hadoop_path,
    read_file,
    start_spark,
    to_batch_error,
    watch_cluster,
    write_file,
)
from .batch_model import ANSWER_COLUMNS
from .errors import ProgramError
from .package import SHARED_FILES, copy_package

# Names that the input must not use: columns of the output, and temporary columns.
ROW_ID_COLUMNS = ["row", "row_hash"]
ADDED_COLUMNS = (*ROW_ID_COLUMNS, *ANSWER_COLUMNS)
TEMPORARY_COLUMNS = ("_metadata", "_file", "_answer")
SHIPPED_FILES = (*SHARED_FILES, "batch_model.py")

# --- input and output -----------------------------------------------------------------------


class Report(NamedTuple):
    """The counts of a finished run.

    Attributes
    ----------
    rows : int
        Rows of the input.
    kept : int
        Rows that an earlier run has answered, errors included.
    failed : int
        Rows with an error.
    errors : dict of str to int
        The 20 most frequent reasons, and how often each occurred.
    cut : int
        Answers that max_tokens ended.
    retried : int
        Tasks that failed and that Spark tried again.
    """

    rows: int
    kept: int
    failed: int
    errors: dict[str, int]
    cut: int
    retried: int


def resolve_alias(uri: str) -> str:
    """Replace the alias in a model's URI by the version that it points to now.

    The output's settings keep the version: a later run can tell whether the alias has moved.
    """
    if not uri.startswith("models:/"):
        return uri
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if not at:
        _, _, number = name.partition("/")
        if number and not number.isdigit():
            raise BatchError(
                f"{uri} names neither a version nor an alias.",
                "Correct --model, such as models:/NAME/3 or models:/NAME@ALIAS.",
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
            f"The registry has no model {name} with the alias {alias}.",
            "Register one and set its alias, or correct --model and MLFLOW_TRACKING_URI.",
        ) from None
    return f"models:/{name}/{version}"


def wrap_model(uri: str, folder: Path, config: dict) -> Path:
    """Save a `BatchModel` around a model, with the code that it needs on a worker.

    The code gets its own package name, because the model may bring a package ``serving``.
    """
    sources = [Path(__file__).with_name(name) for name in SHIPPED_FILES]
    code = copy_package(sources, folder.with_name("code"), "batch", "batch_model", "BatchModel")
    try:
        signature = mlflow.models.get_model_info(uri).signature
        if signature and "messages" not in signature.inputs.input_names():
            raise BatchError(
                f"{uri} is not a chat model: its signature has no messages.",
                "Name a chat model, such as --model models:/slm-onnx@champion.",
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
                f"{path} does not exist.", "Correct the first argument, the input."
            ) from None
        reason = to_batch_error(error)
        if reason.what.startswith("The job failed"):
            reason = BatchError(
                f"{path} has no Parquet file that Spark can read.", "Correct the path."
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
            f"The column {prompt_column} has neither texts nor messages: its type is "
            f"{kind.simpleString()}.",
            "Name another one: --column NAME.",
        )
    # Most programs that read Parquet ignore the case of a column's name.
    taken = [name for name in names if name.lower() in (*ADDED_COLUMNS, *TEMPORARY_COLUMNS)]
    if taken:
        raise BatchError(
            f"{path} has columns with names of the output's columns: {', '.join(taken)}.",
            "Rename them.",
        )
    metadata = functions.col("_metadata")
    table = table.select("*", metadata.file_path.alias("_file"), metadata.row_index.alias("row"))
    starts = {}
    total = 0
    for file, count in sorted(table.groupBy("_file").count().collect()):
        starts[file] = total
        total += count
    if not starts:
        return table.drop("_file"), 0
    pairs = [functions.lit(value) for pair in starts.items() for value in pair]
    start = functions.create_map(*pairs)[functions.col("_file")]
    return table.withColumn("row", functions.col("row") + start).drop("_file"), total


def _can_hold_prompts(kind):
    """Return whether a column of this type can hold texts or lists of messages."""
    if kind.typeName() == "string":
        return True
    if kind.typeName() != "array" or kind.elementType.typeName() != "struct":
        return False
    fields = {field.name: field.dataType.typeName() for field in kind.elementType.fields}
    return fields.get("role") == fields.get("content") == "string"


# Options of `to_json` for the hash: all fields, and the same text in every time zone.
JSON_OPTIONS = {
    "ignoreNullFields": "false",
    "timeZone": "UTC",
    "timestampFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSSXXX",
    "timestampNTZFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSSSS",
}


def add_hash(table: Any, settings: dict) -> Any:
    """Add ``row_hash``, a hash of a row's content and of the settings that its answer depends on."""
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
    output.check_usable(options.overwrite)
    names = ("max_tokens", "temperature")
    config = {
        "fields": {name: settings[name] for name in names if settings[name] is not None},
        "system": options.system,
        "threads": int(spark.conf.get("spark.task.cpus", "1")),
    }
    wrapped = wrap_model(model_uri, folder / "model", config)
    raise_if_lost()
    missing, kept = output.start_or_resume(table, total, settings, options.overwrite)
    kinds = ", ".join(f"{name}: {kind}" for name, kind in ANSWER_COLUMNS.items())
    answer = mlflow.pyfunc.spark_udf(
        spark, wrapped.as_uri(), result_type=f"struct<{kinds}>", env_manager="local"
    )
    # Rows of similar length are answered together, so that short ones do not wait for long ones.
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
    """The folder of the answers, in which an interrupted run is resumed.

    Each task that ends leaves its rows in it. A later run resumes if its input and its settings are
    the same: it answers the rows that are not there. ``_settings.json`` has what the answers depend
    on, and ``_SUCCESS`` says that all rows are there. Spark reads no file whose name begins with
    ``_``.
    """

    def __init__(self, spark: Any, path: str):
        self._spark = spark
        self._name = path
        self._path, self._file_system = hadoop_path(spark, path)
        self._settings = self._path.suffix("/_settings.json")
        self._success = self._path.suffix("/_SUCCESS")

    def check_usable(self, overwrite: bool) -> None:
        """Raise a BatchError if the folder is not an output of this program, or may not be replaced.

        A complete output may be replaced if ``overwrite`` is set.
        """
        if not self._file_system.exists(self._path):
            return
        if not self._file_system.exists(self._settings) and self._file_system.listStatus(
            self._path
        ):
            raise BatchError(
                f"{self._name} exists, and this program has not written it.",
                "Name another path.",
            )
        if self._file_system.exists(self._success) and not overwrite:
            raise BatchError(
                f"{self._name} exists already, and is complete.",
                "Name another path, or replace it with --overwrite.",
            )

    def start_or_resume(
        self, table: Any, total: int, settings: dict, overwrite: bool
    ) -> tuple[Any, int]:
        """Return the rows that are still to be answered, and the number of answered ones.

        Deletes an output that is complete or that an earlier run with other settings has left: call
        `check_usable` first.

        Raises
        ------
        BatchError
            The earlier run had other settings or another input, and ``overwrite`` is not set.
        """
        before = json.loads(read_file(self._file_system, self._settings) or "null")
        is_complete = self._file_system.exists(self._success)
        if before is None or is_complete:
            return self._start_over(table, settings)
        change = _find_change(before, settings)
        done = None if change else self._read_rows()
        if done is not None and done.join(table, ROW_ID_COLUMNS, "left_anti").count():
            change = "another input"
        if change and not overwrite:
            raise BatchError(
                f"{self._name} is unfinished, and its run had {change}.",
                "Run it again with the earlier input and options, or start over with --overwrite.",
            )
        if change or done is None:
            return self._start_over(table, settings)
        missing = table.join(done, ROW_ID_COLUMNS, "left_anti")
        # The join puts its columns first. All output files need the input's order.
        return missing.select(*map(column, table.columns)), done.count()

    def _start_over(self, table, settings):
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
    """Describe the settings of an earlier run that have changed since; empty if none has."""
    changed = [name for name in settings if before.get(name) != settings[name]]
    if not changed:
        return ""
    return "other settings: " + ", ".join(f"{name} {before.get(name)}" for name in changed)


def _report(spark, output, total, kept):
    """Check that each input row is in the output exactly once, and count the results."""
    from pyspark.sql import functions

    rows = spark.read.parquet(output)
    is_error = functions.expr("status = 'error'")
    is_cut = functions.expr("finish_reason = 'length'")
    count, distinct, failed, cut = rows.agg(
        functions.count("*"),
        functions.countDistinct("row"),
        functions.count_if(is_error),
        functions.count_if(is_cut),
    ).first()
    if (count, distinct) != (total, total):
        raise BatchError(
            f"{output} should have {total} rows, each once, but it has {distinct} different ones and "
            f"{count - distinct} repeats.",
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
    add("--temperature", type=_temperature, help="from 0 to 2; default: the model's")
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
    number = int(text) if text.isdecimal() else 0
    if not 0 < number < 2**31:
        raise argparse.ArgumentTypeError("it has to be a whole number from 1")
    return number


def _temperature(text):
    number = float(text)
    if not 0 <= number <= 2:  # also refuses NaN
        raise argparse.ArgumentTypeError("it has to be a number from 0 to 2")
    return number


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
        f"(kept from an earlier run: {report.kept}; cut by max_tokens: {report.cut}; "
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
