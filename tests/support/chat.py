"""What the tests of the chat model share: requests, and requests that no model may answer."""

import math
from types import SimpleNamespace

SECRET = "zqsecret"  # stands in every bad request; no error may quote it
# An answer that repeats itself to the last allowed token.
LONG = {"max_tokens": 2000, "frequency_penalty": -2.0}
ASKED = ["The sky is", "1 2 3", "Once upon a time, there was", "x", "日本語 🙂", "A longer message. " * 12]
FRAGMENTS = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>",
             "<|", "|>", "<", ">", "|", "im_", "start", "end", "\n", "system", " ", "x", "1", "<repo_name>", "🙂",
             "\ue000"]


def user(text):
    return [{"role": "user", "content": text}]


AS_SHOWN = {"messages": user("The sky is")}


def contents(completion):
    return [choice["message"]["content"] for choice in completion["choices"]]


def load_chat(folder, **settings):
    """Return the chat model on a folder, as MLflow would load it."""
    from serving.chat_model import ChatModel

    model = ChatModel()
    model.load_context(SimpleNamespace(
        artifacts={"model": str(folder)}, model_config={"model": "toy", "max_tokens": 16} | settings))
    return model


def mixed_requests():
    """Return requests of every kind: greedy, seeded, with several answers, short and long."""
    requests = []
    for number, text in enumerate(ASKED):
        requests += [
            {"messages": user(text), "max_tokens": 3 + 7 * number},
            {"messages": user(text), "max_tokens": 20, "temperature": 1.5, "seed": number},
            {"messages": user(text), "temperature": 0.7, "seed": 5, "top_p": 0.8, "top_k": 50, "n": 2},
            {"messages": user(text), "max_tokens": 12, "frequency_penalty": 1.5, "presence_penalty": 0.5},
        ]
    return requests


def deltas(chunks, n=1):
    """Return the pieces of text of a stream with ``n`` choices, as (text, index), and check all chunks' shape."""
    chunks = list(chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    pieces, begun, ended = [], set(), {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            index, delta = choice["index"], choice["delta"]
            assert index not in ended
            assert ("role" in delta) == (index not in begun)
            begun.add(index)
            if choice["finish_reason"]:
                ended[index] = choice["finish_reason"]
                assert delta == {}
            elif delta.get("content"):
                pieces.append((delta["content"], index))
    assert set(ended) == begun == set(range(n))
    assert set(ended.values()) <= {"stop", "length"}
    return pieces


MESSAGES = "messages has to be a list of 1 to 1000 messages, role and content each."
ROLE = "has to be system, user or assistant."
TEXT = "has to be text, without NUL and without half a surrogate pair."
OBJECT = "has to be an object with role and content."
TEMPERATURE = "temperature has to be a number from 0 to 2."
MAX_TOKENS = "max_tokens has to be a whole number from 1 up to what the context leaves."
STOP = "stop has to be up to 4 texts of 1 to 100 characters."
N = "n has to be a whole number from 1 to 8."
TOP_P = "top_p has to be a number above 0, up to 1."
TOP_K = "top_k has to be a whole number from 1."
FREQUENCY = "frequency_penalty has to be a number from -2 to 2."
PRESENCE = "presence_penalty has to be a number from -2 to 2."
SEED = "seed has to be a whole number from 0 to 2**53 - 1."
STREAM = "stream has to be true for predict_stream, false for predict, or left out."
FIELDS = ("messages, temperature, max_tokens, stop, n, stream, top_p, top_k, frequency_penalty, presence_penalty, "
          "seed, stream_options")
# A request's fields, and the whole sentence that refuses them. Who names no messages gets some.
BAD = [
    ({"messages": []}, MESSAGES),
    ({"messages": user(SECRET) * 1001}, MESSAGES),
    ({"messages": [SECRET] * 100_000}, f"messages[0] {OBJECT}"),
    ({}, MESSAGES),
    ({"messages": None}, MESSAGES),
    ({"messages": SECRET}, MESSAGES),
    ({"messages": {"role": "user", "content": SECRET}}, MESSAGES),
    ({"messages": [SECRET]}, f"messages[0] {OBJECT}"),
    ({"messages": [None]}, f"messages[0] {OBJECT}"),
    ({"messages": [{"role": "user"}]}, f"messages[0].content {TEXT}"),
    ({"messages": [{"content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [{"role": "tool", "content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [{"role": 5, "content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [*user("a"), {"role": SECRET, "content": "b"}]}, f"messages[1].role {ROLE}"),
    ({"messages": user(None)}, f"messages[0].content {TEXT}"),
    ({"messages": user(5)}, f"messages[0].content {TEXT}"),
    ({"messages": user([{"type": "text", "text": SECRET}])}, f"messages[0].content {TEXT}"),
    ({"messages": user(SECRET + "\ud83d")}, f"messages[0].content {TEXT}"),
    ({"messages": user(SECRET + "\0")}, f"messages[0].content {TEXT}"),
    ({"messages": [user("a")[0] | {"name": SECRET}]},
     "messages[0] holds a field that is not served. The fields are: role, content."),
    ({"messages": [*user("a"), {"role": "assistant", "content": SECRET}]},
     "The last message's role has to be user or system: the assistant speaks next."),
    ({"temperature": -1}, TEMPERATURE),
    ({"temperature": 2.1}, TEMPERATURE),
    ({"temperature": math.inf}, TEMPERATURE),
    ({"temperature": SECRET}, TEMPERATURE),
    ({"temperature": True}, TEMPERATURE),
    ({"temperature": [0.5]}, TEMPERATURE),
    ({"max_tokens": 0}, MAX_TOKENS),
    ({"max_tokens": -1}, MAX_TOKENS),
    ({"max_tokens": "4"}, MAX_TOKENS),
    ({"max_tokens": 4.5}, MAX_TOKENS),
    ({"max_tokens": True}, MAX_TOKENS),
    ({"stop": [SECRET] * 100}, STOP),
    ({"stop": [SECRET] * 5}, STOP),
    ({"stop": ""}, STOP),
    ({"stop": [""]}, STOP),
    ({"stop": "s" * 101}, STOP),
    ({"stop": ["s" * 101]}, STOP),
    ({"stop": ["a", 5]}, STOP),
    ({"stop": ["a", None]}, STOP),
    ({"n": 0}, N),
    ({"n": 9}, N),
    ({"n": 1000}, N),
    ({"n": 1.5}, N),
    ({"top_p": 0}, TOP_P),
    ({"top_p": 1.01}, TOP_P),
    ({"top_k": 0}, TOP_K),
    ({"top_k": SECRET}, TOP_K),
    ({"frequency_penalty": 2.5}, FREQUENCY),
    ({"frequency_penalty": -2.5}, FREQUENCY),
    ({"presence_penalty": 2.5}, PRESENCE),
    ({"presence_penalty": -2.5}, PRESENCE),
    ({"seed": -1}, SEED),
    ({"seed": 2**53}, SEED),
    ({"seed": SECRET}, SEED),
    ({"stream_options": {"include_usage": SECRET}}, "stream_options.include_usage has to be true or false."),
    ({"stream": SECRET}, STREAM),
]
