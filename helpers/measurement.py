"""Measures a logged model the same way for both tracks, through MLflow's pyfunc interface alone."""

import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
from mlflow.pyfunc import PyFuncModel

REPEATS = 3


def measure(model_uri: str, ask: Callable[[object, int], int], tokens: int) -> tuple[dict[str, float], PyFuncModel]:
    """Load a logged model anew, time what it does, and return the figures with the model.

    Parameters
    ----------
    model_uri : str
        Of a logged model.
    ask : callable
        ``ask(model, max_tokens)`` makes one prediction and returns the number of tokens in its answer.
    tokens : int
        Most tokens of the longer answer, 2 or more.

    Returns
    -------
    figures : dict of str to float
        ``load_seconds``; ``first_token_seconds``, the time to an answer of one token;
        ``tokens_per_second`` after the first token, 0 where the answer had no second one;
        ``disk_bytes`` of the logged model; ``peak_memory_bytes`` of this process so far, with all that it has loaded.
        Times are medians of three, after a warm-up.
    model : mlflow.pyfunc.PyFuncModel
        The copy that was measured, to go on with.
    """
    started = time.perf_counter()
    model = mlflow.pyfunc.load_model(model_uri)
    load_seconds = time.perf_counter() - started
    ask(model, 1)
    first, rates = [], []
    for _ in range(REPEATS):
        first.append(_timed(ask, model, 1)[1])
        count, seconds = _timed(ask, model, tokens)
        rates.append(max(count - 1, 0) / max(seconds - first[-1], 1e-9) if count > 1 else 0.0)
    folder = mlflow.artifacts.download_artifacts(model_uri)
    figures = {
        "load_seconds": load_seconds,
        "first_token_seconds": statistics.median(first),
        "tokens_per_second": statistics.median(rates),
        "disk_bytes": folder_bytes(folder),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return figures, model


def _timed(ask, model, max_tokens):
    started = time.perf_counter()
    count = ask(model, max_tokens)
    return count, time.perf_counter() - started


def folder_bytes(folder: Path | str) -> int:
    """Return the bytes of all files below ``folder``."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held so far, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # Not ru_maxrss: there, a program starts with the peak of the one that started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes
