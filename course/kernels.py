"""Runs pages on the Python that runs the command.

A notebook asks for the kernel ``python3``. The first kernel of that name on Jupyter's path may
belong to another Python.
"""

import os
import tempfile
from pathlib import Path

from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from traitlets import default

from helpers.files import is_writable
from helpers.paths import ROOT


class Kernels(KernelSpecManager):
    """Jupyter's list of kernels with the running Python as its only entry."""

    def find_kernel_specs(self) -> dict[str, str]:
        """Return the folder of each kernel's pictures by its name; see jupyter_client's KernelSpecManager."""
        return {NATIVE_KERNEL_NAME: RESOURCES}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return how to start the running Python, also for a page that names another kernel."""
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class Kernel(AsyncKernelManager):
    """Starts a kernel from ``Kernels``."""

    @default("kernel_spec_manager")
    def _list_kernels(self):
        return Kernels(parent=self)


def kernel_variables() -> dict[str, str]:
    """Return the environment variables that a kernel, or the JupyterLab that starts it, needs.

    The course's folder comes first on Python's path, so that ``helpers`` and ``serving`` are the
    course's packages. If the home folder cannot be written, Jupyter and IPython get a temporary one.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if _has_home():
        return {"PYTHONPATH": path}
    home = tempfile.mkdtemp(prefix="home-")
    return {"PYTHONPATH": path, "HOME": home, "USERPROFILE": home}


def _has_home():
    try:
        return is_writable(Path.home())
    except (OSError, RuntimeError):  # RuntimeError: the system does not know the home folder
        return False
