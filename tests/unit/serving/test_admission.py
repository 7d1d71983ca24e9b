"""How many requests may be in the model, and in which order the others wait.

Run: python -m helpers test tests/unit/serving/test_admission.py
"""

import asyncio
import random

import pytest

from serving.errors import ServiceError
from serving.service.admission import AdmissionQueue, retry_after


@pytest.mark.parametrize(
    "waiting, concurrent, seconds, answer",
    [
        (1, 1, 0.01, 1),
        (1, 64, 1, 1),
        (10, 1, 2, 20),
        (10, 4, 2, 5),
        (10, 4, 2.01, 6),
        (256, 1, 30, 60),
    ],
)
def test_the_time_to_retry_after(waiting, concurrent, seconds, answer):
    assert retry_after(waiting, concurrent, seconds) == answer


def test_requests_are_admitted_in_order_and_a_cancelled_one_is_left_out():
    async def story():
        queue, came = AdmissionQueue(lambda: 1, 4), []

        async def caller(number):
            await queue.acquire()
            came.append(number)

        callers = [asyncio.create_task(caller(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting, came) == (1, 4, [0])
        with pytest.raises(ServiceError) as refusal:
            await asyncio.wait_for(queue.acquire(), 5)
        assert (refusal.value.status, refusal.value.code, refusal.value.retry_after) == (
            429,
            "busy",
            4,
        )
        callers[2].cancel()
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting) == (1, 3)
        for _ in range(4):
            queue.release(0.1)
            await asyncio.sleep(0)
        assert (queue.running, queue.waiting, came) == (0, 0, [0, 1, 3, 4])

    asyncio.run(story())


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_request_that_is_cancelled_as_it_is_admitted_lets_the_next_one_in(leaves_first):
    async def story():
        queue = AdmissionQueue(lambda: 1, 4)
        await queue.acquire()
        leaver, other = (asyncio.create_task(queue.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        if leaves_first:
            leaver.cancel()
            queue.release()
        else:
            queue.release()
            leaver.cancel()
        await asyncio.wait([leaver, other], timeout=5)
        assert other.done() and not other.cancelled()
        assert (queue.running, queue.waiting) == (1, 0)

    asyncio.run(story())


def test_a_thousand_requests_with_cancellations_leave_nothing_behind():
    async def story():
        queue = AdmissionQueue(lambda: 3, 2000)
        chance = random.Random(1)
        most = 0

        async def caller():
            nonlocal most
            await queue.acquire()
            most = max(most, queue.running)
            try:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                queue.release(0.1)

        callers = [asyncio.create_task(caller()) for _ in range(1000)]
        for _ in range(300):
            await asyncio.sleep(0)
            chance.choice(callers).cancel()
        done, left = await asyncio.wait(callers, timeout=30)
        assert not left
        assert sum(task.cancelled() for task in done) > 50
        assert (queue.running, queue.waiting, most) == (0, 0, 3)

    asyncio.run(story())


def test_a_larger_limit_is_used_as_soon_as_a_request_ends():
    async def story():
        places = 1
        queue = AdmissionQueue(lambda: places, 9)
        callers = [asyncio.create_task(queue.acquire()) for _ in range(9)]
        await asyncio.sleep(0)
        places = 4
        queue.release()
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting) == (4, 4)
        for caller in callers:
            caller.cancel()

    asyncio.run(story())
