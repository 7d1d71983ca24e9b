"""Simulates a cluster that works off the tasks of a batch: what they take goes in, when they are done comes out.

Executors take the next task as soon as they are free, as Spark's do. A slow one needs a multiple of
the time for everything; a lost one takes its unfinished task back to the queue, and nothing else,
because finished rows are written.
"""

import heapq
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Simulated(NamedTuple):
    """What came of a batch: seconds until the last task ended, tasks done twice, and each executor's busy share."""

    seconds: float
    retried: int
    busy: list[float]


def simulate(
    tasks: Sequence[float],
    executors: int,
    start: float = 0.0,
    slow: Mapping[int, float] | None = None,
    lost: Mapping[int, float] | None = None,
) -> Simulated:
    """Work off the tasks, in their order, and return when and how.

    Parameters
    ----------
    tasks : sequence of float
        The seconds that each takes on an executor of the usual speed.
    executors : int
        Each works on one task at a time.
    start : float, optional
        The seconds until an executor has its model and takes its first task.
    slow : mapping of int to float, optional
        By the executor's number, how many times as long it takes for everything.
    lost : mapping of int to float, optional
        By the executor's number, the second at which it is gone for good.

    Raises
    ------
    ValueError
        There is no executor, or all are lost before the tasks are done.
    """
    if executors < 1:
        raise ValueError("There has to be an executor.")
    slow, lost = slow or {}, lost or {}
    left, retried, end, busy = list(reversed(tasks)), 0, 0.0, [0.0] * executors
    free = [(start * slow.get(number, 1), number) for number in range(executors)]  # when, and who
    heapq.heapify(free)
    returned = []  # tasks of lost executors: when they are back, and their seconds
    while left or returned:
        if not free:
            raise ValueError("All executors are lost, and tasks are left.")
        now, number = heapq.heappop(free)
        gone = lost.get(number, float("inf"))
        if now >= gone:
            continue
        if returned and returned[0][0] <= now:
            seconds = heapq.heappop(returned)[1]
        elif left:
            seconds = left.pop()
        else:  # nothing to do until a lost one's task is back
            heapq.heappush(free, (returned[0][0], number))
            continue
        ended = now + seconds * slow.get(number, 1)
        busy[number] += min(ended, gone) - now
        if ended > gone:
            retried += 1
            heapq.heappush(returned, (gone, seconds))
            continue
        end = max(end, ended)
        heapq.heappush(free, (ended, number))
    return Simulated(end, retried, [share / end if end else 0.0 for share in busy])


def cut_tasks(seconds: Sequence[float], rows_per_task: int, seed: int = 0) -> list[float]:
    """Return the seconds of each task: rows in random order, so many at a time."""
    shuffled = list(seconds)
    random.Random(seed).shuffle(shuffled)
    return [
        sum(shuffled[first : first + rows_per_task])
        for first in range(0, len(shuffled), rows_per_task)
    ]
