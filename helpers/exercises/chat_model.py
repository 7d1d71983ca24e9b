"""Checks the exercises of ChatModel."""

from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from helpers.exercises import NOT_WRITTEN, exercise, surplus


@exercise("seed")
def _(seeded, chat_model):
    if not isinstance(seeded, dict):
        return 'the settings are a dict, such as {"temperature": 1.0}.'
    chat_model.read_request({"messages": [{"role": "user", "content": "Hello"}]} | seeded)
    if more := surplus(seeded, "temperature", "seed", "top_p", "top_k"):
        return more
    if not seeded.get("temperature"):
        return "at a temperature of 0 an answer is never random. Set a temperature first."
    return (
        "a random answer repeats itself only with a seed." if seeded.get("seed") is None else None
    )


@exercise("pieces")
def _(read_piece):
    def chunk(delta, reason=None):
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    piece = read_piece(chunk({"content": "Ma"}))
    if piece is ...:
        return NOT_WRITTEN
    if not isinstance(piece, str):
        return f"a piece is text, and yours is of the type {type(piece).__name__}."
    if piece != "Ma":
        return "the text of a piece is the delta's content."
    if read_piece(chunk({}, "stop")) != "":
        return "the last chunk has a finish_reason and no text: return an empty text for it."
    return None


@exercise("schema")
def _(pet):
    if not isinstance(pet, dict):
        return 'a schema is a dict that begins with {"type": "object"}.'
    Draft202012Validator.check_schema(pet)
    if error := LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(pet)):
        return f"the model can't keep this schema: {error.splitlines()[0]}."
    tom, fits = {"name": "Tom", "kind": "cat", "age": 3}, Draft202012Validator(pet).is_valid
    if not all(fits(tom | other) for other in ({}, {"kind": "dog", "age": 0}, {"age": 30})):
        return "the cat Tom of 3 years has to fit, and so do a dog of 0 and a cat of 30 years."
    for name in tom:
        if fits({other: tom[other] for other in tom if other != name}):
            return f"a pet without {name} fits too: look at required."
    for name, wrong in (
        ("name", 5),
        ("name", "x" * 21),
        ("kind", "horse"),
        ("age", -1),
        ("age", 31),
        ("age", 2.5),
    ):
        if fits(tom | {name: wrong}):
            return f"a pet fits whose {name} is {wrong!r}."
    return (
        "fields of other names fit: additionalProperties."
        if fits(tom | {"colour": "red"})
        else None
    )


@exercise("steps")
def _(static_steps, joining_steps, lengths, slots):
    if static_steps == sum(lengths):
        return "in a static batch, all three answers get a token in each step: it takes as many steps as its longest."
    if static_steps != sum(
        max(lengths[start : start + slots]) for start in range(0, len(lengths), slots)
    ):
        return "a static batch of three ends with its longest answer, and only then the next three begin."
    ends = [0] * slots  # the step after which each slot is free
    for length in lengths:
        ends[ends.index(min(ends))] += length
    return (
        None
        if joining_steps == max(ends)
        else (
            "write down three slots. Each next answer begins in the slot that is free first; the last end counts."
        )
    )


@exercise("settings")
def _(changes, chat_model):
    if not isinstance(changes, dict):
        return "the settings are a dict: names of chat_model.SETTINGS, each with a new value."
    if unknown := [name for name in changes if name not in chat_model.SETTINGS]:
        return f"{unknown[0]} is no setting. They are: {', '.join(chat_model.SETTINGS)}."
    chat_model.Settings(**chat_model.SETTINGS | changes)
    if changes.get("max_tokens") != 8:
        return "an answer has 8 tokens where a request doesn't say how many: that setting is max_tokens."
    if more := surplus(changes, "max_tokens", "model", "temperature"):
        return more
    return (
        None
        if changes.get("model", "slm-onnx") != "slm-onnx"
        else "give the model a name of your own: model."
    )
