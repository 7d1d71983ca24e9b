"""Measures a batch of rows on a Spark cluster: contenders come in, ratios and figures go out.

The same rows go through one ``predict`` in this process, and through the batch program on a cluster
of one and of two workers. A worker runs one task at a time, on one thread; this process uses as
many threads as there are cores.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd

from benchmarks.contenders import CHAT, Contenders
from benchmarks.turns import take_turns, timed
from course.cluster import running
from course.environment import install_extra
from helpers.errors import CourseError

ROWS, FEW = 256, 8  # of a run, and of the one that tells what starting costs
TOKENS = 16


def spark(them: Contenders) -> tuple[dict, dict]:
    """Compare the seconds of the rows. Return two dicts: the ratios by name, and the figures behind them."""
    prompts = [them.story()[0]["content"] for _ in range(ROWS)]
    tokens = min(TOKENS, them.tokens)
    requests = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        for prompt in prompts
    ]
    with contextlib.ExitStack() as at_end:
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="bench ")))
        site = install_extra("spark")
        works = {"predict": timed(lambda: them.chat.predict(requests))}
        for workers in (1, 2):
            cluster = at_end.enter_context(running(folder / f"cluster {workers}", site, workers))
            works[str(workers)] = lambda cluster=cluster: {
                rows: _seconds(cluster, prompts[:rows], tokens) for rows in (FEW, ROWS)
            }
        found = take_turns(works, max(them.repeats // 4, 1))
    workers = {
        name: statistics.median(turn[ROWS] - turn[FEW] for turn in found[name])
        for name in ("1", "2")
    }
    rates = {"predict": ROWS / statistics.median(found["predict"])} | {
        name: (ROWS - FEW) / seconds for name, seconds in workers.items()
    }
    start = statistics.median(turn[FEW] for turn in found["2"])
    return (
        {
            "spark_two_workers": rates["2"] / rates["1"],
            "spark_predict": rates["2"] / rates["predict"],
        },
        {
            "spark": {
                "rows": ROWS,
                "tokens": tokens,
                "few_rows_seconds": start,
                "rows_per_second": rates,
            }
        },
    )


def _seconds(cluster, prompts, tokens):
    """Return the seconds of a run of the batch program."""
    source, out = cluster.folder / "in.parquet", cluster.folder / "out.parquet"
    pd.DataFrame({"prompt": prompts}).to_parquet(source)
    began = time.perf_counter()
    process = cluster.batch(
        source,
        out,
        "--model",
        CHAT,
        "--overwrite",
        "--max-tokens",
        str(tokens),
        "--rows-per-task",
        str(-(-len(prompts) // 4)),
    )
    said, complained = process.communicate()
    if process.returncode:
        raise CourseError(
            "bench-failed",
            f"The batch ended with {process.returncode}: {complained.strip() or said}.",
            "Read what the workers say.",
        )
    return time.perf_counter() - began
