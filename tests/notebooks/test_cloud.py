"""The cloud page from end to end, on the toy model: what its cluster loses, and what comes out all the same.

Run: python -m helpers test tests/notebooks/test_cloud.py
"""

import re

import nbformat
import pytest
from support import run_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["onnx", "transformers"])
def ran(request, tmp_path_factory, site):
    """Run the page, solved; return what each cell shows, as text, and what the program complained of."""
    folder = tmp_path_factory.mktemp("clöud 1")
    store = "sqlite:///" + (folder / "mlflow.db").as_posix()
    result = run_python(folder, "-m", "helpers", "notebook", "Cloud", "--solved", "-p", "track", request.param,
                        "-p", "model", "tiny-phi3", "-p", "tracking_uri", store, "--output", folder,
                        PYTHONPATH=str(site))
    assert result.returncode == 0, result.stdout + result.stderr
    cells = nbformat.read(folder / "Cloud.ipynb", as_version=4).cells
    return [(cell.source, "\n".join(
        output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "")
        for output in cell.outputs)) for cell in cells if cell.cell_type == "code"], result, cells


def shown(ran, text):
    """Return what the one cell shows that shows a text."""
    (found,) = [said for _, said in ran[0] if text in said]
    return found


def test_the_page_runs_without_a_word_of_complaint(ran):
    told = [output.text for cell in ran[2] if cell.cell_type == "code" for output in cell.outputs
            if output.get("name") == "stderr"]
    known = re.compile(r"((Successfully r|R)egistered model .*|Created version .*|\s)*")
    assert not [text for text in told if not known.fullmatch(text)], told
    assert sum(said.startswith("PASS") for _, said in ran[0]) == 4


def test_a_bad_row_fails_the_plain_call_and_only_itself_in_the_batch(ran):
    assert "5 rows in .../bad-answers.parquet: 2 answered, 3 errors" in shown(ran, "bad-answers.parquet: ")
    assert shown(ran, "Every row has its fate\n").count("error") == 3


def test_a_dead_worker_and_a_stopped_run_cost_no_row(ran):
    table = shown(ran, "After both losses\n")
    count = int(re.search(r"rows that went in +(\d+)", table)[1])
    assert [int(number) for number in re.findall(r"(?:came out|different ones) +(\d+)", table)] == [count, count]
    assert re.search(r"there is an output +False", shown(ran, "Stopped\n"))
    said = shown(ran, "many-answers.parquet: ")
    assert not re.search(r"(before|again): 0", said) and f"{count} answered, 0 errors" in said


def test_the_dry_run_fills_the_files_and_the_script_answers(ran):
    assert "az ml online-deployment create" in shown(ran, "az ml online-deployment create")
    assert '"choices"' in shown(ran, '"usage"')
