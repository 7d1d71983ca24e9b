"""Checks the exercises of TransformerPipeline."""

from helpers.exercises import exercise, surplus
from helpers.exercises.tracks import settings_hint


@exercise("warm pipeline")
def _(warm):
    return settings_hint(warm, ("max_new_tokens",))


@exercise("request")
def _(request, model_info):
    from mlflow.models import validate_schema

    if not isinstance(request, dict):
        return "a request is a dict: the names of the first column, each with its value."
    fields = model_info.signature.inputs.input_names()
    if unknown := [name for name in request if name not in fields]:
        return f"the signature has no field {unknown[0]}, and MLflow would drop it with a warning."
    validate_schema(request, model_info.signature.inputs)
    if more := surplus(request, "messages", "max_tokens", "stop", "temperature", "top_p"):
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
