"""Cloud, executed as a project with its exercises open: what its cluster loses, and what comes out.

Run: python -m helpers test tests/pages/test_cloud.py
"""

import re

import pytest
from support.executed import Executed, assert_clean, execute_once


@pytest.fixture(scope="module")
def executed() -> Executed:
    return execute_once("cloud")


def test_the_page_runs_clean(executed):
    assert_clean(executed)


def test_a_plain_call_is_refused_and_in_the_batch_bad_rows_say_why(executed):
    said = executed.shown("PythonException")  # transformers' own words, or the chat model's
    assert (
        "Input messages should be list of dictionaries" in said
        or "messages[0].content has to be text" in said
    )
    assert "5 rows in .../bad-answers.parquet: 2 answered, 3 errors" in executed.shown(
        "bad-answers.parquet: "
    )
    assert executed.shown("Every row has its fate\n").count("error") == 3


def test_a_stopped_run_and_a_dead_worker_cost_no_row(executed):
    assert re.search(r"the output is whole +False", executed.shown("Stopped\n"))
    table = executed.shown("After both losses\n")
    count = int(re.search(r"rows that went in +(\d+)", table)[1])
    assert [int(number) for number in re.findall(r"(?:came out|different ones) +(\d+)", table)] == [
        count,
        count,
    ]
    said = executed.shown("many-answers.parquet: ")
    assert not re.search(r"before: 0|again: 0", said) and f"{count} answered, 0 errors" in said


def test_the_dry_run_fills_the_files_and_the_script_answers(executed):
    assert "az ml online-deployment create" in executed.shown("az ml online-deployment create")
    assert '"choices"' in executed.shown('"usage"')
