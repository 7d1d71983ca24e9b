"""Checks the exercises of CustomPythonWrapper."""

from helpers.exercises import exercise
from helpers.exercises.tracks import settings_hint


@exercise("warm engine")
def _(warm):
    return settings_hint(warm, ())


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
