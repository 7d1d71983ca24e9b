"""Writes what a caller gets: JSON, and the server-sent events of a stream."""

import json
from collections.abc import Iterable, Iterator

# Characters at which some clients end a line, although JSON allows them in a string.
LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold the chunks back
}
LAST_EVENT = b"data: [DONE]\n\n"


def to_json(value: dict) -> bytes:
    """Return a value as JSON without characters at which a client may end the line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(LINE_ENDS).encode()


def to_event(value: dict) -> bytes:
    """Return a value as a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def to_events(chunks: Iterable[dict], request: dict) -> Iterator[bytes]:
    """Yield the events of a stream's chunks, without the last one.

    If the request asks for usage, each chunk has ``usage``: null until the last. If it does not,
    the chunk that has only usage is left out.
    """
    sends_usage = bool((request.get("stream_options") or {}).get("include_usage"))
    for chunk in chunks:
        if sends_usage:
            yield to_event({"usage": None} | chunk)
        elif chunk["choices"]:
            yield to_event(chunk)
