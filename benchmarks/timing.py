"""Times work that is compared, in turns: a machine that gets slower gets slower for all contenders."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

PAUSE = 0.3  # seconds, in which the threads of the contender before go idle


def interleave(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list]:
    """Run all works one after the other, ``repeats`` times. Return the results of each by name.

    A first round is a warm-up, and its results are left out.
    """
    results = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            time.sleep(PAUSE)
            result = work()
            if repeat:
                results[name].append(result)
    return results


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that runs ``work`` and returns the seconds that it took."""

    def run():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def median_seconds(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each work by name."""
    seconds = interleave({name: timed(work) for name, work in works.items()}, repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def mix(lengths: Sequence[int], count: int) -> list[int]:
    """Return ``count`` lengths, each as often as the others, with short and long ones alternating."""
    return [lengths[5 * number % len(lengths)] for number in range(count)]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of the values, such as 0.95, does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
