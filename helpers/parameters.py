"""Checks a page's parameters and the shell's variables before anything starts that takes long."""

import ast
import json
import logging
import math
import os
from collections.abc import Iterable

from helpers.devices import DEVICES
from helpers.errors import CourseError
from helpers.models.catalogue import TRACKS, find_entry

# The default values of a page's parameters.
DEFAULTS = {
    "model": "smollm2-135m",
    "tracking_uri": "",
    "question": "What is the capital of Spain?",
    "system_prompt": "Answer in one short sentence.",
    "max_tokens": 64,
    "temperature": 0.0,
    "device": "cpu",
}
PARAMETERS = tuple(DEFAULTS)
# Variables that libraries read as a number when they are imported.
NUMBER_VARIABLES = (
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "HF_HUB_ETAG_TIMEOUT",
    "JOBLIB_MULTIPROCESSING",
    "LOKY_MAX_CPU_COUNT",
    "LOKY_MAX_DEPTH",
)


def check_parameters(
    *,
    model: str,
    tracking_uri: str,
    question: str,
    system_prompt: str,
    max_tokens: int,
    temperature: float,
    device: str,
    track: str | None = None,
) -> None:
    """Raise CourseError unless all parameters can be used.

    Parameters
    ----------
    model : str
        A name of ``data/models.toml``, or ``hub:org/name``.
    tracking_uri : str
        An MLflow tracking URI; empty for the course's own store.
    question, system_prompt : str
        The question and the instruction before it, which may be empty.
    max_tokens : int
        The most tokens of an answer: 1 to what fits into the model's context.
    temperature : float
        0 to 2; 0 takes the most probable token each time.
    device : str
        One of ``helpers.devices.DEVICES``. Each track asks its engine whether the device exists.
    track : str, optional
        One of ``helpers.models.catalogue.TRACKS``, for a page that takes either track.

    Raises
    ------
    CourseError
        Names the parameter, its value and its range.
    """
    _refuse_injected(PARAMETERS if track is None else (*PARAMETERS, "track"))
    check_variables()
    if track is not None and track not in TRACKS:
        raise CourseError(
            "track-unknown", f"track is {track!r}.", f"Choose one of: {', '.join(TRACKS)}."
        )
    for name, value in (
        ("model", model),
        ("tracking_uri", tracking_uri),
        ("question", question),
        ("system_prompt", system_prompt),
        ("device", device),
    ):
        if not isinstance(value, str):
            raise CourseError(
                "parameter-type",
                f"{name} is {value!r}, and it has to be text.",
                f"Put {name} in quotes; with papermill, use -r in place of -p.",
            )
    entry = find_entry(model)
    if not question.strip():
        raise CourseError(
            "question-empty",
            "question is empty.",
            "Ask something, such as: What is the capital of Spain?",
        )
    for name, value in (("question", question), ("system_prompt", system_prompt)):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise CourseError(
                "parameter-text",
                f"{name} holds a character that is not text (NUL or half a surrogate pair).",
                "Remove that character.",
            )
    # For a model from the Hub it is not known yet: check_fits checks again later.
    limit = entry.context_length or math.inf
    if (
        not isinstance(max_tokens, int)
        or isinstance(max_tokens, bool)
        or not 0 < max_tokens < limit
    ):
        most = "" if limit == math.inf else f" to {limit - 1}"
        raise CourseError(
            "max-tokens-range",
            f"max_tokens is {max_tokens!r}.",
            f"Choose a whole number from 1{most} for {entry.title}.",
        )
    if (
        not isinstance(temperature, int | float)
        or isinstance(temperature, bool)
        or not math.isfinite(temperature)
        or not 0 <= temperature <= 2
    ):
        raise CourseError(
            "temperature-range", f"temperature is {temperature!r}.", "Choose a number from 0 to 2."
        )
    if device not in DEVICES:
        raise CourseError(
            "device-unknown", f"device is {device!r}.", f"Choose one of: {', '.join(DEVICES)}."
        )


