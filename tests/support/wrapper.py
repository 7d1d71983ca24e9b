"""The wrapper that CustomPythonWrapper teaches, out of the page's own cells."""

from pathlib import Path

import mlflow

from support import find_cell

PAGE = "CustomPythonWrapper"


def write_wrapper(folder: Path) -> Path:
    """Write the file that the page's ``%%writefile`` cell writes."""
    file = folder / "prompt_model.py"
    file.write_text(find_cell(PAGE, "%%writefile").split("\n", 1)[1], encoding="utf-8")
    return file


def log_wrapper(file: Path, onnx_dir: Path, folder: Path) -> str:
    """Log the wrapper with the page's signature; return its URI. A store in ``folder`` becomes the active one."""
    scope = {"mlflow": mlflow, "prompt": "a", "max_tokens": 16, "temperature": 0.0}
    exec(find_cell(PAGE, "log_model(").split("\nstore = open_store")[0], scope)
    mlflow.set_tracking_uri("sqlite:///" + (folder / "mlflow.db").as_posix())
    mlflow.create_experiment("wrapper", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment("wrapper")
    return mlflow.pyfunc.log_model(
        name="wrapper",
        python_model=str(file),
        artifacts={"model": str(onnx_dir)},
        model_config={"provider": "cpu", "context_length": 4096},
        signature=scope["signature"],
        pip_requirements=["mlflow", "onnxruntime-genai"],
    ).model_uri
