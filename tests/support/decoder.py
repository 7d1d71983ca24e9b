"""A decoder that stands in for the ONNX model: the next token follows from all tokens of a slot.

It has no weights and answers in microseconds. An answer is wrong as soon as a slot holds a token
that is not its row's.
"""

import threading

import numpy as np

VOCABULARY = 97


def next_token(tokens):
    """Return the token that follows, which depends on each token and its place; never an end token."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1_000_003
    return 2 + value % (VOCABULARY - 2)


def answer(prompt, max_tokens):
    """Return the answer that a prompt gets alone."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class StandInDecoder:
    """Has the methods of `serving.chat.decoder.Decoder`, and refuses what the real one would get wrong.

    `hold` stops it before a call, ``reached`` says that it stands there, and `go` lets it go on.
    ``calls`` notes what was done, ``most_held`` the most tokens for which memory was held.
    """

    def __init__(self, config, threads, room):
        self.slots, self.room = 16, room
        self.held, self.tokens = [0] * self.slots, [[] for _ in range(self.slots)]
        self.calls, self.most_held = [], 0
        self.reached, self._open, self._hold_at = threading.Event(), threading.Event(), None

    def read(self, slot, tokens, start):
        self._wait(("read", slot, len(tokens)))
        assert len(tokens) > 1, "one token alone is rounded in another way"
        assert len(self.tokens[slot]) >= start
        self._put(slot, self.tokens[slot][:start] + list(tokens))
        return self._logits(slot)

    def step(self, tokens, lengths):
        self._wait(("step", len(tokens)))
        for slot, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
            assert len(self.tokens[slot]) >= length - 1
            self._put(slot, [*self.tokens[slot][: length - 1], token])
        return np.stack([self._logits(slot) for slot in range(len(tokens))])

    def copy(self, source, target, tokens):
        assert source != target
        assert len(self.tokens[source]) >= tokens
        self._put(target, self.tokens[source][:tokens])

    def swap(self, one, other, one_tokens, other_tokens, trim):
        assert one != other
        longer, kept = max(self.held[one], self.held[other]), self.tokens[one][:one_tokens]
        self.tokens[one], self.tokens[other] = self.tokens[other][:other_tokens], kept
        self.held[one], self.held[other] = (other_tokens, one_tokens) if trim else (longer, longer)
        self.most_held = max(self.most_held, sum(self.held))

    def release(self, slot):
        self.tokens[slot], self.held[slot] = [], 0

    def _put(self, slot, tokens):
        assert len(tokens) <= self.room
        self.tokens[slot] = tokens
        self.held[slot] = max(self.held[slot], len(tokens))
        self.most_held = max(self.most_held, sum(self.held))

    def _logits(self, slot):
        logits = np.zeros(VOCABULARY, np.float32)
        logits[next_token(self.tokens[slot])] = 1
        return logits

    def hold(self, calls=0):
        """Stop after so many more readings and steps."""
        self.reached.clear()
        before, self._open, self._hold_at = self._open, threading.Event(), len(self.calls) + calls
        before.set()

    def go(self):
        self._hold_at = None
        self._open.set()

    def _wait(self, call):
        if self._hold_at is not None and len(self.calls) >= self._hold_at:
            self.reached.set()
            assert self._open.wait(60)
        self.calls.append(call)
