"""Faults of a Spark cluster that take long: a lost master, too little memory, a full disk, and 200,000 rows.

Run: python -m helpers test tests/nightly/test_spark.py
"""

import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas as pd
import psutil
import pytest
from support.chat import chat_model_for
from support.projects import activated, project
from support.service import wait_for

from course.cluster import running


@pytest.fixture
def batch(cluster, store, tmp_path):
    """Return a function that runs the program on prompts, and returns its exit code and what it said."""

    def run(
        prompts,
        *words,
        model="models:/stand-in@champion",
        out=tmp_path / "öut 1.parquet",
        **variables,
    ):
        if not isinstance(prompts, Path):
            prompts = write(tmp_path / "prömpts 1.parquet", prompts)
        process = cluster.batch(
            prompts, out, "--model", model, *words, MLFLOW_TRACKING_URI=store, **variables
        )
        said, complained = process.communicate(timeout=600)
        return process.returncode, said, complained

    return run


def write(path, prompts):
    pd.DataFrame(
        {"prompt": prompts, "id": [f"id {number}" for number in range(len(prompts))]}
    ).to_parquet(path)
    return path


def read(tmp_path, out="öut 1.parquet"):
    return pd.read_parquet(tmp_path / out).sort_values("row", ignore_index=True)


def left_over(tmp_path):
    return [path.name for path in tmp_path.iterdir() if ".parquet." in path.name]


def test_conversations_and_settings_reach_the_model_and_no_proxy_is_asked(
    batch, tiny, registry, tmp_path
):
    logged = mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny, max_tokens=4))
    talk = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "And now?"},
    ]
    proxies = dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"),
        "http://127.0.0.1:1",
    )
    code, _, complained = batch(
        [talk], "--max-tokens", "7", "--system", "Be brief.", model=logged.model_uri, **proxies
    )
    assert (code, complained) == (0, ""), complained
    asked = {"messages": [{"role": "system", "content": "Be brief."}, *talk], "max_tokens": 7}
    alone = mlflow.pyfunc.load_model(logged.model_uri).predict(asked)[0]
    row = read(tmp_path).iloc[0]
    assert row["answer"] == alone["choices"][0]["message"]["content"]
    assert row["prompt_tokens"] == alone["usage"]["prompt_tokens"] and row["completion_tokens"] == 7


