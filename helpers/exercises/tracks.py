"""Checks the exercise that both tracks have, and the settings that both ask for."""

from helpers.exercises import exercise


def settings_hint(settings, length):
    """Return a hint on settings that should make an answer random; ``length`` has the fields that limit its length."""
    if not isinstance(settings, dict):
        return 'the settings are a dict, such as {"do_sample": True}.'
    known = {"do_sample", "temperature", "top_p", "top_k", *length}
    if unknown := [name for name in settings if name not in known]:
        return f"{unknown[0]} is no setting here. Choose among: {', '.join(sorted(known))}."
    if settings.get("do_sample") is not True:
        return "without do_sample=True the most probable token is taken each time, whatever the temperature."
    temperature = settings.get("temperature", 1.0)
    if (
        isinstance(temperature, bool)
        or not isinstance(temperature, int | float)
        or not 0 < temperature <= 2
    ):
        return (
            "the temperature is a number above 0, up to 2; 1.0 keeps the model's own probabilities."
        )
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
        return f"{version.name} has no alias mine in the registry. Call client.set_registered_model_alias."
    return (
        None
        if str(found) == str(version.version)
        else (
            f"the alias mine is on version {found}, and this page's version is {version.version}. Move it."
        )
    )
