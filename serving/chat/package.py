"""Copies this package under a name of its own, for MLflow to log.

MLflow puts a model's ``code_paths`` on Python's search path, and does no more: two versions of a
model with a package of the same name would share one of the two in a process that loads both. So
the copy is named by its sources.
"""

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent
MODEL_FILE = """import mlflow
from {package}.model import ChatModel
mlflow.models.set_model(ChatModel())
"""


class PackagedCode(NamedTuple):
    """What `mlflow.pyfunc.log_model` takes as ``python_model`` and ``code_paths``."""

    python_model: str
    code_paths: list[str]


def package_code(folder: Path) -> PackagedCode:
    """Copy this package into ``folder``, named by its sources, with a file that loads it.

    The same sources have the same name. A copy that is there already stays as it is. ``folder`` is
    put on Python's search path, because MLflow runs the file when it logs it.
    """
    sources = sorted(SOURCES.glob("*.py"))
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    name = f"chat_{digest.hexdigest()[:8]}"
    package, model_file = folder / name, folder / f"load_{name}.py"
    if not (package.exists() and model_file.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may package the same sources now: each writes a folder of its own and
        # renames it at the end.
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            for source in sources:
                (Path(draft) / name).mkdir(exist_ok=True)
                shutil.copyfile(source, Path(draft) / name / source.name)
            (Path(draft) / model_file.name).write_text(
                MODEL_FILE.format(package=name), encoding="utf-8"
            )
            if not package.exists():
                (Path(draft) / name).rename(package)
            (Path(draft) / model_file.name).replace(model_file)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return PackagedCode(str(model_file), [str(package)])
