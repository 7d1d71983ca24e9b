"""What the tests of the chat model share: models, requests, and checks of answers."""

import shutil
from pathlib import Path
from types import SimpleNamespace

from helpers.paths import BUILD

SECRET = "zqsecret"  # stands in every bad request; no error may quote it
# An answer that repeats itself to the last allowed token.
LONG = {"max_tokens": 2000, "frequency_penalty": -2.0}
ASKED = [
    "The sky is",
    "1 2 3",
    "Once upon a time, there was",
    "x",
    "日本語 🙂",
    "A longer message. " * 12,
]
FRAGMENTS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|endoftext|>",
    "<|",
    "|>",
    "<",
    ">",
    "|",
    "im_",
    "start",
    "end",
    "\n",
    "system",
    " ",
    "x",
    "1",
    "<repo_name>",
    "🙂",
    "\ue000",
]


def user(text):
    return [{"role": "user", "content": text}]


AS_SHOWN = {"messages": user("The sky is")}


def ask(model, request):
    """Return the choices of the answer to one request."""
    return model.predict(None, request)[0]["choices"]


def contents(completion):
    return [choice["message"]["content"] for choice in completion["choices"]]


def chat_model_for(prepared, **settings):
    """Return what MLflow's `log_model` and `save_model` are told of the chat model on a prepared model."""
    from serving.chat import SETTINGS, SIGNATURE, package_code

    return package_code(BUILD / "code")._asdict() | {
        "signature": SIGNATURE,
        "pip_requirements": ["mlflow"],
        "artifacts": {"model": prepared.onnx_dir.as_uri()},
        "model_config": SETTINGS | settings,
    }


def change_code(monkeypatch, folder):
    """Give the chat model that is logged next other code: the ids of its answers begin with ``changed-``."""
    from serving.chat import package

    changed = Path(shutil.copytree(package.SOURCES, folder / "changed"))
    source = (changed / "model.py").read_text(encoding="utf-8")
    assert 'f"chatcmpl-' in source
    (changed / "model.py").write_text(source.replace('f"chatcmpl-', 'f"changed-'), encoding="utf-8")
    monkeypatch.setattr(package, "SOURCES", changed)


def load_chat(folder, **settings):
    """Return the chat model on a folder, as MLflow would load it."""
    from serving.chat.model import ChatModel

    model = ChatModel()
    model.load_context(
        SimpleNamespace(
            artifacts={"model": str(folder)},
            model_config={"model": "toy", "max_tokens": 16} | settings,
        )
    )
    return model


def mixed_requests():
    """Return requests of every kind: greedy, seeded, with several answers, short and long."""
    requests = []
    for number, text in enumerate(ASKED):
        requests += [
            {"messages": user(text), "max_tokens": 3 + 7 * number},
            {"messages": user(text), "max_tokens": 20, "temperature": 1.5, "seed": number},
            {
                "messages": user(text),
                "temperature": 0.7,
                "seed": 5,
                "top_p": 0.8,
                "top_k": 50,
                "n": 2,
            },
            {
                "messages": user(text),
                "max_tokens": 12,
                "frequency_penalty": 1.5,
                "presence_penalty": 0.5,
            },
        ]
    return requests


def deltas(chunks, n=1):
    """Return the pieces of text of a stream with ``n`` choices, as (text, index), and check all chunks' shape."""
    chunks = list(chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    pieces = []
    begun = set()
    ended = {}
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


# The sentence that refuses messages out of their range, and the fields that a message may have.
MESSAGES = "messages has to be a list of 1 to 1000 messages, role and content each."
MESSAGE_FIELDS = "role, content, name, tool_calls, annotations"


def parts(*texts):
    """Return the content of a message in parts."""
    return [{"type": "text", "text": text} for text in texts]


def schema(definition, /, **more):
    """Return a request's field that asks for JSON of this schema."""
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": definition} | more,
        }
    }


A_TOOL = {"type": "function", "function": {"name": SECRET, "parameters": {}}}
# The fields that change no answer: the name, the range, values that are accepted, values that are
# refused.
HABITS = [
    *(
        (name, "a text", ["", "a text", "gpt-4.1", "日本語"], [5, [SECRET]])
        for name in ("prompt_cache_key", "model", "user", "safety_identifier", "service_tier")
    ),
    ("metadata", "an object", [{}, {"a label": "x"}, {"a": {"b": [1, None]}}], [SECRET, []]),
    ("prediction", "an object", [{}, {"type": "content", "content": "x"}], [SECRET, []]),
    *(
        (name, "true or false", [True, False], [SECRET, 1])
        for name in ("store", "parallel_tool_calls")
    ),
    ("logprobs", "false or left out", [False], [True, SECRET]),
    ("top_logprobs", "0 or left out", [0], [3, SECRET]),
    *(
        (name, "empty or left out", [[], {}], [[A_TOOL], {SECRET: 1}, SECRET])
        for name in ("tools", "functions")
    ),
    ("logit_bias", "empty or left out", [{}, []], [{"5": 0}, SECRET]),
    *(
        (name, "none, auto or left out", ["none", "auto"], ["required", {"name": SECRET}])
        for name in ("tool_choice", "function_call")
    ),
    (
        "modalities",
        "a list of text, and of nothing else",
        [["text"], []],
        [["audio"], ["text", "audio"], "text"],
    ),
]
# An answer as clients send it back in the next request: OpenAI's SDK makes it with
# ``message.model_dump()``.
SENT_BACK = {
    "content": "Paris.",
    "refusal": None,
    "role": "assistant",
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}
