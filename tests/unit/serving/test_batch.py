"""The rules of a batch on Spark: which row is at fault, what a failure means, and which command is refused.

Run: python -m helpers test tests/unit/serving/test_batch.py
"""

import os
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from serving import batch_cluster
from serving.batch import read_options
from serving.batch_cluster import read_java_version, to_batch_error
from serving.batch_model import answer_rows, read_messages
from serving.errors import ServiceError

# --- rows -------------------------------------------------------------------------------


def user(text):
    return [{"role": "user", "content": text}]


def completion(text):
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": len(text)},
    }


class Model:
    """Answers in capitals, and has words that it takes badly. It keeps what it was asked."""

    def __init__(self, works=True):
        self.asked, self._works = [], works

    def complete(self, conversations):
        texts = [messages[-1]["content"] for messages in conversations]
        self.asked.append(texts)
        if "refused" in texts:
            raise MlflowException.invalid_parameter_value(
                "messages has to be something else.\nAnd more."
            )
        if "breaks" in texts:
            raise ZeroDivisionError("a secret")
        if "busy" in texts:
            raise MlflowException("too many", error_code=8)
        return [completion(text.upper()) for text in texts]

    def check(self):
        if not self._works:
            raise RuntimeError("the engine is gone")


@pytest.mark.parametrize(
    "cell, asked",
    [
        ("Hello", user("Hello")),
        (" Hello\n", user(" Hello\n")),
        ([{"role": "user", "content": "Hello"}], user("Hello")),
        (
            pd.Series([[{"role": "user", "content": "Hello", "name": "x"}]]).to_numpy()[0],
            user("Hello"),
        ),
        ([{"role": "user", "content": None}], user(None)),
        ("", None),
        (" \n\t", None),
        (None, None),
        (float("nan"), None),
        (pd.NA, None),
        (pd.NaT, None),
        (b"Hello", None),
        (7, None),
        ([], None),
    ],
)
def test_a_cell_is_a_text_or_a_list_of_messages(cell, asked):
    assert read_messages(cell) == asked
    before = [{"role": "system", "content": "Be brief."}]
    assert read_messages(cell, "Be brief.") == (asked and before + asked)


def test_a_list_with_a_null_in_it_is_that_rows_error():
    with pytest.raises(ServiceError, match="A message is null"):
        read_messages([None, {"role": "user", "content": "Hello"}])
    rows = answer_rows([[None], "text"], "", (model := Model()).complete, model.check)
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("error", "A message is null."),
        ("ok", ""),
    ]


BAD = {
    None: "The cell is empty or null: it has no prompt.",
    "refused": "messages has to be something else.",
    "breaks": "The model failed on this row: ZeroDivisionError.",
    "busy": "The model failed on this row: MlflowException.",
}


@pytest.mark.parametrize(
    ("bad", "places", "at_once"),
    [
        *((bad, (2, 3), at_once) for bad in BAD for at_once in (1, 64)),
        *(
            ("refused", places, at_once)
            for places in ((0,), (4,), (0, 1, 2, 3, 4))
            for at_once in (1, 2, 5)
        ),
    ],
)
def test_a_bad_row_is_the_only_one_that_changes(bad, places, at_once):
    reason = BAD[bad]
    texts = [bad if place in places else f"text {place}" for place in range(5)]
    rows = answer_rows(texts, "", (model := Model()).complete, model.check, at_once)
    for place, row in enumerate(rows):
        assert row == (
            {
                "answer": "",
                "status": "error",
                "reason": reason,
                "finish_reason": "",
                "prompt_tokens": 0,
                "completion_tokens": 0,
            }
            if place in places
            else {
                "answer": f"TEXT {place}",
                "status": "ok",
                "reason": "",
                "finish_reason": "length",
                "prompt_tokens": 3,
                "completion_tokens": 6,
            }
        )


def test_rows_of_similar_length_go_together():
    texts = [word * size for size in (1, 30, 2, 31, 3, 32) for word in ("ab",)]
    model = Model()
    rows = answer_rows(texts, "", model.complete, model.check, 3)
    assert sorted(sorted(map(len, asked)) for asked in model.asked) == [[2, 4, 6], [60, 62, 64]]
    assert [row["answer"] for row in rows] == [text.upper() for text in texts]


def test_one_bad_row_of_many_costs_few_calls():
    model = Model()
    answer_rows(
        ["refused" if place == 40 else "text" for place in range(64)],
        "",
        model.complete,
        model.check,
        64,
    )
    assert len(model.asked) == 13  # it, and at each of six halvings two


