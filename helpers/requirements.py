"""Finds the installed builds of packages, and writes a logged model's requirements from them."""

import importlib.metadata

# Distributions with the same modules as a package, for a GPU.
GPU_BUILDS = {
    "onnxruntime-genai": {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}
}


def installed_build(name: str) -> tuple[str, str | None]:
    """Return the distribution that is installed for the package ``name``, and its version; a build for a GPU first.

    The version is None if none is installed.
    """
    for build in (*GPU_BUILDS.get(name, {}).values(), name):
        try:
            return build, importlib.metadata.version(build)
        except importlib.metadata.PackageNotFoundError:
            pass
    return name, None


def pinned(*names: str) -> list[str]:
    """Return exact requirements for ``pip_requirements=``, such as ``["torch==2.13.0"]``.

    A build for a GPU is named instead of the package if it is installed. A tag such as ``+cpu`` is
    left out: the machine that loads the model may have another build.
    """
    found = [installed_build(name) for name in names]
    return [
        f"{build}=={(version or importlib.metadata.version(build)).split('+')[0]}"
        for build, version in found
    ]
