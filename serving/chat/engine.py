"""Runs the answers of many callers together, on one thread: continuous batching.

Each round of the loop reads some tokens of the next prompts, then makes one step, in which every
running answer gets its next token. An answer begins as soon as its prompt is read and leaves when
it ends. Prompts are read in the order in which they came. They wait while all slots are taken, or
while the cache has no memory for them.

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

# The most prompt tokens that are read in a round. They take about as long as four steps.
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
        Gets ``(row, text)`` for each piece of a stream, and ``(row, None)`` at the end.
    stream
        Whether somebody reads the text as it comes.
    cache_key
        Rows share prompts only with rows of the same key.
    """

    def __init__(
        self,
        prompt: list[int],
        max_tokens: int,
        writer: TextWriter,
        sampler: Sampler | None,
        events: queue.SimpleQueue,
        stream: bool,
        cache_key: str | None = None,
    ):
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.writer = writer
        self.sampler = sampler
        self.events = events
        self.stream = stream
        self.cache_key = cache_key
        self.text = ""
        self.token_count = 0
        self.last_token = None
        self.reused_tokens = 0  # of the prompt, which did not have to be read
        self.finish_reason = None
        self.error = None
        self.ended = False
        self.times = {"submitted": time.time_ns()}  # nanoseconds since 1970

    def take(self, token: int, end_tokens: Collection[int]) -> None:
        """Add the next token, and end the answer where the token ends it."""
        if token in end_tokens:
            self._finish("stop")
            return
        if not self.token_count:
            self.times["first"] = time.time_ns()
        self.token_count += 1
        self.last_token = token
        self._write(self.writer.write(token))
        if self.sampler and self.sampler.complete:
            self._finish("stop")
        elif self.writer.stopped or self.token_count == self.max_tokens:
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
        """End the row: it is complete, cancelled by its caller, or failed with an error."""
        if not self.ended:
            self.times["ended"] = time.time_ns()
            self.error = error
            self.ended = True
            self.events.put((self, None))


@dataclass(eq=False)
class Slot:
    """What a slot of the cache holds.

    Attributes
    ----------
    row
        The answer that has the slot, or None.
    prompt
        The tokens of a prompt that have been read into the slot. The answer follows them and is
        never shared: the values that a step computes differ slightly from those of reading, and
        the same prompt has to get the same answer.
    cache_key
        The key of the row that the prompt is from.
    last_used
        A number that is higher for the slot that was used later.
    """

    row: Row | None = None
    prompt: list[int] = field(default_factory=list)
    cache_key: str | None = None
    last_used: int = 0

    @property
    def length(self) -> int:
        """The number of tokens in the slot. An answer's newest token is not in it yet."""
        is_writing = self.row and self.row.token_count and not self.row.ended
        return len(self.prompt) + (self.row.token_count - 1 if is_writing else 0)


