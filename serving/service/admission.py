"""Decides how many requests may be in the model at once. Up to a limit, others wait in order."""

import asyncio
import collections
import math
from collections.abc import Callable

from ..errors import ServiceError


class AdmissionQueue:
    """Lets some requests into the model, and the others wait in the order of arrival.

    asyncio.Semaphore waits in order too, but its size is fixed: here it changes with the version
    of the model that serves.

    Parameters
    ----------
    limit : callable
        Returns how many requests may be in the model now.
    max_waiting : int
        How many may wait.
    """

    def __init__(self, limit: Callable[[], int], max_waiting: int):
        self._limit = limit
        self._max_waiting = max_waiting
        self.running = 0
        self._queue = collections.deque()
        self._seconds = 1.0  # a moving average: how long a request is in the model

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._queue)

    async def acquire(self) -> None:
        """Wait until the request may ask the model.

        Raises
        ------
        ServiceError
            Too many requests wait.
        """
        if self.running >= self._limit() and self.waiting >= self._max_waiting:
            raise ServiceError(
                429,
                f"The service is busy: {self.waiting} requests wait. Try again later.",
                "busy",
                retry_after=retry_after(self.waiting, self._limit(), self._seconds),
            )
        admitted = asyncio.get_running_loop().create_future()
        self._queue.append(admitted)
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted in self._queue:
                self._queue.remove(admitted)
            elif (
                not admitted.cancelled()
            ):  # it was admitted in the moment in which it was cancelled
                self.release()
            raise

    def release(self, seconds: float | None = None) -> None:
        """Let the next request in. ``seconds`` is how long this one was in the model."""
        if seconds is not None:
            self._seconds += (seconds - self._seconds) / 8
        self.running -= 1
        self._admit()

    def _admit(self):
        while self._queue and self.running < self._limit():
            admitted = self._queue.popleft()
            if not admitted.done():  # otherwise it has just been cancelled
                admitted.set_result(None)
                self.running += 1


def retry_after(waiting: int, limit: int, seconds: float) -> int:
    """Estimate in how many whole seconds, from 1 to 60, a request would be admitted."""
    return min(max(math.ceil(waiting / limit * seconds), 1), 60)
