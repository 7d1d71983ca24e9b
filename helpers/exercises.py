"""Checks what a learner put in place of ``...``: an exercise's name comes in, PASS or one hint is printed.

A check takes its answers by name from the page. It returns what to look at, or nothing where all is
well; it may raise whatever an answer makes it raise.
"""

import inspect
from collections.abc import Callable

from IPython import get_ipython
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

CHECKS: dict[str, Callable[..., str | None]] = {}
DOTS = "put your own in place of the three dots after return, run that cell, then this one."


def check(name: str, answers: dict | None = None) -> bool:
    """Print PASS or what to look at, and return whether the exercise is solved.

    ``answers`` has them by name; left out, they are those of the page that asks.
    """
    answers = get_ipython().user_ns if answers is None else answers
    hint = find_hint(name, answers)
    print(f"Not yet: {hint}" if hint else "PASS")
    return not hint


def find_hint(name: str, answers: dict) -> str | None:
    """Return what to look at in the answers to an exercise; None where they are right."""
    needed = list(inspect.signature(CHECKS[name]).parameters)
    for answer in needed:
        if answer not in answers:
            return f"there is no {answer} on this page. Run the cells above, from the top."
        if answers[answer] is ...:
            return f"put your own in place of the three dots after {answer}, run that cell, then this one."
    try:
        return CHECKS[name](**{answer: answers[answer] for answer in needed})
    except Exception as error:  # whatever a learner wrote: it is their code that runs here
        return f"your answer stops with {type(error).__name__}: {error}"


def exercise(name: str) -> Callable:
    """Put a check into CHECKS under its exercise's name."""
    return lambda function: CHECKS.setdefault(name, function)


def _settings_hint(settings, length):
    """Return what is wrong with settings that should make an answer warm; ``length`` is the field that ends it."""
    if not isinstance(settings, dict):
        return 'the settings are a dict, such as {"do_sample": True}.'
    known = {"do_sample", "temperature", "top_p", "top_k", *length}
    if unknown := [name for name in settings if name not in known]:
        return f"{unknown[0]} is no setting here. Choose among: {', '.join(sorted(known))}."
    if settings.get("do_sample") is not True:
        return "without do_sample=True the likeliest token is taken each time, whatever the temperature."
    temperature = settings.get("temperature", 1.0)
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
        or not 0 < temperature <= 2
    ):
        return "the temperature is a number above 0, up to 2; 1.0 leaves the model's own odds."
    for name, most in (("top_p", 1), ("top_k", 100), *((name, 1000) for name in length)):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            return f"{name} is a number above 0, up to {most}."
        if name != "top_p" and not isinstance(value, int):
            return f"{name} is a whole number."
    return next(
        (f"say how long the answer may be: {name}." for name in length if name not in settings),
        None,
    )


def _surplus(answer, *known):
    """Return a hint where an answer holds a field that its exercise does not need, and that may not go well."""
    return next(
        (
            f"leave {name} out: it is more than this exercise asks for."
            for name in answer
            if name not in known
        ),
        None,
    )


@exercise("warm pipeline")
def _(warm):
    return _settings_hint(warm, ("max_new_tokens",))


@exercise("warm engine")
def _(warm):
    return _settings_hint(warm, ())


@exercise("request")
def _(request, model_info):
    from mlflow.models import validate_schema

    if not isinstance(request, dict):
        return "a request is a dict: the names of the first column, each with its value."
    fields = model_info.signature.inputs.input_names()
    if unknown := [name for name in request if name not in fields]:
        return f"the signature has no field {unknown[0]}, and MLflow would drop it with a warning."
    validate_schema(request, model_info.signature.inputs)
    if more := _surplus(request, "messages", "max_tokens", "stop", "temperature", "top_p"):
        return more
    if request["messages"][-1]["role"] != "user":
        return "the last message is the user's: the assistant speaks next."
    if "France" not in request["messages"][-1]["content"]:
        return "the last message asks for the capital of France."
    if request.get("max_tokens") != 12:
        return "the answer may have 12 tokens at most. Find that field in the table."
    if request.get("stop") != ["."]:
        return "the answer ends at the first full stop. Find that field and its type in the table."
    return None


@exercise("signature")
def _(wider):
    from mlflow.models import ModelSignature

    if not isinstance(wider, ModelSignature):
        return "wider is a ModelSignature: what mlflow.models.infer_signature returns."
    if wider.inputs is None or wider.inputs.input_names() != ["prompt"]:
        return "a request still holds one prompt and nothing else. Parameters go in params=."
    params = {param.name: param for param in wider.params or []}
    for name in ("max_tokens", "temperature", "top_p"):
        if name not in params:
            return f"the parameters lack {name}."
    if params["top_p"].dtype.name != "double":
        return f"top_p is a {params['top_p'].dtype.name}, so 0.9 would be refused. MLflow reads the default's type."
    return (
        None
        if params["top_p"].default == 1.0
        else "a top_p of 1.0 changes nothing: let that be the default."
    )


@exercise("alias")
def _(my_uri, version, client):
    from mlflow.exceptions import MlflowException

    if my_uri != f"models:/{version.name}@mine":
        return "a model's address is models:/NAME@ALIAS; here the alias is mine."
    try:
        found = client.get_model_version_by_alias(version.name, "mine").version
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return f"{version.name} or its version was deleted. Run this page's cells from Register it on."
        return f"the registry knows no alias mine of {version.name}. Call client.set_registered_model_alias."
    return (
        None
        if str(found) == str(version.version)
        else (f"mine stands on version {found}, and this page's is {version.version}. Move it.")
    )


@exercise("pieces")
def _(read_piece):
    def chunk(delta, reason=None):
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

    piece = read_piece(chunk({"content": "Ma"}))
    if piece is ...:
        return "put your own in place of the three dots after return, run that cell, then this one."
    if not isinstance(piece, str):
        return f"a piece is text, and yours is of the type {type(piece).__name__}."
    if piece != "Ma":
        return "the text of a piece is the delta's content."
    if read_piece(chunk({}, "stop")) != "":
        return "the last chunk has a finish_reason and no text: return an empty text for it."
    return None


@exercise("seed")
def _(seeded, chat_model):
    if not isinstance(seeded, dict):
        return 'the settings are a dict, such as {"temperature": 1.0}.'
    chat_model.read_request({"messages": [{"role": "user", "content": "Hello"}]} | seeded)
    if more := _surplus(seeded, "temperature", "seed", "top_p", "top_k"):
        return more
    if not seeded.get("temperature"):
        return "at a temperature of 0 there is no chance to repeat. Make it warm first."
    return "a warm answer repeats itself only with a seed." if seeded.get("seed") is None else None


@exercise("settings")
def _(changes, chat_model):
    if not isinstance(changes, dict):
        return "the settings are a dict: names of chat_model.SETTINGS, each with a new value."
    if unknown := [name for name in changes if name not in chat_model.SETTINGS]:
        return f"{unknown[0]} is no setting. They are: {', '.join(chat_model.SETTINGS)}."
    chat_model.Settings(**chat_model.SETTINGS | changes)
    if changes.get("max_tokens") != 8:
        return "an answer has 8 tokens where a request doesn't say how many: that setting is max_tokens."
    if more := _surplus(changes, "max_tokens", "model", "temperature"):
        return more
    return (
        None
        if changes.get("model", "slm-onnx") != "slm-onnx"
        else "give the model a name of your own: model."
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
