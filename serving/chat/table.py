"""Reads the requests in a table of pandas, one from each row."""

import math
from typing import Any

import numpy as np
import pandas as pd

from .contract import ChatRequest, Refusal, invalid, to_python


def read_table(table: pd.DataFrame) -> list[dict]:
    """Return the requests in a table. They are not checked.

    MLflow makes such a table of a dict and of a list of dicts, too.

    Parameters
    ----------
    table : pandas.DataFrame
        One request in each row, one field in each column. A gap is a field that is not given.

    Raises
    ------
    Refusal
        For a table without columns, or with two columns of one name.
    """
    if table.columns.empty:  # MLflow makes such a table of {}
        raise invalid("messages", ChatRequest.model_fields["messages"].description)
    if not table.columns.is_unique:
        raise invalid("A table", "of one column for each field")
    rows = [
        {name: None if is_gap(value) else value for name, value in row.items()}
        for row in table.to_dict("records")
    ]
    return _split_instances(rows[0]) if len(rows) == 1 else rows


def is_gap(value: Any) -> bool:
    """Tell whether pandas filled in the value: NA, NaT, or NaN in a column of numbers.

    Pandas 3 gives None in place of NA, pandas 2 does not.
    """
    return value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value))


def _split_instances(row: dict) -> list[dict]:
    """Return the requests in the only row of a table.

    Of a body with ``instances``, MLflow's server makes one row. Each of its fields is the list of
    the values that the requests gave, and a request without the field is skipped in that list.
    """
    given = {name: value for name, value in row.items() if value is not None}
    conversations = to_python(given.get("messages"), 2)
    if not (
        isinstance(conversations, list)
        and conversations
        and all(isinstance(messages, list) for messages in conversations)
    ):
        return [row]
    count = len(conversations)
    if any(
        not isinstance(value, list | np.ndarray) or len(value) != count for value in given.values()
    ):
        raise Refusal(
            "Of a field that not all instances have, MLflow's server does not say whose it is. "
            "Send inputs in place of instances, or the same fields with each."
        )
    return [{name: value[place] for name, value in given.items()} for place in range(count)]