def check_variables() -> None:
    """Raise CourseError if MLflow, or a library that it uses, cannot read the value of a variable of the shell."""
    for name in (*NUMBER_VARIABLES, "MLFLOW_RUN_CONTEXT", "MLFLOW_LOGGING_LEVEL"):
        if name in os.environ and not _is_readable(name, os.environ[name]):
            raise _unreadable(f"{name} is {os.environ[name]!r}")
    try:
        from mlflow import environment_variables as known

        for variable in vars(known).values():
            if isinstance(variable, known._EnvironmentVariable):
                variable.get()
    except ValueError as error:  # it names the variable and quotes its value
        raise _unreadable(error) from None


def _is_readable(name, value):
    if name == "MLFLOW_LOGGING_LEVEL":
        return value.upper() in logging.getLevelNamesMapping()
    try:
        return type(json.loads(value)) is (dict if name == "MLFLOW_RUN_CONTEXT" else int)
    except ValueError:
        return False


def _unreadable(what):
    return CourseError(
        "variable-unreadable",
        f"A variable of this shell cannot be read: {what}.",
        "Correct or unset it, and run this again; in a page, restart the kernel.",
    )


def name_run(model: str, **parameters) -> str:
    """Return a name for a run: the model, and each parameter that differs from the default.

    ``tracking_uri`` is left out, and a text is cut after 40 characters.
    """
    changed = [
        f"{name}={str(value)[:40]}"
        for name, value in parameters.items()
        if name != "tracking_uri" and value != DEFAULTS[name]
    ]
    return f"{model}: {', '.join(changed)}" if changed else model


def _refuse_injected(known):
    """Raise CourseError if papermill has inserted a parameter that the notebook does not have.

    papermill itself only logs a line, and exits with 0.
    """
    try:
        shell = get_ipython()
    except NameError:
        return
    refuse_unknown(injected_names(shell.user_ns.get("In", [])), known)


def injected_names(cells: list[str]) -> list[str]:
    """Return the names that the cell inserted by papermill sets; of several such cells, the last one counts."""
    injected = [source for source in cells if source.startswith("# Parameters\n")]
    statements = ast.parse(injected[-1]).body if injected else []
    return [
        statement.targets[0].id for statement in statements if isinstance(statement, ast.Assign)
    ]


def refuse_unknown(names: Iterable[str], known: Iterable[str] = PARAMETERS) -> None:
    """Raise CourseError unless all ``names`` are ``known`` as parameters of a notebook."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise CourseError(
            "parameter-unknown",
            f"This notebook has no parameter called {', '.join(unknown)}.",
            f"Choose among: {', '.join(known)}.",
        )


def check_fits(prepared, messages: list[dict[str, str]], max_tokens: int) -> int:
    """Count a conversation's tokens, markup included, and refuse what the model cannot take.

    Parameters
    ----------
    prepared : PreparedModel
        The model, for either track; its tokenizer has a chat template.
    messages : list of dict
        ``role`` and ``content`` each.
    max_tokens : int
        Most tokens of the answer.

    Raises
    ------
    CourseError
        The prompt and its answer are too long together, or a message holds the model's own markup,
        with which its author could write in the name of another role.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        prepared.transformers_dir or prepared.onnx_dir, trust_remote_code=False
    )
    for message in messages:
        for token in tokenizer.get_added_vocab():
            if token.strip() and token in message["content"]:
                raise CourseError(
                    "markup",
                    f"The {message['role']}'s text holds {token}, which is markup to this model.",
                    "Remove it, or write it with a space inside.",
                )
    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise CourseError(
            "template",
            f"The model's chat template refuses this conversation: {error}.",
            "Choose an instruct model whose template takes a system message and a user's.",
        ) from None
    count = len(tokenizer.encode(prompt, add_special_tokens=False))
    context_length = prepared.entry.context_length
    if count + max_tokens > context_length:
        raise CourseError(
            "too-long",
            f"The prompt takes {count} of the model's {context_length} tokens, "
            f"which leaves {max(context_length - count, 0)} for the answer, and max_tokens is {max_tokens}.",
            "Lower max_tokens or shorten the question.",
        )
    return count
