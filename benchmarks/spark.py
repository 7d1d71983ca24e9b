"""Measures the batch program on a Spark cluster with one and with two workers.

The same rows go through one ``predict`` in this process. A worker runs one task at a time, on one
thread; this process uses all cores.
"""

import contextlib
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd

from benchmarks.contenders import CHAT, Contenders
from benchmarks.timing import interleave, timed
from course.cluster import running
from course.environment import install_extra
from helpers.errors import CourseError

ROWS = 256
FEW_ROWS = 8  # of a run that shows how long the start takes
TASKS = 4
TOKENS = 16


def measure_spark(contenders: Contenders) -> tuple[dict, dict]:
    """Compare rows per second. Return the ratios by name, and the figures behind them."""
    prompts = [contenders.story()[0]["content"] for _ in range(ROWS)]
    tokens = min(TOKENS, contenders.tokens)
    requests = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        for prompt in prompts
    ]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench ")))
        spark_packages = install_extra("spark")
        works = {"predict": timed(lambda: contenders.chat.predict(requests))}
        for workers in (1, 2):
            cluster = stack.enter_context(
                running(folder / f"cluster {workers}", spark_packages, workers)
            )
            works[str(workers)] = partial(_time_runs, cluster, prompts, tokens)
        results = interleave(works, max(contenders.repeats // 4, 1))
    rates = {"predict": ROWS / statistics.median(results["predict"])}
    for workers in ("1", "2"):
        seconds = statistics.median(all_rows - few_rows for few_rows, all_rows in results[workers])
        rates[workers] = (ROWS - FEW_ROWS) / seconds
    ratios = {
        "spark_two_workers": rates["2"] / rates["1"],
        "spark_predict": rates["2"] / rates["predict"],
    }
    figures = {
        "rows": ROWS,
        "tokens": tokens,
        "few_rows_seconds": statistics.median(few_rows for few_rows, _ in results["2"]),
        "rows_per_second": rates,
    }
    return ratios, {"spark": figures}


def _time_runs(cluster, prompts, tokens):
    """Return the seconds of a run with few rows, and of one with all rows."""
    return _time_run(cluster, prompts[:FEW_ROWS], tokens), _time_run(cluster, prompts, tokens)


def _time_run(cluster, prompts, tokens):
    """Return the seconds of a run of the batch program."""
    source = cluster.folder / "in.parquet"
    pd.DataFrame({"prompt": prompts}).to_parquet(source)
    options = {
        "--model": CHAT,
        "--max-tokens": str(tokens),
        "--rows-per-task": str(-(-len(prompts) // TASKS)),
    }
    words = [word for option in options.items() for word in option]
    started = time.perf_counter()
    process = cluster.batch(source, cluster.folder / "out.parquet", "--overwrite", *words)
    output, errors = process.communicate()
    if process.returncode:
        raise CourseError(
            "bench-failed",
            f"The batch ended with {process.returncode}: {errors.strip() or output}.",
            "Read the workers' logs.",
        )
    return time.perf_counter() - started
