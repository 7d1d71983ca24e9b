"""Single cells of the pages, run where a learner has another kernel, and for one model after the other.

Run: python -m helpers nightly tests/nightly/test_cells.py
"""

import mlflow
import pytest
from mlflow.models import infer_signature
from support import NAMES, PAGES, find_cell
from support.small_model import use_store


@pytest.fixture
def here(store):
    return use_store(store)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """Return a file of code that is a model in three lines."""
    file = tmp_path_factory.mktemp("small") / "model.py"
    file.write_text(
        "import mlflow\nclass Small(mlflow.pyfunc.PythonModel):\n    def predict(self, context, "
        "model_input: list[str]):\n        return model_input\nmlflow.models.set_model(Small())\n"
    )
    return str(file)


@pytest.mark.parametrize("page", PAGES)
def test_the_champion_stays_with_another_model_unless_its_weights_are_random(
    page, here, small_model
):
    info = mlflow.pyfunc.log_model(
        name="small",
        python_model=small_model,
        pip_requirements=["mlflow"],
        signature=infer_signature(["a"], ["a"]),
    )
    cell, client = find_cell(page, "mlflow.register_model("), here["client"]
    # The model of a run after the other, and who is champion after it.
    champions = []
    for model in (
        "tiny-phi3",
        "tiny-phi3",
        "smollm2-135m",
        "tiny-phi3",
        "phi-3-mini-4k",
        "smollm2-135m",
    ):
        names = here | {"model_info": info, "model": model}
        exec(cell, names)
        champion = client.get_model_version_by_alias(NAMES[page], "champion")
        assert (
            client.get_model_version_by_alias(NAMES[page], names["alias"]).version
            == names["version"].version
        )
        champions.append((names["alias"], champion.tags["model"], int(champion.version)))
    assert champions == [
        ("champion", "tiny-phi3", 1),
        ("champion", "tiny-phi3", 2),
        ("champion", "smollm2-135m", 3),
        ("challenger", "smollm2-135m", 3),
        ("challenger", "smollm2-135m", 3),
        ("champion", "smollm2-135m", 6),
    ]
