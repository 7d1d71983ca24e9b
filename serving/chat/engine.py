"""Runs the answers of many callers together, on one thread: continuous batching.

Each round of the loop reads a part of the next prompts, then makes one step, in which every running
answer gets its next token. An answer begins as soon as its prompt is read and leaves when it ends.
None waits for another, unless all slots or the cache's memory are taken; then answers wait in the
order in which they came.

When an answer has ended, its prompt stays in its slot until another answer needs the slot. A new
prompt that begins like the prompt in any slot copies that part instead of reading it. So the next
turn of a conversation reads only what is new, and a system prompt that many share is read once.

This file knows rows of tokens. It does not know messages or requests: `model` makes rows of them.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

import joblib
import psutil
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_STATE, RESOURCE_EXHAUSTED

from .contract import Refusal
from .decoder import Decoder
from .folder import Config
from .sampler import Sampler
from .text import TextWriter

# Tokens of prompts that are read between two steps. That takes about as long as four steps.
PIECE = 64
LEAST_SHARED = 8  # Reading fewer tokens takes no longer than copying them.

_logger = logging.getLogger("chat_model")


class Row:
    """One answer, from its prompt to its end.

    Parameters
    ----------
    prompt
        The tokens of the prompt.
    max_tokens
        The most tokens that the answer may have.
    writer
        Turns the answer's tokens into text.
    sampler
        Chooses the tokens; None takes the likeliest.
    events
        Gets ``(row, text)`` for each token of a stream, and ``(row, None)`` at the end.
    stream
        Whether somebody reads the text as it comes.
    """

    def __init__(
        self,
        prompt: list[int],
        max_tokens: int,
        writer: TextWriter,
        sampler: Sampler | None,
        events: queue.SimpleQueue,
        stream: bool,
    ):
        self.prompt, self.max_tokens, self.writer, self.sampler = (
            prompt,
            max_tokens,
            writer,
            sampler,
        )
        self.events, self.stream = events, stream
        self.text, self.tokens, self.last_token = "", 0, None
        self.reused_tokens = 0  # of the prompt, copied from another slot
        self.finish_reason, self.error, self.ended = None, None, False
        self.times = {"submitted": time.time_ns()}  # nanoseconds since 1970

    def take(self, token: int, end_tokens: Collection[int]) -> None:
        """Add the next token, and end the answer where the token ends it."""
        if token in end_tokens:
            self._finish("stop")
            return
        if not self.tokens:
            self.times["first"] = time.time_ns()
        self.tokens, self.last_token = self.tokens + 1, token
        self._write(self.writer.write(token))
        if self.sampler and self.sampler.complete:
            self._finish("stop")
        elif self.writer.stopped or self.tokens == self.max_tokens:
            self._finish("length")

    def _write(self, text):
        self.text += text
        if self.stream:
            self.events.put((self, text))

    def _finish(self, reason):
        if not self.writer.stopped:
            self._write(self.writer.close())  # which may complete a stop string
        self.finish_reason = "stop" if self.writer.stopped else reason
        self.end()

    def end(self, error: MlflowException | None = None) -> None:
        """End the row: its answer is whole, its caller went away, or it failed with an error."""
        if not self.ended:
            self.error, self.ended, self.times["ended"] = error, True, time.time_ns()
            self.events.put((self, None))


@dataclass(eq=False)
class Slot:
    """What a slot of the cache holds.

    Attributes
    ----------
    row
        The answer that has the slot; None when it has ended.
    prompt
        The tokens of a prompt that are in the slot. Behind them is the answer, which is never
        shared: a step rounds in another way than reading does, and the same prompt has to get the
        same answer wherever it is asked.
    last_used
        The number of the last row that had the slot.
    """

    row: Row | None = None
    prompt: list[int] = field(default_factory=list)
    last_used: int = 0

    @property
    def tokens(self) -> int:
        """The tokens in the slot that are needed. The next step adds an answer's last token."""
        answer = self.row.tokens - 1 if self.row and self.row.tokens and not self.row.ended else 0
        return len(self.prompt) + answer


