"""Lets JupyterLab open and save a page without changing it.

JupyterLab writes the version of the running Python into every notebook that it opens. The course's
pages have no version, because each learner has another Python.
"""

import platform

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class Contents(AsyncLargeFileManager):
    """Gives a notebook the running Python's version when it is opened, and removes it when it is saved."""

    async def get(self, path, content=True, **options):
        """Return a file's model; see jupyter_server's ContentsManager."""
        model = await super().get(path, content=content, **options)
        if language := _language(model):
            language.setdefault("version", platform.python_version())
        return model

    async def save(self, model, path=""):
        """Write a file; see jupyter_server's ContentsManager."""
        if language := _language(model):
            language.pop("version", None)
        return await super().save(model, path)


def _language(model):
    """Return a notebook's language_info; None for any other file, and for a model without content."""
    content = model.get("content")
    return (
        content.get("metadata", {}).get("language_info")
        if model["type"] == "notebook" and content
        else None
    )
