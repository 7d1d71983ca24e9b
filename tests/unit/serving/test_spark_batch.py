"""A batch on a Spark cluster: which row is at fault, what a failure means, and that no row is lost or comes twice.

The cluster is a real one, a master and two workers on this machine.

Run: python -m helpers test tests/unit/serving/test_spark_batch.py
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pytest
from mlflow.exceptions import MlflowException
from support import ROOT, stand_ins
from support.chat import chat_model_for
from support.projects import activated, project
from support.service import wait_for

from course.cluster import running
from serving import spark_batch
from serving.spark_batch import answer_rows, explain, read_java, read_messages, read_options

TEXTS = ("short", "a good deal longer than that", "of middling length")

# --- the rows -------------------------------------------------------------------------------


def user(text):
    return [{"role": "user", "content": text}]


def completion(text):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 3, "completion_tokens": len(text)}}


class Model:
    """Answers in capitals, and has words that it takes badly. It keeps what it was asked."""

    def __init__(self, works=True):
        self.asked, self._works = [], works

    def ask(self, conversations):
        texts = [messages[-1]["content"] for messages in conversations]
        self.asked.append(texts)
        if "refused" in texts:
            raise MlflowException.invalid_parameter_value("messages has to be something else.\nAnd more.")
        if "breaks" in texts:
            raise ZeroDivisionError("a secret")
        if "busy" in texts:
            raise MlflowException("too many", error_code=8)
        return [completion(text.upper()) for text in texts]

    def works(self):
        if not self._works:
            raise RuntimeError("the engine is gone")


@pytest.mark.parametrize("cell, asked", [
    ("Hello", user("Hello")),
    (" Hello\n", user(" Hello\n")),
    ([{"role": "user", "content": "Hello"}], user("Hello")),
    (pd.Series([[{"role": "user", "content": "Hello", "name": "x"}]]).to_numpy()[0], user("Hello")),
    ([{"role": "user", "content": None}], user(None)),
    ("", None), (" \n\t", None), (None, None), (float("nan"), None), (pd.NA, None), (pd.NaT, None), (b"Hello", None),
    (7, None), ([], None)])
def test_a_cell_is_a_text_or_a_list_of_messages(cell, asked):
    assert read_messages(cell) == asked
    before = [{"role": "system", "content": "Be brief."}]
    assert read_messages(cell, "Be brief.") == (asked and before + asked)


@pytest.mark.parametrize("bad, reason", [
    (None, "There is nothing to ask: the cell is empty or null."),
    ("refused", "messages has to be something else."),
    ("breaks", "The model failed on this row: ZeroDivisionError."),
    ("busy", "The model failed on this row: MlflowException.")])
@pytest.mark.parametrize("places", [(0,), (4,), (2, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("at_once", [1, 2, 5, 64])
def test_a_bad_row_is_the_only_one_that_changes(bad, reason, places, at_once):
    texts = [bad if place in places else f"text {place}" for place in range(5)]
    rows = answer_rows([text and user(text) for text in texts], (model := Model()).ask, model.works, at_once)
    for place, row in enumerate(rows):
        assert row == ({"answer": "", "status": "error", "reason": reason, "prompt_tokens": 0, "completion_tokens": 0}
                       if place in places else
                       {"answer": f"TEXT {place}", "status": "ok", "reason": "", "prompt_tokens": 3,
                        "completion_tokens": 6})


def test_rows_of_similar_length_go_together():
    texts = [word * size for size in (1, 30, 2, 31, 3, 32) for word in ("ab",)]
    model = Model()
    rows = answer_rows([user(text) for text in texts], model.ask, model.works, 3)
    assert sorted(sorted(map(len, asked)) for asked in model.asked) == [[2, 4, 6], [60, 62, 64]]
    assert [row["answer"] for row in rows] == [text.upper() for text in texts]


def test_one_bad_row_of_many_costs_few_calls():
    model = Model()
    answer_rows([user("refused" if place == 40 else "text") for place in range(64)], model.ask, model.works, 64)
    assert len(model.asked) == 13  # it, and at each of six halvings two


def test_a_model_that_does_not_work_puts_no_row_at_fault():
    with pytest.raises(RuntimeError, match="the engine is gone"):
        answer_rows([user("text"), user("breaks")], (model := Model(works=False)).ask, model.works)


def test_no_rows_are_no_call():
    assert answer_rows([], (model := Model()).ask, model.works) == model.asked == []


def test_a_model_that_answers_too_few_is_no_answer():
    model = Model()
    rows = answer_rows([user("a"), user("b")], lambda asked: model.ask(asked)[1:], model.works)
    assert {row["reason"] for row in rows} == {"The model failed on this row: ValueError."}


# --- the words ------------------------------------------------------------------------------


@pytest.mark.parametrize("error, what, named", [
    ("java.io.IOException: No space left on device\n at x", "A disk is full.", "Make room"),
    ("OSError: [Errno 122] Disk quota exceeded", "A disk is full.", "Make room"),
    ("ExecutorLostFailure: Command exited with code 137 ... exit code 137", "A worker ran out of memory.",
     "spark.executor.memoryOverhead"),
    ("numpy ... MemoryError: Unable to allocate", "A worker ran out of memory.", "spark.executor.pyspark.memory"),
    ("java.lang.OutOfMemoryError: Java heap space", "A worker ran out of memory.", "spark.executor.memory"),
    ("Job 3 cancelled as part of cancellation of all jobs", "The cluster's master is lost.", "Start the master"),
    ("Job aborted: All masters are unresponsive! Giving up.", "The cluster's master is lost.", "Start the master"),
    ("Cannot call methods on a stopped SparkContext.", "The cluster's master is lost.", "Start the master"),
    ("ModuleNotFoundError: No module named 'mlflow'", "A worker's Python lacks", "what the model requires"),
    ("[PYTHON_VERSION_MISMATCH] Python in worker", "The workers' Python is of another", "same version"),
    ("\nSomething else.\n at y", "The job failed: Something else.", "goes on with the rows that are missing"),
    ("", "The job failed: it says nothing.", "goes on")])
def test_a_failure_of_spark_is_two_sentences(error, what, named):
    told = explain(error)
    assert told.what.startswith(what) and named in told.fix
    for sentence in (told.what, told.fix):
        assert sentence[0].isupper() and sentence.endswith(".")


@pytest.mark.parametrize("said, number", [
    ('openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime', 17), ('java version "1.8.0_381"', 8),
    ('openjdk version "21" 2023-09-19', 21), ('openjdk version "25-ea"', 25), ("sh: no such thing", 0), ("", 0)])
def test_a_java_says_its_number(said, number):
    assert read_java(said) == number


def java(folder, said):
    """Write a java that says this, and return its JAVA_HOME."""
    program = folder / "jäva 1" / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{said}\"' >&2\n", encoding="utf-8")
    program.chmod(0o755)
    return str(program.parents[1])


@pytest.mark.parametrize("version, what", [
    ("17.0.1", None), ("1.8.0_381", "this one is 8"), ("11.0.2", "this one is 11"), ("", "of no known version")])
def test_a_java_that_is_too_old_is_refused(version, what, tmp_path, monkeypatch):
    (tmp_path / "pyspark").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JAVA_HOME", java(tmp_path, version))
    if what:
        with pytest.raises(spark_batch.BatchError, match=what):
            spark_batch.check_spark()
    else:
        spark_batch.check_spark()


def test_no_spark_and_no_java_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)  # as if it were not installed
    with pytest.raises(spark_batch.BatchError, match="This Python has no Spark"):
        spark_batch.check_spark()
    monkeypatch.delitem(sys.modules, "pyspark")
    (tmp_path / "pyspark").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(spark_batch.BatchError, match="none where JAVA_HOME points"):
        spark_batch.check_spark()
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(spark_batch.BatchError, match="there is none"):
        spark_batch.check_spark()


@pytest.mark.parametrize("master, what", [
    ("local[2]", "no cluster"), ("local-cluster[2,1,1024]", "no cluster"), ("", "no cluster"),
    ("yarn-ish", "no cluster"),
    ("spark://127.0.0.1:1", "No Spark master answers"), ("spark://127.0.0.1", "No Spark master answers"),
    ("spark://:x", "No Spark master answers"), ("spark://127.0.0.1:1,127.0.0.1:2", "No Spark master answers"),
    ("yarn", None), ("k8s://https://127.0.0.1:1", None)])
def test_a_master_is_a_cluster_that_answers(master, what):
    if what:
        with pytest.raises(spark_batch.BatchError, match=what):
            spark_batch.check_master(master)
    else:
        spark_batch.check_master(master)


@pytest.mark.parametrize(("looks", "lost"), [
    ([], False), ([(False, 0)] * 3, False), ([(False, 0)] * 4, True), ([(True, 2)] * 9 + [(False, 0)] * 4, True),
    ([(True, 0)] * 9, False), ([(False, 1)] * 9, False), ([(False, 0)] * 4 + [(True, 0)], False),
    ([(False, 0), (False, 0), (False, 1), (False, 0)], False)])
def test_a_cluster_is_lost_when_nobody_was_there_for_a_while(looks, lost):
    assert spark_batch.is_lost(looks) is lost


@pytest.mark.parametrize("words", [
    ["in"], ["in", "out"], ["in", "out", "--master", "yarn", "--max-tokens", "0"],
    ["in", "out", "--master", "yarn", "--rows-per-task", "x"], ["in", "out", "--mas", "yarn"]])
def test_words_that_are_no_command_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        read_options(words)
    assert ended.value.code == 2 and "usage: batch" in capsys.readouterr().err


def test_settings_have_a_name_and_a_value():
    with pytest.raises(spark_batch.BatchError, match="no NAME=VALUE"):
        spark_batch.read_settings("spark://127.0.0.1:1", ["spark.executor.memory"])


@pytest.mark.parametrize("master, host", [
    ("spark://127.0.0.1:7077", "127.0.0.1"), ("spark://localhost:7077", "127.0.0.1"), ("spark://master:7077", None),
    ("yarn", None)])
def test_a_driver_listens_on_loopback_where_its_master_does(master, host):
    settings = spark_batch.read_settings(master, ["spark.log.level=WARN", "a=b=c"])
    assert settings.get("spark.driver.host") == settings.get("spark.driver.bindAddress") == host
    assert (settings["spark.log.level"], settings["a"]) == ("WARN", "b=c")


# --- on a cluster ---------------------------------------------------------------------------

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, site):
    with running(tmp_path_factory.mktemp("clüster 1"), site) as cluster:
        yield cluster


@pytest.fixture
def registry(store, tmp_path):
    """Return the store's variable for a program, and a function that registers a stand-in there."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("stand-ins", (tmp_path / "artifacts").as_uri()))
    yield functools.partial(stand_ins.register, tmp_path / "code")
    mlflow.set_tracking_uri(before)


