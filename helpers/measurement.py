"""Measures a logged model through MLflow's pyfunc interface, in the same way for both tracks."""

import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
from mlflow.pyfunc import PyFuncModel

from helpers.files import folder_bytes

REPEATS = 3


def measure(
    folder: Path | str, ask: Callable[[object, int], int], tokens: int
) -> tuple[dict[str, float], PyFuncModel]:
    """Load a logged model, time its predictions, and return the figures with the model.

    Parameters
    ----------
    folder : Path or str
        The folder of a logged model.
    ask : callable
        ``ask(model, max_tokens)`` makes one prediction and returns the number of tokens in its
        answer.
    tokens : int
        The most tokens of the longer answer, 2 or more.

    Returns
    -------
    figures : dict of str to float
        ``load_seconds``; ``first_token_seconds``, the time to an answer of one token;
        ``tokens_per_second`` after the first token, missing if the answers were too short to
        measure it; ``disk_bytes`` of the logged model; ``peak_memory_bytes`` of this process so far.
        Times are medians of three, after a warm-up.
    model : mlflow.pyfunc.PyFuncModel
        The copy that was measured.
    """
    started = time.perf_counter()
    model = mlflow.pyfunc.load_model(str(folder))
    load_seconds = time.perf_counter() - started
    ask(model, 1)
    pairs = [(_timed(ask, model, 1), _timed(ask, model, tokens)) for _ in range(REPEATS)]
    first, rate = read_times(pairs)
    figures = {
        "load_seconds": load_seconds,
        "first_token_seconds": first,
        "disk_bytes": folder_bytes(folder),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    return figures if rate is None else figures | {"tokens_per_second": rate}, model


def read_times(
    pairs: list[tuple[tuple[int, float], tuple[int, float]]],
) -> tuple[float, float | None]:
    """Return the seconds to the first token, and the tokens per second after it, None if they cannot be measured.

    ``pairs`` has the tokens and seconds of an answer of one token and of a longer one. Their
    difference has to be clear: at least a tenth of the time to the first token, and twice the
    spread of that time.
    """
    firsts = [seconds for (_, seconds), _ in pairs]
    first = statistics.median(firsts)
    rest = statistics.median(seconds - one for (_, one), (_, seconds) in pairs)
    later = statistics.median(tokens - 1 for _, (tokens, _) in pairs)
    spread = statistics.median(abs(seconds - first) for seconds in firsts)
    return first, later / rest if later >= 1 and rest > max(first / 10, 2 * spread) else None


def _timed(ask, model, max_tokens):
    started = time.perf_counter()
    count = ask(model, max_tokens)
    return count, time.perf_counter() - started


def peak_memory_bytes() -> int:
    """Return the peak of this process's memory so far, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    if sys.platform == "linux":
        # Not ru_maxrss, which begins with the peak of the process that started this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts it in bytes
