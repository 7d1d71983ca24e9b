"""The lesson's wrapper loads in another process.

Run: python -m helpers nightly tests/nightly/test_wrapper.py
"""

from pathlib import Path

import mlflow
from support.wrapper import log_wrapper, write_wrapper


def test_it_loads_in_another_process_without_pickles_and_without_the_course(tiny, python, tmp_path):
    store = tmp_path / "störe 1"
    store.mkdir()
    logged = log_wrapper(write_wrapper(store), tiny.onnx_dir, store)
    code = (
        "import sys, mlflow; sys.modules['helpers'] = None; mlflow.set_tracking_uri(sys.argv[1]); "
        "print(ascii(mlflow.pyfunc.load_model(sys.argv[2]).predict({'prompt': ['a', 'b']})))"
    )
    result = python(
        "-c",
        code,
        mlflow.get_tracking_uri(),
        logged,
        cwd=tmp_path,
        network=False,
        MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
    )
    assert result.returncode == 0, result.stderr
    expected = mlflow.pyfunc.load_model(logged).predict({"prompt": ["a", "b"]})
    assert result.stdout.strip() == ascii(expected)
    files = [
        path
        for path in Path(mlflow.artifacts.download_artifacts(logged)).rglob("*")
        if path.is_file()
    ]
    assert "prompt_model.py" in {path.name for path in files}
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".joblib")]