@pytest.fixture
def batch(cluster, store, tmp_path):
    """Return a function that runs the program on prompts, and returns its exit code and what it said."""
    def run(prompts, *words, model="models:/stand-in@champion", out=tmp_path / "öut 1.parquet", **variables):
        if not isinstance(prompts, Path):
            prompts = write(tmp_path / "prömpts 1.parquet", prompts)
        process = cluster.batch(prompts, out, "--model", model, *words, MLFLOW_TRACKING_URI=store, **variables)
        said, complained = process.communicate(timeout=600)
        return process.returncode, said, complained

    return run


def write(path, prompts):
    pd.DataFrame({"prompt": prompts, "id": [f"id {number}" for number in range(len(prompts))]}).to_parquet(path)
    return path


def read(tmp_path, out="öut 1.parquet"):
    return pd.read_parquet(tmp_path / out).sort_values("row", ignore_index=True)


def left_over(tmp_path):
    return [path.name for path in tmp_path.iterdir() if ".parquet." in path.name]


@slow
def test_every_row_is_answered_and_a_bad_one_says_why(cluster, batch, tiny, registry, tmp_path):
    logged = mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny, max_tokens=4))
    prompts = [*(f"Tell me about the number {number}." for number in range(20)), None, "", "word " * 5000, "a\x00b"]
    (temporary := tmp_path / "temporary").mkdir()
    code, said, complained = batch(prompts, model=logged.model_uri, TMPDIR=str(temporary))
    assert (code, complained) == (0, ""), complained
    assert not [path for path in temporary.rglob("*") if path.suffix == ".zip" or path.name == "MLmodel"]
    assert list(cluster.folder.glob("work-*/**/MLmodel"))  # what a worker unpacks goes with its folder
    rows = read(tmp_path)
    assert list(rows["row"]) == list(range(24)) and list(rows["id"]) == [f"id {number}" for number in range(24)]
    assert list(rows["status"]) == ["ok"] * 20 + ["error"] * 4
    assert rows["reason"][20] == rows["reason"][21] == "There is nothing to ask: the cell is empty or null."
    assert "context" in rows["reason"][22] and "NUL" in rows["reason"][23]
    chat = mlflow.pyfunc.load_model(logged.model_uri)
    alone = chat.predict({"messages": user(prompts[7])})[0]
    assert rows["answer"][7] == alone["choices"][0]["message"]["content"]
    assert rows["completion_tokens"][7] == alone["usage"]["completion_tokens"] == 4
    assert f"24 rows in {tmp_path / 'öut 1.parquet'}: 20 answered, 4 errors" in said
    assert left_over(tmp_path) == []


