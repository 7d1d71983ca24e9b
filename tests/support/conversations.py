"""Conversations with a chat model, and what waits for its engine."""

import threading
import time

from support.chat import user

TURNS = [
    "The sky is",
    "And at night?",
    "A longer one. " * 9,
    "x",
    "日本語 🙂 " * 5,
    "The end, or not? " * 4,
]
WAYS = {
    "greedy": {"max_tokens": 24},
    "seeded": {"max_tokens": 24, "temperature": 1.0, "seed": 7},
    "n": {"max_tokens": 12, "temperature": 0.8, "seed": 3, "n": 2, "top_p": 0.9},
    "penalties": {"max_tokens": 24, "frequency_penalty": 0.5, "presence_penalty": 0.3},
}


def engine_of(model):
    return model._loaded.engine


def engine_threads():
    return [thread for thread in threading.enumerate() if thread.name == "chat-model-engine"]


def share_nothing(model):
    """Let a model read each prompt whole, whatever its cache holds."""
    read_whole(engine_of(model))
    return model


def read_whole(engine):
    """Let an engine read each prompt whole."""
    engine._choose_slot = lambda row: (engine._unused_slots()[0], engine._unused_slots()[0], 0)


def talk(model, opening="", turns=TURNS, **fields):
    """Hold a conversation; return each turn's messages and choices."""
    messages, held = [{"role": "system", "content": f"You are brief. {opening}" * 4}], []
    for text in turns:
        messages = [*messages, *user(text)]
        choices = model.predict(None, {"messages": messages} | fields)[0]["choices"]
        held.append((messages, choices))
        # What a model of noise writes is no text that a client would send back.
        answer = "".join(
            letter for letter in choices[0]["message"]["content"] if letter.isprintable()
        )
        messages = [*messages, {"role": "assistant", "content": answer}]
    return held


def wait_for(row):
    while row.events.get(timeout=60)[1] is not None:
        pass


def settle(engine):
    """Wait until an engine has nothing to do: a caller has its answer a moment before the row has left its slot."""
    deadline = time.monotonic() + 60
    while not engine._condition._waiters:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stats_of(model):
    """Return what an idle model has counted."""
    settle(engine_of(model))
    return model.stats()
