"""Runs a page on the Python that runs the command, whatever kernels and packages of the same names are around.

A notebook asks for the kernel ``python3``, and the first of that name on Jupyter's path may belong
to another Python.
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
        """Return how to start the running Python, also for a page that was saved with another kernel's name."""
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class Kernel(AsyncKernelManager):
    """A kernel that is one of ``Kernels``."""

    @default("kernel_spec_manager")
    def _list_kernels(self):
        return Kernels(parent=self)


def kernel_variables() -> dict[str, str]:
    """Return what a kernel, or the JupyterLab that starts it, has in its environment beside this process's own.

    The course's folder comes first on Python's path: ``helpers`` and ``serving`` are then the
    course's, whatever else is called so. Where the home folder takes no file, Jupyter and IPython
    keep theirs in a temporary one.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return (
        {"PYTHONPATH": path}
        if _has_home()
        else {
            "PYTHONPATH": path,
            **dict.fromkeys(("HOME", "USERPROFILE"), tempfile.mkdtemp(prefix="home-")),
        }
    )


def _has_home():
    try:
        return is_writable(Path.home())
    except (OSError, RuntimeError):  # there is no such folder, or nobody knows which one it is
        return False
