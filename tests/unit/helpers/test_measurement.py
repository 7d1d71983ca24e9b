"""What is read from the times of a model's answers.

Run: python -m helpers test tests/unit/helpers/test_measurement.py
"""

import pytest

from helpers.measurement import read_times


def pairs(firsts, longer):
    return [((1, first), answer) for first, answer in zip(firsts, longer, strict=True)]


@pytest.mark.parametrize(
    ("firsts", "longer", "rate"),
    [
        # The rest of an answer: 31 tokens in 0.31 s, however long the first one took.
        ((0.05, 0.05, 0.05), ((32, 0.36), (32, 0.36), (32, 0.36)), 100),
        ((1.0, 1.1, 1.05), ((32, 1.31), (32, 1.41), (32, 1.36)), 100),
        # One answer that something else held up says nothing.
        ((0.05, 5.0, 0.05), ((32, 0.36), (32, 0.36), (32, 0.36)), 100),
        ((0.05, 0.05, 0.05), ((32, 0.36), (32, 9.0), (32, 0.36)), 100),
        # No second token.
        ((0.05, 0.05, 0.05), ((1, 0.05), (1, 0.06), (1, 0.05)), None),
        ((0.05, 0.05, 0.05), ((0, 0.3), (0, 0.3), (0, 0.3)), None),
        # Two nearly equal times; the second shorter than the first; just the same.
        ((0.05, 0.05, 0.05), ((32, 0.0500000001), (32, 0.0500000001), (32, 0.0500000001)), None),
        ((0.05, 0.05, 0.05), ((32, 0.04), (32, 0.03), (32, 0.04)), None),
        ((0.05, 0.05, 0.05), ((2, 0.05), (2, 0.05), (2, 0.05)), None),
        # The rest is longer than a tenth of the first, and no longer than one first is from the next.
        ((0.01, 0.03, 0.05), ((32, 0.04), (32, 0.04), (32, 0.06)), None),
        ((0.03, 0.03, 0.03), ((4, 0.036), (4, 0.036), (4, 0.036)), 500),
        ((0.0, 0.0, 0.0), ((4, 0.0), (4, 0.0), (4, 0.0)), None),
    ],
)
def test_a_speed_is_told_where_the_rest_of_an_answer_took_long_enough(firsts, longer, rate):
    first, told = read_times(pairs(firsts, longer))
    assert first == sorted(firsts)[1]
    assert told == (rate and pytest.approx(rate))
