"""Simulates a cluster that runs the tasks of a batch.

An executor takes the next task as soon as it is free, as in Spark. A slow executor needs a multiple
of the time. The unfinished task of a lost executor returns to the queue; its finished rows are
written.
"""

import heapq
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Simulated(NamedTuple):
    """The result: seconds until the last task ended, tasks that ran twice, and each executor's busy share."""

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
    """Run the tasks in their order.

    Parameters
    ----------
    tasks : sequence of float
        The seconds that each task takes on an executor of normal speed.
    executors : int
        How many there are; each runs one task at a time.
    start : float, optional
        Seconds until an executor has loaded its model and takes its first task.
    slow : mapping of int to float, optional
        By an executor's number, the multiple of the time that it needs.
    lost : mapping of int to float, optional
        By an executor's number, the second at which it is lost.

    Raises
    ------
    ValueError
        There is no executor, or all are lost before the last task ends.
    """
    if executors < 1:
        raise ValueError("There has to be an executor.")
    slow = slow or {}
    lost = lost or {}
    left = list(reversed(tasks))
    retried = 0
    end = 0.0
    busy = [0.0] * executors
    free = [
        (start * slow.get(number, 1), number) for number in range(executors)
    ]  # the time and the number of each free executor
    heapq.heapify(free)
    returned = []  # tasks of lost executors: the time of their return, and their seconds
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
        else:  # wait until the task of a lost executor returns
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
    """Return the seconds of each task, for rows in random order with ``rows_per_task`` in each."""
    shuffled = list(seconds)
    random.Random(seed).shuffle(shuffled)
    return [
        sum(shuffled[first : first + rows_per_task])
        for first in range(0, len(shuffled), rows_per_task)
    ]
