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


def ask(model, request):
    """Return the choices of the answer to one request."""
    return model.predict(None, request)[0]["choices"]


def contents(completion):
    return [choice["message"]["content"] for choice in completion["choices"]]


def chat_model_for(prepared, **settings):
    """Return what MLflow's `log_model` and `save_model` are told of the chat model on a prepared model."""
    from serving import chat_model

    return {"python_model": chat_model.__file__, "signature": chat_model.SIGNATURE, "pip_requirements": ["mlflow"],
            "artifacts": {"model": prepared.onnx_dir.as_uri()}, "model_config": chat_model.SETTINGS | settings}


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


MESSAGES = "messages has to be a list of 1 to 1000 messages, role and content each."
ROLE = "has to be system, developer, user or assistant."
TEXT = "has to be text, without NUL and without half a surrogate pair."
CONTENT = "has to be text, or 1 to 1000 parts of text, without NUL and without half a surrogate pair."
OBJECT = "has to be an object with role and content."
TEMPERATURE = "temperature has to be a number from 0 to 2."
MAX_TOKENS = "max_tokens has to be a whole number from 1 up to what the context leaves."
MAX_COMPLETION_TOKENS = "max_completion_tokens has to be a whole number from 1 up to what the context leaves."
BOTH = "max_completion_tokens has to be left out beside another max_tokens."
STOP = "stop has to be up to 4 texts of 1 to 100 characters."
N = "n has to be a whole number from 1 to 8."
TOP_P = "top_p has to be a number above 0, up to 1."
TOP_K = "top_k has to be a whole number from 1."
FREQUENCY = "frequency_penalty has to be a number from -2 to 2."
PRESENCE = "presence_penalty has to be a number from -2 to 2."
SEED = "seed has to be a whole number from 0 to 2**53 - 1."
STREAM = "stream has to be true, for predict_stream alone, false or left out."
MESSAGE_FIELDS = "role, content, name, tool_calls, annotations"
FORMAT = "response_format has to be an object with the type text, json_object or json_schema."
FORMAT_TYPE = "response_format.type has to be text, json_object or json_schema."
JSON_SCHEMA = "response_format.json_schema has to be an object with name and schema."
SCHEMA = "response_format.json_schema.schema has to be an object: a JSON schema."
STOP_IN_JSON = "stop has to be left out where response_format asks for JSON, which it would cut."
FIELDS = ("messages, temperature, max_tokens, max_completion_tokens, stop, n, stream, top_p, top_k, frequency_penalty, "
          "presence_penalty, seed, response_format, stream_options")


def parts(*texts):
    """Return the content of a message in parts."""
    return [{"type": "text", "text": text} for text in texts]


def schema(definition, /, **more):
    """Return a request's field that asks for JSON of this schema."""
    return {"response_format": {"type": "json_schema",
                                "json_schema": {"name": "answer", "schema": definition} | more}}


