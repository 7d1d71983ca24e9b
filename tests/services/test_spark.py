"""Batches on a real Spark cluster, a master and two workers: each row comes once, also where a driver and a worker end.

Run: python -m helpers test tests/services/test_spark.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pytest
from support import ROOT, stand_ins
from support.chat import chat_model_for, user
from support.service import wait_for

MODEL = "models:/stand-in@champion"
# Runs the commands that it reads, a line of JSON each, in one Spark session; prints a line for each: what it came to.
DRIVER = """
import json, sys
from pathlib import Path
from serving import spark_batch
master, folder = sys.argv[1], Path(sys.argv[2])
spark = spark_batch.start_spark(master)
for number, line in enumerate(sys.stdin):
    (folder / str(number)).mkdir()
    try:
        options = spark_batch.read_options([*json.loads(line), "--master", master])
        report = spark_batch.run(spark, options, folder / str(number))
        print(json.dumps(report._asdict()), flush=True)
    except spark_batch.BatchError as error:
        print(json.dumps([error.what, error.fix]), flush=True)
spark.stop()
"""


class Driver:
    """A program with one Spark session that takes commands."""

    def __init__(self, cluster, store, folder):
        environment = cluster.environment(MLFLOW_TRACKING_URI=store, TMPDIR=str(folder))
        environment["PYTHONPATH"] += os.pathsep + str(ROOT)
        self.log = folder / "driver.log"
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER, cluster.address, folder], env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=self.log.open("w", encoding="utf-8"))

    def begin(self, *words):
        """Send a command."""
        self.process.stdin.write(json.dumps(list(map(str, words))) + "\n")
        self.process.stdin.flush()

    def run(self, *words):
        """Return the report of a command, or the two sentences of its refusal."""
        self.begin(*words)
        line = self.process.stdout.readline()
        assert line, self.log.read_text(encoding="utf-8")[-3000:]
        return json.loads(line)

    def kill(self):
        """End it and its Java at once."""
        if self.process.poll() is None:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def registered(empty_database, tmp_path_factory):
    """Return a store in which a stand-in is registered."""
    folder = tmp_path_factory.mktemp("störe")
    shutil.copy(empty_database, folder / "mlflow.db")
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    with stand_ins.registry(store, folder) as register:
        register("Rows")
        yield store


@pytest.fixture(scope="module")
def chat_uri(tiny, registered):
    """Return the address of the chat model on the toy model."""
    return mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny, max_tokens=4)).model_uri


@pytest.fixture(scope="module")
def driver(cluster, registered, tmp_path_factory):
    driver = Driver(cluster, registered, tmp_path_factory.mktemp("driver"))
    yield driver
    driver.kill()


def write(path, prompts):
    pd.DataFrame({"prompt": prompts, "id": [f"id {number}" for number in range(len(prompts))]}).to_parquet(path)
    return path


def read(out):
    return pd.read_parquet(out).sort_values("row", ignore_index=True)


def test_every_row_is_answered_and_a_bad_one_says_why(cluster, driver, chat_uri, tmp_path):
    prompts = [*(f"Tell me about the number {number}." for number in range(20)), None, "", "word " * 5000, "a\x00b"]
    out = tmp_path / "öut 1.parquet"
    report = driver.run(write(tmp_path / "prömpts 1.parquet", prompts), out, "--model", chat_uri)
    assert (report["rows"], report["kept"], sum(report["errors"].values())) == (24, 0, 4)
    assert list(cluster.folder.glob("work-*/**/MLmodel"))  # what a worker unpacks goes with its folder
    rows = read(out)
    assert list(rows["row"]) == list(range(24)) and list(rows["id"]) == [f"id {number}" for number in range(24)]
    assert list(rows["status"]) == ["ok"] * 20 + ["error"] * 4
    assert rows["reason"][20] == rows["reason"][21] == "There is nothing to ask: the cell is empty or null."
    assert "context" in rows["reason"][22] and "NUL" in rows["reason"][23]
    alone = mlflow.pyfunc.load_model(chat_uri).predict({"messages": user(prompts[7])})[0]
    assert rows["answer"][7] == alone["choices"][0]["message"]["content"]
    assert rows["completion_tokens"][7] == alone["usage"]["completion_tokens"] == 4
    assert [path.name for path in tmp_path.iterdir() if ".parquet." in path.name] == []


def test_conversations_and_settings_reach_the_model(driver, chat_uri, tmp_path):
    talk = [*user("Hello"), {"role": "assistant", "content": "Hi"}, *user("And now?")]
    driver.run(write(tmp_path / "in.parquet", [talk]), tmp_path / "out.parquet", "--model", chat_uri, "--max-tokens", 7,
               "--system", "Be brief.")
    asked = {"messages": [{"role": "system", "content": "Be brief."}, *talk], "max_tokens": 7}
    alone = mlflow.pyfunc.load_model(chat_uri).predict(asked)[0]
    row = read(tmp_path / "out.parquet").iloc[0]
    assert row["answer"] == alone["choices"][0]["message"]["content"]
    assert row["prompt_tokens"] == alone["usage"]["prompt_tokens"] and row["completion_tokens"] == 7


def test_an_output_is_replaced_only_when_told_and_no_rows_are_an_output(driver, tmp_path):
    one = write(tmp_path / "one.parquet", ["word 2"])
    none = tmp_path / "none.parquet"
    out = tmp_path / "out.parquet"
    pd.DataFrame({"prompt": pd.Series([], dtype="str")}).to_parquet(none)
    assert driver.run(none, out, "--model", MODEL)["rows"] == 0
    assert list(read(out).columns) == ["prompt", "row", "answer", "status", "reason", "prompt_tokens",
                                       "completion_tokens"]
    what, fix = driver.run(one, out, "--model", MODEL)
    assert "is there already" in what and "--overwrite" in fix and len(read(out)) == 0
    assert driver.run(one, out, "--model", MODEL, "--overwrite")["rows"] == 1
    assert list(read(out)["answer"]) == ["word word "]
    assert [path.name for path in tmp_path.iterdir() if ".parquet." in path.name] == []


def test_inputs_that_cannot_be_are_refused_before_anything_is_written(driver, tmp_path):
    good = write(tmp_path / "good.parquet", ["word 1"])
    pd.DataFrame({"text": ["a"], "answer": ["b"], "number": [1]}).to_parquet(other := tmp_path / "other.parquet")
    (text := tmp_path / "text.parquet").write_text("no Parquet", encoding="utf-8")
    for path, words, says in (
            (other, (), "has no column prompt: it has text, answer, number"),
            (other, ("--column", "text"), "has columns that the answers would have: answer"),
            (other, ("--column", "number"), "its type is bigint"),
            (tmp_path / "nowhere.parquet", (), "is not there"),
            (text, (), "holds no Parquet"),
            (good, ("--model", "models:/nobody@champion"), "There is no model nobody whose alias champion"),
            (good, ("--model", "models:/stand-in@nobody"), "There is no model stand-in whose alias nobody"),
            (good, ("--model", "models:/stand-in/9"), "The model models:/stand-in/9 cannot be had")):
        refusal = driver.run(path, tmp_path / "out.parquet", "--model", MODEL, *words)
        assert says in refusal[0] and all(sentence.endswith(".") for sentence in refusal), refusal
    assert not list(tmp_path.glob("out*"))


def test_a_driver_and_a_worker_that_are_killed_cost_no_row(cluster, driver, registered, tmp_path):
    """Kill the module's driver in its job, begin again by the program itself, and kill a worker then: the last test."""
    count, out = 600, tmp_path / "out.parquet"
    command = [write(tmp_path / "in.parquet", [f"slow {number % 3 + 1}" for number in range(count)]), out, "--model",
               MODEL, "--rows-per-task", 25]

    def finished():
        return len(list(Path(f"{out}.unfinished/rows").glob("part-*")))

    driver.begin(*command)
    wait_for(lambda: finished() >= 4 or driver.process.poll() is not None, "four tasks", 180)
    driver.kill()
    assert not out.exists() and finished() < 24
    process = cluster.batch(*command, MLFLOW_TRACKING_URI=registered, TMPDIR=str(tmp_path))
    kept = finished()
    wait_for(lambda: finished() >= kept + 3 or process.poll() is not None, "three tasks more", 180)
    cluster.workers[0].kill()
    said, complained = process.communicate(timeout=600)
    assert (process.returncode, complained) == (0, ""), complained
    rows = read(out)
    assert list(rows["row"]) == list(range(count)) and set(rows["status"]) == {"ok"}
    assert list(rows["answer"]) == ["word " * (number % 3 + 1) for number in range(count)]
    assert f"{count} rows in {out}: {count} answered, 0 errors" in said
    assert 100 <= int(re.search(r"kept from a run before: (\d+)", said)[1]) < count
    assert int(re.search(r"tasks tried again: (\d+)", said)[1]) >= 1
    assert [path.name for path in tmp_path.iterdir() if ".parquet." in path.name or "spark-batch" in path.name] == []
