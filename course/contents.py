"""Lets JupyterLab open and save a page without changing it: a notebook file comes in with this Python's version.

JupyterLab writes the version of the running Python into every notebook that it opens. The course's
pages have none, because each learner has another.
"""

import platform

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


class Contents(AsyncLargeFileManager):
    """JupyterLab's files: a notebook without a version of Python gets the running one until it is saved."""

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
    """Return a notebook's language_info; None of any other file, and of a model without content."""
    content = model.get("content")
    return (
        content.get("metadata", {}).get("language_info")
        if model["type"] == "notebook" and content
        else None
    )