def test_a_model_that_does_not_work_puts_no_row_at_fault():
    with pytest.raises(RuntimeError, match="the engine is gone"):
        answer_rows(["text", "breaks"], "", (model := Model(works=False)).complete, model.check)


def test_no_rows_are_no_call():
    assert answer_rows([], "", (model := Model()).complete, model.check) == model.asked == []


def test_a_model_that_answers_too_few_is_no_answer():
    model = Model()
    rows = answer_rows(["a", "b"], "", lambda asked: model.complete(asked)[1:], model.check)
    assert {row["reason"] for row in rows} == {"The model failed on this row: ValueError."}


# --- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, what, named",
    [
        ("java.io.IOException: No space left on device\n at x", "A disk is full.", "Free space"),
        ("OSError: [Errno 122] Disk quota exceeded", "A disk is full.", "Free space"),
        (
            "ExecutorLostFailure: Command exited with code 137",
            "A worker ran out of memory.",
            "spark.executor.memoryOverhead",
        ),
        (
            "SystemError: error return without exception set",
            "A worker ran out of memory.",
            "spark.executor.memoryOverhead",
        ),
        (
            "numpy ... MemoryError: Unable to allocate",
            "A worker ran out of memory.",
            "spark.executor.pyspark.memory",
        ),
        (
            "ImportError: core.so: failed to map segment from shared object",
            "A worker ran out of memory.",
            "spark.executor.pyspark.memory",
        ),
        (
            "o1.parquet: SparkException: Python worker exited unexpectedly (crashed)",
            "A worker's Python process was ended",
            "spark.executor.pyspark.memory",
        ),
        (
            "java.lang.OutOfMemoryError: Java heap space",
            "A worker ran out of memory.",
            "spark.executor.memory",
        ),
        (
            "Job 3 cancelled as part of cancellation of all jobs",
            "The cluster's master is lost.",
            "Start the master",
        ),
        (
            "Job aborted: All masters are unresponsive! Giving up.",
            "The cluster's master is lost.",
            "Start the master",
        ),
        (
            "Cannot call methods on a stopped SparkContext.",
            "The cluster's master is lost.",
            "Start the master",
        ),
        (
            "ModuleNotFoundError: No module named 'mlflow'",
            "A worker's Python lacks",
            "what the model requires",
        ),
        (
            "[PYTHON_VERSION_MISMATCH] Python in worker",
            "The workers' Python has another version",
            "of this version",
        ),
        (
            "Connection refused: the artifact store",
            "The job failed: Connection refused",
            "logs of the executors",
        ),
        (
            "An error occurred while calling o1.parquet.\n: org.x.Wrapper: y\n at z\n"
            "Caused by: java.a: The reason.\n at q",
            "The job failed: java.a: The reason.",
            "logs of the executors",
        ),
        (
            "[JAVA_GATEWAY_EXITED] Java gateway process exited",
            "Spark's Java program did not start.",
            "--conf",
        ),
        (
            "Py4JNetworkError: Answer from Java side is empty",
            "Spark's Java program on this machine has ended",
            "spark.driver.memory",
        ),
        (
            "Container killed by YARN for exceeding physical memory limits",
            "A worker ran out of memory.",
            "spark.executor.memoryOverhead",
        ),
        (
            "[FAILED_READ_FILE.CANNOT_READ_FILE_FOOTER] Encountered error while reading file "
            "file:///a/README.md. Could not",
            "Spark can't read the file file:///a/README.md.",
            "remove it",
        ),
        (
            "[FAILED_READ_FILE.PARQUET_COLUMN_DATA_TYPE_MISMATCH] Encountered error while reading file "
            "file:///a/b.parquet. "
            "Data type mismatches when reading Parquet column [prompt]. Expected",
            "The column prompt has another type",
            "one type",
        ),
        (
            "Caused by: java.lang.RuntimeException: file:/a b/c.parquet is not a Parquet file. Expected magic number",
            "Spark can't read the file file:/a b/c.parquet.",
            "remove it",
        ),
        (
            "[PARQUET_TYPE_ILLEGAL] Illegal Parquet type: INT64 (TIMESTAMP(NANOS,false)). SQLSTATE: 42846",
            "Spark can't read the type of one of the input's columns: INT64 (TIMESTAMP(NANOS,false)).",
            "microseconds",
        ),
        (
            "\nSomething else.\n at y",
            "The job failed: Something else.",
            "answers the rows that are missing",
        ),
        ("", "The job failed: Spark gives no reason.", "answers the rows"),
    ],
)
def test_a_failure_of_spark_is_two_sentences(error, what, named):
    told = to_batch_error(Exception(error))
    assert told.what.startswith(what) and named in told.fix
    for sentence in (told.what, told.fix):
        assert sentence[0].isupper() and sentence.endswith(".")


