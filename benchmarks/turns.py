"""Lets those who are compared take turns, so that a machine whose speed drifts drifts for all of them."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

PAUSE = 0.3  # seconds, in which the threads of the one before stop looking for work


def take_turns(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list]:
    """Let each work run in each turn. Return by name what it returned, without that of a first turn, the warm-up."""
    found = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            time.sleep(PAUSE)
            result = work()
            if turn:
                found[name].append(result)
    return found


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """Return a work that returns the seconds which this one takes."""

    def run():
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def mix(lengths: Sequence[int], count: int) -> list[int]:
    """Return ``count`` lengths, each as often as the others, short and long ones by turns."""
    return [lengths[5 * number % len(lengths)] for number in range(count)]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least of some values that so large a share of them, such as 0.95, does not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
