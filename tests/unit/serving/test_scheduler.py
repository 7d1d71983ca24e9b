"""Which rows start when: each rule of the scheduler as a table. Rows are stand-ins; there is no engine and no clock.

Run: python -m helpers test tests/unit/serving/test_scheduler.py
"""

from dataclasses import dataclass

import pytest

from serving.chat_model import Scheduler

NOW = 1000.0  # seconds


@dataclass(eq=False)
class Row:
    prompt: list
    max_tokens: int
    due: float
    urgent: bool
    ended: bool
    kept: int


@dataclass(eq=False)
class Batch:
    rows: list
    cache_tokens: int


def row(prompt=10, max_tokens=10, waited=0.0, urgent=False, ended=False, kept=0):
    """Return what the scheduler sees of a row whose turn came ``waited`` seconds ago."""
    return Row([0] * prompt, max_tokens, NOW - waited, urgent, ended, kept)


def batch(rows, cache_tokens=0):
    return Batch([row() for _ in range(rows)], cache_tokens)


@pytest.mark.parametrize(("waiting", "last_size", "seconds"), [
    (1, 1, 0.003),
    (1, 2, 0.006),
    (1, 5, 0.015),
    (1, 6, 0.015),  # no first token is kept waiting for longer
    (15, 16, 0.015),
    (16, 16, 0.0),  # a full batch waits for nobody
    (17, 1, 0.0),
])
def test_an_idle_engine_lingers_for_company_and_longer_after_a_larger_batch(waiting, last_size, seconds):
    assert Scheduler(4096).linger_time([row() for _ in range(waiting)], last_size) == pytest.approx(seconds)


@pytest.mark.parametrize(("urgent", "place", "due"), [
    (False, 0, 0), (False, 15, 0),  # the first 16 rows of a call have their turn now
    (False, 16, 3), (False, 31, 3), (False, 32, 6), (False, 255, 45),  # 16 more every three seconds
    (True, 0, -3), (True, 7, -3), (True, 40, -3),  # an urgent row's patience is over when it comes
])
def test_a_call_of_many_rows_takes_turns_and_an_urgent_row_does_not_wait(urgent, place, due):
    assert Scheduler(4096).due(row(urgent=urgent), place, NOW) == NOW + due


@pytest.mark.parametrize(("running", "patience"), [
    ([1], 0),  # beside a lone row
    ([2], 0.375),
    ([5], 1.5),
    ([9], 3),
    ([16], 3),
    ([1, 1], 0.375),  # two batches of one row are as many rows as one of two
    ([8, 1], 3),
    ([1, 1, 1], 0.75),
    ([16] * 7, 3),
    ([1] * 8, 3 + 2.625),  # eight batches: patience anew
    ([16] * 8, 6),
    ([1] * 15, 6),
])
def test_a_row_starts_beside_running_ones_when_its_patience_ends(running, patience):
    running = [batch(rows) for rows in running]
    late = row(waited=patience)
    assert Scheduler(4096).next([late], running, NOW) == [late]
    assert Scheduler(4096).next([late], running, NOW - 0.001) == []


@pytest.mark.parametrize(("running", "starts"), [
    ([], True), ([16], True), ([16] * 7, True), ([1] * 8, False), ([16] * 8, False)])
def test_a_stream_joins_at_once_up_to_the_eighth_batch_and_then_waits_for_company(running, starts):
    scheduler = Scheduler(4096)
    stream = row(urgent=True)
    stream.due = scheduler.due(stream, 0, NOW)
    running = [batch(rows) for rows in running]
    assert scheduler.next([stream], running, NOW) == [stream] * starts
    assert scheduler.next([stream], running, NOW + 3) == [stream]  # by then it does


def test_no_more_than_16_batches_run():
    waiting = [row(waited=1e6)]
    assert Scheduler(4096).next(waiting, [batch(1) for _ in range(15)], NOW) == waiting
    assert Scheduler(4096).next(waiting, [batch(1) for _ in range(16)], NOW) == []
    assert Scheduler(4096).next(waiting, [batch(1) for _ in range(17)], NOW) == []


@pytest.mark.parametrize(("running", "rows"), [
    ([], 5),  # of 200 tokens each: a batch takes one context of 1000
    ([0], 5),
    ([1000], 5),  # all batches together take two
    ([1001], 4),
    ([1400], 3),
    ([700, 700], 3),
    ([1800], 1),
    ([1801], 0),
    ([1000, 1000], 0),
    ([2500], 0),
])
def test_one_batch_and_all_batches_stay_within_their_bound_on_the_cache(running, rows):
    waiting = [row(10, 190, waited=20.0) for _ in range(8)]
    assert len(Scheduler(1000).next(waiting, [batch(1, tokens) for tokens in running], NOW)) == rows