def test_a_refused_connection_is_javas_here_and_a_models_on_a_worker():
    assert (
        "Spark's Java program on this machine has ended"
        in to_batch_error(ConnectionRefusedError("111")).what
    )
    on_worker = Exception(
        "Caused by: PythonException: Traceback (most recent call last):\n  File a, line 1\n    ask()\n"
        "ConnectionRefusedError: [Errno 111] Connection refused\n\n\tat org.apache.spark"
    )
    assert to_batch_error(on_worker).what == (
        "The job failed: ConnectionRefusedError: [Errno 111] Connection refused."
    )


@pytest.mark.parametrize(
    "said, number",
    [
        ('openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime', 17),
        ('java version "1.8.0_381"', 8),
        ('openjdk version "21" 2023-09-19', 21),
        ('openjdk version "25-ea"', 25),
        ("sh: no such thing", 0),
        ("", 0),
    ],
)
def test_a_java_says_its_number(said, number):
    assert read_java_version(said) == number


def java(folder, said):
    """Write a java that says this, and return its JAVA_HOME."""
    program = folder / "jäva 1" / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{said}\"' >&2\n", encoding="utf-8")
    program.chmod(0o755)
    return str(program.parents[1])


@pytest.mark.parametrize(
    "version, what",
    [
        ("17.0.1", None),
        ("1.8.0_381", "version is 8"),
        ("11.0.2", "version is 11"),
        ("", "version is unknown"),
    ],
)
def test_a_java_that_is_too_old_is_refused(version, what, tmp_path, monkeypatch):
    (tmp_path / "pyspark").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JAVA_HOME", java(tmp_path, version))
    if what:
        with pytest.raises(batch_cluster.BatchError, match=what):
            batch_cluster.check_installation()
    else:
        batch_cluster.check_installation()


def test_windows_itself_is_refused_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(batch_cluster.BatchError, match="Spark does not run on Windows itself"):
        batch_cluster.check_installation()


def test_no_spark_and_no_java_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)  # as if it were not installed
    with pytest.raises(batch_cluster.BatchError, match="This Python has no pyspark"):
        batch_cluster.check_installation()
    monkeypatch.delitem(sys.modules, "pyspark")
    (tmp_path / "pyspark").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(batch_cluster.BatchError, match="none where JAVA_HOME points"):
        batch_cluster.check_installation()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(batch_cluster.BatchError, match="none on the PATH"):
        batch_cluster.check_installation()


@pytest.mark.parametrize(
    "master, what",
    [
        ("local[2]", "not the address of"),
        ("local-cluster[2,1,1024]", "not the address of"),
        ("", "not the address of"),
        ("yarn-ish", "not the address of a cluster"),
        ("spark://127.0.0.1:1", "No Spark master answers"),
        ("spark://127.0.0.1", "No Spark master answers"),
        ("spark://:x", "No Spark master answers"),
        ("spark://127.0.0.1:1,127.0.0.1:2", "No Spark master answers"),
        ("yarn", None),
        ("k8s://https://127.0.0.1:1", None),
    ],
)
def test_a_master_is_a_cluster_that_answers(master, what):
    if what:
        with pytest.raises(batch_cluster.BatchError, match=what):
            batch_cluster.check_master(master)
    else:
        batch_cluster.check_master(master)


@pytest.mark.parametrize(
    ("looks", "lost"),
    [
        ([], False),
        ([(False, 0)] * 3, False),
        ([(False, 0)] * 4, True),
        ([(True, 2)] * 9 + [(False, 0)] * 4, True),
        ([(True, 0)] * 9, False),
        ([(False, 1)] * 9, False),
        ([(False, 0)] * 4 + [(True, 0)], False),
        ([(False, 0), (False, 0), (False, 1), (False, 0)], False),
    ],
)
def test_a_cluster_is_lost_when_nobody_was_there_for_a_while(looks, lost):
    assert batch_cluster.is_lost(looks) is lost


@pytest.mark.parametrize(
    "words",
    [
        ["in"],
        ["in", "out"],
        ["in", "out", "--master", "yarn", "--max-tokens", "0"],
        ["in", "out", "--master", "yarn", "--rows-per-task", "x"],
        ["in", "out", "--mas", "yarn"],
    ],
)
def test_words_that_are_no_command_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        read_options(words)
    assert ended.value.code == 2 and "usage: batch" in capsys.readouterr().err


