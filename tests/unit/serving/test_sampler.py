"""The next token for given logits. No model.

Run: python -m helpers test tests/unit/serving/test_sampler.py
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat import user

from serving.chat.contract import ChatRequest, Refusal
from serving.chat.sampler import Sampler, _keep_likeliest

FIVE = [0.4, 0.3, 0.2, 0.08, 0.02]  # probabilities


class Matcher:
    """Stands in for ``LLMatcher``: allows these tokens at each step, and keeps those it got."""

    def __init__(self, *allowed, size=16):
        self.allowed = allowed
        self.size = size
        self.taken = []

    def compute_bitmask(self):
        mask = bytearray(self.size // 8)
        for token in self.allowed[len(self.taken)]:
            mask[token // 8] |= 1 << token % 8
        return bytes(mask)

    def consume_token(self, token):
        self.taken.append(token)
        return token in self.allowed[len(self.taken) - 1]

    def is_error(self):
        return False

    def is_stopped(self):
        return len(self.taken) == len(self.allowed)


def sampler(index=0, **fields):
    return Sampler(ChatRequest(messages=user("x"), **fields), index)


def draw(count, logits, **fields):
    one = sampler(**fields)
    return [one.choose(np.array(logits, dtype=np.float32)) for _ in range(count)]


def kept(weights, top_k, top_p):
    weights = np.array(weights, dtype=np.float64)
    _keep_likeliest(weights, top_k, top_p)
    return weights.tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (5, 1.0, FIVE),
        (3, 1.0, [0.4, 0.3, 0.2, 0, 0]),
        (1, 1.0, [0.4, 0, 0, 0, 0]),
        (600, 1.0, FIVE),
        (5, 0.39, [0.4, 0, 0, 0, 0]),
        (5, 0.41, [0.4, 0.3, 0, 0, 0]),
        (5, 0.71, [0.4, 0.3, 0.2, 0, 0]),
        (5, 0.99, FIVE),
        (5, 1e-9, [0.4, 0, 0, 0, 0]),
        # top_p is a share of what top_k leaves: of 0.7, not of 1.
        (2, 0.5, [0.4, 0, 0, 0, 0]),
        (2, 0.56, [0.4, 0, 0, 0, 0]),
        (2, 0.58, [0.4, 0.3, 0, 0, 0]),
        (3, 0.77, [0.4, 0.3, 0, 0, 0]),
        (3, 0.78, [0.4, 0.3, 0.2, 0, 0]),
    ],
)
def test_top_k_and_then_top_p_leave_the_fewest_likeliest_tokens(top_k, top_p, expected):
    assert kept(FIVE, top_k, top_p) == expected
    assert kept(FIVE[::-1], top_k, top_p) == expected[::-1]


@pytest.mark.parametrize(
    ("weights", "top_k", "top_p", "expected"),
    [
        ([1, 1, 1, 1], 2, 1.0, [1, 1, 0, 0]),
        ([1, 2, 1, 2, 1], 3, 1.0, [1, 2, 0, 2, 0]),
        ([1, 1, 1, 1], 4, 0.5, [1, 1, 0, 0]),  # two make up exactly a half
        ([1, 1, 1, 1], 4, 0.51, [1, 1, 1, 0]),
        ([3, 1], 2, 0.75, [3, 0]),
        ([0, 0, 5], 3, 1.0, [0, 0, 5]),
        ([1, 1, 1, 1], 3, 1.0, [1, 1, 1, 0]),
        ([2, 1, 1, 1, 1, 2], 4, 1.0, [2, 1, 1, 0, 0, 2]),
    ],
)
def test_of_equal_tokens_the_first_are_kept(weights, top_k, top_p, expected):
    assert kept(weights, top_k, top_p) == expected


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=600), st.integers(1, 700), st.floats(0.01, 1)
)
@settings(max_examples=60)
def test_what_is_kept_is_the_fewest_of_the_likeliest_for_any_logits(logits, top_k, top_p):
    logits = np.array(logits, dtype=np.float32)
    weights = np.exp(logits.astype(np.float64) - logits.max())
    left = weights.copy()
    _keep_likeliest(left, top_k, top_p)
    count = np.count_nonzero(left)
    likeliest = np.sort(weights)[::-1]
    whole = likeliest[:top_k].sum()
    assert count <= top_k
    assert np.array_equal(np.sort(left)[::-1][:count], likeliest[:count])
    assert likeliest[:count].sum() >= top_p * whole * (1 - 1e-9)
    assert count == 1 or likeliest[: count - 1].sum() < top_p * whole * (1 + 1e-9)
    drawn = {
        sampler(temperature=1.0, top_k=top_k, top_p=top_p, seed=seed).choose(logits)
        for seed in range(5)
    }
    assert all(left[token] for token in drawn)


def test_of_equal_tokens_top_k_draws_the_first():
    logits = np.zeros(50, dtype=np.float32)
    assert {sampler(temperature=1.0, top_k=3, seed=seed).choose(logits) for seed in range(60)} == {
        0,
        1,
        2,
    }


@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({"temperature": 1.0}, FIVE),
        ({"temperature": 1.0, "top_k": 5}, FIVE),
        ({"temperature": 0.5}, [share**2 for share in FIVE]),
        ({"temperature": 2.0, "top_k": 3}, [math.sqrt(share) for share in FIVE[:3]]),
        ({"temperature": 1.0, "top_p": 0.7}, FIVE[:2]),  # 0.4 and 0.3 make up 0.7
        ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, FIVE[:1]),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_a_token_is_drawn_by_the_number_that_seed_and_index_give(fields, weights, index):
    # Any other use of the random numbers would change the answer to every seed.
    numbers = np.random.default_rng([7, index])
    sums = np.cumsum(weights)
    expected = [
        int(np.searchsorted(sums, numbers.random() * sums[-1], side="right")) for _ in range(50)
    ]
    request = ChatRequest(messages=user("x"), seed=7, **fields)
    for matcher in (
        None,
        Matcher(*[range(5)] * 50),
    ):  # a schema that allows all tokens changes nothing
        one = Sampler(request, index, matcher)
        assert [one.choose(np.log(np.array(FIVE))) for _ in range(50)] == expected


def test_a_draw_of_0_takes_no_token_that_is_left_out():
    one = sampler(temperature=1.0, top_p=0.9)
    one._random = SimpleNamespace(random=lambda: 0.0)
    assert one.choose(np.array([-5.0, 3.0, 2.0])) == 1


def test_a_seed_repeats_an_answer_and_each_of_n_answers_has_its_own():
    flat = np.zeros(1000)
    assert draw(20, flat, temperature=1.0, seed=1) == draw(20, flat, temperature=1.0, seed=1)
    seeds = [
        {"seed": 1},
        {"seed": 2},
        {"seed": 0},
        {},
        {},
        {"seed": 1, "index": 1},
        {"seed": 2, "index": 1},
    ]
    assert len({tuple(draw(20, flat, temperature=1.0, **fields)) for fields in seeds}) == len(seeds)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0.0, "top_k": 2, "top_p": 0.5, "seed": 1},
        {"temperature": 1e-9},
        {"temperature": 1e-300},
        {"temperature": 5e-324, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_likeliest_token_wins_at_a_temperature_near_0_and_where_no_other_is_left(fields):
    assert draw(5, [-3e38, 1.0, 3e38, 2.0, -math.inf], **fields) == [2] * 5


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        # 0: 1.0, then 0.5, 0.0 ...; 1: 0.9, then 0.4 ...; 2: 0.0
        ({"frequency_penalty": 0.5}, [0, 1, 0, 1, 0]),
        ({"frequency_penalty": 0.25}, [0, 1, 0, 1, 0, 1, 0, 1, 0, 2, 1]),
        # A presence counts once: after 0, 1 and 2 have come, their order is the old one, for good.
        ({"presence_penalty": 1.5}, [0, 1, 2, 0, 0, 0, 0]),
        ({"presence_penalty": 0.95}, [0, 1, 0, 0, 0]),
        ({"presence_penalty": -2.0}, [0, 0, 0]),
        ({"frequency_penalty": -2.0}, [0, 0, 0]),
        # Both together: 0 falls to -0.5, 1 to -0.6; the next time, each by 0.5 more.
        ({"frequency_penalty": 0.5, "presence_penalty": 1.0}, [0, 1, 2, 0, 1, 0, 1]),
        ({"frequency_penalty": 1.0, "presence_penalty": -1.0}, [0, 0, 1, 1, 0]),
    ],
)
def test_penalties_count_the_tokens_of_the_answer(fields, tokens):
    assert draw(len(tokens), [1.0, 0.9, 0.0, -5.0], temperature=0, **fields) == tokens


def test_a_penalty_acts_on_draws_too_and_before_top_k():
    one = sampler(temperature=1.0, top_k=1, presence_penalty=2.0, seed=1)
    assert [one.choose(np.array([2.0, 1.0, 0.5])) for _ in range(4)] == [0, 1, 2, 0]
    assert not one.complete  # without a schema, an answer can always go on
    logits = np.array([2.0, 1.0], dtype=np.float32)
    sampler(temperature=1.0, presence_penalty=2.0, seed=1).choose(logits)
    assert logits.tolist() == [2.0, 1.0]  # the caller's numbers stay


# --- bound to a schema ------------------------------------------------------------------------


def bound(matcher, **fields):
    return Sampler(ChatRequest(messages=user("x"), **fields), 0, matcher)


@pytest.mark.parametrize(
    ("allowed", "token"),
    [
        ([0, 1, 2], 2),
        ([0, 1], 1),
        ([0], 0),
        ([8], 8),
        ([7, 8], 8),
        ([9], 9),
        ([0, 9], 9),
        ([2, 3], 2),
    ],
)
def test_of_an_answer_bound_to_a_schema_the_likeliest_token_that_fits_wins(allowed, token):
    logits = np.array(
        [1.0, 2, 5, 4, 0, 9, 9, 3, 6, 7], dtype=np.float32
    )  # 5 and 6 are the likeliest, and never fit
    matcher = Matcher(allowed)
    one = bound(matcher, temperature=0)
    assert not one.complete
    assert one.choose(logits) == token
    assert matcher.taken == [token]
    assert one.complete
    assert logits[5] == 9  # the caller's numbers stay


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.0},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.01},
        {"temperature": 0, "frequency_penalty": 2.0, "presence_penalty": 2.0},
    ],
)
@pytest.mark.filterwarnings("error")
def test_no_draw_and_no_penalty_takes_a_token_that_does_not_fit(fields):
    steps = [[1, 3], [3], [1, 3, 12], [12], [0, 1, 3]] * 20
    matcher = Matcher(*steps)
    one = bound(matcher, seed=4, **fields)
    tokens = [one.choose(np.linspace(0, 30, 13)[::-1]) for _ in steps]
    assert matcher.taken == tokens
    assert all(token in allowed for token, allowed in zip(tokens, steps, strict=True))


def test_top_k_counts_the_tokens_that_fit():
    logits = np.array([9.0, 8, 2, 1, 0, 0], dtype=np.float32)
    drawn = {
        bound(Matcher([2, 3, 4]), temperature=2.0, top_k=2, seed=seed).choose(logits)
        for seed in range(60)
    }
    assert drawn == {2, 3}


@pytest.mark.parametrize(("error", "consumed"), [(True, True), (True, False), (False, False)])
def test_a_schema_that_grows_too_much_for_an_answer_is_refused(error, consumed):
    # After an error, llguidance still consumes the end token.
    matcher = Matcher([1])
    matcher.is_error = lambda: error
    matcher.consume_token = lambda token: consumed
    with pytest.raises(Refusal) as refusal:
        bound(matcher, temperature=0).choose(np.zeros(4))
    assert refusal.value.message == (
        "response_format.json_schema.schema has to be simpler: it grew too much for this answer."
    )
    assert refusal.value.code == "invalid_value"
