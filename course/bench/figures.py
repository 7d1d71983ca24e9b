"""Says what the measurements should reach, and shows those of several machines: runs come in, ranges go out.

A run is what ``make bench`` writes: ``machine``, ``date``, ``versions``, ``ratios`` and, behind them, ``raw`` figures.
Nothing in it is rounded: whoever shows a figure rounds it.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from helpers.paths import DATA

BENCH = DATA / "bench.json"
KEPT = 6  # runs in data/bench.json
# What each ratio should reach.
REACH = {
    "single_overhead": {"at_least": 0.97, "what": "one conversation through `predict`",
                        "against": "a bare engine loop"},
    "rows16": {"at_least": 1.8, "what": "16 rows in one `predict`", "against": "16 times `predict`"},
    "callers8": {"at_least": 1.5, "what": "8 threads, 32 requests of mixed length",
                 "against": "the lesson's wrapper behind a lock"},
    "callers8_llamacpp": {"at_least": 1.0, "what": "the same load", "against": "llama.cpp with 8 slots"},
    "single_llamacpp": {"at_least": 0.9, "what": "one stream", "against": "llama.cpp, one stream"},
    "stream_ttft": {"under": 1.0, "what": "seconds to a stream's first chunk, with 7 others generating",
                    "against": "their whole batch and then the stream alone"},
    "track_ratio": {"at_least": 4.0, "what": "track B's tokens per second", "against": "track A's"},
    "memory": {"under": 1.6, "what": "peak memory of a process that loads it, less 200 MB",
               "against": "the size of the model's folder"},
    "log_disk": {"under": 1.05, "what": "bytes that logging adds", "against": "the size of the model's folder"},
}
# In seconds and bytes, on 2 cores: what a figure has to stay under.
BUDGETS = {
    "tiny-phi3": {"seconds": 60, "peak_memory_bytes": 4e9},
    "smollm2-135m": {"seconds": 300, "peak_memory_bytes": 4e9},
    "prepare": {"warm_seconds": 0.5, "peak_memory_bytes": 2.5e9},
    "test": {"seconds": 720, "tests_seconds": 540},
}


def reaches(value: float, reach: dict) -> bool:
    """Tell whether a ratio is ``at_least`` what it should be, or ``under`` it."""
    return value >= reach["at_least"] if "at_least" in reach else value < reach["under"]


def misses(run: dict) -> list[str]:
    """Return the names of a run's figures that miss their reach or their budget."""
    missed = [name for name, reach in REACH.items()
              if name in run["ratios"] and not reaches(run["ratios"][name], reach)]
    raw = run["raw"]
    figures = [(f"{one['notebook']} on {one['model']}", one, BUDGETS[one["model"]]) for one in raw["notebooks"]]
    figures += [(name, raw[name], BUDGETS[name]) for name in ("prepare", "test") if name in raw]
    return missed + [f"{name}: {unit}" for name, figure, budget in figures for unit, most in budget.items()
                     if figure[unit] >= most]


def read_runs(path: Path = BENCH) -> list[dict]:
    """Return the runs that are kept, oldest first."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def keep_run(runs: list[dict], run: dict) -> list[dict]:
    """Return the runs with one more; the oldest ones make way for it."""
    return [*runs, run][-KEPT:]


def write_runs(runs: list[dict], path: Path = BENCH) -> None:
    """Write the runs that are kept."""
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")


def show_range(values: Iterable[float], digits: int = 2) -> str:
    """Return the smallest and the largest of some figures, such as ``"5.67 to 9.09"``; one where they look alike."""
    values = list(values)
    least, most = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return least if least == most else f"{least} to {most}"
