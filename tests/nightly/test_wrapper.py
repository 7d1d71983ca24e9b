"""The lesson's wrapper loads in another process.

Run: python -m helpers nightly tests/nightly/test_wrapper.py
"""


from pathlib import Path

import mlflow
import nbformat
import pytest
from support import ROOT


def cell_of(start):
    """Return the notebook's cell that holds this text."""
    notebook = nbformat.read(ROOT / "notebooks" / "CustomPythonWrapper.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if start in cell.source]
    return cell


@pytest.fixture(scope="module")
def signature():
    """Return the signature that the notebook writes."""
    scope = {"mlflow": mlflow, "prompt": "a", "max_tokens": 16, "temperature": 0.0}
    exec(cell_of("log_model(").source.split("\nstore = tracking_store")[0], scope)
    return scope["signature"]


@pytest.fixture(scope="module")
def wrapper_file(tmp_path_factory):
    """Return the file that the notebook's cell writes."""
    cell = cell_of("%%writefile")
    file = tmp_path_factory.mktemp("wrapper") / "prompt_model.py"
    file.write_text(cell.source.split("\n", 1)[1], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def logged(wrapper_file, signature, tiny, tmp_path_factory):
    """Return the URI of the logged wrapper."""
    folder = tmp_path_factory.mktemp("störe 1")
    mlflow.set_tracking_uri("sqlite:///" + (folder / "mlflow.db").as_posix())
    mlflow.create_experiment("wrapper", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment("wrapper")
    info = mlflow.pyfunc.log_model(
        name="wrapper", python_model=str(wrapper_file), artifacts={"model": str(tiny.onnx_dir)},
        model_config={"provider": "cpu", "context_length": 4096},
        signature=signature,
        pip_requirements=["mlflow", "onnxruntime-genai"])
    return info.model_uri


@pytest.fixture(scope="module")
def model(logged):
    return mlflow.pyfunc.load_model(logged)


def test_it_loads_in_another_process_without_pickles_and_without_the_course(logged, python, tmp_path):
    code = ("import sys, mlflow; sys.modules['helpers'] = None; mlflow.set_tracking_uri(sys.argv[1]); "
            "print(ascii(mlflow.pyfunc.load_model(sys.argv[2]).predict({'prompt': ['a', 'b']})))")
    result = python("-c", code, mlflow.get_tracking_uri(), logged, cwd=tmp_path, network=False,
                    MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false")
    assert result.returncode == 0, result.stderr
    expected = mlflow.pyfunc.load_model(logged).predict({"prompt": ["a", "b"]})
    assert result.stdout.strip() == ascii(expected)
    files = [path for path in Path(mlflow.artifacts.download_artifacts(logged)).rglob("*") if path.is_file()]
    assert "prompt_model.py" in {path.name for path in files}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".joblib")]