@slow
def test_conversations_and_settings_reach_the_model_and_no_proxy_is_asked(batch, tiny, registry, tmp_path):
    logged = mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny, max_tokens=4))
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "And now?"}]
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), "http://127.0.0.1:1")
    code, _, complained = batch([talk], "--max-tokens", "7", "--system", "Be brief.", model=logged.model_uri, **proxies)
    assert (code, complained) == (0, ""), complained
    asked = {"messages": [{"role": "system", "content": "Be brief."}, *talk], "max_tokens": 7}
    alone = mlflow.pyfunc.load_model(logged.model_uri).predict(asked)[0]
    row = read(tmp_path).iloc[0]
    assert row["answer"] == alone["choices"][0]["message"]["content"]
    assert row["prompt_tokens"] == alone["usage"]["prompt_tokens"] and row["completion_tokens"] == 7


@slow
def test_an_output_is_replaced_only_when_told(batch, registry, tmp_path):
    registry("Rows")
    assert batch(["word 1"])[0] == 0
    code, _, complained = batch(["word 2", "word 3"])
    assert code == 1 and "is there already" in complained and "--overwrite" in complained
    assert list(read(tmp_path)["answer"]) == ["word "]
    assert batch(["word 2", "word 3"], "--overwrite")[0] == 0
    assert list(read(tmp_path)["answer"]) == ["word word ", "word word word "]
    assert left_over(tmp_path) == []


