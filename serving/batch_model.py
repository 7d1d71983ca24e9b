"""Answers the cells of a column on the workers of a Spark cluster.

`serving/batch.py` ships this file with the model.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException

from .errors import ServiceError, to_service_error
from .served_model import ServedModel

ROWS_AT_ONCE = 64  # the most rows in one call of a model that batches them
TEST_REQUEST = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
# The output's columns with an answer, and their Spark types.
ANSWER_COLUMNS = {
    "answer": "string",
    "status": "string",
    "reason": "string",
    "finish_reason": "string",
    "prompt_tokens": "long",
    "completion_tokens": "long",
}


def error_row(reason: str) -> dict:
    """Return the fields of ``ANSWER_COLUMNS`` for a row without an answer."""
    empty = {name: "" if kind == "string" else 0 for name, kind in ANSWER_COLUMNS.items()}
    return empty | {"status": "error", "reason": reason}


def answer_row(completion: dict) -> dict:
    """Return the fields of ``ANSWER_COLUMNS`` for a chat completion."""
    choice = completion["choices"][0]
    usage = completion.get("usage") or {}
    return {
        "answer": choice["message"]["content"] or "",
        "status": "ok",
        "reason": "",
        "finish_reason": choice.get("finish_reason") or "",
        "prompt_tokens": usage.get("prompt_tokens") or 0,
        "completion_tokens": usage.get("completion_tokens") or 0,
    }


def read_messages(cell: Any, system: str = "") -> list[dict] | None:
    """Return a cell's messages, after the system prompt if there is one.

    The cell holds a text or a list of messages. Returns None if it is blank, null or of another
    type.

    Raises
    ------
    ServiceError
        A message of the list is null.
    """
    before = [{"role": "system", "content": system}] if system else []
    if isinstance(cell, str) and cell.strip():
        return [*before, {"role": "user", "content": cell}]
    if isinstance(cell, list | np.ndarray) and len(cell):
        if any(message is None for message in cell):
            raise ServiceError(400, "A message is null.", "invalid_value", "messages")
        messages = [{"role": message["role"], "content": message["content"]} for message in cell]
        return [*before, *messages]
    return None


def answer_rows(
    cells: Sequence[Any],
    system: str,
    complete: Callable[[list[list[dict]]], list[dict]],
    check_model: Callable[[], Any],
    at_once: int = ROWS_AT_ONCE,
) -> list[dict]:
    """Answer the conversation in each cell. An error in one row changes no other row.

    Parameters
    ----------
    cells : sequence
        What `read_messages` takes.
    system : str
        A system prompt for each row, or an empty text.
    complete : callable
        Returns the chat completions of several conversations. It raises if one of them is refused.
    check_model : callable
        Sends the model a request that it can answer. It raises if the model does not work.
    at_once : int
        The most conversations that ``complete`` gets. Those of similar length go together.

    Returns
    -------
    list of dict
        The fields of ``ANSWER_COLUMNS``, in the order of ``cells``.

    Raises
    ------
    Exception
        What ``check_model`` raises: then no row is at fault.
    """
    rows = []
    conversations = []
    for cell in cells:
        row = None
        messages = None
        try:
            messages = read_messages(cell, system)
            if messages is None:
                row = error_row("The cell is empty or null: it has no prompt.")
        except ServiceError as error:
            row = error_row(error.message)
        rows.append(row)
        conversations.append(messages)
    asked = [index for index, row in enumerate(rows) if row is None]
    asked.sort(key=lambda index: sum(len(one["content"] or "") for one in conversations[index]))
    groups = [asked[start : start + at_once] for start in range(0, len(asked), at_once)]
    while groups:
        group = groups.pop()
        try:
            completions = complete([conversations[index] for index in group])
            for index, completion in zip(group, completions, strict=True):
                rows[index] = answer_row(completion)
        except Exception as error:
            if len(group) > 1:  # halve the group until the row at fault is alone
                middle = len(group) // 2
                groups += [group[:middle], group[middle:]]
            else:
                rows[group[0]] = error_row(_explain_or_raise(error, check_model))
    return rows


def _explain_or_raise(error, check_model):
    """Return the reason to store for a row that failed.

    If the error is not the row's fault, test the model first, and raise what the test raises.
    """
    if to_service_error(error).status == 400:
        is_mlflow_error = isinstance(error, MlflowException)
        message = error.message if is_mlflow_error else to_service_error(error).message
        return message.partition("\n")[0][:500]
    check_model()  # Spark tries the task again if this raises
    return f"The model failed on this row: {type(error).__name__}."


class BatchModel(mlflow.pyfunc.PythonModel):
    """A chat model as Spark calls it: it returns a table with ``ANSWER_COLUMNS`` for a column of cells.

    The artifact ``model`` is the chat model's folder. ``model_config`` has ``fields``, which each
    request gets beside its messages; ``system``, a system prompt or an empty text; and
    ``threads``, the number of threads that one process may use.
    """

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        """Load the chat model, once for each Python process of a worker."""
        folder = Path(context.artifacts["model"])
        self._config = context.model_config
        flavor = mlflow.models.Model.load(folder).flavors["python_function"]
        has_threads = "threads" in (flavor.get("config") or {})
        config = {"threads": self._config["threads"]} if has_threads else None
        self._model = ServedModel(mlflow.pyfunc.load_model(folder.as_uri(), model_config=config))
        self._check_model()

    def predict(
        self,
        context: mlflow.pyfunc.PythonModelContext,
        model_input: pd.DataFrame,
        params: dict | None = None,
    ) -> pd.DataFrame:
        """Answer the cells of the first column. ``params`` is not used."""
        rows = answer_rows(
            list(model_input.iloc[:, 0]),
            self._config["system"],
            self._complete,
            self._check_model,
            1 if self._model.is_pipeline else ROWS_AT_ONCE,
        )
        return pd.DataFrame(rows, columns=list(ANSWER_COLUMNS))

    def _check_model(self):
        self._model.complete_all([TEST_REQUEST])

    def _complete(self, conversations):
        fields = self._config["fields"]
        return self._model.complete_all([{"messages": one} | fields for one in conversations])
