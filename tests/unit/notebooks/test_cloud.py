"""The cloud page from end to end, as a project, on the toy model: what its cluster loses, and what comes out.

nbmake runs it on the other track. Run: python -m helpers test tests/unit/notebooks/test_cloud.py
"""

import re

import nbformat
import pytest
from support import run_python
from support.projects import activated, project

pytestmark = [pytest.mark.slow, pytest.mark.index]


@pytest.fixture(scope="module")
def cells(tmp_path_factory, site):
    """Run the page with its exercises open; return of each cell the source, and what it shows, as text."""
    folder = tmp_path_factory.mktemp("clöud 1")
    words = project("cloud", model="tiny-phi3", track="transformers",
                    tracking_uri="sqlite:///" + (folder / "mlflow.db").as_posix())
    result = run_python(folder, *words, cwd=folder, network=False, PYTHONPATH=str(site), **activated(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    (page,) = re.findall(r"page: (\S.*)\.html", result.stdout)
    return [cell for cell in nbformat.read(f"{page}.ipynb", as_version=4).cells if cell.cell_type == "code"]


def shown(cells, text):
    """Return what the one cell shows that shows a text."""
    told = ["\n".join(output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
                      for output in cell.outputs) for cell in cells]
    (found,) = [said for said in told if text in said]
    return found


def test_the_page_runs_without_a_word_of_complaint(cells):
    told = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stderr"]
    known = re.compile(r"((Successfully r|R)egistered model .*|Created version .*|\s)*")
    assert not [text for text in told if not known.fullmatch(text)], told


def test_a_plain_call_is_refused_and_in_the_batch_bad_rows_say_why(cells):
    assert "Input messages should be list of dictionaries" in shown(cells, "PythonException")
    assert "5 rows in .../bad-answers.parquet: 2 answered, 3 errors" in shown(cells, "bad-answers.parquet: ")
    assert shown(cells, "Every row has its fate\n").count("error") == 3


def test_a_stopped_run_and_a_dead_worker_cost_no_row(cells):
    assert re.search(r"there is an output +False", shown(cells, "Stopped\n"))
    table = shown(cells, "After both losses\n")
    count = int(re.search(r"rows that went in +(\d+)", table)[1])
    assert [int(number) for number in re.findall(r"(?:came out|different ones) +(\d+)", table)] == [count, count]
    said = shown(cells, "many-answers.parquet: ")
    assert not re.search(r"before: 0|again: 0", said) and f"{count} answered, 0 errors" in said


def test_the_dry_run_fills_the_files_and_the_script_answers(cells):
    assert "az ml online-deployment create" in shown(cells, "az ml online-deployment create")
    assert '"choices"' in shown(cells, '"usage"')
