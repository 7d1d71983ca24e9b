"""Writes the requirements of a logged model from the versions that are installed."""

import importlib.metadata

from helpers.setup import GPU_BUILDS


def pinned(*names):
    """Return exact requirements for ``pip_requirements=``.

    Parameters
    ----------
    *names : str
        Distribution names, such as ``"torch"``. Where a build for a GPU is installed in a package's place, such as
        onnxruntime-genai-cuda, that one is named.

    Returns
    -------
    list of str
        Such as ``["torch==2.13.0"]``. A build tag such as ``+cpu`` is left out: the machine
        that loads the model may offer another build.
    """
    return [f"{build}=={version.split('+')[0]}" for build, version in map(_installed, names)]


def _installed(name):
    for build in GPU_BUILDS.get(name, ()):
        try:
            return build, importlib.metadata.version(build)
        except importlib.metadata.PackageNotFoundError:
            pass
    return name, importlib.metadata.version(name)
