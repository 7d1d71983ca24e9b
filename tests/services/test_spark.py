"""Batches on a real Spark cluster, a master and two workers: each row comes once, also where a driver and a worker end.

Run: python -m helpers test tests/services/test_spark.py
"""

import json
import os
import re
import shutil
import subprocess
import sys

import mlflow
import pandas as pd
import psutil
import pytest
from pyarrow import parquet
from support import ROOT, stand_ins
from support.chat import chat_model_for, user
from support.service import wait_for

MODEL = "models:/stand-in@champion"
# Runs the commands that it reads, a line of JSON each, in one Spark session; prints a line for
# each: what it came to.
DRIVER = """
import json, sys
from pathlib import Path
from serving import batch, batch_cluster
master, folder = sys.argv[1], Path(sys.argv[2])
spark = batch_cluster.start_spark(master)
for number, line in enumerate(sys.stdin):
    (folder / str(number)).mkdir()
    try:
        options = batch.read_options([*json.loads(line), "--master", master])
        report = batch.run(spark, options, folder / str(number))
        print(json.dumps(report._asdict()), flush=True)
    except Exception as error:  # as the program does
        error = error if isinstance(error, batch_cluster.BatchError) else batch_cluster.to_batch_error(error)
        print(json.dumps([error.what, error.fix]), flush=True)
spark.stop()
"""


class Driver:
    """A program with one Spark session that takes commands."""

    def __init__(self, cluster, store, folder):
        environment = cluster.environment(MLFLOW_TRACKING_URI=store, TMPDIR=str(folder))
        environment["PYTHONPATH"] += os.pathsep + str(ROOT)
        self.log = folder / "driver.log"
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.address, folder],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=self.log.open("w", encoding="utf-8"),
        )

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
            for process in [
                *psutil.Process(self.process.pid).children(recursive=True),
                self.process,
            ]:
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
    pd.DataFrame(
        {"prompt": prompts, "id": [f"id {number}" for number in range(len(prompts))]}
    ).to_parquet(path)
    return path


def read(out):
    return pd.read_parquet(out).sort_values("row", ignore_index=True)


def test_every_row_is_answered_and_a_bad_one_says_why(cluster, driver, chat_uri, tmp_path):
    prompts = [
        *(f"Tell me about the number {number}." for number in range(20)),
        None,
        "",
        "word " * 5000,
        "a\x00b",
    ]
    out = tmp_path / "öut 1.parquet"
    report = driver.run(write(tmp_path / "prömpts 1.parquet", prompts), out, "--model", chat_uri)
    assert (report["rows"], report["kept"], report["failed"], report["cut"]) == (24, 0, 4, 20)
    assert sum(report["errors"].values()) == 4
    # What a worker unpacks goes with its folder.
    assert list(cluster.folder.glob("work-*/**/MLmodel"))
    rows = read(out)
    assert list(rows["row"]) == list(range(24)) and list(rows["id"]) == [
        f"id {number}" for number in range(24)
    ]
    assert list(rows["status"]) == ["ok"] * 20 + ["error"] * 4
    assert (
        rows["reason"][20] == rows["reason"][21] == "The cell is empty or null: it has no prompt."
    )
    assert "context" in rows["reason"][22] and "NUL" in rows["reason"][23]
    alone = mlflow.pyfunc.load_model(chat_uri).predict({"messages": user(prompts[7])})[0]
    assert rows["answer"][7] == alone["choices"][0]["message"]["content"]
    assert rows["completion_tokens"][7] == alone["usage"]["completion_tokens"] == 4
    assert set(rows["finish_reason"]) == {"length", ""}
    assert [path.name for path in tmp_path.iterdir() if ".parquet." in path.name] == []