@slow
def test_mlflow_run_makes_of_no_rows_a_whole_output_with_its_columns(cluster, registry, store, tmp_path):
    registry("Rows")
    table = tmp_path / "none.parquet"
    pd.DataFrame({"prompt": pd.Series([], dtype="str")}).to_parquet(table)
    words = project("batch", input=table, output=tmp_path / "öut 1.parquet", master=cluster.address,
                    model="models:/stand-in@champion")
    environment = cluster.environment(COURSE_TRACKING_URI=store, **activated(tmp_path))
    environment.pop("MLFLOW_EXPERIMENT_ID", None)  # MLflow sets it for the store of this test
    ran = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
                         timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\n0 rows in " in "\n" + ran.stdout
    assert list(read(tmp_path).columns) == ["prompt", "row", "answer", "status", "reason", "prompt_tokens",
                                            "completion_tokens"]


# Runs several commands in one Spark session, and prints what each is refused with.
RUNS = """
import json, sys
from pathlib import Path
from serving import spark_batch
master, folder, commands = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
spark = spark_batch.start_spark(master)
for words in commands:
    try:
        spark_batch.run(spark, spark_batch.read_options([*words, "--master", master]), folder)
        print("[]")
    except spark_batch.BatchError as error:
        print(json.dumps([error.what, error.fix]))
spark.stop()
"""