def test_mlflow_run_makes_of_no_rows_a_whole_output_with_its_columns(
    cluster, registry, store, tmp_path
):
    registry("Rows")
    table = tmp_path / "none.parquet"
    pd.DataFrame({"prompt": pd.Series([], dtype="str")}).to_parquet(table)
    words = project(
        "batch",
        input=table,
        output=tmp_path / "öut 1.parquet",
        master=cluster.address,
        model="models:/stand-in@champion",
    )
    environment = cluster.environment(COURSE_TRACKING_URI=store, **activated(tmp_path))
    environment.pop("MLFLOW_EXPERIMENT_ID", None)  # MLflow sets it for the store of this test
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\n0 rows in " in "\n" + ran.stdout
    assert list(read(tmp_path).columns) == [
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


def start(cluster, store, prompts, out, *words):
    return cluster.batch(
        prompts,
        out,
        "--model",
        "models:/stand-in@champion",
        "--rows-per-task",
        "50",
        *words,
        MLFLOW_TRACKING_URI=store,
    )


def finished(out):
    """Return how many tasks have left their rows, and nothing else."""
    return len(list(out.glob("part-*")))


def lock_of(out):
    return out.with_name(f"{out.name}.lock")


def whole(tmp_path, out, count):
    rows = read(tmp_path, out)
    assert list(rows["row"]) == list(range(count)) and set(rows["status"]) == {"ok"}
    assert list(rows["answer"]) == ["word " * (number % 3 + 1) for number in range(count)]


SLOWLY = [f"slow {number % 3 + 1}" for number in range(2000)]


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


def test_an_interrupted_run_goes_on_with_the_rows_that_are_missing(
    cluster, store, registry, tmp_path
):
    registry("Rows")
    prompts, out = write(tmp_path / "in.parquet", SLOWLY), tmp_path / "out.parquet"
    process = start(cluster, store, prompts, out)
    wait_for(lambda: finished(out) >= 8 or process.poll() is not None, "eight tasks", 180)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()
    assert not (out / "_SUCCESS").exists()
    other = start(cluster, store, prompts, out, "--max-tokens", "3")
    assert (
        "its run had other settings: max_tokens None" in other.communicate(timeout=600)[1]
        and other.returncode == 1
    )
    process = start(cluster, store, prompts, out)
    wait_for(lambda: lock_of(out).exists() or process.poll() is not None, "the lock", 180)
    second = start(cluster, store, prompts, out)
    _, complained = second.communicate(timeout=600)
    assert second.returncode == 1
    assert f"Another run writes to this output: process {process.pid} on " in complained
    said, complained = process.communicate(timeout=600)
    assert (process.returncode, complained) == (0, ""), complained
    assert not lock_of(out).exists()
    whole(tmp_path, "out.parquet", 2000)
    kept = int(re.search(r"kept from an earlier run: (\d+)", said)[1])
    assert 300 <= kept < 2000
    assert left_over(tmp_path) == []


def test_a_lost_master_loses_nothing(store, registry, site, tmp_path):
    registry("Rows")
    prompts, out = write(tmp_path / "in.parquet", SLOWLY), tmp_path / "out.parquet"
    with running(tmp_path / "cluster", site) as cluster:
        process = start(cluster, store, prompts, out)
        wait_for(lambda: finished(out) >= 4 or process.poll() is not None, "four tasks", 180)
        cluster.stop()
        said, complained = process.communicate(timeout=600)
        assert process.returncode == 1 and "The cluster's master is lost." in complained, complained
        assert complained.count("\n") == 2 and not (out / "_SUCCESS").exists()
    with running(tmp_path / "another", site) as cluster:
        process = start(cluster, store, prompts, out)
        said, complained = process.communicate(timeout=600)
    assert (process.returncode, complained) == (0, ""), complained
    whole(tmp_path, "out.parquet", 2000)
    assert "kept from an earlier run: 0" not in said


def test_a_worker_without_memory_is_told_with_its_settings(batch, tiny, registry, tmp_path):
    logged = mlflow.pyfunc.log_model(name="slm", **chat_model_for(tiny))
    code, _, complained = batch(
        ["Hello"], "--conf", "spark.executor.pyspark.memory=300m", model=logged.model_uri
    )
    # Where the bound is met, Python raises an error or ends.
    assert code == 1 and re.search(
        "A worker ran out of memory|because memory ran out", complained
    ), complained
    for name in (
        "spark.executor.memory ",
        "spark.executor.memoryOverhead",
        "spark.executor.pyspark.memory",
    ):
        assert name in complained
    assert not (tmp_path / "öut 1.parquet" / "_SUCCESS").exists()


def test_a_full_disk_leaves_nothing_half_written(
    store, registry, site, mounted, tmp_path, monkeypatch
):
    registry("Rows")
    prompts = write(tmp_path / "in.parquet", ["big 9"] * 400)
    out = tmp_path / "disk" / "out.parquet"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    command = [
        sys.executable,
        "-m",
        "course.cluster",
        tmp_path / "cluster",
        site,
        prompts,
        out,
        "--model",
        "models:/stand-in@champion",
        "--rows-per-task",
        "20",
    ]
    # The disk is gone with the command: what is on it is listed before.
    result = mounted(
        "size=200k", ["sh", "-c", f'"$@"; code=$?; find "{out.parent}"; exit $code', "sh", *command]
    )
    assert result.returncode == 1 and "A disk is full." in result.stderr, result.stderr
    assert f"{out}/_SUCCESS" not in result.stdout.split("\n")


def test_200_000_rows_go_through_without_growing_memory(
    cluster, store, registry, tmp_path, record_property
):
    registry("Rows")
    count, out = 200_000, tmp_path / "out.parquet"
    prompts = write(tmp_path / "in.parquet", ["word 1"] * count)
    process = cluster.batch(
        prompts,
        out,
        "--model",
        "models:/stand-in@champion",
        "--rows-per-task",
        "2000",
        MLFLOW_TRACKING_URI=store,
    )
    held = []
    while process.poll() is None:
        if tasks := finished(out):
            held.append((tasks, cluster.python_bytes()))
        wait_for(
            lambda: process.poll() is not None or finished(out) != (held and held[-1][0]),
            "a task",
            300,
        )
    assert process.wait() == 0, process.stderr.read()
    rows = read(tmp_path, "out.parquet")
    assert list(rows["row"]) == list(range(count)) and set(rows["answer"]) == {"word "}
    early = max(size for tasks, size in held if tasks <= 20)
    late = max(size for tasks, size in held if tasks >= 80)
    record_property("memory of the Python workers, last fifth against first", late / early)
    assert late < 1.1 * early
