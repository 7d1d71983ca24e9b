"""Writes the requirements of a logged model from the versions that are installed."""

import importlib.metadata


def pinned(*names):
    """Return exact requirements for ``pip_requirements=``.

    Parameters
    ----------
    *names : str
        Distribution names, such as ``"torch"``.

    Returns
    -------
    list of str
        Such as ``["torch==2.13.0"]``. A build tag such as ``+cpu`` is left out: the machine
        that loads the model may offer another build.
    """
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in names]
