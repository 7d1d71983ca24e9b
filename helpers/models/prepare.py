"""Gets a model ready for the tracks, once: ``prepare_model``. It fetches, converts and exports; it loads no model."""

import contextlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.errors import CourseError
from helpers.files import is_writable, locked
from helpers.models.catalogue import HUB_NAME, TRACKS, CatalogueEntry, find_entry, read_catalogue
from helpers.models.folders import is_whole, read_receipt
from helpers.models.sources import ensure_folder, hub_name, is_from_hub, source_of, was_exported
from helpers.models.space import check_memory, disk_errors, disk_full, memory_needed
from helpers.paths import model_cache


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready for the tracks that were asked for; the folder of another track is None."""

    entry: CatalogueEntry  # what is known of it; of its context, what the track's files take
    transformers_dir: Path | None  # for transformers: safetensors, configuration, tokenizer
    onnx_dir: Path | None  # for onnxruntime_genai: ONNX, genai_config.json, tokenizer
    # Where the files of each track came from, to the commit or the hash: log it with a run.
    sources: dict[str, str]


def prepare_model(name: str, track: str | None = None, export: bool = False) -> PreparedModel:
    """Fetch, check and convert a model; a second call finds it ready.

    Parameters
    ----------
    name : str
        A name of ``data/models.toml``, or ``hub:org/name`` for a repository of the Hugging Face
        Hub.
    track : str, optional
        ``"transformers"`` or ``"onnx"``: what one track needs. Left out, both.
    export : bool, optional
        For a repository of the Hub: make the ONNX files here, from its safetensors.

    Raises CourseError: unknown name, no network, a file with the wrong hash, too little memory, a
    full disk or a read-only cache; a repository of the Hub that a track cannot use.
    """
    entry = find_entry(name)
    tracks = TRACKS if track is None else (track,)
    home = model_cache() / entry.folder
    facts, sources = {}, {}
    with _disk_errors(entry, home):
        home.mkdir(parents=True, exist_ok=True)
        # A shared, read-only cache is fine as long as nothing is missing from it.
        with (
            locked(
                home,
                lambda: print(
                    f"Another process prepares {entry.title}; waiting for it.", flush=True
                ),
            )
            if is_writable(home)
            else contextlib.nullcontext()
        ):
            for track in tracks:
                source = source_of(
                    entry, track, export or (track == "onnx" and was_exported(entry, home / track))
                )
                facts[track] = ensure_folder(source, home / track)
                sources[track] = source.origin(facts[track])
    entry = _completed(entry, facts)
    if "onnx" in tracks:
        entry = replace(
            entry, context_length=min(entry.context_length, longest_exact(home / "onnx"))
        )
    check_memory(entry.title, entry.memory)  # the next step is to load it
    return PreparedModel(
        entry, *(home / track if track in tracks else None for track in TRACKS), sources
    )


def longest_exact(folder: Path) -> float:
    """Return after how many tokens an ONNX folder is no longer its model; infinity where it always is.

    Its builder gives a model whose layers all have a window, such as Phi-3-mini-4k, a cache of that
    size and no window in the graph: beyond it the tokens are others than the model's, 16 further on
    the engine fails. Where the builder lists the layers, graph and cache agree.
    https://github.com/microsoft/onnxruntime-genai/issues/2334
    """
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    window = config.get("model", {}).get("decoder", {}).get("sliding_window") or {}
    size = window.get("window_size") or 0
    return size if size > 0 and not window.get("layers") else math.inf


def _disk_errors(entry, home):
    refused = CourseError(
        "cache-not-writable",
        f"The model cache {home} cannot be written.",
        "Set COURSE_CACHE to a folder that is yours, or make this one writable.",
    )
    return disk_errors(home, lambda: disk_full(entry.title, entry.disk, home), refused)


def _completed(entry, facts):
    """Return a model's entry with what its repository of the Hub says, where it comes from there."""
    sizes = [found["bytes"] for found in facts.values() if "bytes" in found]
    if not sizes:
        return entry
    if HUB_NAME.fullmatch(entry.name):
        found, size = next(iter(facts.values())), round(sum(sizes) / 1e6)
        entry = replace(
            entry,
            **{key: found[key] for key in ("licence", "task", "context_length", "parameters")},
            download=size,
            disk=size,
        )
    return replace(entry, memory=round(memory_needed(max(sizes))))


def cached_models() -> list[str]:
    """Return the names of all models that have files in the cache, as ``prepare_model`` takes them."""
    names, catalogue = {}, read_catalogue()
    for receipt in sorted(model_cache().glob("*/*.receipt.json")):
        recipe = read_receipt(receipt.with_name(receipt.name.removesuffix(".receipt.json")))[
            "recipe"
        ]
        name = receipt.parent.name if receipt.parent.name in catalogue else hub_name(recipe or {})
        if name in catalogue or HUB_NAME.fullmatch(name or ""):
            names[name] = None
    return list(names)


def cache_state(name: str) -> str:
    """Compare the files of a model with what was written, down to the last byte.

    Returns ``"ready"``, ``"not prepared"``, ``"damaged"``, or ``"being prepared"`` by another
    process. A file that differs is noted in its receipt, so that ``prepare_model`` gets it anew.
    """
    entry = find_entry(name)
    home = model_cache() / entry.folder
    if not home.is_dir():
        return "not prepared"
    try:
        with locked(home, _refuse_to_wait) if is_writable(home) else contextlib.nullcontext():
            parts = {
                path.name.removesuffix(".receipt.json") for path in home.glob("*.receipt.json")
            }
            if not all(is_whole(home / part) for part in sorted(parts)):
                return "damaged"
    except BlockingIOError:
        return "being prepared"
    ready = parts & set(TRACKS) if is_from_hub(entry) else parts >= set(TRACKS)
    return "ready" if ready else "not prepared"


def _refuse_to_wait():
    raise BlockingIOError