def count_shared(one: list[int], other: list[int]) -> int:
    """Count the tokens with which both begin."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def end_piece(start: int, stop: int, size: int) -> int:
    """Return where the next piece of a prompt ends.

    It leaves no single token for the last piece; see `Decoder.read`.
    """
    end = min(start + size, stop)
    return end - 1 if stop - end == 1 else end


class Engine:
    """Runs all rows on its own thread, until `close`. Any thread may submit rows.

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
        self._end_tokens = config.end_tokens
        self._max_waiting = max_waiting
        self._cache_tokens = cache_tokens or 2 * config.context_length
        self.context_length = min(config.context_length, self._cache_tokens)
        self._decoder = Decoder(config, threads or count_cores(), self.context_length)
        # Attention works in blocks of twice the head size. A longer piece could leave a block of
        # one token, which would be rounded differently.
        self._piece = min(PIECE, 2 * config.head_size)
        self._waiting = deque()
        self._condition = threading.Condition()
        self._closed = False
        # The running answers have the first slots, because a step takes a range of slots.
        self._slots = [Slot() for _ in range(self._decoder.slots)]
        self._running_count = 0  # the number of answers that are being written
        self._reading_index = None  # the index of the slot whose prompt is being read
        self._uses = 0  # counts the uses of all slots, and so orders them
        self._done = dict.fromkeys(
            ("answers", "prompt_tokens", "reused_prompt_tokens", "completion_tokens"), 0
        )
        self._since = time.time()
        self._thread = threading.Thread(target=self._run, name="chat-model-engine", daemon=True)
        self._thread.start()

    def submit(self, rows: list[Row]) -> None:
        """Queue all of ``rows``, or none: then a Refusal says why."""
        with self._condition:
            if self._closed or not self._thread.is_alive():
                raise _closed_error("This model is closed. Load it again.")
            # Only the engine's thread takes rows out of the queue, cancelled ones too.
            waiting = sum(not row.ended for row in self._waiting)
            if waiting + len(rows) > self._max_waiting:
                raise Refusal(
                    f"The model is busy: {waiting} answers wait, and {self._max_waiting} may. "
                    "Try again later.",
                    "busy",
                    error_code=RESOURCE_EXHAUSTED,
                )
            self._waiting += rows
            self._condition.notify()

    def stop(self) -> None:
        """Ask the thread to end. Answers get an error, and a closed engine stays closed."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def close(self) -> None:
        """Do what `stop` does, and wait until the thread has ended and its memory is free."""
        self.stop()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def stats(self) -> dict:
        """Return counts of answers and tokens, now and since the model was loaded."""
        with self._condition:
            waiting = sum(not row.ended for row in self._waiting)
            rows = [slot.row for slot in self._slots if slot.row]
            kept = sum(bool(slot.prompt) and not slot.row for slot in self._slots)
            done = {
                name: count + sum(_count(row)[name] for row in rows)
                for name, count in self._done.items()
            }
            held = self._count_claimed(range(len(self._slots)))
        running = sum(not row.ended for row in rows)
        now = {
            "since": self._since,
            "closed": self._closed,
            "waiting": waiting,
            "running": running,
        }
        return now | done | {"cache_tokens": held, "kept_conversations": kept}

    def _run(self):
        try:
            while self._wait_for_work():
                self._remove_ended()
                self._read_prompts()
                self._step()
        except Exception:
            _logger.exception("The engine ended.")
        with self._condition:
            self._closed = True
            left = [*self._waiting, *(slot.row for slot in self._slots if slot.row)]
            self._waiting = deque()
        for row in left:
            row.end(_closed_error())
        for index, slot in enumerate(self._slots):
            if slot.row:
                self._detach_row(index)
        with self._condition:
            self._slots = []
            self._decoder = None  # frees the model and its cache

    def _wait_for_work(self):
        """Wait until there is a row to work on. Return False when the engine is closed."""
        with self._condition:
            while not (self._closed or self._waiting or any(slot.row for slot in self._slots)):
                self._condition.wait()
            return not self._closed

    def _remove_ended(self):
        """Take ended answers out of their slots. The last running answer fills the gap."""
        for index in reversed(range(self._running_count)):
            if self._slots[index].row.ended:
                self._swap(index, self._running_count - 1)
                self._running_count -= 1
                self._detach_row(self._running_count)
        if self._reading_index is not None and self._slots[self._reading_index].row.ended:
            self._detach_row(self._reading_index)
            self._reading_index = None

    def _detach_row(self, index):
        """Take the row out of a slot, count it, and keep its prompt there."""
        slot = self._slots[index]
        with self._condition:
            for name, count in _count(slot.row).items():
                self._done[name] += count
            slot.row = None
            self._mark_used(slot)

    def _mark_used(self, slot):
        self._uses += 1
        slot.last_used = self._uses

    def _swap(self, one, other):
        """Exchange two slots, and free memory where the cache would hold too much after it."""
        if one == other:
            return
        slots = self._slots
        held = self._decoder.held
        held_after = self._count_claimed(range(len(slots))) + abs(held[one] - held[other])
        trim = held_after > self._cache_tokens
        self._decoder.swap(one, other, slots[one].length, slots[other].length, trim)
        with self._condition:
            slots[one], slots[other] = slots[other], slots[one]

    def _read_prompts(self):
        """Read prompts, row after row, up to the tokens of one piece."""
        read = 0
        while self._reading_index is not None or self._begin_next():
            slot = self._slots[self._reading_index]
            start = len(slot.prompt)
            end = end_piece(start, len(slot.row.prompt), self._piece)
            if read and read + end - start > self._piece:
                break
            read += end - start
            self._read(slot, start, end)

    def _read(self, slot, start, end):
        """Read a piece of a slot's prompt. After the last piece the answer begins."""
        row = slot.row
        try:
            logits = self._decoder.read(self._reading_index, row.prompt[start:end], start)
        except Exception:
            self._fail([row])
        else:
            slot.prompt = row.prompt[:end]
            if end < len(row.prompt):
                return
            self._choose_token(row, logits)
        if row.ended:  # it failed, or its first token is its last
            self._detach_row(self._reading_index)
        else:
            self._swap(self._reading_index, self._running_count)
            self._running_count += 1
        self._reading_index = None

    def _step(self):
        """Give each running answer its next token."""
        rows = [slot.row for slot in self._slots[: self._running_count]]
        if all(row.ended for row in rows):
            return
        try:
            logits = self._decoder.step(
                [row.last_token for row in rows],
                [len(row.prompt) + row.token_count for row in rows],
            )
        except Exception:
            self._fail(rows)
            return
        for row, row_logits in zip(rows, logits, strict=True):
            if not row.ended:
                self._choose_token(row, row_logits)

    def _choose_token(self, row, logits):
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
        with self._condition:
            while self._waiting and self._waiting[0].ended:
                self._waiting.popleft()
            row = self._waiting[0] if self._waiting else None
        if row is None or self._running_count == len(self._slots):
            return False
        needed = len(row.prompt) + row.max_tokens
        if self._count_claimed(range(self._running_count)) + needed > self._cache_tokens:
            return False
        target, source, shared = self._choose_slot(row)
        target, source, shared = self._free_memory(needed, target, source, shared)
        if source != target:
            self._decoder.copy(source, target, shared)
        row.reused_tokens, row.times["started"] = shared, time.time_ns()
        with self._condition:
            self._waiting.popleft()
            self._mark_used(self._slots[source])
            self._slots[target] = Slot(row, row.prompt[:shared], row.cache_key)
        self._reading_index = target
        return True

    def _choose_slot(self, row):
        """Choose a slot for a row, and a slot whose prompt begins in the same way.

        Returns
        -------
        tuple[int, int, int]
            The index of the row's slot, that of the other, which may be the same, and the number of
            tokens that they share.
        """
        # Two tokens are left to read: the last one's logits are needed, and one token alone would
        # be rounded differently.
        most = len(row.prompt) - 2
        counts = [
            min(count_shared(slot.prompt, row.prompt), most)
            if slot.cache_key == row.cache_key
            else 0
            for slot in self._slots
        ]
        source = max(range(len(counts)), key=counts.__getitem__)
        shared = counts[source]
        oldest, *others = self._unused_slots()
        if shared < LEAST_SHARED:
            return oldest, oldest, 0
        is_unused = source >= self._running_count
        if is_unused and (shared >= len(self._slots[source].prompt) - 2 or not others):
            return source, source, shared  # the row goes on in the slot of its conversation
        return others[0] if source == oldest else oldest, source, shared

    def _free_memory(self, needed, target, source, shared):
        """Forget kept prompts until ``needed`` tokens fit, those of the chosen slots last.

        Returns
        -------
        tuple[int, int, int]
            What `_choose_slot` returned, changed where one of its slots had to be forgotten.
        """
        for index in self._unused_slots():
            if index not in (target, source) and not self._fits(needed, target):
                self._forget(index)
        if target != source and not self._fits(needed, target):
            self._forget(target)
            if source >= self._running_count:
                target = source
        # Memory from a long answer would count in full, even if the row needs little.
        is_large = self._decoder.held[target] > 2 * needed and (source != target or not shared)
        if is_large or not self._fits(needed, target):
            self._forget(target)
            shared = shared if source != target else 0
        return target, source, shared

    def _fits(self, needed, target):
        """Return whether a row of ``needed`` tokens fits in the cache, in the slot ``target``."""
        others = [index for index in range(len(self._slots)) if index != target]
        held = max(self._decoder.held[target], needed)
        return self._count_claimed(others) + held <= self._cache_tokens

    def _forget(self, index):
        self._decoder.release(index)
        self._slots[index] = Slot()

    def _unused_slots(self):
        """Return the indexes of the slots without a row, the least recently used first."""
        unused = range(self._running_count, len(self._slots))
        return sorted(unused, key=lambda index: self._slots[index].last_used)

    def _count_claimed(self, indexes):
        """Add up the tokens that slots hold memory for, or that rows may need if that is more."""
        total = 0
        for index in indexes:
            row = self._slots[index].row
            reserved = len(row.prompt) + row.max_tokens if row else 0
            total += max(self._decoder.held[index], reserved)
        return total


def count_cores() -> int:
    """Count the physical cores that affinity and the container's quota allow."""
    cores = joblib.cpu_count()
    physical = psutil.cpu_count(logical=False) or cores  # some boards report no physical cores
    return min(cores, physical)


def _count(row):
    return {
        "answers": int(row.ended),
        "prompt_tokens": len(row.prompt),
        "reused_prompt_tokens": row.reused_tokens,
        "completion_tokens": row.token_count,
    }


def _closed_error(sentence="The model was closed before it had answered."):
    return Refusal(sentence, "closed", error_code=INVALID_STATE)