def test_conversations_and_settings_reach_the_model(driver, chat_uri, tmp_path):
    talk = [*user("Hello"), {"role": "assistant", "content": "Hi"}, *user("And now?")]
    driver.run(
        write(tmp_path / "in.parquet", [talk]),
        tmp_path / "out.parquet",
        "--model",
        chat_uri,
        "--max-tokens",
        7,
        "--system",
        "Be brief.",
    )
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
    assert list(read(out).columns) == [
        "prompt",
        "row",
        "row_hash",
        "answer",
        "status",
        "reason",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
    ]
    what, fix = driver.run(one, out, "--model", MODEL)
    assert "exists already" in what and "--overwrite" in fix and len(read(out)) == 0
    assert driver.run(one, out, "--model", MODEL, "--overwrite")["rows"] == 1
    assert list(read(out)["answer"]) == ["word word "]
    assert [path.name for path in tmp_path.iterdir() if ".parquet." in path.name] == []


def test_inputs_that_cannot_be_are_refused_before_anything_is_written(driver, tmp_path):
    good = write(tmp_path / "good.parquet", ["word 1"])
    pd.DataFrame({"text": ["a"], "Answer": ["b"], "number": [1]}).to_parquet(
        other := tmp_path / "other.parquet"
    )
    (text := tmp_path / "text.parquet").write_text("no Parquet", encoding="utf-8")
    for path, words, says in (
        (other, (), "has no column prompt: it has text, Answer, number"),
        (other, ("--column", "text"), "has columns with names of the output's columns: Answer"),
        (other, ("--column", "number"), "its type is bigint"),
        (tmp_path / "nowhere.parquet", (), "does not exist"),
        (text, (), f"Spark can't read the file file:{text}."),
        (
            good,
            ("--model", "models:/nobody@champion"),
            "The registry has no model nobody with the alias champion",
        ),
        (
            good,
            ("--model", "models:/stand-in@nobody"),
            "The registry has no model stand-in with the alias nobody",
        ),
        (good, ("--model", "models:/stand-in/9"), "Could not load the model models:/stand-in/9"),
    ):
        refusal = driver.run(path, tmp_path / "out.parquet", "--model", MODEL, *words)
        assert says in refusal[0] and all(sentence.endswith(".") for sentence in refusal), refusal
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    for words in ((), ("--overwrite",)):
        what, _ = driver.run(good, tmp_path / "mine", "--model", MODEL, *words)
        assert "this program has not written it" in what
    assert (tmp_path / "mine" / "letter.txt").exists()


def test_columns_come_out_as_they_went_in(driver, tmp_path):
    times = pd.to_datetime(["2026-01-02", None]).astype("datetime64[us]")
    table = pd.DataFrame(
        {
            "user.id": [1, 2],
            "a `b` *": ["x", None],
            "prompt": ["word 1", "word 2"],
            "Prompt": [[1], []],
            "when": times,
        }
    )
    table.to_parquet(tmp_path / "in.parquet")
    assert (
        driver.run(tmp_path / "in.parquet", tmp_path / "out.parquet", "--model", MODEL)["failed"]
        == 0
    )
    rows = read(tmp_path / "out.parquet")
    assert list(rows.columns)[:5] == list(table.columns)
    for name in ("user.id", "prompt", "when"):
        pd.testing.assert_series_equal(rows[name], table[name], check_dtype=False)
    assert rows["a `b` *"][0] == "x" and pd.isna(rows["a `b` *"][1])
    assert [list(value) for value in rows["Prompt"]] == [[1], []]
    assert list(rows["answer"]) == ["word ", "word word "]