def test_settings_have_a_name_and_a_value():
    with pytest.raises(batch_cluster.BatchError, match="the form NAME=VALUE"):
        batch_cluster.spark_config("spark://127.0.0.1:1", ["spark.executor.memory"])


@pytest.mark.parametrize(
    "master, host",
    [
        ("spark://127.0.0.1:7077", "127.0.0.1"),
        ("spark://localhost:7077", "127.0.0.1"),
        ("spark://master:7077", None),
        ("yarn", None),
    ],
)
def test_a_driver_listens_on_loopback_where_its_master_does(master, host):
    settings = batch_cluster.spark_config(master, ["spark.log.level=WARN", "a=b=c"])
    assert settings.get("spark.driver.host") == settings.get("spark.driver.bindAddress") == host
    assert (settings["spark.log.level"], settings["a"]) == ("WARN", "b=c")


# --- the lock -------------------------------------------------------------------------------


class Files:
    """Hadoop's file system, as far as `DriverLock` needs it, and a Spark session that has it."""

    def __init__(self):
        self.texts = {}
        self.org = self.apache = self.hadoop = self.fs = self._jvm = self._jsc = self

    def Path(self, path):  # noqa: N802
        return SimpleNamespace(
            name=path,
            getFileSystem=lambda configuration: self,
            suffix=lambda end: self.Path(path + end),
        )

    def hadoopConfiguration(self):  # noqa: N802
        return None

    def exists(self, path):
        return path.name in self.texts

    def create(self, path, overwrite):
        if path.name in self.texts and not overwrite:
            raise FileExistsError(path.name)
        self.texts[path.name] = b""

        def write(data):
            self.texts[path.name] += bytes(data)

        return SimpleNamespace(write=write, close=lambda: None)

    def open(self, path):
        return SimpleNamespace(readAllBytes=lambda: self.texts[path.name], close=lambda: None)

    def delete(self, path, recursive):
        del self.texts[path.name]


def test_a_second_driver_is_refused_while_the_first_gives_signs_of_life(monkeypatch, capsys):
    files = Files()
    first, second = (batch_cluster.DriverLock(files, "out") for _ in range(2))
    first.acquire()
    monkeypatch.setattr(batch_cluster.time, "sleep", lambda seconds: first.beat())
    with pytest.raises(
        batch_cluster.BatchError,
        match=f"Another run writes to this output: process {os.getpid()} on",
    ):
        second.acquire()
    second.release()
    assert first.beat()
    first.release()
    assert files.texts == {}
    second.acquire()
    assert "Waiting 20 seconds to see whether that still runs." in capsys.readouterr().err


def test_a_driver_takes_over_from_one_that_gives_no_sign(monkeypatch):
    files, slept = Files(), []
    first, second = (batch_cluster.DriverLock(files, "out") for _ in range(2))
    first.acquire()
    monkeypatch.setattr(batch_cluster.time, "sleep", slept.append)
    second.acquire()
    assert slept == [
        batch_cluster.SILENT_BEATS * batch_cluster.BEAT_SECONDS,
        batch_cluster.BEAT_SECONDS,
    ]
    assert second.beat() and not first.beat()  # the first was only stopped, and has to end now
    first.release()
    assert second.beat()
    second.release()
    assert not first.beat()  # also where the second has ended meanwhile


def test_of_two_drivers_that_take_over_at_once_one_is_refused(monkeypatch):
    files = Files()
    dead, second, third = (batch_cluster.DriverLock(files, "out") for _ in range(3))
    dead.acquire()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:  # the second has just written its name
            third._write()

    monkeypatch.setattr(batch_cluster.time, "sleep", sleep)
    with pytest.raises(batch_cluster.BatchError, match="Another run"):
        second.acquire()
    assert third.beat()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--temperature", "nan", "a number from 0 to 2"),
        ("--temperature", "-1", "a number from 0 to 2"),
        ("--max-tokens", "0", "a whole number from 1"),
        ("--rows-per-task", "1.5", "a whole number from 1"),
    ],
)
def test_a_number_that_no_model_takes_is_refused_with_its_range(option, value, says, capsys):
    words = ["in.parquet", "out.parquet", "--master", "spark://127.0.0.1:1", f"{option}={value}"]
    with pytest.raises(SystemExit):
        read_options(words)
    assert f"{option}: it has to be {says}" in capsys.readouterr().err
