"""Turns the tokens of one answer into text, piece by piece, and finds the stop sequences in it.

Knows the tokenizer and the request's stop sequences. Knows nothing of how tokens are chosen, or
where the text goes.
"""

from tokenizers import Tokenizer


class TextWriter:
    """Decodes an answer token by token.

    No piece of text ends inside a character, and none shows any part of a stop sequence. The answer
    ends before the stop sequence that is complete first; ``stopped`` is True from then on.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str]):
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens = []
        # The tokens up to _decoded are text already, those from _context to _decoded most recently.
        self._context = 0
        self._decoded = 0
        self._held = ""  # text that is kept back, because a stop sequence may begin with it
        self.stopped = False

    def write(self, token: int) -> str:
        """Add a token. Return the text that no later token can change."""
        self._tokens.append(token)
        return self._release(self._decode(final=False))

    def close(self) -> str:
        """Return the text that was kept back, at the end of the answer."""
        return self._release(self._decode(final=True)) + self._held

    def _decode(self, final):
        """Return the text of the new tokens, nothing while their last character is incomplete."""
        # Decode the latest tokens once more before the new ones, because some tokenizers write a
        # space only between two tokens.
        before = self._tokenizer.decode(self._tokens[self._context : self._decoded])
        text = self._tokenizer.decode(self._tokens[self._context :])
        incomplete = text.endswith("\ufffd") and not final  # how tokenizers show incomplete bytes
        if incomplete or len(text) <= len(before):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return text[len(before) :]

    def _release(self, text):
        """Add new text to what was kept back. Return what can be shown of both."""
        text = self._held + text
        places = [(text.find(stop), stop) for stop in self._stop]
        found = [(start + len(stop), start) for start, stop in places if start >= 0]
        if found:
            # The sequence that ends first is complete first, however the text is cut into tokens.
            _, start = min(found)
            self.stopped = True
            self._held = ""
            return text[:start]
        shown = len(text) - self._count_held(text)
        self._held = text[shown:]
        return text[:shown]

    def _count_held(self, text):
        """Count the characters at the end of the text with which a stop sequence begins."""
        counts = [
            count
            for stop in self._stop
            for count in range(1, len(stop))
            if text.endswith(stop[:count])
        ]
        return max(counts, default=0)
