"""Runs the ONNX model on its key/value cache: reads prompts, and steps many answers at once.

The cache has slots, one for each answer. A slot is the same part of every layer's keys and values,
which have the shape (slots, heads, room, head size). The model gets these tensors as its past and
as its present, so GroupQueryAttention writes the keys and values of new tokens where they belong
and copies nothing. The attention mask says how many tokens each slot holds. So answers of any
length make a step together, and an answer can begin or end between any two steps.

This file knows tokens and slots. Which answer has which slot is for `engine` to decide.
"""

import contextlib
import math
import mmap
import os

import numpy as np
import onnxruntime

from .contract import Refusal
from .folder import Config, unusable

MOST_SLOTS = 16  # More rows make steps longer, and hardly any token cheaper.
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A model with a key/value cache of ``slots`` slots, each with room for ``room`` tokens.

    The system gives memory for a page of the cache when it is first written. So slots with room for
    the whole context cost no more than the tokens that were in them. ``held`` counts these for each
    slot, until `release` gives the slot's memory back.

    Parameters
    ----------
    config
        What the model's folder says of it.
    threads
        The number of threads that compute.
    room
        The most tokens of a prompt and its answer together.

    Raises
    ------
    Refusal
        The graph does not fit this cache, or the system has no memory for one slot.
    """

    def __init__(self, config: Config, threads: int, room: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors reach the caller as exceptions
        # A waiting thread looks for work for so many microseconds, and then sleeps. By default it
        # looks for longer, and slows other processes down.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
        try:
            self._session = onnxruntime.InferenceSession(
                config.onnx_file, options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # onnxruntime raises nothing narrower
            raise unusable("onnxruntime can't load its ONNX file") from None
        self._names = config.names
        self._vocab_size = config.vocab_size
        self._read_graph(config)
        self._room = self._round_up(room)
        self.slots = MOST_SLOTS
        while not self._reserve():
            self.slots //= 2
            if not self.slots:
                raise Refusal(
                    f"The system has no memory for a cache of {room} tokens. "
                    "Load the model with a smaller cache_tokens.",
                    "failed",
                )
        self.held = [0] * self.slots
        self._bindings = {}
        try:
            self.read(0, [0, 0], 0)
            self.step([0], [3])
        except Exception:
            raise unusable(
                "its ONNX file does not work with a cache of the shape that genai_config.json says"
            ) from None
        self.release(0)

    def _read_graph(self, config):
        """Find the cache's tensors in the graph. Refuse a graph with other inputs or outputs."""
        names = config.names
        self._tensors = [
            (names[f"past_{kind}_names"] % layer, names[f"present_{kind}_names"] % layer)
            for layer in range(config.layers)
            for kind in ("key", "value")
        ]
        inputs = {tensor.name: tensor for tensor in self._session.get_inputs()}
        outputs = {tensor.name: tensor for tensor in self._session.get_outputs()}
        pasts = [past for past, _ in self._tensors]
        presents = [present for _, present in self._tensors]
        known_inputs = {names["input_ids"], names["attention_mask"], *pasts}
        if inputs.keys() != known_inputs or outputs.keys() != {names["logits"], *presents}:
            raise unusable(
                "its ONNX file has other inputs or outputs than tokens, a mask, logits and "
                "the cache"
            )
        heads = {inputs[past].shape[1] for past in pasts}
        types = {inputs[past].type for past in pasts}
        logits = outputs[names["logits"]]
        is_known = {*types, logits.type} <= TYPES.keys() and all(isinstance(n, int) for n in heads)
        if len(heads) > 1 or len(types) > 1 or not is_known:
            raise unusable(
                "its layers have caches of different shapes, or of a type other than "
                "float32 and float16"
            )
        self._shape = heads.pop(), config.head_size
        self._type = TYPES[types.pop()]
        self._logits_type = TYPES[logits.type]
        self._last_only = logits.shape[1] == 1  # the graph gives logits for the last token alone

    def _round_up(self, room):
        """Return the room of a slot that has whole pages of memory."""
        heads, head_size = self._shape
        token_bytes = heads * head_size * np.dtype(self._type).itemsize
        tokens = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, token_bytes)
        return math.ceil(room / tokens) * tokens

    def _reserve(self):
        """Reserve memory for all slots. Return whether the system agreed."""
        heads, head_size = self._shape
        shape = self.slots, heads, self._room, head_size
        size = math.prod(shape) * np.dtype(self._type).itemsize
        try:
            self._memory = [_reserve_pages(size) for _ in self._tensors]
        except (OSError, MemoryError):
            self._memory = []
            return False
        self._caches = [np.frombuffer(pages, self._type).reshape(shape) for pages in self._memory]
        return True

    def read(self, slot: int, tokens: list[int], start: int) -> np.ndarray:
        """Read tokens of a prompt into a slot that holds the ``start`` tokens before them.

        One token alone is rounded differently from two or more together. So a prompt gets the same
        logits in any pieces, as long as no piece is one token.

        Returns
        -------
        numpy.ndarray
            The logits behind the last of the tokens, of shape (vocabulary,), float32.
        """
        return self._run(slot, slot + 1, [tokens], [start + len(tokens)])[0]

    def step(self, tokens: list[int], lengths: list[int]) -> np.ndarray:
        """Add a token to each of the first slots.

        ``lengths`` are the tokens that the slots hold with it. Each slot gets the same logits alone
        as with others.

        Returns
        -------
        numpy.ndarray
            The logits behind the tokens, of shape (len(tokens), vocabulary), float32.
        """
        return self._run(0, len(tokens), [[token] for token in tokens], lengths)

    def _run(self, first, last, tokens, lengths):
        binding = self._bindings.get((first, last)) or self._bind(first, last)
        for slot, length in enumerate(lengths, first):
            self.held[slot] = max(self.held[slot], length)
        tokens = np.array(tokens, np.int64)
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        rows, width = tokens.shape
        logits = np.empty(
            (rows, 1 if self._last_only else width, self._vocab_size), self._logits_type
        )
        for name, values in (("input_ids", tokens), ("attention_mask", mask)):
            binding.bind_input(
                self._names[name], "cpu", 0, np.int64, values.shape, values.ctypes.data
            )
        binding.bind_output(
            self._names["logits"], "cpu", 0, self._logits_type, logits.shape, logits.ctypes.data
        )
        self._session.run_with_iobinding(binding)
        return logits[:, -1].astype(np.float32, copy=False)

    def _bind(self, first, last):
        """Bind a range of slots as past and as present, once for each range."""
        binding = self._session.io_binding()
        for (past, present), cache in zip(self._tensors, self._caches, strict=True):
            part = cache[first:last]
            binding.bind_input(past, "cpu", 0, self._type, part.shape, part.ctypes.data)
            binding.bind_output(present, "cpu", 0, self._type, part.shape, part.ctypes.data)
        self._bindings[first, last] = binding
        return binding

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first ``tokens`` tokens of a slot to another slot."""
        for cache in self._caches:
            cache[target, :, :tokens] = cache[source, :, :tokens]
        self.held[target] = max(self.held[target], tokens)

    def swap(self, one: int, other: int, one_tokens: int, other_tokens: int, trim: bool) -> None:
        """Exchange the contents of two slots, ``one_tokens`` and ``other_tokens`` tokens.

        Each slot then holds the memory of the longer one, unless ``trim`` asks to give back what it
        does not need. That takes longer, because the system gives each page anew.
        """
        for cache, pages in zip(self._caches, self._memory, strict=True):
            kept = cache[one, :, :one_tokens].copy()
            moved = cache[other, :, :other_tokens].copy()
            if trim:
                _release_pages(pages, one, cache)
                _release_pages(pages, other, cache)
            cache[one, :, :other_tokens] = moved
            cache[other, :, :one_tokens] = kept
        longer = max(self.held[one], self.held[other])
        self.held[one], self.held[other] = (other_tokens, one_tokens) if trim else (longer, longer)

    def release(self, slot: int) -> None:
        """Give the memory of a slot back to the system, and forget what was in it."""
        for cache, pages in zip(self._caches, self._memory, strict=True):
            _release_pages(pages, slot, cache)
        self.held[slot] = 0


def _reserve_pages(size):
    """Reserve memory that the system gives page by page, when it is written."""
    if os.name == "nt":
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A token has a place in each head's part. With huge pages, each part takes 2 MB for it.
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


def _release_pages(pages, slot, cache):
    # Windows has no such call, and macOS takes it as advice: memory that was written stays there.
    if hasattr(mmap, "MADV_DONTNEED"):
        size = cache[slot].nbytes
        pages.madvise(mmap.MADV_DONTNEED, slot * size, size)