@pytest.mark.parametrize(("reserved", "waited", "starts"), [
    (1500, 3.0, ["small"]),  # the large row needs 900 of 500 tokens: smaller ones go first
    (1500, 29.999, ["small"]),
    (1500, 30.0, []),  # for ten times its patience at the most; then the cache is kept free for it
    (1101, 1000.0, []),
    (1100, 30.0, ["large"]),
    (1100, 3.0, ["large"]),  # where it fits, the first one is in the batch
    (0, 3.0, ["large"]),
])
def test_smaller_rows_go_first_for_a_while_and_then_the_first_one_is_waited_for(reserved, waited, starts):
    large, small = row(100, 800, waited=waited), row(10, 10, waited=0.5)
    rows = Scheduler(1000).next([small, large], [batch(1, reserved)], NOW)
    assert rows == [{"small": small, "large": large}[name] for name in starts]


@pytest.mark.parametrize(("running", "waited", "starts"), [
    ([], 0.0, "short"), ([], 2.999, "short"),  # an idle engine takes the better batch
    ([], 3.0, "long"),  # and whoever's patience is over
    ([1], 0.0, "long"), ([16], 3.0, "long"),  # beside others, the earliest row is in it
])
def test_the_earliest_row_is_in_the_batch_where_it_has_waited(running, waited, starts):
    short = [row(40, 8, waited=waited - 1) for _ in range(4)]
    long = [row(40, 64, waited=waited), *(row(40, 64, waited=waited - 2) for _ in range(3))]
    rows = Scheduler(8192).next([*short, *long], [batch(rows) for rows in running], NOW)
    assert set(rows) == set({"short": short, "long": long}[starts])


@pytest.mark.parametrize(("prompt", "rows"), [(32, 16), (33, 15), (170, 3), (256, 2), (257, 1), (512, 1), (5000, 1)])
def test_a_batch_of_several_rows_reads_512_tokens_of_prompt_at_most(prompt, rows):
    waiting = [row(prompt, 8) for _ in range(20)]
    assert len(Scheduler(8192).next(waiting, [], NOW)) == rows


@pytest.mark.parametrize(("rows", "must", "expected"), [
    # Answers of one length belong together, whatever the order; the shorter ones cost less.
    ([(40, 8), (40, 64), (40, 8), (40, 64), (40, 8)], None, [0, 2, 4]),
    ([(40, 8), (40, 64), (40, 8), (40, 64), (40, 8)], 1, [1, 3]),
    ([(40, 8), (40, 64), (40, 8), (40, 64), (40, 8)], 4, [0, 2, 4]),
    # So do prompts of one length, because all are padded to the longest one.
    ([(10, 10), (200, 10), (10, 10)], 0, [0, 2]),
    ([(10, 10), (200, 10), (10, 10)], None, [1]),
    # A little padding costs less than another batch.
    ([(20, 20), (22, 20), (20, 24)], None, [0, 1, 2]),
    ([(1, 1), (1, 400)], None, [0]),
    ([(1, 2), (20, 20)], None, [1]),
    ([(300, 1), (1, 1)], None, [0]),
    # Of equal rows the earliest go first.
    ([(10, 10)] * 20, None, list(range(16))),
    ([(10, 10)] * 20, 19, list(range(4, 20))),
    ([(10, 10)], None, [0]),
    ([], None, []),
])
def test_a_batch_is_made_of_rows_of_similar_length(rows, must, expected):
    rows = [row(*size) for size in rows]
    chosen = Scheduler(8192).choose(rows, 8192, None if must is None else rows[must])
    assert [rows.index(one) for one in chosen] == expected


@pytest.mark.parametrize(("cache_tokens", "rows"), [(200, 1), (199, 0), (400, 2), (650, 3), (0, 0), (-500, 0)])
def test_a_batch_fits_in_the_cache_that_is_left(cache_tokens, rows):
    assert len(Scheduler(8192).choose([row(100, 100) for _ in range(4)], cache_tokens)) == rows
    # Each row takes as much as the longest prompt and the longest answer.
    assert len(Scheduler(8192).choose([row(100, 1), row(1, 100)], 2 * 200 - 1)) == 1


def test_where_the_row_that_must_start_does_not_fit_none_does():
    large, small = row(100, 800), row(10, 10)
    assert Scheduler(8192).choose([large, small], 899, must=large) == []
    assert Scheduler(8192).choose([large, small], 900, must=large) == [large]


@pytest.mark.parametrize(("kept", "alone"), [(0, False), (255, False), (256, True), (300, True)])
def test_a_row_that_goes_on_with_a_kept_conversation_starts_alone_where_that_is_worth_it(kept, alone):
    waiting = [row(128, 10, waited=2, kept=kept), row(128, 10), row(128, 10)]
    # Whether others run or not, and whether its turn has long come.
    for running, now in (([], NOW), ([batch(1)], NOW), ([], NOW + 5)):
        assert Scheduler(8192).next(waiting, running, now) == waiting[:1 if alone else 3]
    assert Scheduler(8192).next(waiting[:1], [], NOW) == waiting[:1]