@slow
def test_inputs_that_cannot_be_are_refused_before_anything_is_written(cluster, batch, registry, store, tmp_path):
    registry("Rows")
    good = write(tmp_path / "good.parquet", ["word 1"])
    pd.DataFrame({"text": ["a"], "answer": ["b"], "number": [1]}).to_parquet(other := tmp_path / "other.parquet")
    (text := tmp_path / "text.parquet").write_text("no Parquet", encoding="utf-8")
    cases = (
        (other, (), "has no column prompt: it has text, answer, number"),
        (other, ("--column", "text"), "has columns that the answers would have: answer"),
        (other, ("--column", "number"), "its type is bigint"),
        (tmp_path / "nowhere.parquet", (), "is not there"),
        (text, (), "holds no Parquet"),
        (good, ("--model", "models:/nobody@champion"), "There is no model nobody whose alias champion"),
        (good, ("--model", "models:/stand-in@nobody"), "There is no model stand-in whose alias nobody"),
        (good, ("--model", "models:/stand-in/9"), "The model models:/stand-in/9 cannot be had"))
    out = tmp_path / "öut 1.parquet"
    commands = [[str(path), str(out), "--model", "models:/stand-in@champion", *words] for path, words, _ in cases]
    environment = cluster.environment(MLFLOW_TRACKING_URI=store)
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    ran = subprocess.run([sys.executable, "-c", RUNS, cluster.address, tmp_path / "model", json.dumps(commands)],
                         env=environment, capture_output=True, text=True, timeout=600)
    refusals = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(refusals) == len(cases), ran.stderr
    for (_, _, what), refusal in zip(cases, refusals, strict=True):
        assert what in refusal[0] and all(sentence.endswith(".") for sentence in refusal), refusal
    code, said, complained = batch(other)
    assert (code, said) == (1, "") and complained == "error: {}\n       {}\n".format(*refusals[0])
    assert not list(tmp_path.glob("öut*"))


def start(cluster, store, prompts, out, *words):
    return cluster.batch(prompts, out, "--model", "models:/stand-in@champion", "--rows-per-task", "50", *words,
                         MLFLOW_TRACKING_URI=store)


def finished(out):
    """Return how many tasks have left their rows, and nothing else."""
    return len(list(Path(f"{out}.unfinished/rows").glob("part-*")))


def whole(tmp_path, out, count):
    rows = read(tmp_path, out)
    assert list(rows["row"]) == list(range(count)) and set(rows["status"]) == {"ok"}
    assert list(rows["answer"]) == ["word " * (number % 3 + 1) for number in range(count)]


SLOWLY = [f"slow {number % 3 + 1}" for number in range(2000)]


@slow
def test_a_worker_that_is_killed_costs_no_row(store, registry, site, tmp_path, record_property):
    registry("Rows")
    prompts, out = write(tmp_path / "in.parquet", SLOWLY), tmp_path / "out.parquet"
    with running(tmp_path / "cluster", site) as cluster:
        process = start(cluster, store, prompts, out)
        wait_for(lambda: finished(out) >= 4 or process.poll() is not None, "four tasks", 180)
        cluster.workers[0].kill()
        said, complained = process.communicate(timeout=600)
    assert (process.returncode, complained) == (0, ""), complained
    whole(tmp_path, "out.parquet", 2000)
    retried = int(re.search(r"tasks tried again: (\d+)", said)[1])
    record_property("tasks tried again after a worker was killed", retried)
    assert retried >= 1


