"""A cluster's work, simulated: cases that can be done on paper.

Run: python -m helpers test tests/unit/helpers/test_simulation.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.cloud.simulation import cut_tasks, simulate


@pytest.mark.parametrize(
    "tasks, executors, options, seconds, retried",
    [
        ([], 1, {}, 0, 0),
        ([3, 4], 1, {}, 7, 0),
        ([3, 4], 2, {}, 4, 0),
        ([1, 1, 4], 2, {}, 5, 0),  # in their order, though the long one first would take 4
        ([3, 4], 2, {"start": 10}, 14, 0),
        ([2, 2], 2, {"slow": {0: 3}}, 6, 0),
        ([2, 2], 2, {"start": 1, "slow": {0: 3}}, 9, 0),
        ([2] * 4, 2, {"slow": {0: 3}}, 6, 0),  # the quick one does three of them
        ([2, 2], 2, {"lost": {0: 1}}, 4, 1),  # its task comes back at 1, and is taken at 2
        ([2, 5], 2, {"lost": {0: 4}}, 5, 0),  # it has ended what it had
        (
            [5, 2],
            2,
            {"lost": {0: 4}},
            9,
            1,
        ),  # the other one waits for 2 seconds before it is needed
        ([2, 2], 2, {"lost": {0: 0}}, 4, 0),  # it never took one
        ([2, 2], 2, {"lost": {0: 2}}, 2, 0),  # gone as it ended
        ([2, 2, 2], 3, {"lost": {0: 1, 1: 3}}, 5, 2),
    ],
)
def test_what_can_be_done_on_paper(tasks, executors, options, seconds, retried):
    done = simulate(tasks, executors, **options)
    assert (done.seconds, done.retried) == (seconds, retried)


@pytest.mark.parametrize(
    "tasks, executors, lost",
    [([1], 0, {}), ([1], -1, {}), ([2], 1, {0: 1}), ([2, 2], 2, {0: 1, 1: 1})],
)
def test_nobody_is_there_to_do_it(tasks, executors, lost):
    with pytest.raises(ValueError, match="executor"):
        simulate(tasks, executors, lost=lost)


def test_an_executor_is_busy_for_a_share_of_the_time():
    assert simulate([4, 2], 2).busy == [1, 0.5]
    assert simulate([4, 1], 2, start=1).busy == [0.8, 0.2]
    assert simulate([4, 4], 2, lost={0: 2}).busy == [0.25, 1]
    assert simulate([], 2).busy == [0, 0]


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8), st.floats(0, 50))
def test_no_cluster_is_faster_than_its_work_allows(tasks, executors, start):
    done = simulate(tasks, executors, start)
    least, most = max(sum(tasks) / executors, max(tasks)), sum(tasks) / executors + max(tasks)
    assert least <= done.seconds - start + 1e-6 and done.seconds - start <= most + 1e-6
    assert sum(done.busy) * done.seconds == pytest.approx(sum(tasks))


def test_rows_are_cut_into_tasks():
    rows = list(range(100))
    tasks = cut_tasks(rows, 30)
    assert len(tasks) == 4 and sum(tasks) == sum(rows) and cut_tasks([], 2) == []
    assert tasks == cut_tasks(rows, 30) != cut_tasks(rows, 30, seed=1)
    assert cut_tasks(rows, 1) != rows and sorted(cut_tasks(rows, 1)) == rows
