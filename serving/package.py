"""Copies some of the files here under a package name of their own, for MLflow to log.

MLflow puts a model's ``code_paths`` on Python's search path, and does no more: two versions of a
model with a package of the same name would share one of the two in a process that loads both. So
the name of a copy is a hash of its sources.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# What the service, the batch program and Azure's scoring script share, and travels with each.
SHARED_FILES = ("__init__.py", "errors.py", "events.py", "request.py", "served_model.py")
LOADER_CODE = """import mlflow
from {package}.{module} import {model}
mlflow.models.set_model({model}())
"""


class PackagedCode(NamedTuple):
    """What `mlflow.pyfunc.log_model` takes as ``python_model`` and ``code_paths``."""

    python_model: str
    code_paths: list[str]


def copy_package(
    sources: Sequence[Path], folder: Path, prefix: str, module: str, model: str
) -> PackagedCode:
    """Copy sources into a package in ``folder``, with a file that loads their model.

    The same sources have the same name. A copy that is there already stays as it is. ``folder`` is
    put on Python's search path, because MLflow runs the loading file when it logs it.

    Parameters
    ----------
    sources : sequence of Path
        The files of the package. They import each other relatively.
    folder : Path
        Where the package is made.
    prefix : str
        What its name begins with. A hash follows.
    module, model : str
        The module and the class of the `mlflow.pyfunc.PythonModel` in it.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    package = folder.resolve() / f"{prefix}_{digest.hexdigest()[:8]}"
    loader = f"load_{prefix}_model.py"
    if not package.exists():
        package.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=package.parent) as scratch:
            draft = Path(scratch) / "package"
            draft.mkdir()
            for source in sources:
                shutil.copyfile(source, draft / source.name)
            code = LOADER_CODE.format(package=package.name, module=module, model=model)
            (draft / loader).write_text(code, encoding="utf-8")
            try:
                draft.rename(package)
            except OSError:
                if not package.exists():  # otherwise another process was faster
                    raise
    if str(package.parent) not in sys.path:
        sys.path.append(str(package.parent))
    return PackagedCode(str(package / loader), [str(package)])