@slow
def test_an_interrupted_run_goes_on_with_the_rows_that_are_missing(cluster, store, registry, tmp_path):
    registry("Rows")
    prompts, out = write(tmp_path / "in.parquet", SLOWLY), tmp_path / "out.parquet"
    process = start(cluster, store, prompts, out)
    wait_for(lambda: finished(out) >= 8 or process.poll() is not None, "eight tasks", 180)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()
    assert not out.exists()
    other = start(cluster, store, prompts, out, "--max-tokens", "3")
    assert "of a run with another max_tokens" in other.communicate(timeout=600)[1] and other.returncode == 1
    process = start(cluster, store, prompts, out)
    said, complained = process.communicate(timeout=600)
    assert (process.returncode, complained) == (0, ""), complained
    whole(tmp_path, "out.parquet", 2000)
    kept = int(re.search(r"kept from a run before: (\d+)", said)[1])
    assert 300 <= kept < 2000
    assert left_over(tmp_path) == []


@slow
def test_a_lost_master_loses_nothing(store, registry, site, tmp_path):
    registry("Rows")
    prompts, out = write(tmp_path / "in.parquet", SLOWLY), tmp_path / "out.parquet"
    with running(tmp_path / "cluster", site) as cluster:
        process = start(cluster, store, prompts, out)
        wait_for(lambda: finished(out) >= 4 or process.poll() is not None, "four tasks", 180)
        cluster.stop()
        said, complained = process.communicate(timeout=600)
        assert process.returncode == 1 and "The cluster's master is lost." in complained, complained
        assert complained.count("\n") == 2 and not out.exists()
    with running(tmp_path / "another", site) as cluster:
        process = start(cluster, store, prompts, out)
        said, complained = process.communicate(timeout=600)
    assert (process.returncode, complained) == (0, ""), complained
    whole(tmp_path, "out.parquet", 2000)
    assert "kept from a run before: 0" not in said


@slow
def test_a_worker_without_memory_is_told_with_its_settings(batch, tiny, registry, tmp_path):
    logged = mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny))
    code, _, complained = batch(["Hello"], "--conf", "spark.executor.pyspark.memory=300m", model=logged.model_uri)
    assert code == 1 and "A worker ran out of memory." in complained, complained
    for name in ("spark.executor.memory ", "spark.executor.memoryOverhead", "spark.executor.pyspark.memory"):
        assert name in complained
    assert not (tmp_path / "öut 1.parquet").exists()


@slow
def test_a_full_disk_leaves_nothing_half_written(store, registry, site, mounted, tmp_path, monkeypatch):
    registry("Rows")
    prompts, out = write(tmp_path / "in.parquet", ["big 9"] * 400), tmp_path / "disk" / "out.parquet"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    command = [sys.executable, "-m", "course.cluster", tmp_path / "cluster", site, prompts, out,
               "--model", "models:/stand-in@champion", "--rows-per-task", "20"]
    # The disk is gone with the command: what is on it is listed before.
    result = mounted("size=200k", ["sh", "-c", f'"$@"; code=$?; find "{out.parent}"; exit $code', "sh", *command])
    assert result.returncode == 1 and "A disk is full." in result.stderr, result.stderr
    assert f"{out}.unfinished/plan.json" in result.stdout.split("\n")
    assert not [line for line in result.stdout.split("\n") if f"{line}/".startswith(f"{out}/")]


@slow
def test_200_000_rows_go_through_without_growing_memory(cluster, store, registry, tmp_path, record_property):
    registry("Rows")
    count, out = 200_000, tmp_path / "out.parquet"
    prompts = write(tmp_path / "in.parquet", ["word 1"] * count)
    process = cluster.batch(prompts, out, "--model", "models:/stand-in@champion", "--rows-per-task", "2000",
                            MLFLOW_TRACKING_URI=store)
    held = []
    while process.poll() is None:
        if tasks := finished(out):
            held.append((tasks, cluster.python_bytes()))
        wait_for(lambda: process.poll() is not None or finished(out) != (held and held[-1][0]), "a task", 300)
    assert process.wait() == 0, process.stderr.read()
    rows = read(tmp_path, "out.parquet")
    assert list(rows["row"]) == list(range(count)) and set(rows["answer"]) == {"word "}
    early = max(size for tasks, size in held if tasks <= 20)
    late = max(size for tasks, size in held if tasks >= 80)
    record_property("memory of the Python workers, last fifth against first", late / early)
    assert late < 1.1 * early