def test_only_the_first_row_starts_alone_and_the_others_share_a_batch():
    waiting = [row(128, 10, waited=2), row(128, 10, kept=300), row(128, 10, kept=300)]
    assert Scheduler(8192).next(waiting, [], NOW) == waiting
    assert Scheduler(8192).next(waiting[1:], [], NOW) == waiting[1:2]
    # What is worth it is a number of the scheduler's.
    assert Scheduler(8192, worth_reusing=301).next(waiting[1:], [], NOW) == waiting[1:]
    assert Scheduler(8192, worth_reusing=300).next(waiting[1:], [], NOW) == waiting[1:2]


def test_a_row_that_starts_alone_waits_for_its_cache_like_any_other():
    first, small = row(500, 400, waited=3, kept=400), row(10, 10)
    assert Scheduler(1000).next([first, small], [batch(1, 1100)], NOW) == [first]
    assert Scheduler(1000).next([first, small], [batch(1, 1101)], NOW) == [small]  # which goes first for a while
    assert Scheduler(1000).next([first, small], [batch(1, 1101)], NOW + 30) == []


@pytest.mark.parametrize(("rope_switch", "sizes", "rows"), [
    (None, [(100, 50)] * 4, 4),
    (150, [(100, 50)] * 4, 4),  # up to it
    (149, [(100, 50)] * 4, 1),  # and no further: these would read their last tokens in another way
    (149, [(100, 49)] * 4, 4),
    (120, [(100, 20), (90, 18)], 2),
    # Padded to the longest prompt, and run to the longest answer, they would be beyond.
    (109, [(100, 10), (10, 100)], 1),
    (200, [(100, 100), (10, 100)], 2),
    (199, [(100, 100), (10, 100)], 1),
])
def test_a_batch_of_several_rows_stays_on_one_side_of_the_rope_switch(rope_switch, sizes, rows):
    scheduler = Scheduler(8192, rope_switch)
    waiting = [row(*size) for size in sizes]
    assert len(scheduler.choose(waiting, 8192)) == rows
    assert len(scheduler.next(waiting, [], NOW)) == rows


@pytest.mark.parametrize(("prompt", "max_tokens"), [(100, 50), (100, 51), (149, 1), (151, 1), (5000, 100)])
def test_a_lone_row_may_be_on_either_side_of_the_rope_switch(prompt, max_tokens):
    lone = row(prompt, max_tokens)
    assert Scheduler(8192, 150).next([lone], [], NOW) == [lone]
    assert len(Scheduler(8192, 150).choose([row(prompt, max_tokens), row(prompt, max_tokens)], 16_384)) == (
        2 if prompt + max_tokens <= 150 else 1)


@pytest.mark.parametrize(("running", "free"), [
    ([], 2000), ([0], 2000), ([1], 1999), ([300, 700], 1000), ([1000, 1000], 0), ([1500, 800], -300)])
def test_what_the_batches_have_not_reserved_of_two_contexts_is_free(running, free):
    assert Scheduler(1000).free_tokens([batch(1, tokens) for tokens in running]) == free
    assert Scheduler(1000, max_contexts=3).free_tokens([batch(1, tokens) for tokens in running]) == free + 1000


def test_ended_rows_are_dropped():
    gone, here = row(waited=9, ended=True), row()
    assert Scheduler(4096).next([gone, here, gone], [], NOW) == [here]
    assert Scheduler(4096).next([gone], [], NOW) == []
    assert Scheduler(4096).next([], [], NOW) == []
    # Nor does one that has gone count as the first, whose patience lets a batch start.
    assert Scheduler(4096).next([gone, here], [batch(16)], NOW) == []


@pytest.mark.parametrize(("earlier", "starts"), [(63, True), (64, False)])
def test_the_64_earliest_rows_are_compared(earlier, starts):
    small = row(5, 5, waited=4)
    waiting = [small, *(row(100, 100, waited=5) for _ in range(earlier))]
    assert Scheduler(1000).next(waiting, [batch(1, 1900)], NOW) == [small] * starts


def test_rows_of_one_call_start_sixteen_by_sixteen():
    scheduler = Scheduler(8192)
    now = NOW
    running = []
    sizes = []
    waiting = [row() for _ in range(40)]
    for place, one in enumerate(waiting):
        one.due = scheduler.due(one, place, now)
    for _ in range(100):  # every eighth of a second, and no batch ends
        rows = scheduler.next(waiting, running, now)
        waiting = [one for one in waiting if one not in rows]
        if rows:
            running.append(Batch(rows, cache_tokens=0))
            sizes.append((len(rows), now - NOW))
        now += 0.125
    assert sizes == [(16, 0), (16, 6), (8, 9)]