def test_a_file_that_spark_cannot_read_is_named(driver, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "a.parquet", ["word 1"] * 100)
    (folder / "README.md").write_text("no Parquet", encoding="utf-8")
    what, fix = driver.run(folder, tmp_path / "out", "--model", MODEL)
    assert "README.md" in what and "remove it" in fix
    (folder / "README.md").unlink()
    half = (folder / "a.parquet").read_bytes()[:-200]
    (folder / "b.parquet").write_bytes(half)
    assert "b.parquet" in driver.run(folder, tmp_path / "out", "--model", MODEL)[0]
    (folder / "b.parquet").unlink()
    times = pd.to_datetime(["2026-01-02"]).astype("datetime64[ns]")
    pd.DataFrame({"prompt": ["a"], "when": times}).to_parquet(
        tmp_path / "ns.parquet", version="2.6"
    )
    assert (
        "TIMESTAMP(NANOS"
        in driver.run(tmp_path / "ns.parquet", tmp_path / "out", "--model", MODEL)[0]
    )
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_goes_on_with_the_same_content_alone(driver, tmp_path):
    prompts, out = [f"word {number % 3 + 1}" for number in range(40)], tmp_path / "out.parquet"
    whole = write(tmp_path / "in.parquet", prompts)
    driver.run(whole, out, "--model", MODEL, "--rows-per-task", 10)
    # As a killed driver leaves it: some tasks' files, and no _SUCCESS.
    parts = sorted(out.glob("part-*"))
    (out / "_SUCCESS").unlink()
    for part in parts[1:]:
        part.unlink()
    for words in (["--max-tokens", 3], ["--system", "Be brief."]):
        what, fix = driver.run(whole, out, "--model", MODEL, *words)
        assert (
            f"its run had other settings: {words[0][2:].replace('-', '_')} " in what
            and "--overwrite" in fix
        )
    write(whole, ["another " + prompt for prompt in prompts])
    assert "its run had another input" in driver.run(whole, out, "--model", MODEL)[0]
    write(whole, prompts)
    kept = len(pd.read_parquet(parts[0]))
    # With --overwrite, too, an unfinished run goes on.
    report = driver.run(whole, out, "--model", MODEL, "--overwrite")
    assert (report["rows"], report["kept"]) == (40, kept) and 0 < kept < 40
    assert list(read(out)["answer"]) == ["word " * (number % 3 + 1) for number in range(40)]
    # Both runs' files.
    assert len({tuple(parquet.read_schema(part).names) for part in out.glob("part-*")}) == 1
    write(whole, prompts[:4])
    assert driver.run(whole, out, "--model", MODEL, "--overwrite")["kept"] == 0
    assert len(read(out)) == 4


def test_a_driver_and_a_worker_that_are_killed_cost_no_row(cluster, driver, registered, tmp_path):
    """Kill the module's driver in its job, begin again by the program itself, and kill a worker then: the last test."""
    count, out = 600, tmp_path / "out.parquet"
    command = [
        write(tmp_path / "in.parquet", [f"slow {number % 3 + 1}" for number in range(count)]),
        out,
        "--model",
        MODEL,
        "--rows-per-task",
        25,
    ]

    def finished():
        return len(list(out.glob("part-*")))

    driver.begin(*command)
    wait_for(lambda: finished() >= 4 or driver.process.poll() is not None, "four tasks", 180)
    driver.kill()
    assert not (out / "_SUCCESS").exists() and finished() < 24
    process = cluster.batch(*command, MLFLOW_TRACKING_URI=registered, TMPDIR=str(tmp_path))
    kept = finished()
    wait_for(lambda: finished() >= kept + 3 or process.poll() is not None, "three tasks more", 180)
    cluster.workers[0].kill()
    said, complained = process.communicate(timeout=600)
    assert (process.returncode, complained) == (0, ""), complained
    assert (out / "_SUCCESS").exists()
    rows = read(out)
    assert list(rows["row"]) == list(range(count)) and set(rows["status"]) == {"ok"}
    assert list(rows["answer"]) == ["word " * (number % 3 + 1) for number in range(count)]
    assert f"{count} rows in {out}: {count} answered, 0 errors" in said
    assert 100 <= int(re.search(r"kept from an earlier run: (\d+)", said)[1]) < count
    assert int(re.search(r"tasks tried again: (\d+)", said)[1]) >= 1
    assert [
        path.name
        for path in tmp_path.iterdir()
        if ".parquet." in path.name or "spark-batch" in path.name
    ] == []