def count_shared(one: list[int], other: list[int]) -> int:
    """Count the tokens with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next(
        (place for place, (left, right) in pairs if left != right), min(len(one), len(other))
    )


def end_piece(start: int, stop: int, size: int) -> int:
    """Return where the next piece of a prompt ends.

    It leaves no single token for the last piece; see `Decoder.read`.
    """
    end = min(start + size, stop)
    return end - 1 if stop - end == 1 else end


class Engine:
    """Answers rows for callers on any thread, on a thread of its own that ends with ``close``.

    Parameters
    ----------
    config
        What the model's folder says of it.
    max_waiting
        The most rows that may wait.
    threads
        Threads that compute; None takes one for each core.
    cache_tokens
        The most tokens in the cache, of all slots together; None takes twice the model's context
        length.
    """

    def __init__(
        self,
        config: Config,
        max_waiting: int,
        threads: int | None = None,
        cache_tokens: int | None = None,
    ):
        self._end_tokens, self._max_waiting = config.end_tokens, max_waiting
        self._cache_tokens = cache_tokens or 2 * config.context_length
        self.context_length = min(config.context_length, self._cache_tokens)
        self._decoder = Decoder(config, threads or count_cores(), self.context_length)
        # The attention takes twice its head size of tokens at a time, and of a longer piece one
        # could be left alone.
        self._piece = min(PIECE, 2 * config.head_size)
        self._waiting, self._changed, self._closed = deque(), threading.Condition(), False
        # The running answers have the first slots, because a step takes a range of slots.
        self._slots = [Slot() for _ in range(self._decoder.slots)]
        self._running = 0  # the number of answers that are being written
        self._reading = None  # the place of the slot whose prompt is being read
        self._rows_begun = 0
        self._done = dict.fromkeys(
            ("answers", "prompt_tokens", "reused_prompt_tokens", "completion_tokens"), 0
        )
        self._since = time.time()
        self._thread = threading.Thread(target=self._run, name="chat-model-engine", daemon=True)
        self._thread.start()

    def submit(self, rows: list[Row]) -> None:
        """Queue all of ``rows``, or none: then a Refusal says why."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise _closed("This model is closed. Load it again.")
            self._waiting = deque(row for row in self._waiting if not row.ended)
            if len(self._waiting) + len(rows) > self._max_waiting:
                raise Refusal(
                    f"The model is busy: {len(self._waiting)} answers wait, and "
                    f"{self._max_waiting} may. Try again later.",
                    "busy",
                    error_code=RESOURCE_EXHAUSTED,
                )
            self._waiting += rows
            self._changed.notify()

    def close(self) -> None:
        """End the thread, and each answer with an error. A closed engine stays closed."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def stats(self) -> dict:
        """Return what waits, runs and is kept now, and what was done since the model was loaded."""
        with self._changed:
            waiting = sum(not row.ended for row in self._waiting)
            rows = [slot.row for slot in self._slots if slot.row]
            kept = sum(bool(slot.prompt) and not slot.row for slot in self._slots)
            done = {
                name: count + sum(_count(row)[name] for row in rows)
                for name, count in self._done.items()
            }
            held = self._count_held(range(len(self._slots)))
        return (
            {
                "since": self._since,
                "waiting": waiting,
                "running": sum(not row.ended for row in rows),
            }
            | done
            | {"cache_tokens": held, "kept_conversations": kept}
        )

    def _run(self):
        try:
            while self._wait_for_work():
                self._remove_ended()
                self._read_prompts()
                self._step()
        except Exception:
            _logger.exception("The engine ended.")
        with self._changed:
            self._closed = True
            left = [*self._waiting, *(slot.row for slot in self._slots if slot.row)]
            self._waiting = deque()
        for row in left:
            row.end(_closed())
        self._remove_ended()
        with self._changed:
            self._slots, self._decoder = [], None  # frees the model and its cache

    def _wait_for_work(self):
        """Wait until there is a row to work on. Return False when the engine is closed."""
        with self._changed:
            while not (self._waiting or self._running or self._reading is not None or self._closed):
                self._changed.wait()
            return not self._closed

    def _remove_ended(self):
        """Take ended answers out of their slots. The last running answer fills the gap."""
        for place in reversed(range(self._running)):
            if self._slots[place].row.ended:
                self._swap(place, self._running - 1)
                self._running -= 1
                self._empty(self._running)
        if self._reading is not None and self._slots[self._reading].row.ended:
            self._empty(self._reading)
            self._reading = None

    def _empty(self, place):
        slot = self._slots[place]
        with self._changed:
            for name, count in _count(slot.row).items():
                self._done[name] += count
            slot.row = None

    def _swap(self, one, other):
        if one != other:
            slots, held = self._slots, self._decoder.held
            more_held = self._count_held(range(len(slots))) + abs(held[one] - held[other])
            self._decoder.swap(
                one,
                other,
                slots[one].tokens,
                slots[other].tokens,
                trim=more_held > self._cache_tokens,
            )
            slots[one], slots[other] = slots[other], slots[one]

    def _read_prompts(self):
        """Read as many tokens of prompts as one piece has, row after row."""
        read = 0
        while self._reading is not None or self._begin_next():
            slot = self._slots[self._reading]
            start = len(slot.prompt)
            end = end_piece(start, len(slot.row.prompt), self._piece)
            if read and read + end - start > self._piece:
                break
            read += end - start
            self._read(slot, start, end)

    def _read(self, slot, start, end):
        """Read a piece of a slot's prompt. Behind its last piece the answer begins."""
        row = slot.row
        try:
            logits = self._decoder.read(self._reading, row.prompt[start:end], start)
        except Exception:
            self._fail([row])
            self._empty(self._reading)
            self._reading = None
            return
        slot.prompt = row.prompt[:end]
        if end == len(row.prompt):
            self._take(row, logits)
            self._swap(self._reading, self._running)
            self._reading, self._running = None, self._running + 1

    def _step(self):
        """Give each running answer its next token."""
        rows = [slot.row for slot in self._slots[: self._running]]
        if not rows or all(row.ended for row in rows):
            return
        try:
            logits = self._decoder.step(
                [row.last_token for row in rows], [len(row.prompt) + row.tokens for row in rows]
            )
        except Exception:
            self._fail(rows)
            return
        for row, row_logits in zip(rows, logits, strict=True):
            if not row.ended:
                self._take(row, row_logits)

    def _take(self, row, logits):
        """Choose a row's next token by its logits."""
        try:
            token = row.sampler.choose(logits) if row.sampler else int(logits.argmax())
            row.take(token, self._end_tokens)
        except Refusal as refusal:
            row.end(refusal)
        except Exception:
            self._fail([row])

    def _fail(self, rows):
        """Log the exception that is being handled, and end rows with an error."""
        _logger.exception("%d answers failed.", len(rows))
        for row in rows:
            row.end(
                Refusal("The engine failed on this request.", "failed", error_code=INTERNAL_ERROR)
            )

    def _begin_next(self):
        """Give the first waiting row a slot. Return whether there was a row, a slot and memory."""
        with self._changed:
            while self._waiting and self._waiting[0].ended:
                self._waiting.popleft()
            row = self._waiting[0] if self._waiting else None
        if row is None or self._running == len(self._slots) or not self._free_memory(row):
            return False
        target, source, shared = self._choose_slot(row)
        if source != target:
            self._decoder.copy(source, target, shared)
        row.reused_tokens, row.times["started"] = shared, time.time_ns()
        with self._changed:
            self._waiting.popleft()
            self._rows_begun += 1
            self._slots[source].last_used = self._rows_begun
            self._slots[target] = Slot(row, row.prompt[:shared], self._rows_begun)
        self._reading = target
        return True

    def _unused(self):
        """Return the places of the slots without an answer, the least recently used first."""
        return sorted(
            range(self._running, len(self._slots)), key=lambda place: self._slots[place].last_used
        )

    def _free_memory(self, row):
        """Free memory of kept prompts for a row. Return False if running answers need too much."""
        needed = len(row.prompt) + row.max_tokens
        if self._count_held(range(self._running)) + needed > self._cache_tokens:
            return False
        for place in self._unused():
            if self._count_held(range(len(self._slots))) + needed <= self._cache_tokens:
                break
            self._decoder.release(place)
            self._slots[place] = Slot()
        return True

    def _count_held(self, places):
        """Count the tokens for which slots hold memory or have promised it to their answers."""
        rows = {place: self._slots[place].row for place in places}
        return sum(
            max(self._decoder.held[place], len(row.prompt) + row.max_tokens if row else 0)
            for place, row in rows.items()
        )

    def _choose_slot(self, row):
        """Choose a slot for a row, and a slot whose prompt begins in the same way.

        Returns
        -------
        tuple[int, int, int]
            The place of the row's slot, the place of the other, which may be the same, and how many
            tokens they share.
        """
        # Two tokens are left to read: the last one's logits are needed, and one alone would be
        # rounded in another way.
        counts = [
            min(count_shared(slot.prompt, row.prompt), len(row.prompt) - 2) for slot in self._slots
        ]
        source = max(range(len(counts)), key=counts.__getitem__)
        oldest, *others = self._unused()
        if counts[source] < LEAST_SHARED:
            return oldest, oldest, 0
        if source >= self._running and counts[source] >= len(self._slots[source].prompt) - 2:
            return source, source, counts[source]  # it goes on with the conversation that is there
        return others[0] if source == oldest and others else oldest, source, counts[source]


def count_cores() -> int:
    """Count the cores that this process may use: its affinity and its container's quota count."""
    cores = joblib.cpu_count()
    return min(
        cores, psutil.cpu_count(logical=False) or cores
    )  # some boards and containers report no physical cores


def _count(row):
    return {
        "answers": int(row.ended),
        "prompt_tokens": len(row.prompt),
        "reused_prompt_tokens": row.reused_tokens,
        "completion_tokens": row.tokens,
    }


def _closed(sentence="The model was closed before it had answered."):
    return Refusal(sentence, "closed", error_code=INVALID_STATE)
