"""Chooses the next token of one answer from the model's logits.

Knows the sampling fields of a request (temperature, top_k, top_p, penalties, seed) and, for an
answer in JSON, the matcher of its schema. Knows nothing of the model, of text, or of the other
answers in a batch.
"""

from collections import Counter

import numpy as np
from llguidance import LLMatcher

from .contract import ChatRequest, invalid


class Sampler:
    """Chooses the tokens of one answer: penalties first, then temperature, top_k and top_p.

    An ``og.Generator`` has one set of search options for its whole batch. A batch of ours holds
    answers to different requests, so each answer has its own sampler.

    Parameters
    ----------
    request : ChatRequest
        At temperature 0 the likeliest token wins, whatever top_k and top_p are.
    index : int
        The place of this answer among the request's ``n`` answers. Seed and index together start
        the random numbers, so that the ``n`` answers differ.
    matcher : LLMatcher, optional
        Restricts the answer to JSON that fits a schema.
    """

    def __init__(self, request: ChatRequest, index: int, matcher: LLMatcher | None = None):
        self._request = request
        self._matcher = matcher
        self._random = np.random.default_rng(
            None if request.seed is None else [request.seed, index]
        )
        self._counts = Counter()  # how often the answer has each token

    @property
    def complete(self) -> bool:
        """Whether the schema allows no further token."""
        return bool(self._matcher and self._matcher.is_stopped())

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token.

        Parameters
        ----------
        logits : numpy.ndarray
            The model's output for the next token, of shape (vocabulary,). It is not changed.

        Raises
        ------
        Refusal
            The answer has reached llguidance's limits for this schema.
        """
        logits = logits.astype(np.float64)  # a copy, which the steps below change
        self._subtract_penalties(logits)
        if self._matcher is None:
            token = self._pick(logits)
        else:
            self._exclude_tokens(logits)
            token = self._pick(logits)
            # After an error, the matcher still allows and consumes the end token.
            if self._matcher.is_error() or not self._matcher.consume_token(token):
                raise invalid(
                    "response_format.json_schema.schema",
                    "simpler: it grew too much for this answer",
                )
        self._counts[token] += 1
        return token

    def _subtract_penalties(self, logits):
        request = self._request
        if self._counts and (request.frequency_penalty or request.presence_penalty):
            tokens = np.fromiter(self._counts, dtype=np.int64)
            counts = np.fromiter(self._counts.values(), dtype=np.float64)
            logits[tokens] -= request.frequency_penalty * counts + request.presence_penalty

    def _exclude_tokens(self, logits):
        """Set the logits of tokens that the schema does not allow to minus infinity."""
        bitmask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bitmask, bitorder="little")[: len(logits)]
        logits[allowed == 0] = -np.inf

    def _pick(self, logits):
        request = self._request
        if request.temperature == 0:
            return int(logits.argmax())
        # Subtract the maximum first: the division by a temperature near 0 can then overflow to
        # minus infinity only. Work in place, because new arrays would take as long as the rest.
        logits -= logits.max()
        with np.errstate(over="ignore"):
            logits /= request.temperature
        if request.top_k is None or request.top_k >= len(logits):
            return self._draw(np.exp(logits, out=logits))
        # The exponentials take most of the time, so compute only those that top_k may keep.
        least = np.partition(logits, -request.top_k)[-request.top_k]
        candidates = np.flatnonzero(logits >= least)
        return int(candidates[self._draw(np.exp(logits[candidates]))])

    def _draw(self, weights):
        request = self._request
        if request.top_k or request.top_p < 1:
            _keep_likeliest(weights, request.top_k or len(weights), request.top_p)
        sums = weights.cumsum()
        return int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))


def _keep_likeliest(weights, top_k, top_p):
    """Keep the ``top_k`` largest weights, and of these the fewest that make up ``top_p``.

    The others are set to 0.
    """
    ordered = np.sort(weights)[::-1][:top_k]
    sums = ordered.cumsum()
    count = min(int(np.searchsorted(sums, top_p * sums[-1])) + 1, len(ordered))
    least = ordered[count - 1]
    # Several tokens may have the least weight. Keep the first ones, as many as the count allows.
    ties = count - np.count_nonzero(weights > least)
    weights[weights < least] = 0
    weights[np.flatnonzero(weights == least)[ties:]] = 0
