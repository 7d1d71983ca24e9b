"""Downloads in this process what the course downloads in one of its own: a test then waits for no start of Python."""

import importlib
import json
import time
from types import SimpleNamespace

from huggingface_hub import close_session, constants, file_download
from huggingface_hub.utils import _http

from helpers.models import sources


def download_here(monkeypatch, endpoint="https://huggingface.co"):
    """Let ``call_in_subprocess`` work in this process, with the Hub at ``endpoint``; return its pauses in seconds.

    No pause is slept through, and a file is written in small pieces.
    """

    def ask(title, module, order, environment=None):
        return json.loads(
            json.dumps(importlib.import_module(module).work(json.loads(json.dumps(order))))
        )

    pauses = []
    clock = SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic, time=time.time)
    for place, name, value in (
        (sources, "call_in_subprocess", ask),
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "ENDPOINT", endpoint),
        (constants, "DOWNLOAD_CHUNK_SIZE", 10_000),
        (file_download, "time", clock),
        (_http, "time", clock),
        (
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        ),
    ):
        monkeypatch.setattr(place, name, value)
    close_session()
    return pauses