A_TOOL = {"type": "function", "function": {"name": SECRET, "parameters": {}}}
# What clients send by habit: a field, what it has to be, values that change no answer, and values that would.
HABITS = [
    *((name, "a text", ["", "a text", "gpt-4.1", "日本語"], [5, True, [SECRET], {SECRET: 1}])
      for name in ("model", "user", "safety_identifier", "service_tier", "prompt_cache_key")),
    ("metadata", "an object", [{}, {"a label": "x"}, {"a": {"b": [1, None]}}], [SECRET, 5, [], [SECRET]]),
    ("prediction", "an object", [{}, {"type": "content", "content": "x"}], [SECRET, 5, [SECRET]]),
    *((name, "true or false", [True, False], [SECRET, 1, "true", [True]]) for name in ("store", "parallel_tool_calls")),
    ("logprobs", "false or left out", [False], [True, 1, SECRET, [False]]),
    ("top_logprobs", "0 or left out", [0], [3, 1, -1, SECRET, [0]]),
    *((name, "empty or left out", [[], {}], [[A_TOOL], {SECRET: 1}, SECRET, 5, True])
      for name in ("tools", "functions")),
    ("logit_bias", "empty or left out", [{}, []], [{"50256": -100}, {"5": 0}, [SECRET], SECRET]),
    *((name, "none, auto or left out", ["none", "auto"], ["required", {"name": SECRET}, A_TOOL, "", ["auto"], True])
      for name in ("tool_choice", "function_call")),
    ("modalities", "a list of text, and of nothing else", [["text"], []],
     [["audio"], ["text", "audio"], "text", [None], [["text"]]]),
]
# What OpenAI's SDK makes of an answer with ``message.model_dump()``, and clients send back as a turn.
SENT_BACK = {"content": "Paris.", "refusal": None, "role": "assistant", "annotations": [], "audio": None,
             "function_call": None, "tool_calls": None}
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
    ({"messages": [{"role": "user"}]}, f"messages[0].content {CONTENT}"),
    ({"messages": [{"content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [{"role": "tool", "content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [{"role": 5, "content": SECRET}]}, f"messages[0].role {ROLE}"),
    ({"messages": [*user("a"), {"role": SECRET, "content": "b"}]}, f"messages[1].role {ROLE}"),
    ({"messages": user(None)}, f"messages[0].content {CONTENT}"),
    ({"messages": user(5)}, f"messages[0].content {CONTENT}"),
    ({"messages": user([])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([SECRET])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([None])}, f"messages[0].content {CONTENT}"),
    ({"messages": user(parts(SECRET)[0])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([parts(SECRET)])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([{"type": "text"}])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([{"text": SECRET}])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([*parts("a"), {"type": "text", "text": None}])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([*parts("a"), {"type": "image_url", "image_url": {"url": SECRET}}])},
     f"messages[0].content {CONTENT}"),
    ({"messages": user([{"type": "input_audio", "input_audio": {"data": SECRET}}])}, f"messages[0].content {CONTENT}"),
    ({"messages": user([parts("a")[0] | {SECRET: 1}])}, f"messages[0].content {CONTENT}"),
    ({"messages": user(parts(SECRET + "\0"))}, f"messages[0].content {CONTENT}"),
    ({"messages": user(parts("a", SECRET + "\ud83d"))}, f"messages[0].content {CONTENT}"),
    ({"messages": user(parts(SECRET) * 1001)}, f"messages[0].content {CONTENT}"),
    ({"messages": user(parts(SECRET) * 10_000)}, f"messages[0].content {CONTENT}"),
    ({"messages": [*user("a"), *user([{"type": "image_url"}] * 10_000)]}, f"messages[1].content {CONTENT}"),
    ({"messages": user(SECRET + "\ud83d")}, f"messages[0].content {CONTENT}"),
    ({"messages": user(SECRET + "\0")}, f"messages[0].content {CONTENT}"),
    ({"messages": [user("a")[0] | {"name": 5}]}, f"messages[0].name {TEXT}"),
    ({"messages": [user("a")[0] | {"name": SECRET + "\0"}]}, f"messages[0].name {TEXT}"),
    ({"messages": [user("a")[0] | {"name": [SECRET]}]}, f"messages[0].name {TEXT}"),
    ({"messages": [SENT_BACK | {"tool_calls": [A_TOOL]}, *user("a")]},
     "messages[0].tool_calls has to be empty or left out: this model calls no tools."),
    ({"messages": [*user("a"), SENT_BACK | {"annotations": [{SECRET: 1}]}, *user("b")]},
     "messages[1].annotations has to be empty or left out."),
    ({"messages": [SENT_BACK | {"refusal": SECRET}, *user("a")]},
     f"messages[0] holds a field that is not served. The fields are: {MESSAGE_FIELDS}."),
    ({"messages": [user("a")[0] | {"tool_call_id": SECRET}]},
     f"messages[0] holds a field that is not served. The fields are: {MESSAGE_FIELDS}."),
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
    ({"max_completion_tokens": 0}, MAX_COMPLETION_TOKENS),
    ({"max_completion_tokens": "4"}, MAX_COMPLETION_TOKENS),
    ({"max_completion_tokens": 4.5}, MAX_COMPLETION_TOKENS),
    ({"max_completion_tokens": True}, MAX_COMPLETION_TOKENS),
    ({"max_completion_tokens": 4, "max_tokens": 5}, BOTH),
    ({"max_completion_tokens": 5, "max_tokens": 4}, BOTH),
    ({"max_completion_tokens": 4, "max_tokens": 0}, MAX_TOKENS),
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
    ({"stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation has to be true or false."),
    ({"response_format": "json_object"}, FORMAT),
    ({"response_format": [SECRET]}, FORMAT),
    ({"response_format": True}, FORMAT),
    ({"response_format": {}}, FORMAT_TYPE),
    ({"response_format": {"type": None}}, FORMAT_TYPE),
    ({"response_format": {"type": SECRET}}, FORMAT_TYPE),
    ({"response_format": {"type": ["text"]}}, FORMAT_TYPE),
    ({"response_format": {"type": "json_object", SECRET: 1}},
     "response_format holds a field that is not served. The fields are: type, json_schema."),
    ({"response_format": {"type": "json_schema", "schema": {"type": SECRET}}},
     "response_format holds a field that is not served. The fields are: type, json_schema."),
    ({"response_format": {"type": "json_schema"}}, JSON_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": None}}, JSON_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": SECRET}}, JSON_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": [{}]}}, JSON_SCHEMA),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": SECRET}}}, SCHEMA),
    (schema(None), SCHEMA),
    (schema(SECRET), SCHEMA),
    (schema([SECRET]), SCHEMA),
    (schema(True), SCHEMA),
    ({"response_format": {"type": "text", "json_schema": {"schema": 5}}}, SCHEMA),
    (schema({}, name=5), "response_format.json_schema.name has to be a text of up to 64 characters."),
    (schema({}, name=SECRET * 9), "response_format.json_schema.name has to be a text of up to 64 characters."),
    (schema({}, description=[SECRET]), "response_format.json_schema.description has to be a text."),
    (schema({}, strict=SECRET), "response_format.json_schema.strict has to be true or false."),
    (schema({}, strict=1), "response_format.json_schema.strict has to be true or false."),
    (schema({}, definition={SECRET: 1}), "response_format.json_schema holds a field that is not served. "
                                         "The fields are: name, description, strict, schema."),
    ({"response_format": {"type": "json_object"}, "stop": SECRET}, STOP_IN_JSON),
    (schema({}) | {"stop": [SECRET]}, STOP_IN_JSON),
    *(({name: value}, f"{name} has to be {allowed}.") for name, allowed, _, harmful in HABITS for value in harmful),
]
