"""Copies this package under a name of its own, for MLflow to log.

MLflow puts a model's ``code_paths`` on Python's search path, and does no more: two versions of a
model with a package of the same name would share one of the two in a process that loads both. So
the name of the copy is a hash of its sources.
"""

import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent
MODEL_FILE = "load_chat_model.py"
MODEL_CODE = """import mlflow
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
    package = folder.resolve() / f"chat_{digest.hexdigest()[:8]}"
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
            draft = Path(scratch) / "package"
            draft.mkdir()
            for source in sources:
                shutil.copyfile(source, draft / source.name)
            code = MODEL_CODE.format(package=package.name)
            (draft / MODEL_FILE).write_text(code, encoding="utf-8")
            try:
                draft.rename(package)
            except OSError:
                if not package.exists():  # otherwise another process was faster
                    raise
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
    return PackagedCode(str(package / MODEL_FILE), [str(package)])
