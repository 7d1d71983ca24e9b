"""Turns the tokens of one answer into text, piece by piece, and finds the stop sequences in it.

Knows the tokenizer and the request's stop sequences. Knows nothing of how tokens are chosen or where the text goes.
"""

from tokenizers import Tokenizer


class TextWriter:
    """Decodes an answer token by token. No piece of text ends inside a character or shows part of a stop sequence.

    The answer ends before the stop sequence that is complete first. ``stopped`` is True from then on.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens = []
        # The text of the tokens before _decoded is known. That of the tokens from _context to _decoded came last.
        self._context = 0
        self._decoded = 0
        self._held = ""  # text that is kept back, because a stop sequence may begin with it
        self.stopped = False

    def write(self, token: int) -> str:
        """Add a token. Return the text that no later token can change."""
        self._tokens.append(token)
        return self._release(self._decode(final=False))

    def close(self) -> str:
        """Return the text that was kept back, when the answer has ended."""
        return self._release(self._decode(final=True)) + self._held

    def _decode(self, final):
        """Return the text of the new tokens, or nothing while their last character is incomplete."""
        # Decode the last piece's tokens again with the new ones: some tokenizers write a space only between two tokens.
        before = self._tokenizer.decode(self._tokens[self._context : self._decoded])
        text = self._tokenizer.decode(self._tokens[self._context :])
        incomplete = (
            text.endswith("\ufffd") and not final
        )  # U+FFFD stands for bytes that are no whole character
        if incomplete or len(text) <= len(before):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return text[len(before) :]

    def _release(self, text):
        """Return the text up to a stop sequence, without an end that may begin one."""
        text = self._held + text
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text
        ]
        if found:
            self.stopped = True
            self._held = ""
            # The sequence that ends first is also the first to be complete, however the text is cut into tokens.
            _, start = min(found)
            return text[:start]
        shown = len(text) - self._beginning_length(text)
        self._held = text[shown:]
        return text[:shown]

    def _beginning_length(self, text):
        """Return the length of the longest end of the text with which a stop sequence begins."""
        lengths = [
            size
            for stop in self._stop
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        ]
        return max(lengths, default=0)
